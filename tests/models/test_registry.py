import pytest
import torch

from biper_engine.metadata import Provenance
from biper_engine.models import available, build
from biper_engine.models.registry import state_dict_shapes
from biper_engine.nn import BinaryConv2d, binary_layers

NAMES = ("cifar10/resnet20_1w1a", "cifar10/resnet18_1w1a", "cifar10/vgg_small_1w1a")


@pytest.mark.parametrize(("name", "binary"), list(zip(NAMES, (18, 16, 5), strict=True)))
def test_networks_have_their_binary_convolutions_and_logits(name, binary):
    network = build(name, num_classes=7).eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, *network.input_shape))
    assert logits.shape == (1, 7)
    assert len(list(binary_layers(network))) == binary


def test_resnet18_and_vgg_have_the_official_names():
    resnet, vgg = (state_dict_shapes(name, 10) for name in NAMES[1:])
    assert resnet["layer4.0.conv1.weight"] == (512, 256, 3, 3)
    assert resnet["layer2.1.conv2.alpha"] == (128, 1, 1)
    assert resnet["bn2.running_var"] == (512,)
    assert resnet["linear.weight"] == (10, 512)
    assert not any("shortcut" in key for key in resnet)
    assert vgg["conv0.weight"] == (128, 3, 3, 3)
    assert vgg["conv5.beta"] == (512, 1, 1)
    assert vgg["bn3.bias"] == (256,)
    assert vgg["fc.weight"] == (10, 8192)
    assert len(resnet) == 1 + 16 * 4 + (1 + 16 + 1) * 5 + 2
    assert len(vgg) == 1 + 5 * 4 + 6 * 5 + 2


def test_build_says_what_it_built():
    network = build("cifar10/resnet20_1w1a", frequency=15.0, stage=1)
    assert network.input_shape == (3, 32, 32)
    assert network.provenance == Provenance(
        architecture="cifar10/resnet20_1w1a", frequency=15.0, stage=1
    )
    assert network.metadata is not None
    assert network.metadata.class_names[3] == "cat"
    layer = network.layer1[0].conv1
    assert isinstance(layer, BinaryConv2d)
    assert (layer.frequency, layer.stage) == (15.0, 1)


def test_a_task_of_ones_own_has_no_metadata():
    assert build("cifar10/resnet20_1w1a", num_classes=10).metadata is None


def test_option_a_shortcut_centres_the_input_channels():
    block = build("cifar10/resnet20_1w1a").layer2[0]
    x = torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 2, 2)
    y = block.shortcut(x).flatten()
    assert y.tolist() == [0.0] * 8 + list(range(16)) + [0.0] * 8


def test_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match="Unknown network") as caught:
        build("cifar10/resnet20_1w1")
    assert "Did you mean 'cifar10/resnet20_1w1a'?" in str(caught.value)
    assert all(name in str(caught.value) for name in available())
    assert available() == NAMES


def test_num_classes_below_one_is_refused():
    with pytest.raises(ValueError, match=r"`num_classes` \(=0\)"):
        build("cifar10/resnet20_1w1a", num_classes=0)

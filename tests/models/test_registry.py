import pytest
import torch

from biper_engine.metadata import Provenance
from biper_engine.models import available, build, load_checkpoint, save_checkpoint
from biper_engine.models.registry import state_dict_shapes
from biper_engine.nn import BinaryConv2d, binary_layers
from tests.fresh import fresh_run
from tests.golden.networks import BIPER

# Binary layers of each network.
BINARY = {
    "cifar10/resnet20_1w1a": 18,
    "cifar10/resnet20_1w32a": 18,
    "cifar10/resnet18_1w1a": 16,
    "cifar10/resnet18A_1w1a": 16,
    "cifar10/resnet18B_1w1a": 16,
    "cifar10/resnet18C_1w1a": 16,
    "cifar10/vgg_small_1w1a": 5,
    "imagenet/resnet18_1w1a": 16,
    "imagenet/resnet34_1w1a": 32,
    "imagenet/mobilenet_1w1a": 39,
}


@pytest.mark.some(2)
@pytest.mark.parametrize("name", BINARY)
def test_networks_have_their_binary_convolutions_and_logits(name):
    network = build(name, num_classes=7).eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, *network.input_shape))
    assert logits.shape == (1, 7)
    assert len(list(binary_layers(network))) == BINARY[name]
    assert state_dict_shapes(name, 7).keys() == network.state_dict().keys()


def test_the_float_twin_differs_in_its_convolutions_alone():
    twin, binary = build("cifar10/resnet20"), build("cifar10/resnet20_1w1a")
    assert not list(binary_layers(twin))
    own = {"alpha", "beta", "tau"}
    wanted = {k: v.shape for k, v in binary.state_dict().items() if k.split(".")[-1] not in own}
    assert {key: value.shape for key, value in twin.state_dict().items()} == wanted


def test_the_float_twin_is_the_resnet_of_its_equations():
    torch.manual_seed(0)
    twin, x = build("cifar10/resnet20").eval().double(), torch.randn(2, 3, 32, 32).double()

    def block(x, block):
        y = torch.relu(block.bn1(block.conv1(x)) + block.shortcut(x))
        return torch.relu(block.bn2(block.conv2(y)) + y)

    y = torch.relu(twin.bn1(twin.conv1(x)))
    for layer in (twin.layer1, twin.layer2, twin.layer3):
        for one in layer:
            y = block(y, one)
    torch.testing.assert_close(twin(x), twin.linear(twin.bn2(y.mean((2, 3)))))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_float_twin_keeps_its_stage_in_a_checkpoint(tmp_path, stage):
    twin = build("cifar10/resnet20", stage=stage)
    save_checkpoint(tmp_path / "twin.pt", twin)
    loaded = load_checkpoint(tmp_path / "twin.pt")
    assert loaded.provenance == twin.provenance
    assert all(map(torch.equal, loaded.state_dict().values(), twin.state_dict().values()))


def test_networks_of_imagenet_know_its_images():
    metadata = build("imagenet/mobilenet_1w1a").metadata
    assert metadata.input_size == (3, 224, 224)
    assert (metadata.interpolation, metadata.crop_pct) == ("bilinear", 0.875)


def test_fresh_weights_have_a_sign(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", torch.nn.init.zeros_)
    layers = [layer for _, layer in binary_layers(build("cifar10/resnet20_1w1a"))]
    assert all(bool((layer.quantized_weight() == 1).all()) for layer in layers)


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


def test_a_custom_task_has_no_metadata():
    assert build("cifar10/resnet20_1w1a", num_classes=10).metadata is None


def test_option_a_shortcut_centres_the_input_channels():
    block = build("cifar10/resnet20_1w1a").layer2[0]
    x = torch.arange(16.0).view(1, 16, 1, 1).expand(1, 16, 2, 2)
    y = block.shortcut(x).flatten()
    assert y.tolist() == [0.0] * 8 + list(range(16)) + [0.0] * 8


def test_option_a_shortcut_adds_no_channels_where_none_are_missing():
    block = build("cifar10/resnet18A_1w1a").layer2[0]
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(1, 32, 2, 2)
    assert torch.equal(block.shortcut(x), torch.full((1, 32, 1, 1), 1.5))


def test_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match="Unknown network") as caught:
        build("cifar10/resnet20_1w1")
    assert "Did you mean 'cifar10/resnet20_1w1a'?" in str(caught.value)
    assert all(name in str(caught.value) for name in available())


def test_every_network_of_biper_is_here():
    assert tuple(BINARY) == BIPER


def test_num_classes_below_one_is_refused():
    with pytest.raises(ValueError, match=r"`num_classes` \(=0\)"):
        build("cifar10/resnet20_1w1a", num_classes=0)


def test_shapes_are_found_without_initial_values():
    code = (
        "import sys; from biper_engine.models.registry import state_dict_shapes\n"
        "assert len(state_dict_shapes('imagenet/resnet18_1w1a', 2)) > 100\n"
        "assert 'torch._dynamo' not in sys.modules, 'it imports the compiler, which takes seconds'"
    )
    done = fresh_run(code)
    assert (done.returncode, done.stderr) == (0, "")

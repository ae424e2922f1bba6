from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from biper_engine import models
from biper_engine.conversion.twin import float_twin, folded_network
from biper_engine.nn import BinaryConv2d
from tests.images import images

aten = torch.ops.aten


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardtanh()),
        *(BinaryConv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Hardtanh()),
        *(BinaryConv2d(32, 8, 3, groups=2), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.Hardtanh()),
        *(nn.Flatten(), nn.Linear(288, 5)),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def calls(graph_module: fx.GraphModule, *targets: object) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target in targets]


def test_the_folded_network_computes_what_the_model_does_at_any_batch() -> None:
    model = network()
    folded = folded_network(model, images(2, 3, 16, 16))
    assert not calls(folded, aten.sin.default, aten.mul.Tensor)
    assert len(calls(folded, aten.sign.default, aten.ge.Scalar, aten.where.self)) > 0
    for count in (1, 5):
        torch.testing.assert_close(
            folded(images(count, 3, 16, 16))[0], model(images(count, 3, 16, 16))
        )


def test_the_twin_has_the_same_layers_without_signs() -> None:
    model = network()
    twin = float_twin(model, images(2, 3, 16, 16))
    folded = folded_network(model, images(2, 3, 16, 16))
    signs = [node for node in folded.graph.nodes if "sign" in str(node.target)]
    assert signs
    assert not [node for node in twin.graph.nodes if "sign" in str(node.target)]
    for target in (aten.conv2d.default, aten.hardtanh.default, aten.linear.default):
        assert len(calls(twin, target)) == len(calls(folded, target)) > 0
    assert [node.args[3:] for node in calls(twin, aten.conv2d.default)] == [
        node.args[3:] for node in calls(folded, aten.conv2d.default)
    ]
    assert twin(images(3, 3, 16, 16))[0].shape == (3, 5)


def test_weights_of_layers_that_were_binary_have_a_norm_of_one_half() -> None:
    model = network()
    twin = float_twin(model, images(2, 3, 16, 16))
    stem, *binary = (
        twin.get_buffer(str(node.args[1].target))  # type: ignore[union-attr]
        for node in calls(twin, aten.conv2d.default)
    )
    for weight in binary:
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((len(weight),), 0.5))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    torch.testing.assert_close(stem, (model[0].weight * scale.view(-1, 1, 1, 1)).detach())  # type: ignore[operator]


@pytest.mark.deep
def test_differences_of_rounding_stay_small_through_many_layers() -> None:
    torch.manual_seed(0)
    model = models.build("cifar10/resnet20_1w1a").eval()
    batch = torch.randn(2, 3, 32, 32)
    twin = float_twin(model, batch)
    single = twin(batch)[0]
    double = twin.double()(batch.double())[0]
    assert float((single - double).norm() / double.norm()) < 1e-5


@pytest.mark.parametrize("make", [folded_network, float_twin])
def test_the_model_is_not_changed(make: object) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make(model, images(2, 3, 16, 16))  # type: ignore[operator]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

"""Layers of binary weights and real inputs: their weights are bits, also in files."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import biper_engine
from biper_engine.engine import Engine
from biper_engine.errors import UnconvertedWarning
from biper_engine.graph.reading import biper_op
from tests.images import noise

pytestmark = pytest.mark.filterwarnings(
    "ignore::biper_engine.errors.UnconvertedWarning"  # a real input of a binary layer, said aloud
)


def scaled_signs(weight: Tensor) -> Tensor:
    scale = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))
    return torch.where(weight >= 0, 1.0, -1.0) * scale


def two_values(weight: Tensor) -> Tensor:
    return torch.where(weight >= 0, 0.75, -0.25)


def ternary(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < weight.abs().mean() / 2, 0.0, torch.sign(weight)) * 0.5


WEIGHTS = {"signs": scaled_signs, "two values": two_values, "ternary": ternary}


class Linear(nn.Linear):
    binarized = staticmethod(scaled_signs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.binarized(self.weight), self.bias)


class Conv2d(nn.Conv2d):
    binarized = staticmethod(scaled_signs)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.binarized(self.weight), self.bias)


def binarized(layer: nn.Module, rule: Callable[[Tensor], Tensor]) -> nn.Module:
    layer.binarized = rule
    return layer


def converted(model: nn.Module, x: Tensor, **options: object) -> Engine:
    engine = biper_engine.convert(model, x, **options)  # type: ignore[arg-type]
    for batch in (1, 3):
        inputs = noise(batch, *x.shape[1:], seed=batch)
        torch.testing.assert_close(engine(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    return engine


def nodes_of(engine: Engine, op: str) -> list[fx.Node]:
    return [node for node in engine.graph_module.graph.nodes if biper_op(node) == op]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.some(4)
@pytest.mark.parametrize("shape", [(2, 70), (2, 5, 70), (2, 2, 3, 70)])
@pytest.mark.parametrize("rule", WEIGHTS)
def test_a_linear_layer_multiplies_by_the_bits_of_its_weight(
    rule: str, shape: tuple[int, ...]
) -> None:
    model = seeded(lambda: binarized(Linear(70, 33), WEIGHTS[rule]))
    engine = converted(model, noise(*shape))
    assert len(nodes_of(engine, "weight_linear")) == (2 if rule == "ternary" else 1)
    assert not any(buffer.shape == (33, 70) for buffer in engine.graph_module.buffers())


@pytest.mark.parametrize("rule", WEIGHTS)
def test_a_convolution_unpacks_its_weight(rule: str) -> None:
    model = seeded(lambda: binarized(Conv2d(40, 7, 3, stride=2, padding=1), WEIGHTS[rule]))
    engine = converted(model, noise(2, 40, 9, 8))
    unpacked = nodes_of(engine, "unpack_weight")
    assert len(unpacked) == (2 if rule == "ternary" else 1)
    assert not any(buffer.dim() == 4 and buffer.is_floating_point() for buffer in engine.buffers())


def test_groups_unpack_their_own_channels() -> None:
    engine = converted(seeded(lambda: Conv2d(66, 6, 3, groups=2)), noise(2, 66, 5, 5))
    assert [node.kwargs["channels"] for node in nodes_of(engine, "unpack_weight")] == [33]


def test_weights_that_bits_do_not_make_smaller_stay_floats() -> None:
    model = seeded(lambda: nn.Sequential(Conv2d(6, 6, 3, groups=6), Linear(5, 9)))
    engine = converted(model, noise(2, 6, 3, 7))
    assert nodes_of(engine, "unpack_weight") == []
    assert len(nodes_of(engine, "weight_linear")) == 1


def test_batch_norm_is_folded_before_the_weights_are_packed() -> None:
    def make() -> nn.Module:
        norm = nn.BatchNorm2d(40)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        return nn.Sequential(Conv2d(33, 40, 3, bias=False), norm, nn.ReLU())

    engine = converted(seeded(make), noise(2, 33, 6, 6))
    assert len(nodes_of(engine, "unpack_weight")) == 1
    targets = {str(node.target) for node in engine.graph_module.graph.nodes}
    assert "aten.batch_norm.default" not in targets


def test_batch_norm_in_front_leaves_a_linear_layers_weights_binary() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(70, eps=0.5), Linear(70, 33)))
    assert len(nodes_of(converted(model, noise(2, 70)), "weight_linear")) == 1


def test_the_report_says_that_only_weights_are_bits() -> None:
    model = seeded(lambda: nn.Sequential(Linear(64, 32), nn.ReLU(), Linear(32, 10)))
    engine = converted(model, noise(2, 64))
    first, second = engine.report.layers
    assert not first.packed
    assert first.weights_packed
    assert (first.weight_bits_before, first.weight_bits_after) == (32 * 64 * 32, 64 * 32)
    assert "its weights are held as bits" in first.note
    assert second.weights_packed


def test_kept_layers_keep_their_float_weights() -> None:
    model = seeded(lambda: nn.Sequential(Linear(64, 32), nn.ReLU(), Linear(32, 10)))
    engine = converted(model, noise(2, 64), keep_float=["0"])
    assert [row.weights_packed for row in engine.report.layers] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_engines_keep_float32_parameters(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(Conv2d(40, 64, 1), nn.Flatten(2), Linear(12, 9)))
    engine = biper_engine.convert(model, noise(2, 40, 3, 4), compute_dtype=dtype)
    assert len(nodes_of(engine, "weight_linear")) == 1
    assert len(nodes_of(engine, "unpack_weight")) == 1
    x = noise(3, 40, 3, 4)
    torch.testing.assert_close(engine(x), model(x), rtol=0.05, atol=0.05)


def test_a_file_holds_bits_in_place_of_weights(tmp_path: Path) -> None:
    model = seeded(
        lambda: nn.Sequential(Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), Linear(1024, 256))
    )
    x = noise(2, 64, 6, 6)
    engine = converted(model, x)
    engine.save(tmp_path / "weights.biper")
    floats = sum(4 * parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "weights.biper").stat().st_size < floats / 20
    loaded = biper_engine.load(tmp_path / "weights.biper")
    assert torch.equal(loaded(x), engine(x))


def test_verification_finds_a_wrong_weight() -> None:
    model = seeded(lambda: nn.Sequential(Linear(64, 32), nn.ReLU(), Linear(32, 10)))
    x = noise(2, 64)
    engine = converted(model, x)
    with torch.no_grad():
        model[0].weight[0, 0] *= -1
    assert not biper_engine.verify(engine, model, x).ok


def test_the_real_input_of_a_binary_layer_is_still_said_aloud() -> None:
    model = seeded(lambda: nn.Sequential(Linear(64, 32), nn.ReLU(), Linear(32, 10)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        biper_engine.convert(model, noise(2, 64))
    (said,) = [str(w.message) for w in caught if w.category is UnconvertedWarning]
    assert "its input is a ReLU" in said

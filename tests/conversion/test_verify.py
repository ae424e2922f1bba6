"""Verify: equal engines pass, and others fail."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from biper_engine.conversion import pipeline, simplify, verify
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError
from tests.conversion.comparison import Functional, convert_quietly, converted, images_of
from tests.conversion.foreign_models import QConv, QLinear, SmallNet, copysign, seeded

Converted = tuple[Engine, nn.Module, Tensor]


@pytest.fixture(scope="module")
def small() -> Converted:
    return converted(SmallNet, (3, 8, 8))


def test_an_engine_equals_its_model(small: Converted) -> None:
    report = verify(*small)
    assert report.ok
    assert (report.layers_equal, report.layers, report.images) == (3, 3, 4)
    assert report.top1_agreement == 1.0
    assert report.relative_error < 1e-5
    assert "equal: 3 of 3 binary layers on 4 images" in report.table()
    assert json.loads(report.to_json())["ok"] is True


def test_data_may_be_batches_with_labels(small: Converted) -> None:
    engine, model, images = small
    loader = [(images[:3], torch.zeros(3)), (images[3:], torch.zeros(1))]
    assert verify(engine, model, loader).images == 4
    assert verify(engine, model, (batch for batch in loader), limit=2).images == 2
    with pytest.raises(ValueError, match="contains no image"):
        verify(engine, model, [])
    with pytest.raises(ValueError, match="contains no image"):
        verify(engine, model, images, limit=0)


def tamper(name: str, value: Tensor) -> None:
    first = (0,) * value.dim()
    if value.dtype == torch.int32:
        value[first] ^= 1
    elif value.dtype == torch.bool:
        value[first] ^= True
    else:
        value[first] += 1e-3


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "name",
    [
        "conv1.weight",
        "conv2.multiplier",
        "conv2.bias",
        "conv2.threshold",
        "conv2.sense",
        "stem.weight",
        "stem.bias",
        "fc.weight",
        "fc.bias",
    ],
)
def test_a_changed_tensor_fails_and_is_named(small: Converted, name: str) -> None:
    engine, model, images = small
    changed = copy.deepcopy(engine)
    buffers = dict(changed.graph_module.named_buffers())
    tamper(name, buffers[name])
    report = verify(changed, model, images)
    assert not report.ok
    assert name in report.mismatch
    assert name in report.table()


def test_a_changed_model_fails(small: Converted) -> None:
    engine, model, images = small
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.norm2.running_mean[3] += 0.01
    assert not verify(engine, changed, images).ok


def test_an_engine_of_another_model_fails(small: Converted) -> None:
    engine, _, images = small
    assert not verify(engine, seeded(SmallNet, 1), images).ok

    def deeper() -> nn.Module:
        model = SmallNet()
        model.norm3 = nn.Sequential(model.norm3, nn.Hardtanh(), QConv(16, 16, 1))
        return model

    report = verify(engine, seeded(deeper), images)
    assert not report.ok
    assert report.mismatch


def _of_two_layers(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return seeded(lambda: Functional(forward, a=QConv(3, 4, 3), b=nn.Conv2d(4, 2, 1)))


@pytest.fixture(scope="module")
def clamped() -> tuple[Engine, Tensor]:
    """Return an engine that is equal to its model, and images."""
    model = _of_two_layers(lambda s, x: s.b(F.hardtanh(s.a(x) + 0.5, -2, 2)) * 1.5)
    images = images_of((3, 6, 6))
    return convert_quietly(model, images), images


@pytest.mark.parametrize(
    "other",
    [
        lambda s, x: s.b(F.hardtanh(s.a(x) + 0.5, -3, 3)),
        lambda s, x: s.b(F.relu(s.a(x) + 0.5)),
        lambda s, x: s.b(F.hardtanh(s.a(x) + 0.5, -2, 2)) * 2,
        lambda s, x: s.b(F.hardtanh(s.a(x) + 0.5, -2, 2).flip(2)),
        lambda s, x: s.b(F.hardtanh(s.a(x.flip(3)) + 0.5, -2, 2)),
    ],
)
def test_a_model_that_differs_in_no_tensor_fails(
    other: Callable[[Any, Tensor], Tensor], clamped: tuple[Engine, Tensor]
) -> None:
    """The same weights, another clamp, scale or order: only the operators tell them apart."""
    engine, images = clamped
    assert not verify(engine, _of_two_layers(other), images).ok


@pytest.mark.parametrize("padding", [0, 1])
def test_a_model_of_another_geometry_fails(padding: int) -> None:
    def build(stride: int, padding: int) -> nn.Module:
        layer = QConv(3, 4, 3, stride=stride, padding=padding)
        return seeded(lambda: Functional(lambda s, x: s.a(x), a=layer))

    torch.manual_seed(0)
    model = build(1, 0)
    other = build(2, padding)
    other.load_state_dict(model.state_dict())
    images = images_of((3, 6, 6))
    assert not verify(convert_quietly(model, images, check=False), other, images).ok


def test_images_of_another_size_fail(small: Converted) -> None:
    engine, model, _ = small
    report = verify(engine, model, images_of((3, 16, 16)))
    assert not report.ok


def test_exact_zeros_are_counted_and_no_error() -> None:
    images = images_of((4, 6, 6))
    images[:, :, 2] = 0
    models = (
        Functional(lambda s, x: s.c(x), c=QConv(4, 5, 3, padding=1)),
        Functional(lambda s, x: s.fc(s.c(x).flatten(1)), c=QConv(4, 6, 3), fc=QLinear(96, 5)),
        Functional(lambda s, x: s.d(F.max_pool2d(s.c(x), 2)), c=QConv(4, 6, 3), d=QConv(6, 3, 1)),
    )
    for model in models:
        report = verify(convert_quietly(model.eval(), images, check=False), model, images)
        assert report.ok, report.table()
        assert report.exact_zeros >= 4 * 4 * 6


def test_a_zero_image_through_a_fresh_network() -> None:
    model = SmallNet().eval()
    images = torch.zeros(2, 3, 8, 8)
    engine = convert_quietly(model, images, check=False)
    report = verify(engine, model, images)
    assert report.ok, report.table()
    assert report.exact_zeros > 0


def test_a_negative_zero_counts_as_zero_also_for_copysign() -> None:
    model = Functional(lambda s, x: s.c(-x), c=QConv(4, 5, 3, sign=copysign)).eval()
    images = torch.zeros(2, 4, 6, 6)
    report = verify(convert_quietly(model, images, check=False), model, images)
    assert report.ok, report.table()
    assert report.exact_zeros == images.numel()


def test_a_pass_that_changes_a_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_the_bias(graph_module: fx.GraphModule) -> None:
        simplify.simplify(graph_module)
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.conv2d.default and node.args[2] is not None:
                node.update_arg(2, None)

    monkeypatch.setattr(pipeline, "simplify", lose_the_bias)
    layers = {"stem": nn.Conv2d(3, 8, 3), "c": QConv(8, 4, 3)}
    model = seeded(lambda: Functional(lambda s, x: s.c(s.stem(x)).mean((2, 3)), **layers))
    with pytest.raises(ConversionError, match=r"simplified graph DIFFERS by .* at conv2d") as found:
        convert_quietly(model, images_of((3, 8, 8)))
    assert "defect of biper_engine" in str(found.value)


def test_flips_end_to_end_stand_beside_the_error_that_they_make() -> None:
    """Half precision moves a value over its threshold; each layer alone is within rounding."""
    engine, model, images = converted(
        SmallNet, (3, 16, 16), compute_dtype=torch.bfloat16, check=False
    )
    report = verify(engine, model, images)
    assert report.ok, report.table()
    assert 0 < report.input_bits_differ < report.input_bits
    assert f"{report.input_bits_differ:,} of {report.run_bits:,} bits differ" in report.summary()


@pytest.mark.parametrize("count", [1, 2, 16])
def test_no_bit_differs_only_where_no_output_does(count: int) -> None:
    """Sums of 0 but for rounding: their signs depend on their order, and that on the batch."""
    layers = {"stem": nn.Conv2d(3, 32, 3, bias=False), "c": QConv(32, 4, 3, sign=copysign)}
    model = seeded(lambda: Functional(lambda s, x: s.c(s.stem(x)).mean((2, 3)), **layers))
    with torch.no_grad():
        weight = model.get_parameter("stem.weight")
        nn.init.uniform_(weight, -1, 1, generator=torch.Generator().manual_seed(0))
        weight[:, 0, 0, 0] -= weight.sum((1, 2, 3))
    images = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    images = images.expand(-1, 3, 16, 16).contiguous()
    report = verify(convert_quietly(model, images, check=False), model, images)
    assert (report.input_bits_differ > 0) == (report.logit_error > 1e-3), report.table()


def test_bits_end_to_end_are_those_of_a_call_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Native programs sum in another order than PyTorch's operators, which once were counted."""
    engine, model, images = converted(SmallNet, (3, 8, 8))
    ran = []
    forward = Engine.forward
    monkeypatch.setattr(
        Engine, "forward", lambda self, *x: ran.append(self.execution) or forward(self, *x)
    )
    assert verify(engine, model, images).ok
    assert set(ran) == {engine.execution}


def test_signs_that_rounding_decides_are_reported_first() -> None:
    """Without a BatchNorm between two binary layers, sums of exactly 0 meet the next sign."""

    def run(s: nn.Module, x: Tensor) -> Tensor:
        for layer in (s.a, s.b):
            x = F.conv2d(x.sign(), 0.173 * layer.weight.sign())
        return x.mean((2, 3))

    layers = {"a": nn.Conv2d(32, 32, 3), "b": nn.Conv2d(32, 4, 3)}
    model, images = seeded(lambda: Functional(run, **layers)), images_of((32, 8, 8))
    report = verify(convert_quietly(model, images, check=False), model, images)
    assert report.ok, report.table()
    notes = [line for line in report.table().splitlines() if line.startswith("note: ")]
    assert "decided by float rounding" in notes[-1]


def test_exact_zeros_are_reported_first() -> None:
    images = images_of((4, 6, 6))
    images[:, :, 2] = 0
    model = Functional(lambda s, x: s.c(x), c=QConv(4, 5, 3, padding=1)).eval()
    text = str(verify(convert_quietly(model, images, check=False), model, images))
    assert text.startswith("note: the model's sign is exactly 0 for 16.67% of the inputs")

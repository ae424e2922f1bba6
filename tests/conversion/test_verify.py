"""Verify: it passes what is equal and fails what is not."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import verify
from biper_engine.engine import Engine
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
    assert verify(engine, model, loader, limit=2).images == 2
    assert verify(engine, model, (batch for batch in loader), limit=4).images == 4
    with pytest.raises(ValueError, match="holds no image"):
        verify(engine, model, [])
    with pytest.raises(ValueError, match="holds no image"):
        verify(engine, model, images, limit=0)


def tamper(name: str, value: Tensor) -> None:
    first = (0,) * value.dim()
    if value.dtype == torch.int32:
        value[first] ^= 1
    elif value.dtype == torch.bool:
        value[first] ^= True
    else:
        value[first] += 1e-3


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
def test_a_model_that_differs_in_no_tensor_fails(other: object) -> None:
    """The same weights, another clamp, scale or order: only the operators tell them apart."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.b(F.hardtanh(self.a(x) + 0.5, -2, 2)) * 1.5

    def build(forward: object) -> nn.Module:
        return seeded(lambda: Functional(forward, a=QConv(3, 4, 3), b=nn.Conv2d(4, 2, 1)))

    images = images_of((3, 6, 6))
    engine = convert_quietly(build(run), images)
    assert verify(engine, build(run), images).ok
    assert not verify(engine, build(other), images).ok


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
    assert not verify(convert_quietly(model, images), other, images).ok


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
        report = verify(convert_quietly(model.eval(), images), model, images)
        assert report.ok, report.table()
        assert report.exact_zeros >= 4 * 4 * 6


def test_a_zero_image_through_a_fresh_network() -> None:
    model = SmallNet().eval()
    images = torch.zeros(2, 3, 8, 8)
    engine = convert_quietly(model, images)
    report = verify(engine, model, images)
    assert report.ok, report.table()
    assert report.exact_zeros > 0


def test_a_negative_zero_counts_as_zero_also_for_copysign() -> None:
    model = Functional(lambda s, x: s.c(-x), c=QConv(4, 5, 3, sign=copysign)).eval()
    images = torch.zeros(2, 4, 6, 6)
    report = verify(convert_quietly(model, images), model, images)
    assert report.ok, report.table()
    assert report.exact_zeros == images.numel()

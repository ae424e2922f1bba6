"""Lower: the graph of operators, its tensors and dtypes, and an engine made from it."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import verify
from biper_engine.engine import Engine
from tests.conversion.comparison import (
    Functional,
    assert_close,
    assert_exact,
    convert_quietly,
    converted,
    images_of,
    truth,
)
from tests.conversion.foreign_models import LearnableBias, QConv, ReActNet, SmallNet, seeded

Converted = tuple[Engine, nn.Module, Tensor]


@pytest.fixture(scope="module")
def small() -> Converted:
    return converted(SmallNet, (3, 8, 8))


def test_tensors_are_named_by_layer_and_typed(small: Converted) -> None:
    engine, _, _ = small
    tensors = engine.graph_module.state_dict()
    assert tensors["conv1.weight"].shape == (8, 3, 3, 1)
    assert tensors["conv1.weight"].dtype == torch.int32
    assert tensors["fc.weight"].dtype == torch.float32
    for name in ("conv1", "conv2", "conv3"):
        assert tensors[f"{name}.multiplier"].dtype == torch.float32
        assert {f"{name}.weight", f"{name}.bias"} <= tensors.keys()
    assert engine.report.bytes_after == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch(small: Converted, batch: int) -> None:
    engine, model, _ = small
    assert_close(engine, model, images_of((3, 8, 8), batch, seed=8))


def test_compile_and_export(small: Converted) -> None:
    """Float layers run in PyTorch there, and round differently from those of a program."""
    engine, _, images = small
    with torch.no_grad():
        expected = engine(images)
        compiled = torch.compile(engine, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(engine, (images,), dynamic_shapes=(({0: batch},),)).module()
        torch.testing.assert_close(exported(images), expected)
        torch.testing.assert_close(exported(images[:1]), expected[:1])


def test_copies_and_state_dicts(small: Converted) -> None:
    engine, _, images = small
    expected = engine(images)
    assert torch.equal(copy.deepcopy(engine)(images), expected)
    buffer = io.BytesIO()
    torch.save(engine.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(engine)
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(images), expected)


@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        (SmallNet, torch.bfloat16),
        pytest.param(ReActNet, torch.float16, marks=pytest.mark.deep),
    ],
)
def test_narrow_float_maps_are_close_and_leave_as_float32(
    build: type[nn.Module], dtype: torch.dtype
) -> None:
    engine, model, images = converted(build, (3, 8, 8), compute_dtype=dtype, check=False)
    got = engine(images)
    assert got.dtype == torch.float32
    expected = truth(model, images)
    # Bits flip where a map is rounded to 8 or 11 bits, so only the bulk of the logits is alike.
    correlation = torch.corrcoef(torch.stack([got.double().flatten(), expected.flatten()]))[0, 1]
    assert correlation > 0.9
    assert verify(engine, model, images).ok


def test_two_rules_on_one_map_and_no_other_use() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        y = self.first(x)
        left = F.conv2d(torch.where(y > self.low.bias, 1.0, -1.0), torch.sign(self.one.weight))
        right = F.conv2d(torch.where(y > self.high.bias, 1.0, -1.0), torch.sign(self.two.weight))
        return torch.cat([left, right], 1)

    engine, model, images = converted(
        lambda: Functional(
            run,
            first=QConv(5, 8, 3),
            low=LearnableBias(8),
            high=LearnableBias(8),
            one=nn.Conv2d(8, 4, 3),
            two=nn.Conv2d(8, 4, 3),
        ),
        (5, 8, 8),
    )
    assert engine.report.packed == 3
    assert_exact(engine, model, images)


def test_module_names_may_be_those_of_tensors() -> None:
    """A functional layer of `outer` holds `outer.weight`; so may a submodule of that name."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.bias, self.multiplier = QConv(4, 4, 1), QConv(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(torch.sign(x), torch.sign(self.latent))
            return self.multiplier(self.bias(y + 0.5) + 0.5)

    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.outer(x), outer=Outer()), (4, 6, 6)
    )
    assert engine.report.packed == 3
    assert_exact(engine, model, images)


def test_what_an_engine_cannot_save_still_runs() -> None:
    engine, model, images = converted(
        lambda: Functional(lambda s, x: s.c(torch.cumsum(x, 1)), c=QConv(4, 4, 3)), (4, 6, 6)
    )
    assert_exact(engine, model, images)


def test_integer_images() -> None:
    model = seeded(lambda: Functional(lambda s, x: s.c(x.float() / 255 - 0.41), c=QConv(3, 4, 3)))
    images = torch.randint(0, 256, (4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    engine = convert_quietly(model, images)
    assert_exact(engine, model, images)
    with pytest.raises(TypeError, match="must be uint8"):
        engine(images.float())


def test_casts_to_float32_follow_the_compute_dtype() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        gate = (self.c(x) >= 0).float()
        return self.d(torch.cat([gate * x[:, :, 1:-1, 1:-1], torch.zeros(x.size(0), 1, 4, 4)], 1))

    engine, _, images = converted(
        lambda: Functional(run, c=QConv(4, 4, 3), d=nn.Conv2d(5, 4, 1)),
        (4, 6, 6),
        compute_dtype=torch.float16,
    )
    assert engine(images).dtype == torch.float32

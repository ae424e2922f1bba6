"""Copies: a model without its wrappers, and everything that it holds, is converted or named."""

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn

from biper_engine.conversion.capture import capture
from biper_engine.conversion.copying import private_copy, unwrapped
from biper_engine.errors import ConversionError
from tests.conversion.comparison import Functional, assert_close, convert_quietly, images_of
from tests.conversion.foreign_models import PlainNet, seeded

T = TypeVar("T")


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) * 2


def exported(model: nn.Module) -> Any:
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 3, 8, 8)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "exported": exported,
}


@pytest.mark.some(1)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off(wrapper: str) -> None:
    model = seeded(PlainNet)
    engine = convert_quietly(WRAPPERS[wrapper](model), images_of((3, 8, 8), 2), check=False)
    assert_close(engine, model, images_of((3, 8, 8)))


def test_compiled_parts_run_uncompiled() -> None:
    model = Outer(torch.compile(seeded(PlainNet), backend="eager"))
    model.compile(backend="eager")
    double = torch.compile(lambda x: x * 2, backend="eager")
    model.register_forward_hook(lambda _module, _args, y: double(y))
    graph = capture(model, (images_of((3, 8, 8), 2),)).graph_module
    x = images_of((3, 8, 8))
    with torch.no_grad():
        expected = model.inner._orig_mod(x) * 4
        torch.testing.assert_close(graph(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(ConversionError, match=r"^This model is a TorchScript module"):
        unwrapped(scripted)
    with pytest.raises(ConversionError, match=r"^`inner` is a TorchScript module"):
        unwrapped(Outer(scripted))


def test_a_program_for_one_batch_size_is_refused() -> None:
    program = torch.export.export(nn.ReLU(), (torch.randn(1, 3),))
    with pytest.raises(ConversionError, match=r"exported for a batch of 1 only .*`dynamic_shapes`"):
        unwrapped(program)
    with pytest.raises(ConversionError, match=r"^The model was exported for shapes other than"):
        capture(program.module(), (torch.randn(1, 3),))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": torch.ones(1)}, "a state dict has weights but no network"),
        ("model.pt", "load_checkpoint"),
        (Path("model.pt"), "load_checkpoint"),
        (torch.sign, "put the function into the `forward`"),
        (3, "`model` is a int; pass an `nn.Module`"),
    ],
)
def test_other_objects_are_refused_with_the_next_step(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        unwrapped(given)


def test_a_lazy_module_is_named() -> None:
    with pytest.raises(ConversionError, match=r"^`inner.weight` has no shape yet; call the model"):
        unwrapped(Outer(nn.LazyLinear(3)))


class Level(nn.Parameter):
    """A parameter whose class has a constructor of its own."""

    def __new__(cls, value: float) -> "Level":
        return super().__new__(cls, data=torch.tensor(value))  # type: ignore[no-any-return]

    def __init__(self, value: float) -> None:
        self.note = value


def test_what_deepcopy_refuses_is_copied_or_shared(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    model.level = Level(0.5)
    model.cached = model.weight.sign()
    model.nested = {"list": [model.weight * 2]}
    model.lock, model.module, model.generator = threading.Lock(), io, torch.Generator()
    with (tmp_path / "log").open("w") as log:
        model.log = [io.StringIO(), log]
        private = private_copy(model)
    assert private.log[1] is log
    assert isinstance(private.level, Level)
    assert private.level.note == 0.5
    assert private.lock is model.lock
    assert torch.equal(private.cached, model.cached)
    assert torch.equal(private.nested["list"][0], model.weight * 2)
    assert not any(value.requires_grad for value in private.parameters())
    for mine, theirs in zip(private.parameters(), model.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model.lock = threading.Lock()
    private = private_copy(model)
    assert private[1].weight is private[0].weight


class Container(Generic[T]):
    """An object that hands on every attribute to the module it holds, also its class."""

    def __init__(self, held: nn.Module) -> None:
        self.__dict__["held"] = held
        self.__dict__["recipe"] = {"of": self}

    def __getattr__(self, name: str) -> Any:
        if name == "held":
            return self.__dict__["held"]
        return getattr(self.held, name)

    def __call__(self, x: Tensor) -> Any:
        return self.held(x)

    @property
    def __class__(self) -> type:
        return self.held.__class__


def test_an_object_that_hands_on_its_attributes_is_copied() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(Container(layer), Container(nn.Linear(3, 3)))
    model[1].held.weight = layer.weight
    private = private_copy(model)
    x = torch.randn(2, 3)
    assert torch.equal(private(x), model(x))
    assert private[0].held.weight is private[1].held.weight
    assert private[0].held.weight is not layer.weight
    assert private[0].__dict__["recipe"]["of"] is private[0]


def test_what_cannot_be_copied_is_named() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    model = Outer(nn.Linear(3, 4))
    model.inner.numbers = {"all": numbers()}
    words = r"^The model cannot be copied, because of `inner.numbers` \(a generator\); delete it"
    with pytest.raises(ConversionError, match=words):
        private_copy(model)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = seeded(PlainNet)
        engine = convert_quietly(model, images_of((3, 8, 8), 2))
    assert not any(buffer.is_inference() for buffer in engine.buffers())
    with torch.inference_mode():
        expected = model(images_of((3, 8, 8)))
    torch.testing.assert_close(engine(images_of((3, 8, 8))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_modes_around_a_conversion_do_not_matter(mode: Callable[[], Any], tmp_path: Path) -> None:
    model = seeded(PlainNet)
    with mode():
        engine = convert_quietly(model, images_of((3, 8, 8), 2))
        assert torch.is_autocast_enabled("cpu") or not isinstance(mode(), torch.autocast)
    engine.save(tmp_path / "small.biper")
    assert_close(engine, model, images_of((3, 8, 8)))


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_the_models_own_only(dtype: torch.dtype) -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        assert torch.zeros(1).dtype == dtype
        return self.inner(x)

    model, images = Functional(run, inner=seeded(PlainNet)), images_of((3, 8, 8))
    torch.set_default_dtype(dtype)
    try:
        engine = convert_quietly(model, images[:2])
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(engine, model.inner, images)


def test_the_default_device_does_not_matter() -> None:
    model, images = seeded(PlainNet), images_of((3, 8, 8))
    with torch.device("meta"):
        engine = convert_quietly(model, images[:2])
    assert_close(engine, model, images)

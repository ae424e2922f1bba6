"""Calls of a native program: inputs that it takes directly, copies to another layout or refuses."""

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from biper_engine.engine import Engine
from biper_engine.graph.signature import Signature
from biper_engine.ops.cpu_program import CpuProgram
from tests.networks_by_hand import classifier

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.fixture
def engine() -> Engine:
    return classifier()


class Named(Tensor):
    """A subclass that adds nothing."""


def total() -> CpuProgram:
    """Return a program that adds two maps."""
    program = CpuProgram()
    a, b = program.add_map(5, 4, 4), program.add_map(5, 4, 4)
    program.finish([a, b], program.add("sum", a=a, b=b))
    return program


def misaligned(x: Tensor) -> Tensor:
    """Return a copy of `x` that starts in the middle of a vector."""
    memory = torch.empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


def test_every_form_of_an_input_gives_the_same(engine: Engine, images: Tensor) -> None:
    wanted = engine(images)
    wide = torch.zeros(3, 3, 8, 16)
    wide[..., ::2] = images
    forms = {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "holes": wide[..., ::2],
        "misaligned": misaligned(images),
        "a subclass": images.as_subclass(Named),
        "a parameter": nn.Parameter(images, requires_grad=False),
        "requires grad": images.clone().requires_grad_(),
    }
    with torch.no_grad():
        for form, x in forms.items():
            result = engine(x)
            assert type(result) is Tensor, form
            assert not result.requires_grad, form
            assert torch.equal(result, wanted), form


def test_plain_inputs_need_no_more_than_the_programs_own_checks(
    engine: Engine, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    engine(images)  # makes the plan
    check = Signature.check

    def counted(self: Signature, *arguments: object) -> None:
        checks.append(1)
        check(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Signature, "check", counted)
    for x in (images, images[:1], images.contiguous(memory_format=torch.channels_last)):
        engine(x)
    assert checks == []
    engine(images.transpose(2, 3).contiguous().transpose(2, 3))
    engine(images.as_subclass(Named))
    assert len(checks) == 2


def test_results_are_new_and_hold_their_own_memory_only(engine: Engine, images: Tensor) -> None:
    results = [engine(images) for _ in range(3)]
    assert len({result.data_ptr() for result in results}) == 3
    for result in results:
        assert result.untyped_storage().nbytes() == 3 * 10 * 4
        assert torch.equal(result, results[0])
    results[0].zero_()
    assert not torch.equal(results[1], results[0])


def test_results_belong_to_the_mode_of_their_own_call(engine: Engine, images: Tensor) -> None:
    with torch.inference_mode():
        assert engine(images).is_inference()
    result = engine(images)
    assert not result.is_inference()
    (result.requires_grad_() * 2).sum().backward()  # as an inference tensor could not be used


def test_defaults_of_torch_change_nothing(engine: Engine, images: Tensor) -> None:
    wanted = engine(images)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = engine(images[:2])
    finally:
        torch.set_default_dtype(before)
    assert result.dtype == torch.float32
    assert torch.equal(result, wanted[:2])


def test_batches_of_several_sizes_in_turn(engine: Engine, images: Tensor) -> None:
    wanted = engine(images)
    for size in (1, 3, 1, 2, 0, 3):
        result = engine(images[:size])
        assert torch.equal(result, wanted[:size])


def test_what_makes_outputs_is_kept_without_memory(engine: Engine) -> None:
    engine(torch.zeros(7, 3, 8, 8))
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is Tensor and x.shape == (7, 10)]
    assert found
    assert {x.untyped_storage().nbytes() for x in found} == {0}


class OtherOutputs(TorchFunctionMode):
    """Makes torch.empty return what nobody asked for."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self._changes = changes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changes = self._changes if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **changes})


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float16}, {"device": "meta"}], ids=["float16", "meta"]
)
def test_an_output_that_is_another_tensor_is_refused_and_not_kept(
    engine: Engine, images: Tensor, changes: dict[str, Any]
) -> None:
    wanted = engine(images)
    engine(images[:1])
    with OtherOutputs(**changes), pytest.raises(ValueError, match="another tensor for an output"):
        engine(images)
    assert torch.equal(engine(images), wanted)


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).partition(".")[0] for node in graph.nodes if node.op != "placeholder"}


def test_a_call_that_is_recorded_shows_its_operators_also_after_others(
    engine: Engine, images: Tensor
) -> None:
    wanted = engine(images)
    recorded = make_fx(engine)(images)
    assert "biper" in operators(recorded.graph)
    assert_close(recorded(images), wanted)

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        engine(images)
    assert any(name.startswith("biper.") for name in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # sizes are checked for good
        traced = torch.jit.trace(engine, images)
    assert_close(traced(images[:2]), wanted[:2])  # by torch's float operators


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 5, 4),
        torch.zeros(2, 4, 4, 5),
        torch.zeros(5, 4, 4),
        torch.zeros(2, 5, 4, 4, dtype=torch.float64),
        torch.zeros(2, 5, 4, 4, dtype=torch.int32),
        torch.zeros(2, 5, 4, 4, device="meta"),
        torch.zeros(3, 5, 4, 4),
        torch.zeros(2, 5, 4, 4).to_sparse(),
    ],
    ids=["rank 3", "channels last", "no batch", "float64", "int32", "meta", "batch", "sparse"],
)
def test_a_program_refuses_tensors_that_do_not_fit_its_maps(x: Tensor) -> None:
    program, fits = total(), torch.zeros(2, 5, 4, 4)
    for inputs in ((x, fits), (fits, x)):
        assert program.call_as_is(inputs) is None
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            program(*inputs)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            program.timed(*inputs)


def test_a_refusal_says_what_the_program_takes() -> None:
    with pytest.raises(ValueError, match=r"takes \[N, 5, 4, 4\] torch.float32, .* got \[2, 5, 4\]"):
        total()(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match="takes"):
        total()(torch.zeros(2, 5, 4, 4))


def test_maps_are_taken_as_they_are_in_the_layout_that_the_program_reads() -> None:
    program = total()
    a, b = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    assert program.call_as_is((a, b)) is None
    assert torch.equal(program(a, b)[0], a + b)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (a, b)]
    result = program.call_as_is((last[0], last[1]))
    assert result is not None
    assert torch.equal(result[0], a + b)
    assert result[0].is_contiguous(memory_format=torch.channels_last)

"""Calls of a native program: what it takes as it is, what it lays out first, what it refuses."""

import pytest
import torch
from torch import Tensor, nn

from biper_engine.engine import Engine, Signature
from biper_engine.ops.backends import backends
from biper_engine.ops.cpu_program import Clamp, CpuProgram
from tests.networks_by_hand import classifier


@pytest.fixture(autouse=True)
def _cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)
    if not {info.name: info.available for info in backends()}["cpu"]:
        pytest.skip("no cpu backend here")


@pytest.fixture
def engine() -> Engine:
    return classifier()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Named(Tensor):
    """A subclass that adds nothing."""


def total() -> CpuProgram:
    """Return a program that adds two maps."""
    program = CpuProgram()
    a, b = program.add_map(5, 4, 4), program.add_map(5, 4, 4)
    program.finish([a, b], [program.sum(a, b, Clamp())])
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
def test_a_program_refuses_what_is_no_map_of_its_own(x: Tensor) -> None:
    program, fits = total(), torch.zeros(2, 5, 4, 4)
    for inputs in ((x, fits), (fits, x)):
        assert program.call_as_is(inputs) is None
        with pytest.raises((ValueError, RuntimeError)):
            program(*inputs)
        with pytest.raises((ValueError, RuntimeError)):
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

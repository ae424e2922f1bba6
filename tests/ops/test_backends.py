import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import biper_engine.ops.reference  # noqa: F401  (registers the operators)
from biper_engine import ops
from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import (
    _REGISTERED,
    PREFERENCE,
    backends,
    by_name,
    forced_name,
    select,
    use_backend,
)
from biper_engine.ops.reference import ReferenceBackend
from tests.shared import ABSENT

CPU = torch.device("cpu")
CONV = Conv2dGeometry(in_channels=33, out_channels=4, kernel_size=(1, 1))


class Counting(ReferenceBackend):
    """The reference under another name; notes what it runs and refuses what it is told to."""

    def __init__(self, name: str, refuses: tuple[str, ...] = ()) -> None:
        self.name = name
        self.refuses = refuses
        self.calls: list[str] = []

    def unsupported_reason(
        self, op: str, geometry: Conv2dGeometry | None, device: torch.device
    ) -> str | None:
        return f"no {op} on Tuesdays" if op in self.refuses else None

    def prepack(self, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        self.calls.append("prepack")
        return ReferenceBackend().prepack(weight, geometry)

    def binarize(self, *args: Any) -> Tensor:
        self.calls.append("binarize")
        return ReferenceBackend().binarize(*args)

    def unbinarize(self, *args: Any) -> Tensor:
        self.calls.append("unbinarize")
        return ReferenceBackend().unbinarize(*args)

    def bmaxpool2d(self, *args: Any) -> Tensor:
        self.calls.append("bmaxpool2d")
        return ReferenceBackend().bmaxpool2d(*args)

    def bconv2d(self, *args: Any) -> Tensor:
        self.calls.append("bconv2d")
        return ReferenceBackend().bconv2d(*args)

    def bconv2d_fused(self, *args: Any) -> tuple[Tensor | None, Tensor | None]:
        self.calls.append(f"fused {args[-2]} {args[-1]}")
        return ReferenceBackend().bconv2d_fused(*args)


def install(monkeypatch: pytest.MonkeyPatch, name: str, refuses: tuple[str, ...] = ()) -> Counting:
    backend = Counting(name, refuses)
    monkeypatch.setitem(_REGISTERED, name, backend)
    return backend


def call_every_op(backend: str | None = None) -> None:
    bits = torch.zeros(1, 2, 2, 2, dtype=torch.int32)
    weight = torch.zeros(CONV.weight_shape, dtype=torch.int32)
    zeros = torch.zeros(4)
    epilogue = ops.Epilogue(multiplier=zeros, bias=zeros, threshold=zeros, sense=zeros.bool())
    ops.binarize(torch.zeros(1, 33, 2, 2), backend=backend)
    ops.unbinarize(bits, 33, backend=backend)
    ops.bmaxpool2d(bits, 33, Pool2dGeometry(kernel_size=(2, 2)), backend=backend)
    ops.bconv2d(bits, weight, CONV, backend=backend)
    ops.bconv2d_float(bits, weight, CONV, epilogue, dtype=torch.float16, backend=backend)
    ops.bconv2d_bits(bits, weight, CONV, epilogue, backend=backend)
    ops.bconv2d_float_bits(bits, weight, CONV, epilogue, backend=backend)


def call_with_slope(backend: str | None = None) -> None:
    bits = torch.zeros(1, 2, 2, 2, dtype=torch.int32)
    weight = torch.zeros(CONV.weight_shape, dtype=torch.int32)
    ones = torch.ones(4)
    epilogue = ops.Epilogue(multiplier=ones, bias=ones, slope=ones)
    ops.bconv2d_float(bits, weight, CONV, epilogue, backend=backend)


def test_a_backend_without_a_step_of_the_epilogue_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, any_step = install(monkeypatch, "cuda"), install(monkeypatch, "triton")
    plain.steps = frozenset({"shift"})
    call_with_slope()
    assert plain.calls == []
    assert any_step.calls == ["fused torch.float32 False"]
    with pytest.raises(BackendUnavailableError, match="its epilogue has no slope yet"):
        call_with_slope("cuda")


EVERY_CALL = [
    "binarize",
    "unbinarize",
    "bmaxpool2d",
    "bconv2d",
    "fused torch.float16 False",
    "fused None True",
    "fused torch.float32 True",
]


@pytest.mark.parametrize("absent", ABSENT)
def test_what_is_absent_here_is_told_once(absent: str) -> None:
    pytest.skip(f"{absent}: {ABSENT[absent]}")


def test_a_backend_for_other_devices_is_not_even_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForGpus(Counting):
        device_types = ("cuda",)

        def unavailable_reason(self) -> str | None:
            raise AssertionError("was asked")

    monkeypatch.setitem(_REGISTERED, "cuda", ForGpus("cuda"))
    monkeypatch.setitem(_REGISTERED, "triton", ForGpus("triton"))
    assert select("binarize", None, CPU).name in ("cpu", "reference")
    with pytest.raises(AssertionError, match="was asked"):
        select("binarize", None, torch.device("cuda"))


def test_the_forced_backend_runs_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = install(monkeypatch, "triton")
    with use_backend("triton"):
        call_every_op()
    assert forced.calls == EVERY_CALL
    monkeypatch.setenv("BIPER_BACKEND", "triton")
    call_every_op()
    assert forced.calls == EVERY_CALL * 2
    monkeypatch.delenv("BIPER_BACKEND")
    call_every_op(backend="triton")
    assert forced.calls == EVERY_CALL * 3


def test_the_reference_does_not_run_where_another_backend_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, forced = install(monkeypatch, "reference"), install(monkeypatch, "triton")
    call_every_op(backend="reference")
    assert reference.calls == EVERY_CALL
    assert forced.calls == []


def test_prepack_runs_on_the_backend_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    named = install(monkeypatch, "triton")
    weight = torch.zeros(CONV.weight_shape, dtype=torch.int32)
    with use_backend("reference"):
        ops.prepack(weight, CONV, "triton")
    assert named.calls == ["prepack"]


def test_the_first_backend_that_can_runs_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = ("binarize", "bconv2d")
    backends_ = [install(monkeypatch, name, refuses) for name in PREFERENCE[:-1]]
    last = install(monkeypatch, "reference")
    call_every_op()
    assert backends_[0].calls == [call for call in EVERY_CALL if call not in refuses]
    assert all(backend.calls == [] for backend in backends_[1:])
    assert last.calls == list(refuses)


def test_every_known_backend_is_listed_in_order_with_its_reason() -> None:
    rows = backends()
    assert tuple(row.name for row in rows) == PREFERENCE
    assert all(row.available == (row.reason is None) for row in rows)
    assert rows[-1].available
    for name in PREFERENCE:
        if name not in _REGISTERED:
            reason = {row.name: row.reason for row in rows}[name]
            assert reason == f"this version of biper_engine has no {name} kernels"


@pytest.mark.parametrize(
    ("name", "suggestion"), [("cudaa", "'cuda'"), ("Reference", "'reference'"), ("cpuu", "'cpu'")]
)
def test_an_unknown_backend_is_named_beside_the_closest(name: str, suggestion: str) -> None:
    with pytest.raises(BackendUnavailableError) as error, use_backend(name):
        pass
    assert str(error.value) == (
        f"Unknown backend '{name}'; the known ones are cuda, triton, cpu, reference. "
        f"Did you mean {suggestion}?"
    )


def test_an_unknown_backend_far_from_all_gets_no_suggestion() -> None:
    with pytest.raises(BackendUnavailableError, match=r"the known ones are .* reference\.$"):
        by_name("zzz")


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_REGISTERED, "cuda", raising=False)
    message = (
        "'cuda' cannot run here: this version of biper_engine has no cuda kernels. Available: "
    )
    with pytest.raises(BackendUnavailableError, match=message), use_backend("cuda"):
        pass

    class Broken(Counting):
        def unavailable_reason(self) -> str:
            return "the driver is from 1999"

    monkeypatch.setitem(_REGISTERED, "cuda", Broken("cuda"))
    with pytest.raises(BackendUnavailableError, match="here: the driver is from 1999"):
        by_name("cuda")
    assert backends()[0].reason == "the driver is from 1999"
    assert select("binarize", None, CPU).name != "cuda"


def test_a_forced_backend_that_cannot_run_a_call_raises_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forced = install(monkeypatch, "triton", refuses=("binarize",))
    message = "Backend 'triton' cannot run binarize: no binarize on Tuesdays"
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match=message):
        ops.binarize(torch.zeros(1, 1, 1, 1))
    assert forced.calls == []


def test_if_no_backend_can_run_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PREFERENCE[1:]:
        install(monkeypatch, name, refuses=("binarize",))
    monkeypatch.delitem(_REGISTERED, "cuda", raising=False)
    with pytest.raises(
        BackendUnavailableError, match="No backend can run binarize on cpu"
    ) as error:
        select("binarize", None, CPU)
    assert "cuda: this version of biper_engine has no cuda kernels" in str(error.value)
    assert "reference: no binarize on Tuesdays" in str(error.value)


def test_the_environment_names_an_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "gpu")
    with pytest.raises(BackendUnavailableError, match="Unknown backend 'gpu'"):
        ops.binarize(torch.zeros(1, 1, 1, 1))


def test_an_empty_environment_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "")
    assert forced_name() is None


def test_blocks_nest_and_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cpu")
    monkeypatch.setenv("BIPER_BACKEND", "cpu")
    assert forced_name() == "cpu"
    with use_backend("reference"):
        assert forced_name() == "reference"
        with use_backend("cpu"):
            assert forced_name() == "cpu"
        assert forced_name() == "reference"
    assert forced_name() == "cpu"


def test_a_block_that_raises_restores() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert forced_name() is None
    with pytest.raises(BackendUnavailableError), use_backend("nothing"):
        pass
    assert forced_name() is None


def test_a_block_holds_in_its_own_thread_only() -> None:
    seen: list[str | None] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_name()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_the_environment_holds_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "reference")
    seen: list[str | None] = []
    thread = threading.Thread(target=lambda: seen.append(forced_name()))
    thread.start()
    thread.join()
    assert seen == ["reference"]


def test_the_package_does_not_shadow_its_module() -> None:
    from biper_engine.ops import backends as module

    assert module.PREFERENCE is PREFERENCE

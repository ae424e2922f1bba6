"""Hypothesis without a deadline, a fixture of all backends, and an exact fused multiply-add."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import settings

from biper_engine.ops.backends import _REGISTERED, PREFERENCE, Backend, backends, use_backend
from tests.emulated_cuda import emulated_backend

settings.register_profile("local", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
# The same examples every time in CI.
settings.load_profile("fixed" if os.environ.get("CI") else "local")

DEVICES = {
    "cuda": ("cuda",),
    "triton": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "reference": ("cpu", "cuda"),
}
CPU_ISAS = ("avx512", "avx2", "neon", "portable")
# csrc/cuda on an emulator: products of bits, of bytes, and without tensor cores.
EMULATED_CAPABILITIES = ("90", "120", "75")


def _runs() -> Iterator[Any]:
    """Yield (backend, device, instruction set) in order of preference."""
    for name in PREFERENCE:
        for device in DEVICES[name]:
            for isa in CPU_ISAS if name == "cpu" else (None,):
                parts = (name, device if len(DEVICES[name]) > 1 else None, isa)
                yield pytest.param((name, device, isa), id="-".join(filter(None, parts)))
    for capability in EMULATED_CAPABILITIES:
        yield pytest.param(
            ("cuda", "cpu", capability), id=f"cuda-emulated-{capability}", marks=pytest.mark.deep
        )


@contextmanager
def _isa(name: str | None) -> Iterator[None]:
    """Run the cpu backend's kernels for one instruction set; skip where the processor lacks it."""
    if name is None:
        yield
        return
    from biper_engine import _cpu

    if name not in _cpu.usable_isas():
        pytest.skip(f"cpu: this build or processor has no {name}")
    before = _cpu.isa()
    _cpu.select_isa(name)
    try:
        yield
    finally:
        _cpu.select_isa(before)


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """Return the CUDA backend with csrc/cuda compiled for a CPU."""
    return emulated_backend(tmp_path_factory)


def triton_is_interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter, on CPU tensors."""
    from biper_engine.ops.triton import _interpreted

    return _interpreted()


@pytest.fixture(params=_runs())
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, torch.device]]:
    """Force every backend in turn; give its name and the device that it runs on.

    The cpu backend comes once for every instruction set, the emulated one for every kind of device.
    """
    name, device, isa = request.param
    if (name, device) == ("cuda", "cpu"):
        if "ops" not in request.path.parts:
            pytest.skip("cuda, emulated: networks are in tests/runtime/test_cuda_networks.py")
        monkeypatch.setitem(_REGISTERED, name, request.getfixturevalue("emulated_cuda"))
        monkeypatch.setenv("BIPER_EMULATED_CAPABILITY", isa)
        isa = None
    reason = {info.name: info.reason for info in backends()}[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} on {device}: no CUDA GPU")
    if name == "triton" and (device == "cpu") != triton_is_interpreted():
        needed = "TRITON_INTERPRET=1" if device == "cpu" else "kernels that are not interpreted"
        pytest.skip(f"{name} on {device}: this run needs {needed}")
    with _isa(isa), use_backend(name):
        yield name, torch.device(device)


@pytest.fixture
def backend(run: tuple[str, torch.device]) -> str:
    """Name of the forced backend."""
    return run[0]


@pytest.fixture
def device(run: tuple[str, torch.device]) -> torch.device:
    """Device that the forced backend runs on."""
    return run[1]


def _round_to_float32(exact: Fraction) -> float:
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(size / quantum) * quantum  # to nearest, ties to even
    value = math.inf if rounded >= 2**128 else float(rounded)
    return math.copysign(value, exact.numerator)


def _exact_fma(a: float, b: float, c: float) -> float:
    product = Fraction(a) * Fraction(b)
    exact = product + Fraction(c)
    if exact != 0:
        return _round_to_float32(exact)
    negative = math.copysign(1, a) * math.copysign(1, b) < 0
    return -0.0 if product == 0 and negative and math.copysign(1, c) < 0 else 0.0


@pytest.fixture(scope="session")
def exact_fma() -> Callable[[float, float, float], float]:
    """Return a * b + c of float32 values in rational arithmetic, rounded once to float32."""
    return _exact_fma

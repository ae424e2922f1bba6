"""Hypothesis without a deadline, since machines differ, and every backend in turn."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings

from biper_engine.ops.backends import PREFERENCE, backends, use_backend

settings.register_profile("local", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
# The same examples every time in CI.
settings.load_profile("fixed" if os.environ.get("CI") else "local")

DEVICES = {
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "cpu": ("cpu",),
    "reference": ("cpu", "cuda"),
}
CPU_ISAS = ("avx512", "avx2", "neon", "portable")


def _runs() -> Iterator[Any]:
    """Yield (backend, device, instruction set) in order of preference."""
    for name in PREFERENCE:
        for device in DEVICES[name]:
            for isa in CPU_ISAS if name == "cpu" else (None,):
                parts = (name, device if len(DEVICES[name]) > 1 else None, isa)
                yield pytest.param((name, device, isa), id="-".join(filter(None, parts)))


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


@pytest.fixture(params=_runs())
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.device]]:
    """Force every backend in turn; give its name and the device that it runs on.

    The cpu backend comes once for every instruction set.
    """
    name, device, isa = request.param
    reason = {info.name: info.reason for info in backends()}[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} on {device}: no CUDA GPU")
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

"""What all tests share: settings of hypothesis, every backend in turn, images, networks.

`conftest` loads it as a plugin.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from biper_engine.ops.backends import _REGISTERED, PREFERENCE, Backend, backends, use_backend
from tests.emulated_cuda import emulated_backend
from tests.golden import networks
from tests.images import images

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


def _usable_isas() -> list[str]:
    """Return the instruction sets that the cpu backend runs here, best first."""
    try:
        from biper_engine import _cpu
    except ImportError:
        return []
    return list(_cpu.usable_isas())


USABLE_ISAS = _usable_isas()


def triton_is_interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter, on CPU tensors."""
    from biper_engine.ops.triton import _interpreted

    return _interpreted()


def _absence(name: str, device: str, isa: str | None) -> str | None:
    """Return why a backend cannot run here on a kind of device with an instruction set."""
    reason = {info.name: info.reason for info in backends()}[name]
    if reason is not None:
        return reason
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU"
    if name == "triton" and (device == "cpu") != triton_is_interpreted():
        needed = "TRITON_INTERPRET=1" if device == "cpu" else "kernels that are not interpreted"
        return f"this run needs {needed}"
    if isa is not None and isa not in USABLE_ISAS:
        return f"this build or processor has no {isa}"
    return None


def _runs() -> Iterator[tuple[str, str, str | None]]:
    """Yield (backend, device, instruction set) in order of preference."""
    for name in PREFERENCE:
        for device in DEVICES[name]:
            for isa in CPU_ISAS if name == "cpu" else (None,):
                yield name, device, isa


def _label(name: str, device: str, isa: str | None) -> str:
    return "-".join(filter(None, (name, device if len(DEVICES[name]) > 1 else None, isa)))


# What cannot run here is no parameter; tests/ops/test_backends.py skips once for each.
ABSENT = {_label(*run): reason for run in _runs() if (reason := _absence(*run)) is not None}
RUNS = [pytest.param(run, id=_label(*run)) for run in _runs() if _label(*run) not in ABSENT]
EMULATED = [
    pytest.param(
        ("cuda", "cpu", capability), id=f"cuda-emulated-{capability}", marks=pytest.mark.deep
    )
    for capability in EMULATED_CAPABILITIES
]


def _emulated_capability(item: pytest.Item) -> str | None:
    """Return the kind of the emulated GPU that a test is for, or None."""
    run = item.callspec.params.get("run") if hasattr(item, "callspec") else None
    return run[2] if isinstance(run, tuple) and run[:2] == ("cuda", "cpu") else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep emulated GPUs to operators, and all but the first to what shows their products."""
    left_out = {i for i in items if _emulated_capability(i) and "ops" not in i.path.parts}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        others = _emulated_capability(item) in EMULATED_CAPABILITIES[1:]
        if others and not item.name.startswith("test_accumulators"):
            item.add_marker(pytest.mark.weekly)
    _mark_others_weekly(items)


def _mark_others_weekly(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked `some(count)`, leave `count` that are not weekly.

    They are those of the quick tests, or of the deep ones if all cases are deep.
    """
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("some") and not item.get_closest_marker("weekly"):
            families.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for every in families.values():
        family = [item for item in every if not item.get_closest_marker("deep")] or every
        (count,) = family[0].get_closest_marker("some").args  # type: ignore[union-attr]
        kept = {index * len(family) // count for index in range(count)}
        for index in set(range(len(family))) - kept:
            family[index].add_marker(pytest.mark.weekly)


@contextmanager
def _isa(name: str | None) -> Iterator[None]:
    """Run the cpu backend's kernels for one instruction set."""
    if name is None:
        yield
        return
    from biper_engine import _cpu

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


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch have one thread: on small maps a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="images")
def three_images() -> Tensor:
    return images()


@pytest.fixture(scope="session")
def golden_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `networks.converted_file`: a network's name, then its dtype if not float32."""
    return partial(networks.converted_file, tmp_path_factory)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished training run, for tests that only read it."""
    from tests.training.small_run import train_small

    return train_small(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(params=[*RUNS, *EMULATED])
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, torch.device]]:
    """Force every backend in turn; give its name and the device that it runs on.

    The cpu backend comes once for every instruction set, the emulated one for every kind of device.
    """
    name, device, isa = request.param
    if (name, device) == ("cuda", "cpu"):
        monkeypatch.setitem(_REGISTERED, name, request.getfixturevalue("emulated_cuda"))
        monkeypatch.setenv("BIPER_EMULATED_CAPABILITY", isa)
        isa = None
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

"""csrc/cuda compiled for sm_90, weekly for every architecture: the module and its machine code.

No GPU is needed. These tests check which instructions are present, not that they are correct.
"""

import functools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.native import builds, machine_code
from tests.native.machine_code import Kernel

pytestmark = pytest.mark.deep

ARCHS = (75, 80, 90, 100, 120)
QUICK = 90  # the deep tests compile for this one, the weekly ones for all
MOST_BYTES = 10_000_000  # of a wheel, in which the module is compressed once more

WIDE_LOADS = ("LDG.E.128", "LDG.E.ENL2.256", "LDGSTS.E.128", "LDGSTS.E.BYPASS.128")
WIDE_STORES = ("STG.E.128", "STG.E.ENL2.256")

# Kernels, as beginnings of what they are called, whose maps are read or written 16 bytes at a time.
# `bconv_mma` with its enumerators spelled out.
LOADS_WIDE = (
    "bconv_mma<",
    "binarize_dense<",
    "bit_pool_kernel<4>",
)
STORES_WIDE = (
    *(
        rf"bconv_mma<[^>]*{leaving}>"
        for leaving in ("kFloat32Stream", "kFloat16Stream", "kBfloat16Stream")
    ),
    r"unbinarize_kernel<\d+, [48]>",
    "bit_pool_kernel<4>",
)
# Those in which no float is multiplied.
WITHOUT_FLOATS = (r"bconv_mma<[^>]*kLimits>", "bit_pool_kernel<")


@pytest.fixture(scope="session")
def module(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the extension as setup.py does; for weekly tests, for all architectures it knows."""
    if not sys.platform.startswith("linux"):
        pytest.skip("modules are read as they are on Linux")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("BIPER_CUDA_ARCHS", "NVCCFLAGS"):
            patch.delenv(variable, raising=False)
        here = [item for item in request.session.items if item.path == Path(__file__)]
        if not any(item.get_closest_marker("weekly") for item in here):
            patch.setenv("BIPER_CUDA_ARCHS", str(QUICK))
            # `.ci/run` compiles there beforehand.
            return builds.cuda_module(builds.ROOT / "build" / f"sm_{QUICK}")
        return builds.cuda_module(tmp_path_factory.mktemp("cuda"))


@functools.cache
def all_kernels(module: Path, arch: int) -> list[Kernel]:
    found = machine_code.kernels(module, arch)
    for kernel in found:
        kernel.name = re.sub(
            r"\(biper::Leaving\)(\d+)", lambda m: leavings()[int(m[1])], kernel.name
        )
    return found


@functools.cache
def leavings() -> list[str]:
    """Return the enumerators of what leaves `bconv_mma`, which kernels' names have as numbers."""
    text = (builds.CUDA / "bconv_tile.cuh").read_text(encoding="utf-8")
    declared = re.search(r"enum (?:class )?Leaving\b[^{]*\{([^}]*)\}", text)
    assert declared is not None
    return re.findall(r"\w+", declared[1])


def in_bytes(kernel: Kernel) -> bool | None:
    """Tell whether `bconv_mma` multiplies bytes, not bits; None for another kernel."""
    arguments = re.search(r"\bbconv_mma<([^>]*)>", kernel.name)
    return None if arguments is None else "true" in arguments[1]


def serves(kernel: Kernel) -> bool:
    """Tell whether a kernel is ever started on its architecture."""
    of_bytes = in_bytes(kernel)
    if of_bytes is None:
        return True
    return kernel.arch >= 80 if of_bytes else 80 <= kernel.arch < 100


def parameters(archs: tuple[int, ...]) -> list[Any]:
    marks = {arch: () if arch == QUICK else (pytest.mark.weekly,) for arch in archs}
    return [pytest.param(arch, id=f"sm_{arch}", marks=marks[arch]) for arch in archs]


@pytest.fixture(params=parameters(ARCHS))
def kernels(module: Path, request: pytest.FixtureRequest) -> list[Kernel]:
    """Return the kernels that are started on an architecture."""
    arch = request.param
    if arch not in machine_code.architectures(module)[0]:
        pytest.skip(f"this nvcc has no sm_{arch}")
    found = [kernel for kernel in all_kernels(module, arch) if serves(kernel)]
    assert found
    return found


def on(*archs: int) -> pytest.MarkDecorator:
    """Run a test on some of the architectures."""
    return pytest.mark.parametrize("kernels", parameters(archs), indirect=True)


def named(kernels: list[Kernel], *patterns: str) -> list[Kernel]:
    return [k for k in kernels if any(re.search(rf"\b{p}", k.name) for p in patterns)]


# -- the module -----------------------------------------------------------------------------------


COUNT_DEVICES = """
import sys
from pathlib import Path
from tests.native.builds import import_from

module = import_from(Path(sys.argv[1]), "_cuda")
try:
    print(module.device_count())
except RuntimeError as error:
    print(error)
"""


def test_the_module_imports_without_a_driver_and_finds_no_device(module: Path) -> None:
    # Where there are devices, they are hidden.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(builds.ROOT)}
    done = builds.run(sys.executable, "-c", COUNT_DEVICES, module, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^0$|driver version is insufficient|no CUDA-capable device", done.stdout)


@pytest.mark.weekly
def test_a_wheel_stays_small(module: Path) -> None:
    assert module.stat().st_size < MOST_BYTES


@pytest.mark.weekly
def test_every_file_has_code_for_every_architecture(module: Path) -> None:
    setup = builds.setup_functions()
    flags = " ".join(setup["arch_flags"](setup["nvcc"]()))
    files = sum(path.suffix == ".cu" for path in builds.cuda_sources())
    for kind, found in zip(("sm", "compute"), machine_code.architectures(module), strict=True):
        wanted = map(int, re.findall(rf"code={kind}_(\d+)", flags))
        assert {arch: found.count(arch) for arch in found} == dict.fromkeys(wanted, files), kind


def test_the_module_needs_no_library_of_cuda_and_gives_none_away(module: Path) -> None:
    needed = re.findall(r"NEEDED\s+(\S+?)\.so", builds.succeed("objdump", "-p", module))
    languages = {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", "libdl", "librt"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= languages
    # The runtime of CUDA that torch brings must not take the place of the one that is linked in.
    symbols = builds.succeed("nm", "-D", "--defined-only", module).split()
    assert "PyInit__cuda" in symbols
    assert [name for name in symbols if re.match(r"_*cu(da)?[A-Z]|__cuda", name)] == []


# -- its machine code -----------------------------------------------------------------------------


@pytest.mark.weekly
def test_every_architecture_has_the_same_kernels(module: Path) -> None:
    archs = sorted(set(machine_code.architectures(module)[0]))
    with ThreadPoolExecutor(builds.JOBS) as workers:  # seconds each, and kept for the tests below
        found = list(workers.map(functools.partial(all_kernels, module), archs))
    first, *others = ([kernel.name for kernel in kernels] for kernels in found)
    assert first
    assert all(names == first for names in others)


def test_all_of_a_kernel_is_read(kernels: list[Kernel]) -> None:
    assert [str(kernel) for kernel in kernels if kernel.count("EXIT") == 0] == []


@on(80, 90)
def test_bits_meet_in_the_one_instruction_for_them_and_no_other(kernels: list[Kernel]) -> None:
    of_bits = [kernel for kernel in kernels if in_bytes(kernel) is False]
    assert of_bits
    for kernel in of_bits:
        assert kernel.matrix_products() == {"BMMA.168256.AND.POPC"}, kernel


@on(80, 90, 100, 120)
def test_bytes_meet_in_the_one_instruction_for_them_and_no_other(kernels: list[Kernel]) -> None:
    of_bytes = [kernel for kernel in kernels if in_bytes(kernel)]
    assert of_bytes
    for kernel in of_bytes:
        assert kernel.matrix_products() == {"IMMA.16832.U8.U8"}, kernel


PEAKS = {
    "peak_binary": "BMMA.168256.AND.POPC",
    "peak_int8": "IMMA.16832.U8.U8",
    "peak_half": "HMMA.16816.F32",
    "peak_popcount": "POPC",
}


@on(80, 90)
def test_the_loops_of_the_peaks_are_the_instruction_and_nothing_else(kernels: list[Kernel]) -> None:
    for name, instruction in PEAKS.items():
        (kernel,) = named(kernels, name)
        assert kernel.count(instruction) == 32, kernel  # of eight chains, unrolled four times
        assert kernel.count("LDG", "STG", "LDL", "STL", "LDS", "STS") == 0, kernel


# On sm_80 a call is also how threads that went apart come together again.
@on(90, 100, 120)
def test_no_product_is_emulated(kernels: list[Kernel]) -> None:
    called = {str(k) for k in kernels if in_bytes(k) is not None and k.count("CALL")}
    assert called == set()


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    spilling = {
        str(kernel): (kernel.stack_bytes, kernel.count("STL"), kernel.count("LDL"))
        for kernel in kernels
        if kernel.stack_bytes or kernel.count("STL", "LDL")
    }
    assert spilling == {}


# Before sm_80 nothing has a reason to be fast.
@on(80, 90, 100, 120)
def test_maps_move_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    wanted = [(pattern, WIDE_LOADS) for pattern in LOADS_WIDE]
    wanted += [(pattern, WIDE_STORES) for pattern in STORES_WIDE]
    assert {pattern for pattern, _ in wanted if not named(kernels, pattern)} == set()
    narrow = {
        f"{wide[0][:3]} in {kernel}"
        for pattern, wide in wanted
        for kernel in named(kernels, pattern)
        if kernel.count(*wide) == 0
    }
    assert narrow == set()


def test_nothing_is_fused_where_there_is_nothing_to_multiply(kernels: list[Kernel]) -> None:
    for kernel in named(kernels, *WITHOUT_FLOATS):
        assert kernel.count("FFMA", "DFMA") == 0, kernel


def test_a_parsed_kernel_counts_names_and_not_their_beginnings() -> None:
    kernel = Kernel("f", 90)
    kernel.instructions.update({"LDG.E.128.CONSTANT": 2, "LDG.E.128": 1, "LDG.E.12": 4, "LDGX": 8})
    assert (kernel.count("LDG.E.128"), kernel.count("LDG"), kernel.count("LDG.E.1")) == (3, 7, 0)
    kernel.instructions.update({"BMMA.168256.AND.POPC": 1, "HFMA2.MMA": 1, "FFMA": 1})
    assert kernel.matrix_products() == {"BMMA.168256.AND.POPC"}

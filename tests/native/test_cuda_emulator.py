"""The CUDA emulator in tests/native/cuda: it is correct, and it finds mistakes."""

import functools
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.native import builds
from tests.native.builds import ROOT, Toolchain
from tests.native.cuda.fragments import Places, Tables, cutlass_tables, pack, ptx_tables

pytestmark = pytest.mark.deep

Words = NDArray[np.uint32]

FOLDER = ROOT / "tests/native/cuda"
SOURCES = [FOLDER / name for name in ("emulated.cpp", "right_kernels.cu", "wrong_kernels.cu")]
FLAGS = (
    *(f"-I{ROOT / 'csrc/cuda'}", f"-I{FOLDER}"),
    *("-x", "c++", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
)
SEEDS = range(1, 6)


class Emulated:
    """The program of emulated.cpp."""

    def __init__(self, toolchain: Toolchain, folder: Path) -> None:
        objects = toolchain.compile(SOURCES, folder, *FLAGS)
        program = folder / "emulated"
        flags = ("-pthread", *toolchain.flags, *toolchain.link_flags)
        builds.succeed(*toolchain.compiler, *flags, *objects, "-o", program)
        self._command = (*toolchain.runner, str(program))

    def __call__(
        self, *arguments: object, words: Words | None = None, seed: int = 1
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*self._command, *map(str, arguments)],
            input=b"" if words is None else words.astype(np.uint32).tobytes(),
            capture_output=True,
            check=False,
            env={
                **os.environ,
                "BIPER_EMULATOR_SEED": str(seed),
                "UBSAN_OPTIONS": "print_stacktrace=1",
            },
        )

    def words(self, *arguments: object, words: Words | None = None, seed: int = 1) -> Words:
        """Return what a command that must succeed writes."""
        done = self(*arguments, words=words, seed=seed)
        assert (done.returncode, done.stderr) == (0, b"")
        return np.frombuffer(done.stdout, np.uint32)

    def wrong(self, kernel: str, seed: int = 1) -> str:
        """Return what came of a kernel with a mistake; a correct one must run after it."""
        done = self("wrong", kernel, seed=seed)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode().strip()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated")
    return Emulated(builds.native(folder, "-O1"), folder)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated_sanitized")
    flags = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return Emulated(builds.native(folder, *flags), folder)


@pytest.fixture(scope="session")
def with_ucontext(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    folder = tmp_path_factory.mktemp("emulated_ucontext")
    return Emulated(builds.native(folder, "-O1", "-DBIPER_EMULATOR_UCONTEXT"), folder)


@pytest.fixture(scope="session")
def on_aarch64(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(builds.aarch64_linux(), tmp_path_factory.mktemp("emulated_aarch64"))


BUILDS = ("emulated", "sanitized", "with_ucontext", "on_aarch64")


@pytest.fixture(params=BUILDS)
def every_build(request: pytest.FixtureRequest) -> Emulated:
    """Return the program in each way that it switches between threads."""
    program: Emulated = request.getfixturevalue(request.param)
    return program


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "kernel",
    [
        "missing_barrier",
        "missing_barrier_before_reuse",
        "missing_warp_barrier",
        "missing_wait",
        "missing_commit",
        "wait_for_too_few",
        "wait_without_barrier",
        "source_changes_before_the_wait",
    ],
)
def test_missing_synchronisation_shows_in_the_result(
    emulated: Emulated, kernel: str, seed: int
) -> None:
    said = emulated.wrong(kernel, seed)
    assert said.startswith("differ: ")
    assert said != "differ: 0"


@pytest.mark.parametrize("kernel", ["correct", "correct_in_static_shared"])
def test_code_without_mistakes_reports_none(every_build: Emulated, kernel: str) -> None:
    assert {every_build.wrong(kernel, seed) for seed in SEEDS} == {"differ: 0"}


ERRORS = {
    "misaligned_copy": ("thread (0, 0, 0): cp_async<8>", "not aligned to 8 bytes"),
    "copy_beyond_shared": ("thread (0, 0, 0): cp_async<16>", "512 bytes from the start of 512"),
    "copy_to_global": ("thread (0, 0, 0): cp_async<4>", "from the start of 512 of shared"),
    "divergent_barrier": ("thread (0, 0, 0): __syncthreads", "thread (100, 0, 0)"),
    "barrier_after_a_return": ("waits for thread (77, 0, 0), which has returned",),
    "barrier_beside_a_collective": ("__syncwarp", "waits for lane 5, which is at __syncthreads"),
    "different_collectives": ("__ballot_sync", "__syncwarp", " met "),
    "different_masks": ("__syncwarp", "waits for lane 16, which is at __syncthreads"),
    "lane_outside_its_mask": ("thread (31, 0, 0): __syncwarp", "by lane 31", "0x7fffffff"),
    "product_after_a_return": ("bmma_and_popc", "waits for lane 1, which has returned"),
    "trap": ("thread (3, 0, 0): __trap()",),
    "exception": ("thread (4, 0, 0): thrown in a kernel",),
}


@pytest.mark.parametrize("kernel", ERRORS)
def test_errors_name_the_thread_and_leave_the_next_launch_alone(
    every_build: Emulated, kernel: str
) -> None:
    said = every_build.wrong(kernel)
    assert said.startswith("error: block (0, 0, 0), thread (")
    for part in ERRORS[kernel]:
        assert part in said


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("write_beyond_shared", "block (0, 0, 0): writes outside its 512 bytes of dynamic shared"),
        ("write_before_shared", "block (0, 0, 0): writes outside its 512 bytes of dynamic shared"),
        ("write_below_the_stack", "thread (9, 0, 0): more than 65536 bytes of stack"),
    ],
)
def test_writes_beside_memory_are_errors_afterwards(
    emulated: Emulated, kernel: str, error: str
) -> None:
    assert error in emulated.wrong(kernel)


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("write_beyond_shared", "heap-buffer-overflow"),
        ("write_before_shared", "use-after-poison"),
        ("write_below_the_stack", "use-after-poison"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_sanitizers_report_the_line_of_a_wrong_write(
    sanitized: Emulated, kernel: str, report: str
) -> None:
    done = sanitized("wrong", kernel)
    said = done.stderr.decode()
    assert done.returncode != 0
    assert report in said
    assert "wrong_kernels.cu:" in said
    assert kernel in said


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "error"),
    [
        ((1, 1, 1), 1025, 0, "1025 threads in a block, at most 1024"),
        ((1, 1, 1), 0, 0, "no threads in a block"),
        ((1, 1, 1), 32, 227 * 1024 + 1, "232449 bytes of shared memory, at most 232448"),
        ((2**31, 1, 1), 32, 0, "2147483648 blocks along x, at most 2147483647"),
        ((1, 65536, 1), 32, 0, "65536 blocks along y, at most 65535"),
        ((1, 1, 65536), 32, 0, "65536 blocks along z, at most 65535"),
    ],
)
def test_launches_beyond_the_limits_are_refused(
    emulated: Emulated, grid: tuple[int, int, int], threads: int, shared_bytes: int, error: str
) -> None:
    done = emulated("launch", *grid, threads, shared_bytes)
    assert (done.returncode, done.stderr) == (1, f"invalid launch: {error}\n".encode())


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes"),
    [((0, 1, 1), 32, 0), ((1, 65535, 1), 1, 0), ((2, 1, 3), 1024, 227 * 1024)],
)
def test_launches_within_the_limits_run(
    emulated: Emulated, grid: tuple[int, int, int], threads: int, shared_bytes: int
) -> None:
    assert emulated.words("launch", *grid, threads, shared_bytes).size == 0


# -- order ----------------------------------------------------------------------------------------


def test_the_seed_decides_the_order_of_threads(emulated: Emulated) -> None:
    orders = [emulated.words("order", seed=seed).tolist() for seed in SEEDS]
    assert all(sorted(order) == list(range(512)) for order in orders)
    assert len(set(map(tuple, orders))) == len(SEEDS)
    assert emulated.words("order", seed=1).tolist() == orders[0]


# -- a correct kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tiled_product_of_bits_is_exact(every_build: Emulated, seed: int) -> None:
    m, n, words = 77, 45, 24  # tiles are 64 x 32 x 8 words: the last ones are not full
    random = np.random.default_rng(seed)
    operands = random.integers(0, 2**32, (m + n, words), np.uint32)
    got = every_build.words("product", m, n, words, words=operands, seed=seed)
    bits = np.unpackbits(operands.view(np.uint8), axis=1).astype(np.int64)
    assert np.array_equal(got.reshape(m, n), bits[:m] @ bits[m:].T)


# -- fragments ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    name: str
    k: int
    one: int  # the bits of 1 in an operand
    sums: type[np.generic]


INSTRUCTIONS = [
    Instruction("bmma_and_popc", 256, 1, np.int32),
    Instruction("imma_u8", 32, 1, np.int32),
    Instruction("hmma_f16", 16, 0x3C00, np.float32),
    Instruction("hmma_bf16", 16, 0x3F80, np.float32),
]
every_instruction = pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda it: it.name)
every_table = pytest.mark.parametrize("tables_of", [cutlass_tables, ptx_tables])


def multiply(
    emulated: Emulated,
    instruction: Instruction,
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    c: NDArray[np.generic],
) -> NDArray[np.generic]:
    """Multiply fragments [count, 32, elements]; c and the result are sums."""
    parts = [pack(a, instruction.k), pack(b, instruction.k), c.view(np.uint32)]
    words = np.concatenate([part.ravel() for part in parts])
    return emulated.words("fragments", instruction.name, words=words).view(instruction.sums)


def one_at_a_time(places: Places, one: int) -> NDArray[np.int64]:
    count = places.rows.size
    return (np.eye(count, dtype=np.int64) * one).reshape(count, *places.rows.shape)


def accumulators(instruction: Instruction, count: int) -> NDArray[np.generic]:
    random = np.random.default_rng(0)
    return random.integers(-1000, 1000, (count, 32, 4)).astype(instruction.sums)


@every_instruction
def test_both_sources_agree_on_fragments(instruction: Instruction) -> None:
    cutlass, ptx = cutlass_tables(instruction.k), ptx_tables(instruction.k)
    for matrix in ("a", "b", "c"):
        one, other = getattr(cutlass, matrix), getattr(ptx, matrix)
        assert np.array_equal(one.rows, other.rows)
        assert np.array_equal(one.columns, other.columns)
        assert len(set(zip(one.rows.flat, one.columns.flat, strict=True))) == one.rows.size


@every_table
@every_instruction
@pytest.mark.parametrize("inverted", [False, True])
def test_each_element_of_a_is_where_the_tables_say(
    emulated: Emulated,
    instruction: Instruction,
    tables_of: Callable[[int], Tables],
    inverted: bool,
) -> None:
    """Set one element; column n of B holds bit n of the row, so that D tells row and column."""
    tables = tables_of(instruction.k)
    code = np.arange(instruction.k) ^ (-1 if inverted else 0)
    a = one_at_a_time(tables.a, instruction.one)
    b = (code[tables.b.rows] >> tables.b.columns & 1) * instruction.one
    c = accumulators(instruction, len(a))
    got = multiply(emulated, instruction, a, np.broadcast_to(b, (len(a), *b.shape)), c)

    row = tables.a.rows.reshape(-1, 1, 1)
    column = tables.a.columns.reshape(-1, 1, 1)
    product = (tables.c.rows == row) & (code[column] >> tables.c.columns & 1 == 1)
    assert np.array_equal(got.reshape(c.shape), c + product.astype(instruction.sums))


@every_table
@every_instruction
@pytest.mark.parametrize("inverted", [False, True])
def test_each_element_of_b_is_where_the_tables_say(
    emulated: Emulated,
    instruction: Instruction,
    tables_of: Callable[[int], Tables],
    inverted: bool,
) -> None:
    """Set one element; row m of A holds bit m % 8 of the column."""
    tables = tables_of(instruction.k)
    code = np.arange(instruction.k) ^ (-1 if inverted else 0)
    a = (code[tables.a.columns] >> (tables.a.rows % 8) & 1) * instruction.one
    b = one_at_a_time(tables.b, instruction.one)
    c = accumulators(instruction, len(b))
    got = multiply(emulated, instruction, np.broadcast_to(a, (len(b), *a.shape)), b, c)

    row = tables.b.rows.reshape(-1, 1, 1)
    column = tables.b.columns.reshape(-1, 1, 1)
    product = (tables.c.columns == column) & (code[row] >> (tables.c.rows % 8) & 1 == 1)
    assert np.array_equal(got.reshape(c.shape), c + product.astype(instruction.sums))


def test_products_of_the_largest_bytes_are_exact(emulated: Emulated) -> None:
    instruction = INSTRUCTIONS[1]
    a = np.full((1, 32, 16), 255)
    b = np.full((1, 32, 8), 255)
    c = np.full((1, 32, 4), 2**24 + 1, np.int32)
    got = multiply(emulated, instruction, a, b, c)
    assert np.array_equal(got, np.full(128, 2**24 + 1 + 32 * 255 * 255))


# -- exchanges and intrinsics ---------------------------------------------------------------------


def test_lanes_exchange_as_cuda_says(every_build: Emulated) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 32, np.uint32)
    lane = np.arange(32)
    got = every_build.words("exchange", words=values).reshape(-1, 32)
    low_bytes = functools.reduce(int.__or__, (int(value) & 0xFF for value in values))
    expected = [
        values[(lane + 5) % 32],
        values[lane // 8 * 8 + 3],
        values[lane ^ 9],
        values[np.where(lane % 16 >= 3, lane - 3, lane)],
        values[np.where(lane % 16 <= 12, lane + 3, lane)],
        values[lane ^ 1],
        np.minimum(lane + 1, 31),
        np.full(32, sum((int(value) & 1) << i for i, value in enumerate(values))),
        np.full(32, 1),
        np.full(32, int(values.sum(dtype=np.uint64)) % 2**32),
        np.full(32, low_bytes),
        np.where(lane < 12, 11, 12),
    ]
    assert np.array_equal(got, np.stack(expected).astype(np.uint32))


def intrinsics(x: int, y: int, z: int) -> list[int]:
    both = y << 32 | x
    by = z % 32
    permuted = 0
    for i in range(4):
        selector = z >> (4 * i) & 15
        byte = both >> (8 * (selector & 7)) & 0xFF
        permuted |= (byte if selector < 8 else (byte >> 7) * 0xFF) << (8 * i)
    return [
        x.bit_count(),
        32 - x.bit_length(),
        (x & -x).bit_length(),
        int(f"{x:032b}"[::-1], 2),
        x * y >> 32,
        (both << by >> 32) & 0xFFFFFFFF,
        (both >> by) & 0xFFFFFFFF,
        permuted,
        both.bit_count(),
    ]


def test_intrinsics_do_what_cuda_says(every_build: Emulated) -> None:
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (1000, 3), np.uint32)
    words[:32, 2] = np.arange(32)
    words[32:64, 0] = 1 << np.arange(32)
    words[64, 0] = 0
    got = every_build.words("intrinsics", words=words).reshape(len(words), -1)
    assert got.tolist() == [intrinsics(*map(int, row)) for row in words]


# -- 16-bit floats --------------------------------------------------------------------------------

FORMATS = {"half": torch.float16, "bfloat": torch.bfloat16}


@pytest.mark.parametrize("name", FORMATS)
def test_every_16_bit_float_has_the_value_of_torch(emulated: Emulated, name: str) -> None:
    patterns = np.arange(65536, dtype=np.uint32)
    got = emulated.words("convert", f"{name}_to_float", words=patterns).view(np.float32)
    values = torch.from_numpy(patterns.astype(np.uint16).view(np.int16)).view(FORMATS[name])
    want = values.to(torch.float32).numpy()
    is_nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), is_nan)
    assert np.array_equal(got.view(np.uint32)[~is_nan], want.view(np.uint32)[~is_nan])


def floats_to_round(name: str) -> NDArray[np.float32]:
    """Return floats of all exponents, every 16-bit value, all between two, and their neighbours."""
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint32)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(FORMATS[name]).to(torch.float32).numpy().view(np.int32).astype(np.int64)
    half_way = {"half": 1 << 12, "bfloat": 1 << 15}[name]
    # Below the normal halves a unit is 2 ** -24, half of one 2 ** -25.
    small = (np.arange(-4096, 4096) * 2.0**-25).astype(np.float32).view(np.int32).astype(np.int64)
    near = [base + offset for base in (values + half_way, small) for offset in (-1, 0, 1)]
    return np.concatenate([random, values, *near]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_floats_round_to_16_bits_as_in_torch(every_build: Emulated, name: str) -> None:
    floats = floats_to_round(name)
    got = every_build.words("convert", f"float_to_{name}", words=floats.view(np.uint32))
    rounded = torch.from_numpy(floats).to(FORMATS[name])
    want = rounded.view(torch.int16).numpy().view(np.uint16)
    is_nan = np.isnan(floats)
    exponent = {"half": 0x7C00, "bfloat": 0x7F80}[name]
    assert np.array_equal((got & 0x7FFF) > exponent, is_nan)
    assert np.array_equal(got[~is_nan], want[~is_nan])

"""csrc/cpu without Python: under sanitizers, emulated, and compiled for macOS."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native import builds, cases
from tests.native.builds import Replay

pytestmark = pytest.mark.deep

ISAS = ("avx512", "avx2", "neon", "portable")

# Of the bytes of the network in programs.cpp. A change of it is a change of every result.
PROGRAM_HASH = "01c19e11ce80a078"


@dataclass(frozen=True)
class CaseFile:
    path: Path
    cases: int


@pytest.fixture(scope="module")
def case_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaseFile]:
    """Write the operator matrix and the reference's answers; too large to be left behind."""
    path = tmp_path_factory.mktemp("cases") / "cases.bin"
    yield CaseFile(path, cases.write(path))
    path.unlink()


def expect_equal_bytes(replay: Replay, isa: str, case_file: CaseFile) -> None:
    done = replay("cases", case_file.path, isa)
    assert done.stderr == ""
    count = case_file.cases
    assert done.stdout == f"{isa}: {count} cases, {2 * count} runs, 0 differ\n"
    assert done.returncode == 0


def expect_refusals(replay: Replay, isa: str) -> None:
    done = replay("refusals", isa)
    assert done.stderr == ""
    assert done.stdout.endswith(" calls, 0 not refused\n")
    assert done.returncode == 0


def expect_the_same_programs(replay: Replay, isa: str) -> None:
    """A network gives one hash everywhere: PROGRAM_HASH."""
    done = replay("programs", isa)
    assert done.stderr == ""
    assert done.stdout == f"{isa}: 84 runs, 0 differ, hash {PROGRAM_HASH}\n"
    assert done.returncode == 0


# -- addresses and undefined behaviour ------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return builds.sanitized_replay(tmp_path_factory)


@pytest.mark.parametrize("isa", ISAS)
def test_sanitized_kernels_give_the_bytes_of_the_reference(
    sanitized: Replay, case_file: CaseFile, isa: str
) -> None:
    sanitized.need(isa)
    expect_equal_bytes(sanitized, isa, case_file)


@pytest.mark.parametrize("isa", ISAS)
def test_calls_that_do_not_fit_are_refused_untouched(sanitized: Replay, isa: str) -> None:
    sanitized.need(isa)
    expect_refusals(sanitized, isa)


def test_threads_get_as_many_strips_and_rows_as_each_other(sanitized: Replay) -> None:
    done = sanitized("cuts")
    assert (done.stdout, done.stderr) == ("32400 cuts, 0 unfair\n", "")


@pytest.mark.parametrize("isa", ISAS)
def test_sanitized_programs_give_the_same_bytes(sanitized: Replay, isa: str) -> None:
    sanitized.need(isa)
    expect_the_same_programs(sanitized, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(sanitized: Replay, isa: str) -> None:
    sanitized.need(isa)
    done = sanitized("isa", isa=isa)
    assert (done.returncode, done.stdout.split()[0]) == (0, isa)


def test_the_best_instruction_set_is_the_default(sanitized: Replay) -> None:
    in_use, *usable = sanitized("isa").stdout.split()
    assert in_use == usable[0]
    assert usable == [isa for isa in ISAS if isa in usable]


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "portable "])
def test_an_unknown_instruction_set_in_the_environment_is_an_error(
    sanitized: Replay, isa: str
) -> None:
    done = sanitized("isa", isa=isa)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"BIPER_CPU_ISA (='{isa}') names no instruction set of this build" in done.stderr


def test_a_single_wrong_byte_is_reported(
    sanitized: Replay, case_file: CaseFile, tmp_path: Path
) -> None:
    contents = bytearray(case_file.path.read_bytes())
    contents[-1] ^= 1  # in the last expected output
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(contents)
    done = sanitized("cases", damaged, sanitized.isas()[0])
    damaged.unlink()
    assert done.returncode == 1
    assert "maxpool" in done.stdout
    assert done.stdout.endswith("2 differ\n")  # with one thread, and with three


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.weekly
def test_threads_that_share_a_map_do_not_race(
    case_file: CaseFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("raced")
    replay = builds.native(folder, "-O1", "-g1", "-fsanitize=thread").replay(folder)
    expect_equal_bytes(replay, replay.isas()[0], case_file)
    expect_the_same_programs(replay, replay.isas()[0])


# -- other machines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return builds.aarch64_linux().replay(tmp_path_factory.mktemp("aarch64"))


@pytest.mark.parametrize("isa", ["neon", pytest.param("portable", marks=pytest.mark.weekly)])
def test_emulated_aarch64_gives_the_bytes_of_the_reference(
    emulated: Replay, case_file: CaseFile, isa: str
) -> None:
    expect_equal_bytes(emulated, isa, case_file)


@pytest.mark.parametrize("isa", ["neon", pytest.param("portable", marks=pytest.mark.weekly)])
def test_emulated_aarch64_runs_programs_to_the_same_bytes(emulated: Replay, isa: str) -> None:
    expect_the_same_programs(emulated, isa)


@pytest.mark.parametrize("isa", ["neon", pytest.param("portable", marks=pytest.mark.weekly)])
def test_emulated_aarch64_refuses_calls_that_do_not_fit(emulated: Replay, isa: str) -> None:
    expect_refusals(emulated, isa)


def test_emulated_aarch64_prefers_neon(emulated: Replay) -> None:
    assert emulated("isa").stdout.split() == ["neon", "neon", "portable"]
    assert emulated("isa", isa="portable").stdout.split()[0] == "portable"


@pytest.mark.weekly
def test_the_kernels_compile_for_macos(tmp_path: Path) -> None:
    toolchain = builds.aarch64_macos(tmp_path / "cache")
    objects = toolchain.compile(builds.kernel_sources(), tmp_path)
    macho_arm64 = bytes.fromhex("cffaedfe0c000001")
    assert {path.read_bytes()[:8] for path in objects} == {macho_arm64}


@pytest.mark.weekly
def test_the_bindings_compile_for_macos(tmp_path: Path) -> None:
    toolchain = builds.aarch64_macos(tmp_path / "cache")
    includes = builds.setup_functions()["include_flags"]()
    probe = tmp_path / "probe.cpp"
    probe.write_text("#include <Python.h>\n", encoding="ascii")
    if not toolchain.compiles(probe, tmp_path, *includes):
        headers = sysconfig.get_paths()["include"]
        pytest.skip(f"the headers of Python in {headers} are missing or for this machine alone")
    toolchain.compile(builds.module_sources(), tmp_path, *includes)

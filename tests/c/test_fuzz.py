"""Files that were changed, loaded by the C library with sanitizers: refused or run, never a crash.

The files are those of `tests/fuzz`, and others of which above all the native program was changed.
"""

from __future__ import annotations

import collections
import json
import random
import subprocess
from pathlib import Path

import pytest

from biper_engine.engine import load
from biper_engine.errors import FileFormatError
from biper_engine.serialization import container
from tests.c.library import ROOT
from tests.fuzz.bases import call_networks, write_bases
from tests.fuzz.cases import Cases, sealed
from tests.fuzz.mutations import mutate_program
from tests.native import builds
from tests.runtime.test_program_section import unpacked_weights

_FIRST = 2_000_000
_FILES_AT_ONCE = 250
_SECONDS = 900


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program of fuzz_files.cpp with sanitizers."""
    toolchain, kernels = builds.sanitized_kernels(tmp_path_factory)
    folder = tmp_path_factory.mktemp("c_fuzz")
    sources = sorted((ROOT / "csrc/c").glob("*.cpp"))
    library = [path for path in sources if path.name not in ("biper_run.cpp", "npy.cpp")]
    sources = [*library, ROOT / "tests/c/fuzz_files.cpp"]
    objects = toolchain.compile(sources, folder, f"-I{ROOT / 'csrc/c'}")
    made = folder / "fuzz_files"
    builds.succeed(
        *toolchain.compiler, "-pthread", *toolchain.flags, *objects, *kernels, "-o", made
    )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files that are changed: the bases, and calls of operators that are one program."""
    folder = tmp_path_factory.mktemp("bases")
    write_bases(folder)
    unpacked_weights().save(folder / "unpacked.biper")
    for position, (_, engine) in enumerate(call_networks()):
        engine.save(folder / f"call{position}.biper", program=True)
    return folder


class ProgramCases:
    """Files whose native programs were changed, from seeds; most are of networks with bits."""

    def __init__(self, folder: Path) -> None:
        read = {path.stem: container.read(path) for path in sorted(folder.glob("*.biper"))}
        self._bases = {
            name: (json.dumps(header), tensors)
            for name, (header, tensors) in read.items()
            if "steps" in header["program"]
        }

    def __getitem__(self, seed: int) -> bytes | None:
        r = random.Random(seed)
        names = list(self._bases)
        weights = [1 if name.startswith("call") else 20 for name in names]
        name = r.choices(names, weights)[0]
        text, tensors = self._bases[name]
        header, tensors = json.loads(text), dict(tensors)
        mutate_program(r, header, tensors)
        return sealed(header, tensors)


def write_cases(seeds: range, folder: Path, to: Path) -> list[Path]:
    """Write a file for each seed, except for those that cannot be expressed; return the paths."""
    whole, programs, paths = Cases(folder), ProgramCases(folder), []
    for seed in seeds:
        data = whole[seed].data if seed % 4 == 0 else programs[seed]
        if data is not None:
            paths.append(to / f"{seed}.biper")
            paths[-1].write_bytes(data)
    return paths


def outcomes(program: Path, paths: list[Path]) -> collections.Counter[str]:
    """Run the program on files; return how often each outcome was.

    Raises:
        AssertionError: it ended early; the message has the last file, and what it said.
    """
    done = subprocess.run(
        [program],
        input="".join(f"{path}\n" for path in paths),
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        env={"ASAN_OPTIONS": "allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"{lines[-1:]} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    )
    return collections.Counter(line[2:] for line in lines if line.startswith("= "))


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(500, marks=pytest.mark.deep, id="500 files"),
        pytest.param(50_000, marks=pytest.mark.weekly, id="50,000 files"),
    ],
)
def test_no_file_crashes_the_library(
    files: int, program: Path, folder: Path, tmp_path: Path
) -> None:
    found: collections.Counter[str] = collections.Counter()
    for first in range(_FIRST, _FIRST + files, _FILES_AT_ONCE):
        paths = write_cases(range(first, first + _FILES_AT_ONCE), folder, tmp_path)
        found += outcomes(program, paths)
        for path in paths:
            path.unlink()
    print(dict(found))
    assert not {"INTERNAL", "NO MESSAGE"} & set(found)
    assert found["runs"] > files // 20
    assert found["refused"] > files // 4


@pytest.mark.deep
def test_python_loads_files_with_a_changed_program_or_refuses_them(
    folder: Path, tmp_path: Path
) -> None:
    cases, loaded = ProgramCases(folder), 0
    for seed in range(60):
        data = cases[seed]
        if data is None:
            continue
        (tmp_path / "case.biper").write_bytes(data)
        try:
            load(tmp_path / "case.biper")
            loaded += 1
        except FileFormatError:
            continue
    assert loaded > 0

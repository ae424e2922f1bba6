"""The output of cuobjdump for an extension, parsed into kernels and their instructions."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.native.builds import cuda_tool

_FUNCTION = re.compile(r"\s*Function : (\S+)")
# An address, perhaps a predicate, and the name of the instruction with its modifiers.
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
_STACK = re.compile(r"\bSTACK:(\d+)")


@dataclass
class Kernel:
    """A kernel as it is compiled for one architecture.

    Attributes:
        name: demangled, with its template arguments.
        arch: the architecture, such as 90.
        stack_bytes: of memory for each thread, for what has no register.
        instructions: how often each stands in it, by full name, such as "LDG.E.128".
    """

    name: str
    arch: int
    stack_bytes: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.name.removeprefix('void ').rpartition('(')[0]} on sm_{self.arch}"

    def count(self, *beginnings: str) -> int:
        """Count instructions whose name is one of these, or one of these and more modifiers."""
        return sum(
            count
            for name, count in self.instructions.items()
            if any(f"{name}.".startswith(f"{beginning}.") for beginning in beginnings)
        )

    def matrix_products(self) -> set[str]:
        """Return the instructions of tensor cores: BMMA, IMMA, HMMA and their relatives."""
        return {name for name in self.instructions if name.partition(".")[0].endswith("MMA")}


def _demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt (Debian's binutils)")
    command = ["c++filt", *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def dump(module: Path, *options: str) -> str:
    """Return what cuobjdump prints."""
    tool, disassembler = cuda_tool("cuobjdump"), cuda_tool("nvdisasm")
    # It finds nvdisasm on the PATH only, and prints nothing without it.
    path = os.pathsep.join((str(disassembler.parent), os.environ.get("PATH", "")))
    done = subprocess.run(
        [str(tool), *options, str(module)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def architectures(module: Path) -> tuple[list[int], list[int]]:
    """Return what there is machine code for, and PTX, sorted, as often as there is."""
    elf, ptx = dump(module, "--list-elf"), dump(module, "--list-ptx")
    kinds = ((elf, r"\.sm_(\d+)\.cubin"), (ptx, r"\.sm_(\d+)\.ptx"))
    code, portable = (sorted(map(int, re.findall(pattern, text))) for text, pattern in kinds)
    return code, portable


def kernels(module: Path, arch: int) -> list[Kernel]:
    """Return the kernels of an architecture, by name."""
    found: dict[str, Kernel] = {}
    for line in dump(module, "-sass", "-arch", f"sm_{arch}").splitlines():
        if head := _FUNCTION.match(line):
            kernel = found.setdefault(head[1], Kernel(head[1], arch))
        elif instruction := _INSTRUCTION.match(line):
            kernel.instructions[instruction[1]] += 1
    function = ""
    for line in dump(module, "-res-usage", "-arch", f"sm_{arch}").splitlines():
        if head := re.match(r"\s*Function (\S+):", line):
            function = head[1]
        elif stack := _STACK.search(line):
            found[function].stack_bytes = int(stack[1])
    for kernel, name in zip(found.values(), _demangled(list(found)), strict=True):
        kernel.name = name
    return sorted(found.values(), key=lambda kernel: kernel.name)

"""Resources of a process, sampled while it is idle, and whether they grew."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Holding:
    """What a process holds, memory in MB of 2**20.

    Attributes:
        resident_mb: its pages in memory, without those of files, which the system takes and returns
            as it likes.
        allocated_mb: what malloc gave and nobody freed; 0 where the C library does not say.
        threads: of the system.
        files: that are open.
    """

    resident_mb: float
    allocated_mb: float
    threads: int
    files: int


# Resident memory has the holes of an allocator that serves many threads, and allocated memory what
# threads come and go with. A leak that matters passes the latter within an hour.
ALLOWED = Holding(resident_mb=32.0, allocated_mb=4.0, threads=4, files=4)


def holding() -> Holding:
    """Return what this process holds, after it gave back what nobody uses."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
    resident, shared = map(int, (PROC / "statm").read_text(encoding="ascii").split()[1:3])
    threads, files = (len(list((PROC / name).iterdir())) for name in ("task", "fd"))
    pages = (resident - shared) * resource.getpagesize()
    return Holding(pages / 2**20, _allocated(libc) / 2**20, threads, files)


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocated(libc: ctypes.CDLL) -> int:
    """Return the bytes that malloc gave, from its heaps and as mappings of their own."""
    if not hasattr(libc, "mallinfo2"):  # of glibc since 2.33
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def growth(rounds: Sequence[float]) -> float:
    """Return by how much the median of the last third of `rounds` is above that of the first.

    Raises:
        ValueError: there are less than three.
    """
    if len(rounds) < 3:
        raise ValueError(f"Three rounds are wanted to see growth, there are {len(rounds)}.")
    third = len(rounds) // 3
    return statistics.median(rounds[-third:]) - statistics.median(rounds[:third])


def least(phases: Sequence[Holding]) -> Holding:
    """Return the least of each value over the phases of a round."""
    resident, allocated, threads, files = map(min, zip(*map(astuple, phases), strict=True))
    return Holding(resident, allocated, threads, files)


def growths(rounds: Sequence[Holding]) -> Holding:
    """Return the growth of each value; see `growth`."""
    resident, allocated, threads, files = map(growth, zip(*map(astuple, rounds), strict=True))
    return Holding(resident, allocated, round(threads), round(files))


def complaints(grown: Holding) -> list[str]:
    """Say what grew beyond ALLOWED."""
    names = ("resident memory (MB)", "allocated memory (MB)", "threads", "open files")
    rows = zip(names, astuple(grown), astuple(ALLOWED), strict=True)
    return [
        f"{name} grew by {value:.1f}, at most {allowed:g} is noise"
        for name, value, allowed in rows
        if value > allowed
    ]

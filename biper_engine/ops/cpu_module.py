"""The compiled module of `csrc/cpu`, loaded at the first question about it, never at import."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from biper_engine.ops.cgroup import cgroup_limit

__all__ = ["missing_reason", "native", "torch_parallel_region"]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """Return the compiled module, or None and why it cannot run here."""
    try:
        native = importlib.import_module("biper_engine._cpu")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "biper_engine._cpu"
        cause = "was not built" if missing else f"cannot be loaded ({error})"
        return None, (
            f"the extension biper_engine._cpu {cause}; install a C++17 compiler (g++ or clang++), "
            "then biper-engine again"
        )
    try:
        native.isa()
        native.use_torch(torch)
    except ValueError as error:
        return None, str(error)
    native.share_threads(torch_parallel_region())
    native.limit_processors(cgroup_limit())
    _keep_freed_memory()
    return native, None


def _keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB that were freed, instead of 256 kB to some megabytes.

    glibc gives free memory above twice its largest freed block back to the system, and a large map
    then costs a page fault for every 4 kB, on every call: about 2,000, and a fifth of the time, for
    64 images of 32x32 through a ResNet-20 on a Zen 4. One block of 31 MiB, which nobody touches,
    raises that limit as far as glibc lets it rise by itself (mallopt(3), M_MMAP_THRESHOLD). Without
    effect where MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ is set, and on other C libraries.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def torch_parallel_region() -> int:
    """Return the address of `GOMP_parallel` in the OpenMP runtime that torch runs on, or 0.

    Symbols are looked up in libtorch_cpu and what it depends on, so that it is torch's runtime also
    where other packages bring their own. GCC's and LLVM's runtimes have it on Linux.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    no_load = getattr(os, "RTLD_NOLOAD", 0)
    try:
        function = ctypes.CDLL(
            str(library), mode=no_load | getattr(os, "RTLD_NOW", 0)
        ).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def missing_reason() -> str | None:
    """Return why the module cannot run here, None where it can."""
    return _load()[1]


def native() -> Any:
    """Return the module, None where it cannot run here."""
    return _load()[0]

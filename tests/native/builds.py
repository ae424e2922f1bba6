"""Builds of csrc/cpu, of csrc/cuda and of the replay program: for GPUs, emulated, sanitized."""

import functools
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock  # torch has it

ROOT = Path(__file__).resolve().parent.parent.parent
JOBS = 2


@functools.cache
def setup_functions() -> dict[str, Any]:
    """Return what setup.py defines: the flags of every source, and the compiler that it takes."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_without_setup")


def need_native() -> None:
    """Skip where there is no compiler for csrc/cpu."""
    if reason := setup_functions()["obstacle"]():
        pytest.skip(reason)


def module_sources() -> list[Path]:
    """Return what of csrc/cpu is Python's module and needs its headers."""
    names = ("bindings", "caller", "tensors", "watch")
    return [ROOT / f"csrc/cpu/{name}.cpp" for name in names]


def kernel_sources() -> list[Path]:
    """Return the rest of csrc/cpu."""
    return sorted(set((ROOT / "csrc/cpu").glob("*.cpp")) - set(module_sources()))


def replay_sources() -> list[Path]:
    return sorted((ROOT / "tests/native").glob("*.cpp"))


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def succeed(*command: str | Path, **options: Any) -> str:
    done = run(*command, **options)
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{shlex.join(map(str, command))} failed:\n{said}"
    return said


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """A compiler and what it adds to the flags of setup.py.

    Attributes:
        compiler: its command.
        is_x86: whether it makes code for x86-64, whose files have flags of their own.
        flags: for compiling and linking, after those of setup.py.
        link_flags: for linking alone.
        runner: command that runs what it makes; empty where that is this machine.
        environment: variables that it needs.
    """

    compiler: tuple[str, ...]
    is_x86: bool
    flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def compile(self, sources: list[Path], folder: Path, *extra: str) -> list[Path]:
        """Compile sources, a few at once; return their objects."""
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{source.name}.o" for source in sources]
        commands = [
            self._command(source, made, extra)
            for source, made in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(JOBS) as workers:
            list(workers.map(lambda command: succeed(*command, env=self._variables()), commands))
        return objects

    def compiles(self, source: Path, folder: Path, *extra: str) -> bool:
        """Tell whether a source compiles."""
        command = self._command(source, folder / f"{source.name}.o", extra)
        return run(*command, env=self._variables()).returncode == 0

    def _command(self, source: Path, made: Path, extra: tuple[str, ...]) -> tuple[str | Path, ...]:
        setup = setup_functions()
        own = setup["X86_FLAGS"].get(source.name, []) if self.is_x86 else []
        flags = [*setup["FLAGS"], *setup["FIXED_FLAGS"], *own, *self.flags, *extra]
        include = f"-I{ROOT / 'csrc/cpu'}"
        language = ("-x", "c++") if source.suffix == ".cu" else ()
        return (*self.compiler, *flags, include, *language, "-c", source, "-o", made)

    def _variables(self) -> dict[str, str]:
        return {**os.environ, **dict(self.environment)}

    def replay(self, folder: Path, kernels: list[Path] | None = None) -> "Replay":
        """Build the replay program, around the objects of the kernels where they are made."""
        if kernels is None:
            kernels = self.compile(kernel_sources(), folder)
        objects = [*kernels, *self.compile(replay_sources(), folder)]
        program = folder / "replay"
        flags = ("-pthread", *self.flags, *self.link_flags)
        succeed(*self.compiler, *flags, *objects, "-o", program)
        return Replay((*self.runner, str(program)))


class Replay:
    """The program of replay.cpp."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command

    def __call__(self, *arguments: str | Path, isa: str = "") -> subprocess.CompletedProcess[str]:
        """Run it; `isa` is what BIPER_CPU_ISA says."""
        return run(*self._command, *arguments, env={**os.environ, "BIPER_CPU_ISA": isa})

    def isas(self) -> list[str]:
        """Return the instruction sets that run, best first."""
        done = self("isa")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1:]

    def need(self, isa: str) -> None:
        if isa not in self.isas():
            pytest.skip(f"this processor has no {isa}")


# -- toolchains, each skipping with its reason ----------------------------------------------------


def native(folder: Path, *flags: str) -> Toolchain:
    """Return the compiler of setup.py with flags that it may not support."""
    setup = setup_functions()
    compiler = tuple(setup["compiler"]())
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="ascii")
    made = run(*compiler, *flags, probe, "-o", folder / "probe")
    done = made if made.returncode else run(folder / "probe")
    if done.returncode:
        pytest.skip(f"{compiler[0]} {' '.join(flags)} does not work here: {done.stderr.strip()}")
    return Toolchain(compiler=compiler, is_x86=setup["targets_x86"](), flags=flags)


def aarch64_linux() -> Toolchain:
    """Return a cross compiler for aarch64 whose programs run in an emulator."""
    compiler = "aarch64-linux-gnu-g++"
    emulators = ("qemu-aarch64", "qemu-aarch64-static")
    emulator = next((name for name in emulators if shutil.which(name)), None)
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} (Debian's g++-aarch64-linux-gnu)")
    if emulator is None:
        pytest.skip(f"no {emulators[0]} (Debian's qemu-user)")
    return Toolchain(
        compiler=(compiler,),
        is_x86=False,
        flags=("-O1",),  # the emulator is slow, whatever it runs
        link_flags=("-static",),
        runner=(emulator,),
    )


def aarch64_macos(folder: Path) -> Toolchain:
    """Return a cross compiler for macOS on arm64, whose programs run nowhere here."""
    pytest.importorskip("ziglang", reason="no ziglang (pip install -c constraints.txt ziglang)")
    caches = ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    return Toolchain(
        compiler=(sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos"),
        is_x86=False,
        flags=("-Werror",),
        environment=tuple((name, str(folder)) for name in caches),
    )


# -- csrc/cuda ------------------------------------------------------------------------------------

CUDA = ROOT / "csrc/cuda"
EMULATOR = ROOT / "tests/native/cuda"
EMULATED_NAME = "_cuda_emulated"
# The address sanitizer finds what `null` and `object-size` would. Its checks are calls: such code
# is slower, but compiles in less than half of the time.
SANITIZE = (
    *("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-fno-sanitize=null,object-size", "--param", "asan-instrumentation-with-call-threshold=0"),
)


def cuda_sources() -> list[Path]:
    """Return the files of csrc/cuda that are compiled."""
    return [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp"))]


def import_from(path: Path, name: str) -> ModuleType:
    """Import an extension module from a file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared(temporary: pytest.TempPathFactory, name: str, build: Callable[[Path], Path]) -> Path:
    """Return what `build` makes in a folder, once for all processes of a test run."""
    root = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / name, root / f"{name}.path"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            folder.mkdir(exist_ok=True)
            made.write_text(str(build(folder)), encoding="utf-8")
    return Path(made.read_text(encoding="utf-8"))


def cuda_module(folder: Path) -> Path:
    """Build biper_engine._cuda for every architecture with what setup.py does, and return its path.

    Where `BIPER_CUDA_ARCHS` is set, for those. Objects in the folder that are current are kept.
    """
    setup = setup_functions()
    if reason := setup["cuda_obstacle"]():
        pytest.skip(reason)
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    setup["build"](cuda_sources(), folder / "objects", target, succeed_in_words)
    return target


def succeed_in_words(command: list[str]) -> str:
    return succeed(*command)


def emulated_library(folder: Path, sanitize: bool = False) -> Path:
    """Build csrc/cuda over the emulator, as a module of its own, and return its path.

    A program that loads the sanitized one needs `sanitizer_environment`.
    """
    need_native()
    toolchain = native(folder, *(SANITIZE if sanitize else ()))
    includes = ("-I", str(CUDA), "-I", str(EMULATOR), *setup_functions()["include_flags"]())
    flags = ("-O1" if sanitize else "-O2", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
    macros = (f"-DBIPER_MODULE_NAME={EMULATED_NAME}",)
    device = EMULATOR / "emulated_device.cpp"  # instead of those that ask CUDA
    sources = [path for path in cuda_sources() if path.name not in ("device.cu", "peak.cu")]
    objects = toolchain.compile([*sources, device], folder, *flags, *macros, *includes)
    target = folder / f"{EMULATED_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    succeed(*toolchain.compiler, "-shared", "-pthread", *toolchain.flags, *objects, "-o", target)
    return target


def sanitized_kernels(temporary: pytest.TempPathFactory) -> tuple[Toolchain, list[Path]]:
    """Compile `kernel_sources` with sanitizers, once for all processes of a test run.

    They are for the replay program and for the module of Python alike.
    """
    need_native()
    toolchain = native(temporary.mktemp("probe"), *SANITIZE, "-Og", "-fno-sanitize=vptr")
    sources = kernel_sources()
    build = lambda folder: toolchain.compile(sources, folder)[0].parent  # noqa: E731
    folder = shared(temporary, "sanitized_kernels", build)
    return toolchain, [folder / f"{source.name}.o" for source in sources]


def sanitized_replay(temporary: pytest.TempPathFactory) -> "Replay":
    """Build the replay program with sanitizers."""
    toolchain, kernels = sanitized_kernels(temporary)
    return toolchain.replay(temporary.mktemp("sanitized"), kernels)


def sanitized_cpu_module(temporary: pytest.TempPathFactory) -> Path:
    """Build biper_engine._cpu with sanitizers, and return its path.

    A program that loads it needs `sanitizer_environment`.
    """
    toolchain, kernels = sanitized_kernels(temporary)
    folder = temporary.mktemp("sanitized_cpu")
    objects = toolchain.compile(module_sources(), folder, *setup_functions()["include_flags"]())
    target = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ("-shared", "-pthread", *toolchain.flags)
    succeed(*toolchain.compiler, *flags, *objects, *kernels, "-o", target)
    return target


def sanitizer_environment() -> dict[str, str]:
    """Return the variables under which Python can load a module with the address sanitizer."""
    compiler = setup_functions()["compiler"]()
    library = succeed(*compiler, "-print-file-name=libasan.so").strip()
    if not Path(library).is_absolute():
        pytest.skip(f"{compiler[0]} has no libasan.so")
    # Without the second one, exceptions of modules that Python loads would end the process.
    runtime = succeed(*compiler, "-print-file-name=libstdc++.so").strip()
    options = "detect_leaks=0:detect_stack_use_after_return=0"  # Python's own, and fibers' stacks
    preloaded = f"{library} {Path(runtime).resolve()}"
    return {**os.environ, "LD_PRELOAD": preloaded, "ASAN_OPTIONS": options}


def cuda_tool(name: str) -> Path:
    """Return cuobjdump or nvdisasm: beside nvcc, on the PATH, or Triton's."""
    nvcc = setup_functions()["nvcc"]()
    found = shutil.which(name)
    places = [Path(nvcc).parent / name] if nvcc else []
    places += [Path(found)] if found else []
    places += [Path(entry, "triton/backends/nvidia/bin", name) for entry in sys.path]
    usable = [path for path in places if os.access(path, os.X_OK)]
    if not usable:
        pytest.skip(f"no {name}; Triton has it (pip install -c constraints.txt triton)")
    return usable[0]

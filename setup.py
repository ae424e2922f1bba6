"""Name the packages and build the native extension; the rest stands in pyproject.toml.

`biper_engine._cpu` is csrc/cpu: C++17, pybind11, no header of torch, so that one build serves every
version of torch. Each instruction set has a file of its own with its own flags, all others are
compiled for the baseline, and the choice falls at run time.

Read from the environment: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, ARCHFLAGS, MAX_JOBS, and

    BIPER_REQUIRE_NATIVE    what becomes of an install whose extension cannot be built
    unset or 0              it succeeds without the extension, and says why
    auto                    so it does where a compiler or headers are missing; an error fails it
    1                       it fails
"""

import functools
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cpu"
COMPILERS = ("g++", "c++", "clang++")

FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wextra"]
# After those of the environment: every float operation is rounded once, everywhere alike, and code
# for one instruction set stays in its file. -fno-fast-math is first, as it may reset -ffp-contract.
FIXED_FLAGS = [
    *("-fno-fast-math", "-ffp-contract=off", "-fno-lto"),
    *("-fPIC", "-fvisibility=hidden", "-pthread"),
]
X86_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vpopcntdq"),
        *("-mfma", "-mf16c"),
    ],
}


def call(command: list[str], stdout: int | None = None) -> str:
    """Run a command and return what it prints to `stdout`, if that is a pipe."""
    environment = {"MACOSX_DEPLOYMENT_TARGET": "11.0", **os.environ}  # the first one on arm64
    try:
        done = subprocess.run(command, check=True, stdout=stdout, text=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        outcome = error.returncode if isinstance(error, subprocess.CalledProcessError) else error
        raise CompileError(f"`{shlex.join(command)}` failed ({outcome})") from error
    return done.stdout or ""


def environment_flags(*names: str) -> list[str]:
    """Return the flags in environment variables, split as a shell does."""
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


def compiler() -> list[str]:
    """Return the C++ compiler's command: CXX, or the first of the usual names that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in COMPILERS if shutil.which(name)), COMPILERS[0])]


@functools.cache
def targets_x86() -> bool:
    """Ask the compiler, which may make code for another machine than this one."""
    flags = environment_flags("CPPFLAGS", "CXXFLAGS", "ARCHFLAGS")
    macros = call(
        [*compiler(), *flags, "-dM", "-E", "-x", "c++", os.devnull], stdout=subprocess.PIPE
    )
    return "#define __x86_64__ " in macros


def flags_for(source: Path) -> list[str]:
    """Return the flags of one source file, include paths apart."""
    extra = X86_FLAGS.get(source.name, []) if targets_x86() else []
    environment = environment_flags("CPPFLAGS", "CXXFLAGS", "ARCHFLAGS")
    return [*FLAGS, *environment, *FIXED_FLAGS, *extra]


def include_flags() -> list[str]:
    """Return the flags for the headers of Python and pybind11."""
    import pybind11  # only where something is built

    folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def link_command(objects: list[Path], target: Path) -> list[str]:
    """Return the command that makes a module for Python of object files."""
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    flags = [*environment_flags("CXXFLAGS", "ARCHFLAGS"), *FIXED_FLAGS]
    libraries = environment_flags("LDFLAGS")
    return [*compiler(), *kind, *flags, *map(str, objects), *libraries, "-o", str(target)]


def obstacle() -> str | None:
    """Return what keeps this machine from building an extension and how to help it, or None."""
    if sys.platform == "win32":
        return "there are no native kernels for Windows"
    if shutil.which(compiler()[0]) is None:
        tried = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else ", ".join(COMPILERS)
        return (
            f"there is no C++ compiler ({tried}). Install g++ or clang++, or name one in CXX, then "
            "install again"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return (
            f"{header} is not there. Install the headers of Python (python3-dev in Debian), then "
            "install again"
        )
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not there. Install it, or install again without --no-build-isolation"
    return None


def is_current(made: Path, command: str) -> bool:
    """Tell whether an object is younger than all its inputs, headers too, and made by `command`."""
    try:
        rule = made.with_suffix(".d").read_text(encoding="utf-8").replace("\\\n", " ")
        inputs = shlex.split(rule.partition(": ")[2])
        newest = max(os.stat(path).st_mtime_ns for path in inputs)
        recorded = made.with_suffix(".command").read_text(encoding="utf-8")
        return recorded == command and newest < made.stat().st_mtime_ns
    except OSError:  # never compiled, or an input is gone
        return False


class BuildNative(build_ext):
    """Compiles an extension's files in parallel, those that changed, and links them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools would throw the objects away
            tag = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", tag)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        in_place = ROOT / Path(*ext.name.split(".")).with_name(target.name)
        missing = obstacle()
        required = os.environ.get("BIPER_REQUIRE_NATIVE") or "0"
        ext.optional = required == "0" or (required == "auto" and missing is not None)
        try:
            if missing:
                raise CompileError(missing)
            self._build(ext, target)
        except CompileError as error:
            for stale in (target, in_place):  # or setuptools would take it for this build's
                stale.unlink(missing_ok=True)
            way = "It is left out" if ext.optional else "BIPER_REQUIRE_NATIVE=0 installs without it"
            raise CompileError(
                f"{ext.name} cannot be built: {error}. {way}: biper-engine then has its reference "
                "backend only, which is much slower."
            ) from error
        if (ROOT / ".git").exists():  # python in a checkout imports ./biper_engine
            self.copy_file(str(target), str(in_place))

    def _build(self, ext: Extension, target: Path) -> None:
        folder = Path(self.build_temp, ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [Path(source) for source in ext.sources]
        objects = [folder / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as workers:
            list(workers.map(self._compile, sources, objects))
        self._call(link_command(objects, target))

    def _compile(self, source: Path, made: Path) -> None:
        command = [*compiler(), *flags_for(source), *include_flags()]
        command += ["-c", str(source), "-o", str(made), "-MD", "-MF", str(made.with_suffix(".d"))]
        if self.force or not is_current(made, shlex.join(command)):
            self._call(command)
            made.with_suffix(".command").write_text(shlex.join(command), encoding="utf-8")

    def _call(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=logging.INFO)
        call(command)


if __name__ == "__main__":  # tests read the flags above
    setup(
        packages=[
            *find_packages(include=["biper_engine", "biper_engine.*"]),
            "biper_engine.kernels",
        ],
        package_dir={"biper_engine.kernels": "kernels"},
        ext_modules=[
            Extension(
                "biper_engine._cpu",
                sorted(str(path.relative_to(ROOT)) for path in SOURCES.glob("*.cpp")),
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )

"""Name the packages and build the native extension; the rest stands in pyproject.toml.

`biper_engine._cpu` is csrc/cpu: C++17, pybind11, no header of torch, so that one build serves every
version of torch. Each instruction set has a file of its own with its own flags, all others are
compiled for the baseline, and the choice falls at run time. Without a compiler the package installs
without the extension and says so; BIPER_REQUIRE_NATIVE=1 makes that an error.

Read from the environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, BIPER_REQUIRE_NATIVE.
"""

import os
import platform
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

# No -march=native, no -ffast-math, no link-time optimisation: every float operation is rounded
# once, everywhere alike, and code for one instruction set stays in its file.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
WARNINGS = ["-Wall", "-Wextra"]
X86_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vpopcntdq"),
        *("-mfma", "-mf16c"),
    ],
}


def compiler() -> list[str]:
    """Return the C++ compiler's command: CXX, or the first of the usual names that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    names = ("g++", "c++", "clang++")
    return [next((name for name in names if shutil.which(name)), names[0])]


def flags_for(source: Path) -> list[str]:
    """Return the flags of one source file, include paths apart."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    extra = X86_FLAGS.get(source.name, []) if x86 else []
    return [*FLAGS, *WARNINGS, *extra, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def include_flags() -> list[str]:
    """Return the flags for the headers of Python and pybind11."""
    import pybind11  # only where something is built

    folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


class BuildNative(build_ext):
    """Compiles an extension's files in parallel, those that changed, and links them."""

    def run(self) -> None:
        """Build, or explain why the package goes without its extension."""
        if sys.platform == "win32":
            self.warn("Windows has the reference backend only; biper_engine._cpu is not built.")
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self._build(ext, target)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            command = " ".join(compiler())
            raise CompileError(
                f"{ext.name} could not be built with `{command}` ({error}); biper-engine goes "
                "without it, on the much slower reference backend. Install a C++17 compiler (g++ "
                "or clang++) and pybind11, or set CXX, then install again."
            ) from error
        here = ROOT / "biper_engine" / target.name
        if (ROOT / ".git").exists() and target.resolve() != here:
            shutil.copy2(target, here)  # python in a checkout imports ./biper_engine

    def _build(self, ext: Extension, target: Path) -> None:
        objects = Path(self.build_temp, ext.name)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        headers = [*SOURCES.glob("*.h"), ROOT / "setup.py"]
        newest_header = max(path.stat().st_mtime for path in headers)
        made, commands = [], []
        for source in map(ROOT.joinpath, ext.sources):
            made.append(objects / f"{source.name}.o")
            newest = max(newest_header, source.stat().st_mtime)
            if self.force or not made[-1].exists() or made[-1].stat().st_mtime < newest:
                command = [*compiler(), *flags_for(source), *include_flags()]
                commands.append([*command, "-c", str(source), "-o", str(made[-1])])
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as workers:
            list(workers.map(self._call, commands))
        shared = (
            ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        )
        options = shlex.split(os.environ.get("LDFLAGS", ""))
        self._call([*compiler(), *shared, "-pthread", *map(str, made), *options, "-o", str(target)])

    def _call(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=2)
        subprocess.run(command, check=True)


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
                optional=os.environ.get("BIPER_REQUIRE_NATIVE") != "1",
            )
        ],
        cmdclass={"build_ext": BuildNative},
    )

"""Name the packages and build the native extensions; the rest is in pyproject.toml.

`biper_engine._cpu` is csrc/cpu, `biper_engine._cuda` is csrc/cuda: C++17 and pybind11, without
torch's headers, so that one build works with every version of torch. Each CPU instruction set has
its own file and flags, all else is compiled for the baseline, and the choice is made at run time.
GPU code is compiled for each architecture, and CUDA takes the one that fits. CUDA's runtime is
linked statically: the extension needs no CUDA library, and can be imported without a driver.

These environment variables are read: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, ARCHFLAGS, MAX_JOBS, and

    BIPER_REQUIRE_NATIVE    what happens to an install if _cpu cannot be built
    unset or 0              it succeeds without the extension, and says why
    auto                    the same if a compiler or headers are missing; an error fails it
    1                       it fails

    BIPER_CUDA              the same for _cuda, which the variable above does not affect
    unset                   built if nvcc is found and the installed PyTorch has CUDA; left out if
                            that fails
    auto                    built if nvcc is found; an error fails the install
    1                       required
    0                       left out
    BIPER_CUDA_ARCHS        compute capabilities to compile for, such as "80;90+PTX": +PTX adds PTX,
                            which a driver compiles for newer devices
    NVCCFLAGS               for nvcc, which is searched in CUDA_HOME, CUDA_PATH, /usr/local/cuda
                            and PATH, and reads NVCC_CCBIN itself
"""

import functools
import importlib.util
import logging
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("g++", "c++", "clang++")

CPU, CUDA = "biper_engine._cpu", "biper_engine._cuda"
# For each extension, the variable that says what a failure means, and what remains without it.
VARIABLES = {CPU: "BIPER_REQUIRE_NATIVE", CUDA: "BIPER_CUDA"}
WITHOUT = {
    CPU: "its reference backend only, which is much slower",
    CUDA: "no CUDA kernels, and runs on a GPU through slower backends",
}

FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wextra"]
# These follow the environment's flags: every float operation is rounded once in all files, and code
# for one instruction set stays in its file. -fno-fast-math is first: it may reset -ffp-contract.
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

# Code for one architecture runs on later ones of its generation: sm_86 and sm_89 run that of sm_80,
# sm_103 that of sm_100, sm_121 that of sm_120. For other devices, the driver compiles PTX; the PTX
# of sm_90 is the last with 1-bit matrices.
CUDA_ARCHS = (75, 80, 90, 100, 120)
CUDA_PTX = 90
CUDA_FLAGS = ["-std=c++17", "-O3", "-diag-suppress=128"]  # 128: a loop behind a false constant
# These follow the environment's flags, too: the opposite of --use_fast_math.
CUDA_FIXED_FLAGS = [
    *("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"),
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-ffp-contract=off,-fno-fast-math,-fno-lto",
    "-Xfatbin=-compress-all",
]


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
    """Return the C++ compiler's command: CXX, or the first of the usual names that exists."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in COMPILERS if shutil.which(name)), COMPILERS[0])]


@functools.cache
def targets_x86() -> bool:
    """Ask the compiler, which may compile for a different machine."""
    flags = environment_flags("CPPFLAGS", "CXXFLAGS", "ARCHFLAGS")
    macros = call(
        [*compiler(), *flags, "-dM", "-E", "-x", "c++", os.devnull], stdout=subprocess.PIPE
    )
    return "#define __x86_64__ " in macros


def flags_for(source: Path) -> list[str]:
    """Return the flags of one source file, except for include paths."""
    extra = X86_FLAGS.get(source.name, []) if targets_x86() else []
    environment = environment_flags("CPPFLAGS", "CXXFLAGS", "ARCHFLAGS")
    return [*FLAGS, *environment, *FIXED_FLAGS, *extra]


def include_flags() -> list[str]:
    """Return the flags for the headers of Python and pybind11."""
    import pybind11  # only needed for a build

    folders = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def link_command(objects: list[Path], target: Path) -> list[str]:
    """Return the command that links object files to a Python module."""
    kind = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    flags = [*environment_flags("CXXFLAGS", "ARCHFLAGS"), *FIXED_FLAGS]
    libraries = environment_flags("LDFLAGS")
    return [*compiler(), *kind, *flags, *map(str, objects), *libraries, "-o", str(target)]


def nvcc() -> str | None:
    """Return the path of nvcc, or None. It may be a script, so no files beside it are expected."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((found for found in map(shutil.which, [*paths, "nvcc"]) if found), None)


def requested_archs() -> list[tuple[int, bool]]:
    """Return the architectures of BIPER_CUDA_ARCHS, and whether PTX is wanted for each."""
    text = os.environ.get("BIPER_CUDA_ARCHS") or ""
    words = [re.fullmatch(r"\s*(\d+)(\+PTX)?\s*", word) for word in text.split(";")]
    if text and None in words:
        raise OptionError(
            f"BIPER_CUDA_ARCHS (={text!r}) must be compute capabilities without a dot, optionally "
            'with +PTX, separated by ";", such as "80;90+PTX"'
        )
    return [(int(word[1]), bool(word[2])) for word in words if word]


def check_environment() -> None:
    """Raise if a variable has an invalid value."""
    requested_archs()
    for variable in VARIABLES.values():
        if (value := os.environ.get(variable, "")) not in ("", "0", "1", "auto"):
            raise OptionError(f"{variable} (={value!r}) must be 0, 1, auto or unset")


def arch_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags for the requested architectures, or for all of ours that it knows."""
    listed = call([nvcc, "--list-gpu-arch"], stdout=subprocess.PIPE)
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    ours = [arch for arch in CUDA_ARCHS if arch in known]
    newest = max((arch for arch in ours if arch <= CUDA_PTX), default=None)
    wanted = requested_archs() or [(arch, arch == newest) for arch in ours]
    unknown = [arch for arch, _ in wanted if arch not in known]
    if unknown or not wanted:
        raise CompileError(
            f"{nvcc} has no architecture {unknown or list(CUDA_ARCHS)}, but {sorted(known)}"
        )
    codes = [(arch, f"sm_{arch}") for arch, _ in wanted]
    codes += [(arch, f"compute_{arch}") for arch, ptx in wanted if ptx]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


def host_flags() -> list[str]:
    """Return the flags that make nvcc use the compiler in CXX, unless it has a wrapper (ccache)."""
    own = shlex.split(os.environ.get("CXX", ""))
    return ["-ccbin", own[0]] if len(own) == 1 and "NVCC_CCBIN" not in os.environ else []


def cuda_flags() -> list[str]:
    """Return the flags of a .cu file."""
    environment = [*environment_flags("NVCCFLAGS"), *host_flags()]
    return [*CUDA_FLAGS, *environment, *CUDA_FIXED_FLAGS, *arch_flags(nvcc() or "nvcc")]


def cuda_link_command(objects: list[Path], target: Path) -> list[str]:
    """Return the command that links objects with GPU code to a module.

    nvcc links, as only it knows where its libraries are. Device code is not linked across files.
    """
    kind = ["-shared", "-cudart", "static", "-nodlink", "-Xlinker=-s", *host_flags()]
    libraries = ["-forward-unknown-to-host-compiler", *environment_flags("LDFLAGS")]
    return [nvcc() or "nvcc", *kind, *map(str, objects), *libraries, "-o", str(target)]


def torch_folders() -> list[Path]:
    """Return where an installed PyTorch may lie; pip builds in an environment that hides it."""
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    places = [*sys.path, *installed, *site.getsitepackages(), site.getusersitepackages()]
    return [Path(place, "torch") for place in dict.fromkeys(places)]


def torch_obstacle() -> str | None:
    """Return why the installed PyTorch has no use for CUDA kernels, or None if it has.

    `torch/version.py` is read, not imported, as importing PyTorch takes seconds.
    """
    for folder in torch_folders():
        try:
            text = (folder / "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        version = re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE)
        return None if version else f"the PyTorch in {folder} has no CUDA"
    return "no PyTorch is installed"


def obstacle() -> str | None:
    """Return why this machine cannot build an extension and how to fix that, or None."""
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
            f"{header} is missing. Install the headers of Python (python3-dev in Debian), then "
            "install again"
        )
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing. Install it, or install again without --no-build-isolation"
    return None


def cuda_obstacle() -> str | None:
    """Return why this machine cannot compile for GPUs and how to fix that, or None."""
    if nvcc() is None:
        return (
            "there is no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda or on the PATH. Install the "
            "CUDA toolkit, or name its folder in CUDA_HOME, then install again"
        )
    return obstacle()


def is_current(made: Path, command: str) -> bool:
    """Whether an object is newer than all its inputs, with headers, and was made by `command`."""
    try:
        rule = made.with_suffix(".d").read_text(encoding="utf-8").replace("\\\n", " ")
        inputs = shlex.split(rule.partition(": ")[2])
        newest = max(os.stat(path).st_mtime_ns for path in inputs)
        recorded = made.with_suffix(".command").read_text(encoding="utf-8")
        return recorded == command and newest < made.stat().st_mtime_ns
    except OSError:  # never compiled, or an input is missing
        return False


def compile_command(source: Path, made: Path) -> list[str]:
    """Return the command that compiles a file and lists the files that it includes."""
    if source.suffix == ".cu":
        command = [nvcc() or "nvcc", *cuda_flags()]
    else:
        command = [*compiler(), *flags_for(source), *include_flags()]
    rule = made.with_suffix(".d")
    return [*command, "-c", str(source), "-o", str(made), "-MD", "-MF", str(rule)]


def build(
    sources: list[Path],
    folder: Path,
    target: Path,
    run: Callable[[list[str]], object] = call,
    force: bool = False,
) -> None:
    """Compile the sources that changed into `folder`, in parallel, and link all."""

    def compile_one(source: Path, made: Path) -> None:
        command = compile_command(source, made)
        if force or not is_current(made, shlex.join(command)):
            run(command)
            made.with_suffix(".command").write_text(shlex.join(command), encoding="utf-8")

    for parent in (folder, target.parent):
        parent.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as workers:
        list(workers.map(compile_one, sources, objects))
    for_gpu = any(source.suffix == ".cu" for source in sources)
    run(cuda_link_command(objects, target) if for_gpu else link_command(objects, target))


def leave_out(*built: Path) -> None:
    """Remove the results of an earlier build, which setuptools would take for new ones."""
    for path in built:
        path.unlink(missing_ok=True)


class BuildNative(build_ext):
    """Build the extensions, or leave one out if the environment says so."""

    def finalize_options(self) -> None:
        super().finalize_options()
        check_environment()  # an error here also ends an install for which extensions are optional
        if self.editable_mode:  # setuptools would delete the objects
            tag = f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", tag)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        in_place = ROOT / Path(*ext.name.split(".")).with_name(target.name)
        variable = VARIABLES[ext.name]
        wanted = os.environ.get(variable, "")
        missing = cuda_obstacle() if ext.name == CUDA else obstacle()
        ext.optional = wanted in ("", "0") or (wanted == "auto" and missing is not None)
        unused = torch_obstacle() if ext.name == CUDA and not wanted else None
        if unused:
            self.announce(
                f"{CUDA} is left out: {unused}. Install a PyTorch with CUDA first, or set "
                f"BIPER_CUDA=1, then install again; biper-engine now has {WITHOUT[CUDA]}.",
                level=logging.WARNING,
            )
        if unused or (ext.name == CUDA and wanted == "0"):
            leave_out(target, in_place)
            return
        try:
            if missing:
                raise CompileError(missing)
            sources = [Path(source) for source in ext.sources]
            build(sources, Path(self.build_temp, ext.name), target, self._call, self.force)
        except CompileError as error:
            leave_out(target, in_place)
            way = "It is left out" if ext.optional else f"{variable}=0 installs without it"
            raise CompileError(
                f"{ext.name} cannot be built: {error}. {way}: biper-engine then has "
                f"{WITHOUT[ext.name]}."
            ) from error
        if (ROOT / ".git").exists():  # python in a checkout imports ./biper_engine
            self.copy_file(str(target), str(in_place))

    def _call(self, command: list[str]) -> None:
        self.announce(shlex.join(command), level=logging.INFO)
        call(command)


def extension(name: str, folder: str, *patterns: str) -> Extension:
    """Return an extension of the files in a folder, in the order in which they are compiled."""
    files = [path for pattern in patterns for path in sorted((ROOT / folder).glob(pattern))]
    return Extension(name, [str(path.relative_to(ROOT)) for path in files])


if __name__ == "__main__":  # tests read the flags above
    extensions = [
        extension(CPU, "csrc/cpu", "*.cpp"),
        extension(CUDA, "csrc/cuda", "*.cu", "*.cpp"),
    ]
    setup(
        packages=[
            *find_packages(include=["biper_engine", "biper_engine.*"]),
            "biper_engine.kernels",
        ],
        package_dir={"biper_engine.kernels": "kernels"},
        ext_modules=[ext for ext in extensions if ext.sources],
        cmdclass={"build_ext": BuildNative},
    )

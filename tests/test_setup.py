"""setup.py builds changed files with the required flags, and reports what it leaves out."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.native.builds import ROOT, need_native, run, setup_functions, succeed

MODULE, CUDA_MODULE = (
    f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_cpu", "_cuda")
)
WITHOUT_CUDA = {"BIPER_CUDA": "0"}

pytestmark = pytest.mark.deep


# -- building again -------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project with this setup.py and three small sources."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "licenses", tmp_path / "licenses")
    files = {
        "biper_engine/__init__.py": '__version__ = "1"',
        "kernels/__init__.py": "",
        "csrc/cpu/two.h": "inline int two() { return 2; }",
        "csrc/cpu/one.cpp": "int one() { return 1; }",
        "csrc/cpu/four.cpp": '#include "two.h"\nint four() { return two() * two(); }',
        "csrc/cpu/six.cpp": '#include "two.h"\nint six() { return 3 * two(); }',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def build(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BIPER_REQUIRE_NATIVE": "auto", **variables}
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=project, env=environment)


def compiled(project: Path, **variables: str) -> set[str]:
    done = build(project, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r" -c csrc/\w+/(\w+)\.\w+ ", done.stdout))


def test_only_what_changed_is_compiled_again(project: Path) -> None:
    need_native()
    assert compiled(project) == {"one", "four", "six"}
    assert compiled(project) == set()
    (project / "csrc/cpu/two.h").touch()
    assert compiled(project) == {"four", "six"}
    (project / "csrc/cpu/one.cpp").touch()
    assert compiled(project) == {"one"}
    assert compiled(project, CXXFLAGS="-O1") == {"one", "four", "six"}
    (project / "csrc/cpu/two.h").rename(project / "csrc/cpu/moved.h")
    assert build(project, CXXFLAGS="-O1").returncode != 0


@pytest.mark.parametrize("broken", ["no compiler", "broken source"])
def test_a_failed_build_leaves_no_earlier_extension(project: Path, broken: str) -> None:
    need_native()
    compiled(project)
    assert len(list(project.rglob(MODULE))) == 2
    if broken == "broken source":
        (project / "csrc/cpu/one.cpp").write_text("int one() {", encoding="utf-8")
    done = build(
        project,
        BIPER_REQUIRE_NATIVE="0",
        **({"CXX": "no-such-compiler"} if broken == "no compiler" else {}),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It is left out" in done.stdout + done.stderr
    assert list(project.rglob(MODULE)) == []


def test_auto_forgives_a_missing_compiler_and_no_error(project: Path) -> None:
    need_native()
    assert build(project, CXX="no-such-compiler").returncode == 0
    (project / "csrc/cpu/one.cpp").write_text("int one() {", encoding="utf-8")
    assert build(project).returncode != 0


def test_flags_of_the_environment_do_not_change_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_native()
    monkeypatch.setenv("CXXFLAGS", "-O1 -ffast-math -ffp-contract=fast -flto")
    flags = setup_functions()["flags_for"](Path("csrc/cpu/conv.cpp"))
    for ours, theirs in (
        ("-ffp-contract=off", "-ffp-contract=fast"),
        ("-fno-fast-math", "-ffast-math"),
        ("-fno-lto", "-flto"),
    ):
        assert flags.index(ours) > flags.index(theirs)
    assert flags.index("-O1") > flags.index("-O3")


# -- the extension for GPUs -----------------------------------------------------------------------

NVCC = """#!{python}
import subprocess, sys

if "--list-gpu-arch" in sys.argv:
    print(*(f"compute_{{arch}}" for arch in {archs}), sep="\\n")
    sys.exit()
made = sys.argv[sys.argv.index("-o") + 1]
if "-c" in sys.argv:
    source = sys.argv[sys.argv.index("-c") + 1]
    what = ["-x", "c++", "-c", source, "-MD", "-MF", sys.argv[sys.argv.index("-MF") + 1]]
else:
    what = ["-shared", *(name for name in sys.argv if name.endswith(".o"))]
sys.exit(subprocess.call([*{compiler}, "-fPIC", *what, "-o", made]))
"""


def write_nvcc(home: Path, *archs: int) -> str:
    """Put a stand-in for nvcc into a CUDA_HOME; it has the C++ compiler do the work."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    values = {"python": sys.executable, "archs": archs, "compiler": setup_functions()["compiler"]()}
    path.write_text(NVCC.format(**values), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def pretend_torch(folder: Path, cuda: str | None) -> Path:
    """Put the version file of a PyTorch with or without CUDA into a folder of modules."""
    (folder / "torch").mkdir(parents=True)
    text = f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "torch/version.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def cuda_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the project with two more sources, for a stand-in of nvcc that is in CUDA_HOME."""
    need_native()
    files = {
        "csrc/cuda/ten.cuh": "inline int ten() { return 10; }",
        "csrc/cuda/kernel.cu": '#include "ten.cuh"\nint hundred() { return ten() * ten(); }',
        "csrc/cuda/module.cpp": "int thousand() { return 1000; }",
    }
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text, encoding="utf-8")
    write_nvcc(project / "toolkit", 80, 90)
    monkeypatch.setenv("CUDA_HOME", str(project / "toolkit"))
    monkeypatch.setenv("PYTHONPATH", str(pretend_torch(project / "modules", "13.0")))
    for variable in ("BIPER_CUDA", "BIPER_CUDA_ARCHS", "NVCCFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    return project


def test_only_what_changed_is_compiled_again_for_gpus(cuda_project: Path) -> None:
    everything = {"one", "four", "six", "kernel", "module"}
    assert compiled(cuda_project) == everything
    assert compiled(cuda_project) == set()
    (cuda_project / "csrc/cuda/ten.cuh").touch()
    assert compiled(cuda_project) == {"kernel"}
    (cuda_project / "csrc/cuda/module.cpp").touch()
    assert compiled(cuda_project) == {"module"}
    assert compiled(cuda_project, BIPER_CUDA_ARCHS="90") == {"kernel"}
    assert compiled(cuda_project, BIPER_CUDA_ARCHS="90", NVCCFLAGS="-lineinfo") == {"kernel"}


def test_an_install_has_the_extension_for_gpus(cuda_project: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "BIPER_REQUIRE_NATIVE": "1", "BIPER_CUDA": "1"}
    site = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", site)
    succeed(sys.executable, "-m", "pip", "install", *options, cuda_project, env=environment)
    assert {path.name for path in (site / "biper_engine").glob("*.so")} == {MODULE, CUDA_MODULE}


@pytest.mark.parametrize("wanted", ["", "1", "auto"])
def test_a_torch_without_cuda_gets_the_extension_only_on_demand(
    cuda_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    compiled(cuda_project)
    monkeypatch.setenv("PYTHONPATH", str(pretend_torch(tmp_path / "without", None)))
    done = build(cuda_project, BIPER_CUDA=wanted)
    assert done.returncode == 0
    assert bool(list(cuda_project.rglob(CUDA_MODULE))) == bool(wanted)
    assert ("BIPER_CUDA=1" in done.stdout + done.stderr) == (not wanted)


def test_a_torch_that_pip_hides_from_the_build_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an isolated build the path has no PyTorch, and the interpreter's own folders have."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "overlay")])
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "packages")])
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    reason = setup_functions()["torch_obstacle"]
    assert reason() == "no PyTorch is installed"
    pretend_torch(tmp_path / "packages", "12.8")
    assert reason() is None
    pretend_torch(tmp_path / "platlib", None)
    assert reason() == f"the PyTorch in {tmp_path / 'platlib' / 'torch'} has no CUDA"


def test_zero_leaves_the_extension_for_gpus_out_and_none_behind(cuda_project: Path) -> None:
    compiled(cuda_project)
    assert len(list(cuda_project.rglob(CUDA_MODULE))) == 2
    done = build(cuda_project, **WITHOUT_CUDA)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(cuda_project.rglob(CUDA_MODULE)) == []
    assert len(list(cuda_project.rglob(MODULE))) == 2


@pytest.mark.parametrize("wanted", ["", "auto", "1"])
@pytest.mark.parametrize("broken", ["no compiler", "broken source"])
def test_what_a_failed_build_for_gpus_means(cuda_project: Path, wanted: str, broken: str) -> None:
    compiled(cuda_project)
    if broken == "broken source":
        (cuda_project / "csrc/cuda/kernel.cu").write_text("int ten() {", encoding="utf-8")
    compiler = {"CXX": "no-such-compiler"} if broken == "no compiler" else {}
    done = build(cuda_project, BIPER_CUDA=wanted, BIPER_REQUIRE_NATIVE="0", **compiler)
    fatal = wanted == "1" or (wanted, broken) == ("auto", "broken source")
    assert (done.returncode != 0) == fatal
    said = done.stdout + done.stderr
    assert "biper_engine._cuda cannot be built: " in said
    assert ("BIPER_CUDA=0 installs without it" if fatal else "It is left out") in said
    assert list(cuda_project.rglob(CUDA_MODULE)) == []
    assert bool(list(cuda_project.rglob(MODULE))) == (broken != "no compiler")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BIPER_REQUIRE_NATIVE", "yes"),
        ("BIPER_CUDA", "on"),
        ("BIPER_CUDA_ARCHS", "9.0"),
        ("BIPER_CUDA_ARCHS", "80,90"),
        ("BIPER_CUDA_ARCHS", "80;"),
        ("BIPER_CUDA_ARCHS", "90a"),
        ("BIPER_CUDA_ARCHS", "PTX"),
    ],
)
def test_a_value_without_meaning_ends_the_build(project: Path, variable: str, value: str) -> None:
    done = build(project, **{variable: value})
    assert done.returncode != 0
    assert f"error: {variable} (={value!r}) must be" in done.stderr


def arch_flags(folder: Path, *known: int) -> str:
    flags = setup_functions()["arch_flags"](write_nvcc(folder, *known))
    return " ".join(flag.removeprefix("-gencode=arch=") for flag in flags)


def test_the_architectures_are_those_that_nvcc_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BIPER_CUDA_ARCHS", raising=False)
    assert arch_flags(tmp_path / "new", 80, 86, 90, 100, 120, 130) == (
        "compute_80,code=sm_80 compute_90,code=sm_90 compute_100,code=sm_100 "
        "compute_120,code=sm_120 compute_90,code=compute_90"
    )
    assert arch_flags(tmp_path / "old", 70, 75, 80, 86) == (
        "compute_75,code=sm_75 compute_80,code=sm_80 compute_80,code=compute_80"
    )
    with pytest.raises(Exception, match=r"has no architecture \[75, 80, .*, but \[60, 70\]"):
        arch_flags(tmp_path / "ancient", 60, 70)


def test_the_environment_chooses_the_architectures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_CUDA_ARCHS", "86; 90+PTX")
    assert arch_flags(tmp_path / "new", 80, 86, 90) == (
        "compute_86,code=sm_86 compute_90,code=sm_90 compute_90,code=compute_90"
    )
    with pytest.raises(Exception, match=r"has no architecture \[90\], but \[80, 86\]"):
        arch_flags(tmp_path / "old", 80, 86)


def test_without_nvcc_the_reason_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    which = shutil.which
    hide = lambda name: None if name.endswith("nvcc") else which(name)  # noqa: E731
    monkeypatch.setattr(shutil, "which", hide)
    reason = setup_functions()["cuda_obstacle"]()
    assert "there is no nvcc in CUDA_HOME, CUDA_PATH, /usr/local/cuda or on the PATH" in reason


def test_cuda_home_goes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, other = (write_nvcc(tmp_path / name, 80) for name in ("wanted", "other"))
    monkeypatch.setenv("PATH", str(Path(other).parent))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "wanted"))
    assert setup_functions()["nvcc"]() == wanted
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "not-there"))
    assert setup_functions()["nvcc"]() == other


def test_flags_of_the_environment_do_not_change_the_arithmetic_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nvcc(tmp_path, 80)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("NVCCFLAGS", "-O1 -fmad=true -use_fast_math")
    flags = setup_functions()["cuda_flags"]()
    for ours in ("-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"):
        assert flags.index(ours) > flags.index("-use_fast_math")
    assert flags.index("-O1") > flags.index("-O3")

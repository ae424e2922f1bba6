"""What is built holds what it must, and works away from the checkout."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = (".*_cache", ".git", ".hypothesis", ".venv", "__pycache__", "build", "dist")

PIP_INSTALL = (
    *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install"),
    *("--no-deps", "--no-index", "--no-build-isolation"),
)

pytestmark = pytest.mark.deep


def attempt(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(c) for c in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def run(*command: str | Path, **options: object) -> str:
    done = attempt(*command, **options)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this machine")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of the checkout, and a wheel from that sdist alone."""
    need("g++")
    base = tmp_path_factory.mktemp("packaging")
    copy_checkout(base / "checkout")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", base)
    run(*command, cwd=base / "checkout", env={**os.environ, "BIPER_REQUIRE_NATIVE": "1"})
    return base


def copy_checkout(to: Path) -> None:
    """Copy what is tracked: an egg-info would add to the sdist what MANIFEST.in forgets."""
    left_behind = shutil.ignore_patterns(*LEFT_BEHIND, "*.egg-info", "*.so")
    shutil.copytree(ROOT, to, ignore=left_behind)


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without its dependencies, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    run(*PIP_INSTALL, "--target", target, wheel)
    return target


@pytest.fixture
def environment(site: Path) -> dict[str, str]:
    return environment_of(site)


def environment_of(site: Path) -> dict[str, str]:
    """Return an environment that finds the installed package first, then its dependencies."""
    path = os.pathsep.join((str(site), sysconfig.get_paths()["purelib"]))
    return {**os.environ, "PYTHONPATH": path}


def test_the_sdist_holds_every_tracked_file(dist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are tracked")
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    assert {name for name in tracked if name and (ROOT / name).exists()} - held == set()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "biper_engine").rglob("*.py")}
    kernels = {f"biper_engine/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert package | kernels | {"biper_engine/py.typed"} <= names
    (info,) = {name.split("/")[0] for name in names} - {"biper_engine"}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/licenses/pybind11.txt"} <= names
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    others = {name for name in names if name.startswith("biper_engine/") and name[-3:] != ".py"}
    assert others == {f"biper_engine/_cpu{suffix}", "biper_engine/py.typed"}
    assert {name for name in names if name.endswith(".py")} == package | kernels


def test_the_installed_package_imports_from_elsewhere(
    site: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    program = (
        "import biper_engine, biper_engine.kernels as kernels, importlib.metadata as metadata\n"
        "print(biper_engine.__file__, kernels.__file__, sep='\\n')\n"
        "assert biper_engine.__version__ == metadata.version('biper-engine')\n"
    )
    out = run(sys.executable, "-c", program, cwd=tmp_path, env=environment)
    expected = (site / "biper_engine/__init__.py", site / "biper_engine/kernels/__init__.py")
    assert tuple(map(Path, out.split())) == expected


def test_the_installed_command_runs_from_elsewhere(
    site: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    assert "demo" in run(site / "bin" / "biper", "--help", cwd=tmp_path, env=environment)


def test_the_checkout_imports_without_being_installed(tmp_path: Path) -> None:
    program = "import biper_engine.kernels as kernels; print(kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Without site's .pth files there is no editable install; the libraries come by the path alone.
    libraries = sysconfig.get_paths()["purelib"]
    program = f"import sys; sys.path.append({libraries!r}); {program}"
    out = run(sys.executable, "-S", "-c", program, cwd=tmp_path, env=environment)
    assert Path(out.strip()) == ROOT / "kernels/__init__.py"


RUN_CPU = """
import torch
import biper_engine
from biper_engine import _cpu, ops

x = torch.randn(1, 40, 2, 2)
assert torch.equal(ops.binarize(x, backend="cpu"), ops.binarize(x, backend="reference"))
print(_cpu.__file__)
"""


def test_the_installed_cpu_backend_runs_from_elsewhere(
    site: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    out = run(sys.executable, "-c", RUN_CPU, cwd=tmp_path, env=environment)
    assert Path(out.strip()).parent == site / "biper_engine"


def test_without_a_compiler_the_package_installs_and_says_what_it_lacks(tmp_path: Path) -> None:
    copy_checkout(tmp_path / "checkout")
    environment = {**os.environ, "CXX": "no-such-compiler", "BIPER_REQUIRE_NATIVE": ""}
    site = tmp_path / "site"
    command = (*PIP_INSTALL, "-v", "--target", site, tmp_path / "checkout")
    done = attempt(*command, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be built with `no-such-compiler`" in done.stdout + done.stderr
    assert not list((site / "biper_engine").glob("_cpu*"))
    out = run(site / "bin" / "biper", "backends", cwd=tmp_path, env=environment_of(site))
    said = " ".join(out.split())
    assert "install a C++17 compiler" in said
    assert "reference" in said
    program = "import torch, biper_engine as b; b.ops.binarize(torch.randn(1, 3, 2, 2))"
    run(sys.executable, "-c", program, cwd=tmp_path, env=environment_of(site))


def test_where_the_extension_is_required_a_failed_build_fails_the_install(tmp_path: Path) -> None:
    copy_checkout(tmp_path / "checkout")
    environment = {**os.environ, "CXX": "no-such-compiler", "BIPER_REQUIRE_NATIVE": "1"}
    command = (*PIP_INSTALL, "--target", tmp_path / "site", tmp_path / "checkout")
    done = attempt(*command, env=environment)
    assert done.returncode != 0
    assert "Install a C++17 compiler" in done.stdout + done.stderr


# -- instruction sets stay in their files ---------------------------------------------------------


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compile csrc/cpu as setup.py does; return the object of every source."""
    need("g++", "nm", "objdump")
    folder = tmp_path_factory.mktemp("objects")
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_without_setup")
    made = {}
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        made[source.name] = folder / f"{source.name}.o"
        flags = [*build["flags_for"](source), *build["include_flags"]()]
        run("g++", *flags, "-c", source, "-o", made[source.name])
    return made


def test_no_instruction_set_leaks_into_shared_code(objects: dict[str, Path]) -> None:
    isa_files = {name: path for name, path in objects.items() if name.startswith("isa_")}
    assert len(isa_files) >= 3
    for name, path in isa_files.items():
        symbols = [line.split() for line in run("nm", path).splitlines()]
        # A weak symbol could be the copy that the linker keeps for everybody.
        assert [s[-1] for s in symbols if s[-2] in "WVu"] == [], name
        defined = [s[-1] for s in symbols if len(s) == 3 and s[-2] in "TDRB"]
        assert len(defined) <= 1, (name, defined)
        assert all("Kernels" in symbol for symbol in defined)


def test_only_the_files_of_an_instruction_set_use_its_registers(objects: dict[str, Path]) -> None:
    if "x86_64" not in sysconfig.get_platform():
        pytest.skip("the registers are those of x86-64")
    wide = {"isa_avx512.cpp": {"zmm", "ymm"}, "isa_avx2.cpp": {"ymm"}}
    for name, path in objects.items():
        used = set(re.findall(r"%([yz]mm)\d", run("objdump", "-d", "--no-show-raw-insn", path)))
        assert used <= wide.get(name, set()), name
        if name in wide:
            assert max(wide[name]) in used, name

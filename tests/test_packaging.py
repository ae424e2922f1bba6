"""Built packages have the required contents, and work outside the checkout."""

import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.native.builds import need_native, setup_functions
from tests.native.builds import run as attempt

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = (".*_cache", ".git", ".hypothesis", ".venv", "__pycache__", "dist", "*.egg-info")
MODULE = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
# The CUDA kernels take minutes; tests/native/test_cuda_build.py builds them.
WITHOUT_CUDA = {"BIPER_CUDA": "0"}

PIP_INSTALL = (
    *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install"),
    *("--no-deps", "--no-index", "--no-build-isolation"),
)

pytestmark = pytest.mark.deep


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
    """Build an sdist from a copy of the checkout, and a wheel from that sdist.

    Objects that the checkout has already are not compiled again, if the sdist has their sources.
    """
    base = tmp_path_factory.mktemp("packaging")
    copy_checkout(base / "checkout", "build", "*.so")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", base)
    environment = {**os.environ, "BIPER_REQUIRE_NATIVE": "auto", **WITHOUT_CUDA}
    run(*command, "--sdist", cwd=base / "checkout", env=environment)
    (sdist,) = base.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "sdist", filter="data")
    (unpacked,) = (base / "sdist").iterdir()
    for compiled in ROOT.glob("build/temp.*"):
        shutil.copytree(compiled, unpacked / "build" / compiled.name)
    run(*command, "--wheel", cwd=unpacked, env=environment)
    return base


def copy_checkout(to: Path, *without: str) -> None:
    """Copy the checkout, since an egg-info adds to the sdist what MANIFEST.in forgets."""
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*LEFT_BEHIND, *without))


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


def run_installed(site: Path, *arguments: str | Path, **variables: str) -> str:
    """Run Python with the package in `site` and no other copy of it, away from the checkout."""
    paths = sysconfig.get_paths()
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join((str(site), paths["purelib"], paths["platlib"])),
    }
    # Without site's .pth files there is no editable install, which would lend its extension.
    return run(sys.executable, "-S", *arguments, cwd=site.parent, env=environment)


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
    folder = ROOT / "biper_engine"
    recipes, pages = folder.rglob("*.yaml"), folder.rglob("*.html")
    shipped = [p for p in (folder / "shipped").rglob("*") if p.suffix in (".biper", ".json")]
    kinds = [list(recipes), list(pages), shipped]
    assert all(kinds)
    data = {str(p.relative_to(ROOT)) for kind in kinds for p in kind} | {"biper_engine/py.typed"}
    assert package | kernels | data <= names
    (info,) = {name.split("/")[0] for name in names} - {"biper_engine"}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/licenses/pybind11.txt"} <= names
    others = {name for name in names if name.startswith("biper_engine/") and name[-3:] != ".py"}
    built = set() if setup_functions()["obstacle"]() else {f"biper_engine/{MODULE}"}
    assert others == data | built
    assert {name for name in names if name.endswith(".py")} == package | kernels


def test_the_installed_package_imports_from_elsewhere(site: Path) -> None:
    program = (
        "import biper_engine, biper_engine.kernels as kernels, importlib.metadata as metadata\n"
        "print(biper_engine.__file__, kernels.__file__, sep='\\n')\n"
        "assert biper_engine.__version__ == metadata.version('biper-engine')\n"
    )
    out = run_installed(site, "-c", program)
    expected = (site / "biper_engine/__init__.py", site / "biper_engine/kernels/__init__.py")
    assert tuple(map(Path, out.split())) == expected


def test_the_installed_command_runs_from_elsewhere(site: Path) -> None:
    assert "demo" in run_installed(site, site / "bin" / "biper", "--help")


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


def test_the_installed_cpu_backend_runs_from_elsewhere(site: Path) -> None:
    need_native()
    out = run_installed(site, "-c", RUN_CPU, BIPER_BACKEND="cpu")
    assert Path(out.strip()) == site / "biper_engine" / MODULE


def test_the_licence_of_what_is_compiled_in_is_the_one_that_it_came_with() -> None:
    distribution = importlib.metadata.distribution("pybind11")
    (licence,) = [f for f in distribution.files or () if f.name == "LICENSE"]
    ours = (ROOT / "licenses/pybind11.txt").read_text(encoding="utf-8")
    assert ours.endswith(Path(distribution.locate_file(licence)).read_text(encoding="utf-8"))


# -- without a compiler ---------------------------------------------------------------------------


def test_without_a_compiler_the_package_installs_and_says_what_it_lacks(tmp_path: Path) -> None:
    # With what an earlier build left behind, which must not be taken for this one's.
    copy_checkout(tmp_path / "checkout")
    (tmp_path / "empty").mkdir()
    bare = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    site = tmp_path / "site"
    command = (*PIP_INSTALL, "-v", "--target", site, tmp_path / "checkout")
    done = attempt(*command, env={**bare, "PATH": str(tmp_path / "empty")})
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning: " in said
    assert "there is no C++ compiler (g++, c++, clang++). Install g++ or clang++" in said
    assert not list((site / "biper_engine").glob("_c*.so"))
    out = run_installed(site, site / "bin" / "biper", "backends", COLUMNS="200")
    assert "install a C++17 compiler" in out
    program = """
import torch, biper_engine
(cpu,) = [info for info in biper_engine.backends() if info.name == "cpu"]
assert not cpu.available and "install a C++17 compiler" in cpu.reason
biper_engine.ops.binarize(torch.randn(1, 3, 2, 2))
"""
    run_installed(site, "-c", program)


def test_where_the_extension_is_required_a_failed_build_fails_the_install(tmp_path: Path) -> None:
    copy_checkout(tmp_path / "checkout", "build", "*.so")
    broken = {"CXX": "no-such-compiler", "BIPER_REQUIRE_NATIVE": "1"}
    environment = {**os.environ, **broken, **WITHOUT_CUDA}
    command = (*PIP_INSTALL, "--target", tmp_path / "site", tmp_path / "checkout")
    done = attempt(*command, env=environment)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "biper_engine._cpu cannot be built: there is no C++ compiler (CXX=no-such" in said
    assert "BIPER_REQUIRE_NATIVE=0 installs without it" in said
    assert not (tmp_path / "site").exists()


# -- instruction sets stay in their files ---------------------------------------------------------


@pytest.fixture(scope="module")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build in a copy of the checkout, which compiles only what is not built there already."""
    need_native()
    checkout = tmp_path_factory.mktemp("native") / "checkout"
    copy_checkout(checkout, "*.so")
    environment = {**os.environ, "BIPER_REQUIRE_NATIVE": "1", "BIPER_CUDA": "0"}
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, env=environment)
    return checkout


@pytest.fixture(scope="module")
def objects(native_build: Path) -> dict[str, Path]:
    """Return the object of every source in csrc/cpu."""
    if not sys.platform.startswith("linux"):
        pytest.skip("nm and objdump are read as they print on Linux")
    need("nm", "objdump")
    (folder,) = native_build.glob(f"build/temp.*-{sys.implementation.cache_tag}")
    sources = sorted(path.name for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    return {name: folder / "biper_engine._cpu" / f"{name}.o" for name in sources}


def test_the_extension_needs_no_library_but_those_of_its_language(
    native_build: Path, objects: dict[str, Path]
) -> None:
    text = run("objdump", "-p", native_build / "biper_engine" / MODULE)
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED\s+(\S+)", text)}
    languages = {"libstdc++", "libc++", "libc++abi", "libgcc_s", "libm", "libc", "libpthread"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= languages


def test_an_instruction_set_shares_nothing_but_its_table(objects: dict[str, Path]) -> None:
    isa_files = {name: path for name, path in objects.items() if name.startswith("isa_")}
    assert len(isa_files) >= 3
    for name, path in isa_files.items():
        symbols = [line.split() for line in run("nm", path).splitlines()]
        # A weak symbol could be the copy that the linker keeps for everybody.
        assert [s[-1] for s in symbols if s[-2] in "WVuvw"] == [], name
        defined = [s[-1] for s in symbols if s[-2].isupper() and s[-2] != "U"]
        assert len(defined) <= 1, (name, defined)
        assert all(re.fullmatch(r"_ZN5biper\d+k\w+KernelsE", symbol) for symbol in defined)
    assert run("nm", isa_files["isa_portable.cpp"]).count("KernelsE") == 1


def test_only_the_files_of_an_instruction_set_use_its_registers(objects: dict[str, Path]) -> None:
    if not setup_functions()["targets_x86"]():
        pytest.skip("the registers are those of x86-64")
    wide = {"isa_avx512.cpp": {"zmm", "ymm"}, "isa_avx2.cpp": {"ymm"}}
    for name, path in objects.items():
        code = run("objdump", "-d", "--no-show-raw-insn", path)
        used = set(re.findall(r"%([yz]mm)\d", code))
        assert used <= wide.get(name, set()), name
        if name in wide:
            assert max(wide[name]) in used, name
        else:  # AVX also has forms for the registers of the baseline; their names begin with v
            assert set(re.findall(r"^\s+[0-9a-f]+:\s+(v\w+)", code, re.MULTILINE)) == set(), name


def test_an_installed_wheel_passes_what_ci_tries_on_each(site: Path) -> None:
    need_native()
    out = run_installed(site, ROOT / ".ci/smoke.py")
    assert str(site) in out
    assert "one native program" in out

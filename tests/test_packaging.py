"""What is built holds what it must, and works away from the checkout."""

import os
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

pytestmark = pytest.mark.deep


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an sdist from a copy of the checkout, and a wheel from that sdist alone."""
    base = tmp_path_factory.mktemp("packaging")
    # A copy, since an egg-info in the checkout would add to the sdist what MANIFEST.in forgets.
    left_behind = shutil.ignore_patterns(*LEFT_BEHIND, "*.egg-info", "*.so")
    shutil.copytree(ROOT, base / "checkout", ignore=left_behind)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", base, cwd=base / "checkout")
    return base


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without its dependencies, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture
def environment(site: Path) -> dict[str, str]:
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
    assert f"{info}/licenses/LICENSE" in names
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

"""Rules of the code that a program can check: which modules import which, and what that loads."""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from tests.fresh import fresh_run

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "biper_engine"
MAX_LINES = 500

# A unit is a module or a subpackage right below biper_engine. Each column is ordered from the
# bottom up; a unit may import the units before it in its own column, and those of the base.
BASE = ("errors", "files", "references", "metadata", "plotting", "preprocessing")
INFERENCE = (
    *("bits", "geometry", "kernels", "_cpu", "_cuda", "ops", "graph", "report", "converted"),
    *("serialization", "runtime", "export", "engine", "serving", "shipped", "conversion", "bench"),
)
TRAINING = ("nn", "models", "training")
# The public names (biper_engine/__init__.py) gather both columns; the command line stands on top.
ROOT_UNIT = "__init__"
TOP = (ROOT_UNIT, "cli", "__main__")

# Where the two columns meet, apart from TOP.
# `models.load` gives the trained networks that come with the package; they are engines. A training
# step on CPU uses an operator with a native kernel, which is in `ops` as they all are.
MEETINGS = {"conversion": {"nn", "models"}, "models": {"shipped"}, "nn": {"ops"}}

# Units side by side, though a column has to put one before the other.
APART = {"runtime": {"serialization"}}


@dataclass(frozen=True)
class Import:
    """One imported module, and the place where it is imported."""

    target: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.target}"


def is_import_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in {"import_module", "__import__"}


def targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Return what `node` imports into `module`: dotted names, `from a import b` as `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = resolve_name("." * node.level + (node.module or ""), package)
            return [f"{base}.{alias.name}" for alias in node.names]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]) if is_import_call(node):
            return [resolve_name(name, package)]
    return []


@cache
def nodes_of(text: str) -> list[ast.AST]:
    """Return all nodes of a module that may import another one."""
    kinds = (ast.Import, ast.ImportFrom, ast.Call)
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def imports(directory: Path, package: str) -> Iterator[tuple[str, Import]]:
    """Yield (importing module, import) for every import in the package that lies in `directory`."""
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join((package, *(parts[:-1] if is_package else parts)))
        for node in nodes_of(path.read_text(encoding="utf-8")):
            for target in targets(node, module, is_package):
                yield module, Import(target, path, node.lineno)  # type: ignore[attr-defined]


def unit_of(module: str, known: set[str]) -> str:
    """Return the unit of a module in biper_engine; a public name belongs to the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in known else ROOT_UNIT


def below(unit: str) -> set[str]:
    """Return the units that `unit` may import, itself included.

    Raises:
        KeyError: `unit` has no layer.
    """
    for column in (BASE, INFERENCE, TRAINING, TOP):
        if unit in column:
            allowed = {*column[: column.index(unit) + 1], *BASE[: None if column != BASE else 0]}
            if column == TOP:
                allowed.update(INFERENCE, TRAINING)
            return (allowed | MEETINGS.get(unit, set())) - APART.get(unit, set())
    raise KeyError(unit)


def layer_breaches(directory: Path) -> list[str]:
    """Return a line for every import that points upward or aside in `directory`, a biper_engine."""
    units = {p.stem for p in directory.glob("*.py")} | {p.name for p in directory.glob("*/")}
    known = units | {*BASE, *INFERENCE, *TRAINING, *TOP}
    breaches = []
    for module, found in imports(directory, PACKAGE):
        importer, imported = unit_of(module, known), unit_of(found.target, known)
        if found.target.partition(".")[0] != PACKAGE:
            continue
        try:
            allowed = imported in below(importer)
        except KeyError:
            breaches.append(f"{found}: {importer} has no layer; give it one in {__file__}")
            continue
        if not allowed:
            breaches.append(f"{found}: {importer} may not import {imported}")
    return breaches


def test_the_page_for_contributors_lists_the_layers() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Layers")[2]
    listed = re.findall(r"`(\w+)`", page.partition("- On top")[0])
    elsewhere = ("kernels", "_cpu", "_cuda")
    assert listed == [unit for unit in (*BASE, *INFERENCE, *TRAINING) if unit not in elsewhere]


def kernel_breaches(directory: Path) -> list[str]:
    """Return a line for every import in `directory` of anything but triton, torch and itself."""
    own = f"{PACKAGE}.kernels"
    return [
        f"{found}: kernels import triton and torch only"
        for _, found in imports(directory, own)
        if found.target.partition(".")[0] not in {"__future__", "torch", "triton"}
        and not f"{found.target}.".startswith(f"{own}.")
    ]


def import_circle(directory: Path, package: str = "") -> list[str]:
    """Return modules in `directory` of which each imports the next, from one back to it, or none.

    Args:
        directory: of the modules; imports within functions count, too.
        package: that they are in, whose own `__init__` may import them all; none if they are found
            on the path.
    """
    every = [(module.lstrip("."), each.target) for module, each in imports(directory, package)]
    found = [(module, target) for module, target in every if module != package]
    names = {module for module, _ in found}
    order: TopologicalSorter[str] = TopologicalSorter()
    for module, target in found:
        imported = target if target in names else target.rpartition(".")[0]
        if imported in names:
            order.add(module, imported)
    try:
        order.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def plant(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


def test_imports_point_downward() -> None:
    assert layer_breaches(ROOT / PACKAGE) == []


def test_every_unit_has_a_layer() -> None:
    layers = {*BASE, *INFERENCE, *TRAINING, *TOP}
    modules = {p.stem for p in (ROOT / PACKAGE).glob("*.py")}
    packages = {p.parent.name for p in (ROOT / PACKAGE).glob("*/__init__.py")}
    assert modules | packages <= layers


def test_no_modules_import_each_other() -> None:
    assert import_circle(ROOT / PACKAGE, PACKAGE) == []


def test_a_planted_circle_in_the_package_is_found(tmp_path: Path) -> None:
    files = {"ops/__init__.py": "", "ops/a.py": "from biper_engine.ops import b"}
    files["ops/b.py"] = "def f():\n    from .c import x"
    files["ops/c.py"] = "from .a import y"
    found = import_circle(plant(tmp_path, files), PACKAGE)
    assert set(found) == {f"{PACKAGE}.ops.{name}" for name in "abc"}


def test_kernels_import_triton_and_torch_only() -> None:
    assert kernel_breaches(ROOT / "kernels") == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bits.py", "import biper_engine.ops"),
        ("bits.py", "import biper_engine.ops.reference as r"),
        ("bits.py", "from biper_engine.ops import reference"),
        ("bits.py", "from biper_engine import ops"),
        ("bits.py", "from . import ops"),
        ("bits.py", "from .ops import reference"),
        ("bits.py", "def f():\n    from biper_engine import ops"),
        ("bits.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import ops"),
        ("bits.py", "import importlib\nimportlib.import_module('biper_engine.ops')"),
        ("bits.py", "from importlib import import_module\nimport_module('.ops', 'biper_engine')"),
        ("bits.py", "from biper_engine import convert"),
        ("bits.py", "import biper_engine"),
        ("bits.py", "from biper_engine import geometry"),
        ("errors.py", "from biper_engine import metadata"),
        ("ops/reference.py", "from ..engine import Engine"),
        ("ops/__init__.py", "from ..runtime import program"),
        ("ops/cuda/launch.py", "from ...runtime import program"),
        ("ops/reference.py", "from biper_engine.nn import layers"),
        ("graph/reading.py", "from biper_engine.converted import ConvertedNetwork"),
        ("converted.py", "from biper_engine.runtime import plan"),
        ("runtime/plan.py", "from biper_engine.serialization import container"),
        ("serialization/proof.py", "from biper_engine.runtime import plan"),
        ("serialization/proof.py", "def f():\n    from biper_engine.engine import Engine"),
        ("engine.py", "class Engine:\n    def load(self):\n        from . import conversion"),
        ("nn/layers.py", "from biper_engine.bits import words"),
        ("models/resnet.py", "from biper_engine.training import data"),
        ("training/data.py", "from biper_engine.engine import Engine"),
        ("conversion/capture.py", "from biper_engine.training import data"),
        ("bench/timer.py", "from biper_engine.models import build"),
        ("training/data.py", "from biper_engine.cli import main"),
        ("__init__.py", "from biper_engine.cli import main"),
        ("surprise.py", "from biper_engine.errors import BiperError"),
        ("bits.py", "from biper_engine.surprise import x"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, name: str, text: str) -> None:
    root = plant(tmp_path, {"surprise.py": "", name: text})
    (breach,) = layer_breaches(root)
    assert breach.startswith(f"{root / name}:{len(text.splitlines())} imports biper_engine")


def test_lawful_imports_are_no_breach(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from .conversion import convert\nfrom .models import build",
        "errors.py": "import torch",
        "metadata.py": "from biper_engine.errors import BiperError",
        "ops/reference.py": "from .. import bits\nfrom .epilogue import Epilogue\nimport numpy",
        "ops/triton.py": "def launch():\n    from biper_engine.kernels import bconv",
        "engine.py": "from biper_engine import runtime, serialization",
        "models/resnet.py": "from ..nn import BinaryConv2d\nfrom ..metadata import Metadata",
        "conversion/__init__.py": "from biper_engine.models import load_checkpoint",
        "bench/__init__.py": "from biper_engine import conversion",
        "cli/__init__.py": "import biper_engine\nfrom biper_engine import training, convert, bench",
        "__main__.py": "from biper_engine.cli import main",
    }
    assert layer_breaches(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    "text", ["import numpy", "from biper_engine.ops import x", "from ..bits import words"]
)
def test_a_planted_import_in_the_kernels_is_found(tmp_path: Path, text: str) -> None:
    lawful = "import triton.language as tl\nfrom . import common\nfrom torch import Tensor\n"
    (breach,) = kernel_breaches(plant(tmp_path, {"bconv.py": lawful + text}))
    assert breach.startswith(f"{tmp_path / 'bconv.py'}:4 ")


def test_benchmarks_do_not_import_each_other_in_a_circle() -> None:
    assert import_circle(ROOT / "benchmarks") == []


@pytest.mark.parametrize(
    "text",
    ["from b import x", "import b", "def f():\n    from b import x", "from c.d import x"],
    ids=repr,
)
def test_a_planted_circle_is_found(tmp_path: Path, text: str) -> None:
    files = {"a.py": text, "b.py": "import a", "c/__init__.py": "", "c/d.py": "from c import e\n"}
    plant(tmp_path, {**files, "c/e.py": "if True:\n    import b", "f.py": "import a"})
    assert {"a", "b"} <= set(import_circle(tmp_path)) <= {"a", "b", "c.d", "c.e"}
    assert import_circle(plant(tmp_path, {"b.py": "import torch"})) == []


def test_import_stays_light() -> None:
    program = f"""
import json, sys
import torch
before = set(sys.modules)
import {PACKAGE}
loaded = sorted(set(sys.modules) - before)
print(json.dumps({{"loaded": loaded, "cuda": torch.cuda.is_initialized()}}))
"""
    done = fresh_run(program)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    heavy = {"triton", "lightning", "pytorch_lightning", "sklearn", "matplotlib", "datasets"}
    extensions = {f"{PACKAGE}._cpu", f"{PACKAGE}._cuda"}
    found = [m for m in result["loaded"] if m.partition(".")[0] in heavy or m in extensions]
    assert PACKAGE in result["loaded"]
    assert found == []
    assert not result["cuda"]


def test_no_file_is_too_long() -> None:
    files = [p for d in (PACKAGE, "kernels") for p in (ROOT / d).rglob("*.py")]
    lines = {
        str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files
    }
    assert {name: n for name, n in lines.items() if n >= MAX_LINES} == {}


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.ops.reference", "tests.test_layers"])
def test_a_warning_from_the_package_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn_explicit("planted", UserWarning, "planted.py", 1, module=module)

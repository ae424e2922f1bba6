"""The pages' code runs, the links lead somewhere, and quoted messages are those of the code."""

import ast
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Pages whose blocks run with every test, or with the deep ones, and what the latter print. The
# blocks of a page run in one program.
QUICK = ("deploy", "how", "index", "own-network")
DEEP = {
    "networks": "16 of 21 layers packed",
    "start": "487 of 500 are right",
    "verify": "layer2.0.conv1           32,768 =      32,768 =      0   1300",
}
ELSEWHERE = {
    "export": "tests/test_docs.py runs it",
    "gpu": "needs a GPU",
    "training": "tests/test_docs.py runs what needs no data of the reader's",
}
OUTSIDE = ("http://", "https://", "mailto:")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        for block in blocks(DOCS / f"{name}.md"):
            exec(compile(block, f"docs/{name}.md", "exec"), names)
    return names


def test_every_page_with_code_is_run_or_says_why_not() -> None:
    with_code = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if blocks(page)}
    assert with_code == {*QUICK, *DEEP, *ELSEWHERE}


@pytest.mark.parametrize("name", QUICK)
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_page(name, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    if name == "how":
        assert printed.splitlines() == ["torch.Size([1, 1, 1, 1]) 213", "2"]
    elif name == "deploy":
        assert printed == "3 0\ntorch.Size([1, 10])\n"
    elif name == "own-network":
        page = (DOCS / f"{name}.md").read_text("utf-8")
        report = str(names["engine"].report)  # type: ignore[attr-defined]
        assert "\n".join(f"    {line}" for line in report.splitlines()[:-1]) in page
        assert (tmp_path / "mynet.biper").exists()


@pytest.mark.deep
@pytest.mark.parametrize("name", DEEP)
def test_the_code_of_a_longer_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(name, tmp_path, monkeypatch)
    assert DEEP[name] in capsys.readouterr().out


def anchors(page: Path) -> set[str]:
    """Return the names that MkDocs gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    plain = [re.sub(r"[^\w\s-]", "", text).strip().lower() for text in headings]
    return {re.sub(r"[-\s]+", "-", text) for text in plain}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(OUTSIDE):
            path, _, anchor = target.partition("#")
            found = (page.parent / path) if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def messages() -> list[str]:
    """Return the texts in the package's code; what is filled in is an ellipsis."""
    texts = []
    for path in (ROOT / "biper_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    texts += [path.read_text("utf-8") for path in (ROOT / "csrc/c").glob("*.cpp")]
    return [plain(text) for text in texts]


def plain(text: str) -> str:
    """Return a text without the marks that Markdown cannot hold in a heading."""
    return " ".join(text.replace("`", "").replace("'…'", "…").split())


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^### `(.*)`$", page, re.M)
    known = messages()
    stems = {quote: plain(quote).strip("… ") for quote in quoted}
    assert [q for q, stem in stems.items() if not any(stem in text for text in known)] == []
    assert len(quoted) > 40


def test_pictures_are_what_their_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["PICTURES"]
    for name, draw in drawn.items():
        assert (DOCS / f"pictures/{name}.svg").read_text("utf-8") == draw(), name


def test_no_function_of_the_reference_is_shown_as_the_module_of_its_name() -> None:
    reference = " ".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    names = re.findall(r"^::: ([\w.]+)$", reference, re.M)
    paths = {name: DOCS.parent / name.replace(".", "/") for name in names}
    modules = [n for n, path in paths.items() if path.with_suffix(".py").exists() or path.is_dir()]
    assert modules == ["biper_engine.errors"]


def test_each_attribute_in_the_reference_has_a_line_of_its_own() -> None:
    """The site takes `a, b: ...` for an attribute `a,` of the type b."""
    reference = " ".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    together = []
    for name in re.findall(r"^::: ([\w.]+)$", reference, re.M):
        doc = inspect.getdoc(pkgutil.resolve_name(name)) or ""
        lines = doc.partition("\nAttributes:\n")[2].partition("\n\n")[0]
        together += [f"{name}: {found}" for found in re.findall(r"^ {4}(\w+,.*?):", lines, re.M)]
    assert together == []


def test_every_public_name_is_in_the_reference() -> None:
    import biper_engine
    from biper_engine import models, nn, ops, serving, training

    reference = " ".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    classes = re.findall(r"^::: ([\w.]+)$", reference, re.M)
    listed = {name.rpartition(".")[2] for name in classes}
    for package in (biper_engine, models, nn, ops, serving, training):
        for name in package.__all__:
            value = getattr(package, name)
            is_module = isinstance(value, type(models))
            is_error = isinstance(value, type) and issubclass(value, Exception)
            assert is_module or is_error or name in listed, f"{package.__name__}.{name}"


@pytest.mark.deep
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet")
    done = subprocess.run(
        (*command, "--site-dir", tmp_path),
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    loaded = re.compile(r'<(?:link|script|img|iframe)[^>]+(?:href|src)="?(?:https?:)?//')
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and 404.html
    assert [page.name for page in pages if loaded.search(page.read_text("utf-8"))] == []
    reference = "".join(page.read_text("utf-8") for page in (tmp_path / "api").glob("*.html"))
    assert "doc-symbol-module" not in reference  # a function and its module have one name

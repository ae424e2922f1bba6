"""The pages in docs agree with the code and with the measurements."""

import re
import runpy
from itertools import combinations
from pathlib import Path

import pytest
from frontier_plot import digest, draw
from frontier_report import PICTURE, rounding, table, verdict, weights
from frontier_result import RESULT, Result
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = DOCS / "networks.md"
TRAININGS = sorted((DOCS.parent / "benchmarks/results").glob("training-*.json"))


def test_the_footprint_is_that_of_the_recorded_result() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["footprint"]() in NETWORKS.read_text("utf-8")


def test_the_table_of_other_papers_is_that_of_the_recorded_result() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["published"]() in NETWORKS.read_text("utf-8")


def test_a_row_of_the_networks_is_what_converting_finds() -> None:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    assert tables["network"]("cifar10/resnet20_1w1a") in NETWORKS.read_text("utf-8")


def test_the_cards_are_those_of_the_trained_networks() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["cards"]() in NETWORKS.read_text("utf-8")


def test_the_tables_of_speed_are_those_of_the_recorded_results() -> None:
    tables = runpy.run_path(str(DOCS.parent / "benchmarks/tables.py"))
    page = (DOCS / "speed.md").read_text("utf-8")
    for name in ("networks", "deployed", "one_thread", "streams", "avx2", "grouped", "layers"):
        assert tables[name]() in page
    for name in ("outside", "peak"):
        assert tables[name]() in " ".join(page.split())


def test_the_tables_of_results_are_those_of_the_recorded_runs() -> None:
    tables = runpy.run_path(str(DOCS / "tables.py"))
    page = (DOCS / "results.md").read_text("utf-8")
    wanted = {path.name.split("-", 1)[1].rpartition("-")[0] for path in TRAININGS}
    assert wanted | {"step"} == set(re.findall(r"^<!-- \w+ ([\w-]+) -->$", page, re.M))
    for function, name in re.findall(r"^<!-- (\w+) ([\w-]+) -->$", page, re.M):
        assert f"<!-- {function} {name} -->\n{tables[function](name)}\n" in page


def test_the_comparison_with_float_networks_is_that_of_the_recorded_result() -> None:
    page, result = (DOCS / "choose.md").read_text("utf-8"), Result.read()
    assert table(result) in page
    for told in (rounding, verdict, weights):
        assert told(result) in " ".join(page.split())
    assert f"]({PICTURE.name})" in page
    with Image.open(PICTURE) as picture:
        assert picture.info["Source"] == digest(RESULT)


def test_no_words_overlap_in_the_picture() -> None:
    figure = draw(Result.read())
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in axes.texts]
    boxes = {f"{i} {text.get_text()}": text.get_window_extent() for i, text in enumerate(texts)}
    overlapping = [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert overlapping == []
    for axes in figure.axes:
        frame = axes.get_window_extent()
        inside = [text.get_window_extent() for text in axes.texts[1:]]
        assert all(box.x0 >= frame.x0 and box.x1 <= frame.x1 for box in inside)
        assert all(box.y0 >= frame.y0 and box.y1 <= frame.y1 for box in inside)


def test_the_example_of_a_trained_network_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "training.md").read_text("utf-8")
    (example,) = re.findall(r"^```python\n(import.*?)^```$", page, re.M | re.S)
    exec(compile(example, "training.md", "exec"), {})
    assert "% of 500 test images" in capsys.readouterr().out


@pytest.mark.weekly
def test_the_networks_are_what_converting_finds() -> None:
    assert runpy.run_path(str(DOCS / "tables.py"))["networks"]() in NETWORKS.read_text("utf-8")


@pytest.mark.deep
def test_the_examples_of_exports_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(name, reason='pip install "biper-engine[export]"')
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    page = (DOCS / "export.md").read_text("utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(compile(block, "docs/export.md", "exec"), names)
    assert names["logits"].shape == (7, 10)  # type: ignore[attr-defined]
    assert "top-1 agreement" in str(names["report"])


def test_every_format_of_exports_has_a_row() -> None:
    from biper_engine.export import FORMATS

    page = (DOCS / "export.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == list(FORMATS)

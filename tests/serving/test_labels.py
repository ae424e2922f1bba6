"""Labels in tables of images: they are in the results as they are in the tables."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from biper_engine.errors import DataError
from biper_engine.serving import parts, predict
from biper_engine.serving.classifier import open_classifier
from biper_engine.serving.inputs import open_inputs

pa = pytest.importorskip("pyarrow", reason='pip install "biper-engine[serve]"')
pq = pytest.importorskip("pyarrow.parquet")


def labelled(labels: Any, path: Path) -> None:
    """Write a table of images that cannot be read, in row groups of two."""
    columns = {"image": pa.array([b""] * len(labels), pa.binary()), "label": labels}
    pq.write_table(pa.table(columns), path, row_group_size=2)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (pa.array([2**64 - 1, 0, None], pa.uint64()), "uint64"),
        (pa.array([-128, 127, None], pa.int8()), "int64"),
        (pa.array([True, False, None]), "bool"),
        (pa.array([0.1, 3.0, None], pa.float32()), "double"),
        (pa.array([0.5, 65504.0, None], pa.float16()), "double"),
        (pa.array([0.1, float("inf"), None]), "double"),
        (pa.array(["ant", None, "bee"]).dictionary_encode(), "string"),
        (pa.array([7, None, 9], pa.int16()).dictionary_encode(), "int64"),
        (pa.array(["ant", None, "bee"], pa.large_string()), "string"),
        (pa.nulls(3), "null"),
        (pa.array([b"x", None, b""]), "binary"),
        (pa.array([[1, 5], None, []], pa.list_(pa.int32())), "list<element: int32>"),
        (pa.array([1, None, 3], pa.timestamp("ns")), "timestamp[ns]"),
        (pa.array([{"box": [1.5], "name": "ant"}, None, {}]), None),
    ],
)
def test_labels_are_those_of_the_table(
    network: Path, tmp_path: Path, labels: Any, kind: str | None
) -> None:
    labelled(labels, tmp_path / "in.parquet")
    predict(network, tmp_path / "in.parquet", tmp_path / "out", rows_per_part=2)
    found = pq.read_table(tmp_path / "out")
    assert found.column_names[:3] == ["row", "image", "label"]
    column = found.column("label")
    assert kind is None or str(column.type) == kind
    wanted = labels if kind is None else labels.cast(column.type)
    assert column.combine_chunks().equals(wanted)
    assert predict(network, tmp_path / "in.parquet", tmp_path / "out", rows_per_part=2).failed == 3


def test_tables_may_differ_in_the_width_of_labels(network: Path, tmp_path: Path) -> None:
    """Tables of pandas do: each has the categories of its own rows."""
    (tmp_path / "in").mkdir()
    labelled(pa.array(["ant", "bee"]).dictionary_encode(), tmp_path / "in/a.parquet")
    labelled(pa.array(["cat"], pa.large_string()), tmp_path / "in/b.parquet")
    labelled(pa.array(["dog", "ant"]).dictionary_encode(), tmp_path / "in/c.parquet")
    predict(network, tmp_path / "in", tmp_path / "out")
    found = pq.read_table(tmp_path / "out").column("label").to_pylist()
    assert found == ["ant", "bee", "cat", "dog", "ant"]
    labelled(pa.array([1.5]), tmp_path / "in/d.parquet")
    with pytest.raises(DataError, match=r"'label' \(double\), but .* 'label' \(string\)"):
        predict(network, tmp_path / "in", tmp_path / "other")


def test_labels_that_changed_since_are_refused(network: Path, tmp_path: Path) -> None:
    labelled(pa.array([1, 2]), tmp_path / "in.parquet")
    (part,) = open_inputs(tmp_path / "in.parquet", rows_per_part=2).parts
    pq.write_table(pa.table({"image": [b"", b""]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"Cannot read '.*' in the column 'label' of its groups"):
        part.labels()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_table_with_other_rows_than_before_is_refused(
    network: Path, tmp_path: Path, rows: int
) -> None:
    """It was replaced after the run counted its rows."""
    labelled(pa.array([1, 2]), tmp_path / "in.parquet")
    (part,) = open_inputs(tmp_path / "in.parquet", rows_per_part=2).parts
    pq.write_table(pa.table({"image": [b""] * rows, "label": [1] * rows}), tmp_path / "in.parquet")
    arguments = (
        open_classifier(network),
        part,
        tmp_path / "out.parquet",
        parts.PartOptions(run=""),
    )
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DataError, match=f"has {rows} rows in its gr"),
    ):
        parts.predict_part(*arguments, pool)
    assert not (tmp_path / "out.parquet").exists()

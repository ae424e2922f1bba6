"""Batch runs without Ray: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import biper_engine
from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor
from biper_engine.serving import Predictions, parts, predict
from biper_engine.serving.ray_predict import connected
from tests.networks_by_hand import classifier

from .conftest import noise_image, preparation

pa = pytest.importorskip("pyarrow", reason='pip install "biper-engine[serve]"')
pq = pytest.importorskip("pyarrow.parquet")


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return sorted(rows, key=lambda row: row["row"])


def plain_loop(network: Path, photos: Path) -> list[dict[str, Any]]:
    """Return what a loop over the sorted paths finds, one image at a time."""
    engine = biper_engine.load(network)
    assert engine.metadata is not None
    assert engine.metadata.class_names is not None
    rows: list[dict[str, Any]] = []
    files = (path for path in photos.rglob("*") if path.suffix in (".png", ".jpg"))
    for number, path in enumerate(sorted(files)):
        row: dict[str, Any] = {"row": number, "image": path.relative_to(photos).as_posix()}
        try:
            logits = engine(image_to_tensor(path, engine.metadata)[None])[0]
        except ValueError:
            rows.append({**row, "index": None, "class": None, "probability": None})
            continue
        index = int(logits.argmax())
        share = float(logits.softmax(0)[index])
        names = engine.metadata.class_names
        rows.append({**row, "index": index, "class": names[index], "probability": share})
    return rows


def without_error(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "error"} for row in rows]


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (4, 7), (5, 1000), (64, 23)])
def test_every_image_is_a_row_as_in_a_plain_loop(
    network: Path, photos: Path, tmp_path: Path, batch: int, rows: int
) -> None:
    done = predict(network, photos, tmp_path / "out", batch_size=batch, rows_per_part=rows)
    assert done == Predictions(out=tmp_path / "out", rows=23, failed=1, continued=0)
    found = rows_of(tmp_path / "out")
    assert without_error(found) == plain_loop(network, photos)
    (failed,) = [row for row in found if row["error"] is not None]
    assert failed["image"] == "tief/broken.png"
    assert failed["error"].startswith("Cannot read an image from 'tief/broken.png': ")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == -(-23 // rows)


def test_logits_are_there_if_asked_for(network: Path, photos: Path, tmp_path: Path) -> None:
    predict(network, photos, tmp_path, logits=True)
    engine = biper_engine.load(network)
    assert engine.metadata is not None
    for row in rows_of(tmp_path):
        if row["error"] is None:
            tensor = image_to_tensor(photos / row["image"], engine.metadata)
            assert row["logits"] == engine(tensor[None])[0].tolist()
        else:
            assert row["logits"] is None


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process that the caller may kill; return its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.some(2)
@pytest.mark.parametrize("parts_done", [0, 1, 5, 7])
def test_a_killed_run_goes_on_and_has_every_row_once(
    network: Path, photos: Path, tmp_path: Path, parts_done: int
) -> None:
    def die(done: int, rows: int) -> None:
        if done >= 3 * parts_done:
            os._exit(9)

    out = tmp_path / "out"
    killed = in_child(lambda: predict(network, photos, out, rows_per_part=3, progress=die))
    assert killed == 9
    done = predict(network, photos, out, rows_per_part=3)
    assert done == Predictions(out=out, rows=23, failed=1, continued=3 * parts_done)
    assert without_error(rows_of(out)) == plain_loop(network, photos)


def test_a_run_that_is_killed_while_it_writes_leaves_no_half_file(
    network: Path, photos: Path, tmp_path: Path
) -> None:
    def half(path: Path, write: Callable[[Any], object]) -> None:
        if path.name == "part-00002.parquet":
            path.with_name(f".{path.name}.{'0' * 16}.tmp").write_bytes(b"PAR1 half")
            os._exit(9)
        write_atomically(path, write)

    def run() -> None:
        parts.write_atomically = half  # type: ignore[attr-defined]
        predict(network, photos, tmp_path, rows_per_part=5)

    write_atomically = parts.write_atomically  # type: ignore[attr-defined]
    assert in_child(run) == 9
    assert len(rows_of(tmp_path)) == 10
    assert predict(network, photos, tmp_path, rows_per_part=5).continued == 10
    assert without_error(rows_of(tmp_path)) == plain_loop(network, photos)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


@pytest.mark.parametrize("contents", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_damaged_part_is_made_again(
    network: Path, photos: Path, tmp_path: Path, contents: bytes
) -> None:
    predict(network, photos, tmp_path, rows_per_part=10)
    (tmp_path / "part-00001.parquet").write_bytes(contents)
    assert predict(network, photos, tmp_path, rows_per_part=10).continued == 13
    assert without_error(rows_of(tmp_path)) == plain_loop(network, photos)


def test_a_part_of_another_run_is_made_again(network: Path, photos: Path, tmp_path: Path) -> None:
    predict(network, photos, tmp_path / "a", rows_per_part=10)
    predict(network, photos, tmp_path / "b", rows_per_part=10, metadata=darker())
    shutil.copy(tmp_path / "b/part-00000.parquet", tmp_path / "a/part-00000.parquet")
    assert predict(network, photos, tmp_path / "a", rows_per_part=10).continued == 13
    assert without_error(rows_of(tmp_path / "a")) == plain_loop(network, photos)


def darker() -> Metadata:
    return preparation(0.9)


def test_other_preprocessing_gives_other_answers(
    network: Path, photos: Path, tmp_path: Path
) -> None:
    for name, metadata in (("a", None), ("b", darker())):
        predict(network, photos, tmp_path / name, metadata=metadata)
    shares = [[row["probability"] for row in rows_of(tmp_path / name)] for name in "ab"]
    assert shares[0] != shares[1]


# -- tables ---------------------------------------------------------------------------------------


def table(photos: Path, path: Path, *, group: int = 4, struct: bool = True) -> list[str]:
    """Write the images of a folder as a table; return their names."""
    files = sorted(p for p in photos.rglob("*") if p.suffix in (".png", ".jpg"))
    names = [file.relative_to(photos).as_posix() for file in files]
    contents = [file.read_bytes() for file in files]
    cells: list[Any] = (
        [{"bytes": b, "path": n} for b, n in zip(contents, names, strict=True)]
        if struct
        else contents
    )
    labels = list(range(len(files)))
    pq.write_table(pa.table({"image": cells, "label": labels}), path, row_group_size=group)
    return names


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_tables_give_what_the_folder_gives(
    network: Path, photos: Path, tmp_path: Path, struct: bool, rows: int
) -> None:
    table(photos, tmp_path / "in.parquet", struct=struct)
    done = predict(network, tmp_path / "in.parquet", tmp_path / "out", rows_per_part=rows)
    assert (done.rows, done.failed) == (23, 1)
    found = without_error(rows_of(tmp_path / "out"))
    assert [row.pop("label") for row in found] == list(range(23))
    expected = plain_loop(network, photos)
    assert found == (expected if struct else [{**row, "image": None} for row in expected])


def test_a_folder_of_tables_is_read_in_order(network: Path, tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    contents = []
    for number in range(6):
        noise_image(number).save(tmp_path / "one.png")
        contents.append((tmp_path / "one.png").read_bytes())
    labels = ["cat", "dog", None, "cat", "bee", "ant"]
    for name, of in (("a", slice(0, 2)), ("b", slice(2, 2)), ("deep/c", slice(2, 6))):
        columns = {"photo": pa.array(contents[of], pa.binary()), "name": labels[of]}
        schema = pa.schema([("photo", pa.binary()), ("name", pa.string())])
        pq.write_table(pa.table(columns, schema=schema), tmp_path / f"in/{name}.parquet")
    chosen = {"image_column": "photo", "label_column": "name"}
    predict(network, tmp_path / "in", tmp_path / "out", rows_per_part=3, **chosen)  # type: ignore[arg-type]
    assert [row["label"] for row in rows_of(tmp_path / "out")] == labels


def test_an_empty_cell_is_a_row_with_the_reason(network: Path, tmp_path: Path) -> None:
    cells = pa.array([None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x.png"}])
    pq.write_table(pa.table({"image": cells}), tmp_path / "in.parquet")
    assert predict(network, tmp_path / "in.parquet", tmp_path / "out").failed == 3
    errors = [row["error"] for row in rows_of(tmp_path / "out")]
    assert errors[:2] == [
        f"Cannot read an image from 'row {n}': the cell is empty." for n in range(2)
    ]
    assert errors[2].startswith("Cannot read an image from 'x.png': ")


def test_a_link_that_leads_nowhere_is_a_row_with_the_reason(network: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    noise_image(0).save(folder / "a.png")
    (folder / "b.png").symlink_to("gone.png")
    (folder / "c.png").symlink_to("c.png")
    (folder / "notes").symlink_to("gone")
    assert predict(network, folder, tmp_path / "out").failed == 2
    rows = rows_of(tmp_path / "out")
    assert [row["image"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert rows[1]["error"].startswith("Cannot read an image from 'b.png': ")
    assert predict(network, folder, tmp_path / "out").continued == 3


# -- refusals -------------------------------------------------------------------------------------


def test_the_folder_of_another_run_is_refused(network: Path, photos: Path, tmp_path: Path) -> None:
    predict(network, photos, tmp_path / "out")
    other = tmp_path / "other.biper"
    classifier(5).save(other)
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "bild 1'\".png").unlink()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("results of another .biper file", {"file": other}),
        ("results of images that were prepared otherwise", {"metadata": darker()}),
        ("results of other images, or some were changed", {"images": fewer}),
        ("files of another number of rows", {"rows_per_part": 5}),
        ("files with other columns (logits)", {"logits": True}),
    ]
    for message, changes in cases:
        arguments = {"file": network, "images": photos, **changes}
        with pytest.raises(DataError) as raised:
            predict(out=tmp_path / "out", **arguments)
        assert message in str(raised.value)
    assert predict(network, photos, tmp_path / "out").continued == 23


def test_an_image_that_changed_since_is_not_mixed_in(
    network: Path, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "in")
    predict(network, tmp_path / "in", tmp_path / "out")
    noise_image(99).save(tmp_path / "in/bild 1'\".png")
    with pytest.raises(DataError, match="some were changed, added or removed since"):
        predict(network, tmp_path / "in", tmp_path / "out")


def test_an_image_that_changes_meanwhile_is_said(
    network: Path, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "in")
    image = tmp_path / "in/bild 1'\".png"

    def change(done: int, rows: int) -> None:
        if 0 < done < rows:
            noise_image(99).save(image)

    with pytest.raises(DataError, match=r"bild 1'\".png' was changed while the run read it"):
        predict(network, tmp_path / "in", tmp_path / "out", rows_per_part=8, progress=change)


def test_an_image_that_vanishes_meanwhile_is_a_row_with_the_reason(
    network: Path, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos, tmp_path / "in")

    def remove(done: int, rows: int) -> None:
        shutil.rmtree(tmp_path / "in/tief", ignore_errors=True)

    done = predict(network, tmp_path / "in", tmp_path / "out", progress=remove)
    assert (done.rows, done.failed) == (23, 9)


def test_a_folder_that_cannot_be_made_is_named(network: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Cannot make the folder '.*file/out' for the results: not"):
        predict(network, photos, tmp_path / "file/out")


def test_columns_of_one_name_are_refused(network: Path, tmp_path: Path) -> None:
    images = pa.array([b"x"], pa.binary())
    twice = pa.Table.from_arrays([images, images], names=["image", "image"])
    pq.write_table(twice, tmp_path / "in.parquet")
    with pytest.raises(DataError, match="has several columns 'image'"):
        predict(network, tmp_path / "in.parquet", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 7}'])
def test_a_damaged_description_of_a_run_is_refused(
    network: Path, photos: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / ".biper_run.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="Name another folder for the results"):
        predict(network, photos, tmp_path)


def test_a_folder_with_other_files_is_refused(network: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=r"not of a prediction, such as 'thesis\.txt'"):
        predict(network, photos, tmp_path)
    with pytest.raises(DataError, match="is a file; wanted a folder"):
        predict(network, photos, tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_nothing_to_read_is_refused(network: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"There is no folder or file '.*gone'"):
        predict(network, tmp_path / "gone", tmp_path / "out")
    with pytest.raises(ValueError, match=r"No image file in '.*empty' or below"):
        predict(network, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty/x.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"Cannot read '.*x\.parquet' as Parquet"):
        predict(network, tmp_path / "empty", tmp_path / "out")
    noise_image(0).save(tmp_path / "empty/y.png")
    with pytest.raises(ValueError, match="image files and Parquet files, 1 and 1"):
        predict(network, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="Columns are for Parquet files"):
        predict(network, photos, tmp_path / "out", image_column="image")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_refused(
    network: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def closed(path: Any) -> Any:
        if os.fspath(path).endswith("tief"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match=r"Cannot read the folder '.*tief': Permission"):
        predict(network, photos, tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [1]}, {}, "has no column of images: it has x, wanted one of image, img"),
        ({"image": [b"x"]}, {"image_column": "y"}, "it has image, wanted 'y'"),
        ({"image": [1]}, {}, "The column 'image' of '.*' is int64; wanted the contents"),
        ({"image": ["a.png"]}, {}, "The column 'image' of '.*' is string"),
        ({"image": [{"bytes": "x"}]}, {}, "The column 'image' of '.*' is struct<bytes: string>"),
        ({"image": [{"bytes": [1]}]}, {}, "The column 'image' of '.*' is struct<bytes: list"),
        ({"image": [{"bytes": b"x", "path": 5}]}, {}, "The column 'image' of '.*' is struct"),
        ({"image": [b"x"]}, {"label_column": "y"}, "has no column 'y' of labels"),
        ({"image": pa.array([], pa.binary())}, {}, "has no rows"),
    ],
)
def test_a_table_without_images_is_refused(
    network: Path, tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=message):
        predict(network, tmp_path / "in.parquet", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_results_are_not_read_as_images(network: Path, photos: Path, tmp_path: Path) -> None:
    table(photos, tmp_path / "in.parquet")
    with pytest.raises(DataError, match="results would be read as tables of images"):
        predict(network, tmp_path, tmp_path / "out")


def test_a_network_of_several_inputs_is_refused(two: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes 2 inputs .*; wanted a classifier of one"):
        predict(two, photos, tmp_path / "out")


def test_a_file_that_does_not_say_how_needs_metadata(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.biper"
    classifier(metadata=None).save(path)
    with pytest.raises(ValueError, match="'bare' does not say how its images are prepared"):
        predict(path, photos, tmp_path / "out")
    assert predict(path, photos, tmp_path / "out", metadata=darker()).rows == 23
    wrong = Metadata(input_size=(3, 9, 9))
    with pytest.raises(ValueError, match=r"would become \[3, 9, 9\], but the network takes"):
        predict(path, photos, tmp_path / "out", metadata=wrong)
    names = Metadata(input_size=(3, 8, 8), class_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="3 names of classes, but 'bare' has 10 classes"):
        predict(path, photos, tmp_path / "out", metadata=names)


def test_a_missing_package_is_named(
    network: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"needs 'ray'.*pip install \"biper-engine\[serve\]\""):
        predict(network, photos, tmp_path / "out", workers=2)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Writing Parquet needs 'pyarrow'"):
        predict(network, photos, tmp_path / "out2")


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_said(prefix: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # it does not listen
        address = f"{prefix}127.0.0.1:{free.getsockname()[1]}"
        message = f"Cannot join the Ray cluster at '{address}': .*refused.* Is its head node"
        with pytest.raises(OSError, match=message), connected(NotStarted, None, address):
            raise AssertionError("it is there")


class NotStarted:
    """What is asked of Ray before it joins a cluster."""

    @staticmethod
    def is_initialized() -> bool:
        return False


@pytest.mark.parametrize("name", ["batch_size", "rows_per_part", "workers"])
def test_counts_are_positive(network: Path, photos: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` \(=0\) must be 1 or more"):
        predict(network, photos, tmp_path / "out", **{name: 0})  # type: ignore[arg-type]


def test_the_run_says_what_it_was(network: Path, photos: Path, tmp_path: Path) -> None:
    predict(network, photos, tmp_path)
    said = json.loads((tmp_path / ".biper_run.json").read_text("utf-8"))
    assert said["metadata"]["mean"] == [0.5, 0.5, 0.5]
    assert (said["rows"], said["rows_per_part"], len(said["sha256"])) == (23, 1000, 64)


def test_a_name_that_is_not_utf8_is_escaped(network: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise_image(0).save(tmp_path / "one.png")
    try:
        shutil.copy(tmp_path / "one.png", os.fsencode(tmp_path) + b"/in/\xff.png")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    assert predict(network, tmp_path / "in", tmp_path / "out").failed == 0
    assert [row["image"] for row in rows_of(tmp_path / "out")] == ["\\xff.png"]

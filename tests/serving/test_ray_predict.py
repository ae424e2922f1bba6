"""A batch run in actors of Ray, one of which is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import biper_engine
from biper_engine.errors import DataError
from biper_engine.preprocessing import image_to_tensor
from biper_engine.serving import predict

from .conftest import noise_image
from .test_predict import rows_of

pa = pytest.importorskip("pyarrow", reason='pip install "biper-engine[serve]"')
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = [
    pytest.mark.weekly,
    pytest.mark.skipif(find_spec("ray") is None, reason="no Ray; make test-weekly installs it"),
]

IMAGES, ROWS, BROKEN = 5000, 100, 17


def actors() -> list[int]:
    """Return the processes of the workers of this process's Ray."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" in title and b"PartWorker" in title:
            found.append(int(folder.name))
    return found


def test_a_killed_worker_loses_and_repeats_no_row(network: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(IMAGES):
        place = folder / f"{number % 7}"
        place.mkdir(parents=True, exist_ok=True)
        noise_image(number).save(place / f"{number}.png")
    (folder / f"3/{BROKEN}.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    killed: list[int] = []
    finished = threading.Event()

    def kill_one() -> None:
        while not finished.is_set() and not killed:
            written = len(list(out.glob("part-*.parquet")))
            running = actors()
            if 5 <= written < IMAGES // ROWS - 5 and len(running) == 2:
                os.kill(running[0], signal.SIGKILL)
                killed.append(running[0])
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        done = predict(network, folder, out, workers=2, rows_per_part=ROWS, batch_size=1)
    finally:
        finished.set()
        killer.join()
    assert len(killed) == 1
    assert (done.rows, done.failed, done.continued) == (IMAGES, 1, 0)
    found = rows_of(out)
    assert [row["row"] for row in found] == list(range(IMAGES))
    assert found == expected(network, folder, found)
    print(f"{len(found)} rows, each once; worker {killed[0]} was killed")


def expected(network: Path, folder: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a plain loop gives, with the messages that were found."""
    engine = biper_engine.load(network)
    assert engine.metadata is not None
    assert engine.metadata.class_names is not None
    rows = []
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        row: dict[str, Any] = {"row": number, "image": path.relative_to(folder).as_posix()}
        if path.name == f"{BROKEN}.png":
            none = {"index": None, "class": None, "probability": None}
            rows.append({**row, **none, "error": found[number]["error"]})
            continue
        logits = engine(image_to_tensor(path, engine.metadata)[None])[0]
        index = int(logits.argmax())
        share = float(logits.softmax(0)[index])
        answer = {"index": index, "class": engine.metadata.class_names[index], "error": None}
        rows.append({**row, **answer, "probability": share})
    return rows


def test_what_a_worker_cannot_read_is_said(network: Path, tmp_path: Path) -> None:
    contents = []
    for number in range(4):
        noise_image(number).save(tmp_path / "one.png")
        contents.append((tmp_path / "one.png").read_bytes())
    table, plain = tmp_path / "in.parquet", {"use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"image": contents}), table, row_group_size=2, **plain)
    start = pq.ParquetFile(table).metadata.row_group(1).column(0).data_page_offset
    with table.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 30)
    for workers in (None, 2):
        with pytest.raises(DataError, match=r"Cannot read '.*in\.parquet' at row 0 of its groups"):
            predict(network, table, tmp_path / "out", rows_per_part=2, workers=workers)

"""Compute one part of a batch run, and write it as one Parquet file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from biper_engine.errors import DataError
from biper_engine.files import write_atomically
from biper_engine.preprocessing import open_image
from biper_engine.serving.classifier import Classifier
from biper_engine.serving.inputs import Part, Row

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["PartOptions", "PartResult", "part_file", "predict_part", "whole_part"]

# Key of a Parquet file's metadata, which names the run.
_RUN_KEY = b"biper_run"


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """What all parts of a run share.

    Attributes:
        run: SHA-256 of the run's description; a part of another run is not taken for one of this.
        batch_size: images of a call.
        logits: whether rows have all logits, too.
    """

    run: str
    batch_size: int = 32
    logits: bool = False


class PartResult(NamedTuple):
    """Rows of a part, and of those the ones without a class."""

    rows: int
    failed: int


def part_file(out: Path, number: int) -> Path:
    """Return the name of a part's file."""
    return out / f"part-{number:05}.parquet"


def whole_part(path: Path, part: Part, run: str) -> PartResult | None:
    """Return what a file has if it is this part of this run, whole; else None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, columns=["row", "error"])
    except (pa.ArrowException, OSError, KeyError):
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(_RUN_KEY) != run.encode() or table.num_rows != part.rows:
        return None
    return PartResult(part.rows, part.rows - table.column("error").null_count)


def predict_part(
    classifier: Classifier,
    part: Part,
    path: Path,
    options: PartOptions,
    pool: ThreadPoolExecutor,
) -> PartResult:
    """Classify the images of a part and write its file, whole or not at all.

    Args:
        classifier: the network.
        part: the rows.
        path: file to write.
        options: of the run.
        pool: threads that open and prepare images while the network runs.

    Raises:
        DataError: a table cannot be read, or was changed. An image that cannot be read is a row
            with the reason.
        OSError: the file cannot be written.
    """
    labels = part.labels()
    rows = [
        answer
        for batch in _batched(_prepared(part.read(), classifier, options, pool), options)
        for answer in _answers(classifier, batch, options)
    ]
    if len(rows) != part.rows or (labels is not None and len(labels) != part.rows):
        raise DataError(
            f"'{part.path}' has {len(rows)} rows in its groups {list(part.groups)}, where it had "
            f"{part.rows}: it was changed meanwhile. Start again with another folder for the "
            "results."
        )
    _write(rows, labels, path, options)
    return PartResult(len(rows), sum(row["error"] is not None for row in rows))


_Prepared = tuple[Row, Tensor | str]


def _prepared(
    rows: Iterable[Row], classifier: Classifier, options: PartOptions, pool: ThreadPoolExecutor
) -> Iterator[_Prepared]:
    """Yield rows with their tensor, or with the reason why there is none; in order."""
    waiting: deque[Future[_Prepared]] = deque()
    rows = iter(rows)
    while True:
        missing = 2 * options.batch_size - len(waiting)
        waiting += [pool.submit(_prepare, row, classifier) for row in islice(rows, missing)]
        if not waiting:
            return
        yield waiting.popleft().result()


def _prepare(row: Row, classifier: Classifier) -> _Prepared:
    name = row.image or f"row {row.number}"
    if row.source is None:
        return row, f"Cannot read an image from '{name}': the cell is empty."
    try:
        return row, classifier.tensor(open_image(row.source, name))
    except ValueError as error:
        return row, str(error)


def _batched(rows: Iterator[_Prepared], options: PartOptions) -> Iterator[list[_Prepared]]:
    while batch := list(islice(rows, options.batch_size)):
        yield batch


def _answers(
    classifier: Classifier, batch: list[_Prepared], options: PartOptions
) -> Iterator[dict[str, Any]]:
    tensors = [found for _, found in batch if isinstance(found, Tensor)]
    logits = iter(classifier(torch.stack(tensors)) if tensors else ())
    for row, found in batch:
        answer = {"row": row.number, "image": row.image}
        if isinstance(found, Tensor):
            yield {**answer, **_classified(next(logits), classifier, options)}
        else:
            yield {**answer, "error": found}


def _classified(logits: Tensor, classifier: Classifier, options: PartOptions) -> dict[str, Any]:
    values = logits.tolist()
    if not all(map(isfinite, values)):
        return {"error": "The network's logits are not finite."}
    index = int(logits.argmax())
    names = classifier.class_names
    found = {
        "index": index,
        "class": names[index] if names else None,
        "probability": float(logits.softmax(0)[index]),
        "error": None,
    }
    return {**found, "logits": values} if options.logits else found


def _write(
    rows: list[dict[str, Any]], labels: pa.ChunkedArray | None, path: Path, options: PartOptions
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=_schema(options))
    if labels is not None:
        table = table.add_column(2, "label", labels)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    contents = sink.getvalue()
    write_atomically(path, lambda file: file.write(memoryview(contents)))


def _schema(options: PartOptions) -> pa.Schema:
    """Return the columns, apart from labels."""
    import pyarrow as pa

    fields = [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("class", pa.string()),
        pa.field("probability", pa.float32()),
        *([pa.field("logits", pa.list_(pa.float32()))] if options.logits else []),
        pa.field("error", pa.string()),
    ]
    return pa.schema(fields, metadata={_RUN_KEY: options.run.encode()})

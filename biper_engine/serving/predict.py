"""Classify many images into a folder of Parquet files: here, or in actors of Ray.

The rows of an input are cut into parts, always in the same way. Each part is one file, which is
written under another name and then renamed. So what is there is whole, a run that was interrupted
makes the parts that are missing, and two workers that make the same part write the same file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper_engine.errors import DataError
from biper_engine.files import os_error, write_atomically
from biper_engine.metadata import Metadata
from biper_engine.serving.classifier import Classifier, open_classifier
from biper_engine.serving.inputs import Inputs, Part, open_inputs
from biper_engine.serving.packages import require_package
from biper_engine.serving.parts import (
    PartOptions,
    PartResult,
    part_file,
    predict_part,
    whole_part,
)

__all__ = ["Predictions", "predict"]

RUN_FILE = ".biper_run.json"
"""Readers of folders of Parquet pass over names with a dot in front."""

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a batch run wrote.

    Attributes:
        out: the folder; any reader of Parquet takes it as one table.
        rows: images, each of which is a row.
        failed: rows without a class, whose `error` says why.
        continued: rows that an earlier, interrupted run had written.
    """

    out: Path
    rows: int
    failed: int
    continued: int


Progress = Callable[[int, int], None]


def predict(
    file: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    metadata: Metadata | None = None,
    batch_size: int = 32,
    rows_per_part: int = 1000,
    logits: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Classify all images of a folder or of Parquet files, and write a folder of Parquet files.

    Its columns: `row`, the image's number from 0; `image`, its path below the folder, or that of
    the table; `label`, that of the table, if it has one; `index`, `class` and `probability` of the
    likeliest class; `logits`, if asked for; `error`, why an image has no class. Images are in the
    order of their paths, or of the tables. The same call goes on with a run that was interrupted.

    Args:
        file: a `.biper` file of a classifier.
        images: a folder with images at any depth, one image, a Parquet file with a column of
            images, or a folder of such files.
        out: a folder: new, empty, or that of the same run.
        metadata: how images are prepared; None takes what the file says.
        batch_size: images of a call.
        rows_per_part: rows of a file in `out`, and what an interruption loses at most; a row group
            of a table stays whole.
        logits: whether rows have all logits.
        image_column: of tables; None takes the usual names, as `image`.
        label_column: of tables; None takes the usual names, as `label`, if there is one.
        workers: engines, each of which is an actor of Ray; None runs one here, without Ray, or,
            with `ray`, one for each processor of the cluster.
        ray: address of a Ray cluster, such as "auto"; None starts one here if there are `workers`.
            Its nodes must see `file`, `images` and `out` under the same paths.
        progress: called with the rows done and all rows.

    Raises:
        FileFormatError: `file` is damaged, or no `.biper` file.
        DataError: a table cannot be read, a file of images was changed meanwhile, or `out` has
            something else than this run.
        ValueError: there is no image, the network is no classifier, or nobody says how images are
            prepared.
        ImportError: a package is missing; the message has the command that installs it.
        OSError: a file cannot be read or written.
    """
    require_package("pyarrow", "Writing Parquet")
    for name, value in (("batch_size", batch_size), ("rows_per_part", rows_per_part)):
        _require_positive(name, value)
    if workers is not None:
        _require_positive("workers", workers)
    classifier = open_classifier(file, metadata=metadata)
    known = classifier.require_metadata()
    columns = {"image_column": image_column, "label_column": label_column}
    inputs = open_inputs(images, rows_per_part=rows_per_part, **columns)
    described = _described(classifier, known, inputs, rows_per_part, logits)
    run = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    options = PartOptions(run=run, batch_size=batch_size, logits=logits)
    folder = _open_folder(Path(out), Path(images), described)
    found = {n: whole_part(part_file(folder, n), p, run) for n, p in enumerate(inputs.parts)}
    missing = {n: part for n, part in enumerate(inputs.parts) if found[n] is None}
    done = [result for result in found.values() if result is not None]
    continued = sum(result.rows for result in done)
    if workers is None and ray is None:
        results = _run_here(classifier, missing, folder, options)
    else:
        from biper_engine.serving.ray_predict import run_on_ray

        job = {"file": str(Path(file).absolute()), "sha256": classifier.sha256, "out": str(folder)}
        results = run_on_ray(job, known, missing, options, workers, ray)
    _follow(results, done, inputs.rows, progress)
    inputs.require_unchanged()
    failed = sum(result.failed for result in done)
    return Predictions(out=folder, rows=inputs.rows, failed=failed, continued=continued)


def _follow(
    results: Iterator[PartResult], done: list[PartResult], rows: int, progress: Progress | None
) -> None:
    """Collect the results in `done`, and report on them."""
    report = progress or (lambda *_: None)
    report(sum(result.rows for result in done), rows)
    for result in results:
        done.append(result)
        report(sum(result.rows for result in done), rows)


def _run_here(
    classifier: Classifier, parts: dict[int, Part], folder: Path, options: PartOptions
) -> Iterator[PartResult]:
    # Pillow releases Python's lock while it decodes, so its threads work beside the engine's.
    with closing(_Pool(classifier.engine.num_threads)) as pool:
        for number, part in parts.items():
            path = part_file(folder, number)
            yield predict_part(classifier, part, path, options, pool.threads)


class _Pool:
    """Threads whose waiting work is dropped at the end, so that Ctrl-C need not wait for it."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(max(1, threads))

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` (={value}) must be 1 or more.")


def _described(
    classifier: Classifier, metadata: Metadata, inputs: Inputs, rows_per_part: int, logits: bool
) -> dict[str, Any]:
    """Return what tells one run from another, as JSON values."""
    first = inputs.parts[0]
    return {
        "format": _FORMAT,
        "sha256": classifier.sha256,
        "metadata": metadata.to_dict(),
        "images_sha256": inputs.sha256,
        "columns": first.columns and list(first.columns),
        "rows": inputs.rows,
        "rows_per_part": rows_per_part,
        "logits": logits,
    }


_DIFFERENCES = {
    "format": "the results of another version",
    "sha256": "results of another .biper file",
    "metadata": "results of images that were prepared otherwise (mean, std, size or labels)",
    "images_sha256": "results of other images, or some were changed, added or removed since",
    "columns": "results of other columns",
    "rows": "results of another number of images",
    "rows_per_part": "files of another number of rows",
    "logits": "files with other columns (logits)",
}


def _open_folder(out: Path, images: Path, described: dict[str, Any]) -> Path:
    """Make the folder of a run, or return that of the same run.

    Raises:
        DataError: there is something else.
        OSError: it cannot be made or read.
    """
    if images.is_dir() and _is_within(out, images) and described["columns"]:
        raise DataError(
            f"'{out}' is in '{images}', so that results would be read as tables of images. Name "
            "another folder for the results."
        )
    if out.exists() and not out.is_dir():
        raise DataError(f"'{out}' is a file; wanted a folder for the results, new or empty.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(
            error.errno or errno.EIO,
            f"Cannot make the folder '{out}' for the results: {(error.strerror or '').lower()}.",
        ) from error
    path = out / RUN_FILE
    if path.exists():
        _compare(path, described)
    elif _strangers(out):
        raise DataError(
            f"'{out}' has files that are not of a prediction, such as '{_strangers(out)[0]}'. Name "
            "a new folder for the results, or an empty one."
        )
    else:
        text = json.dumps(described, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
    return out.absolute()


def _strangers(out: Path) -> list[str]:
    """Return names in a folder, apart from temporary files of a run that was killed at once."""
    return sorted(name for name in os.listdir(out) if not name.startswith(f".{RUN_FILE}."))


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _compare(path: Path, described: dict[str, Any]) -> None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"'{path}' is damaged, so that nobody knows whose results '{path.parent}' has: "
            f"{error}. Name another folder for the results."
        ) from error
    wanted = json.loads(json.dumps(described))
    for key, told in _DIFFERENCES.items():
        if not isinstance(held, dict) or held.get(key) != wanted[key]:
            raise DataError(
                f"'{path.parent}' has {told}. Name another folder for the results, or remove this "
                "one to start again."
            )

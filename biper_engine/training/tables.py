"""Parquet, WebDataset and hub data sets through the library `datasets`, imported when needed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from biper_engine.errors import DataError
from biper_engine.preprocessing import open_image
from biper_engine.training.config import TrainingConfig
from biper_engine.training.examples import Examples, counted_classes, whole_label

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Stream", "TableExamples", "Tables", "is_table", "load_tables"]

_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_TEST_SPLITS = ("test", "validation", "val", "valid")
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")
# Images among which a stream draws the next one.
_SHUFFLED = 1000


class _Columns(NamedTuple):
    """Where image and label are, and how a label becomes a number."""

    image: str
    label: str
    names: tuple[str, ...] | None
    source: str

    def read(self, row: Mapping[str, Any], number: int) -> tuple[Image, int]:
        """Return image and label of a row."""
        cell = row[self.image]
        contents = cell.get("bytes") if isinstance(cell, Mapping) else cell
        path = cell.get("path") if isinstance(cell, Mapping) else None
        name = f"{self.source}, {row.get('__key__') or path or f'row {number}'}"
        source = contents if contents is not None else path
        if not isinstance(source, bytes | str):
            raise ValueError(f"Cannot read an image from '{name}': the cell has no bytes.")
        return open_image(source, name), self.number(row[self.label], name)

    def number(self, label: Any, where: str) -> int:
        """Return a label as a number; `where` is what an error calls its row."""
        if not isinstance(label, str) or self.names is None:
            return whole_label(label, f"'{where}'")
        if label not in self.names:
            raise DataError(
                f"'{where}' has the label {label!r}, which is no class of the training images: "
                f"{', '.join(self.names[:10])}{', ...' if len(self.names) > 10 else ''}."
            )
        return self.names.index(label)


class TableExamples(Examples):
    """Rows of a table that can be indexed."""

    def __init__(self, table: Any, columns: _Columns) -> None:
        self._table = table
        self._columns = columns

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> tuple[Image, int]:
        return self._columns.read(self._table[index], index)

    def labels(self) -> Tensor:
        column = self._table.with_format(None)[self._columns.label]
        where = self._columns.source
        values = [
            self._columns.number(one, f"{where}, row {number}") for number, one in enumerate(column)
        ]
        return torch.tensor(values, dtype=torch.int64)


class Stream:
    """Rows of a table that come one after another.

    Attributes:
        count: how many there are, or None if nobody knows.
        shards: files; each worker process reads files of its own.
    """

    def __init__(self, table: Any, columns: _Columns, count: int | None) -> None:
        self._table = table
        self._columns = columns
        self.count = count
        self.shards = int(table.num_shards)

    def rows(
        self, seed: int | None, epoch: int, rank: int, world: int
    ) -> Iterator[tuple[int, Image | str, int]]:
        """Yield number, image and label of the rows of this process and worker.

        An image that cannot be read is its message, with label -1. With a seed the rows are
        shuffled, among neighbours and by file.
        """
        from datasets.distributed import split_dataset_by_node

        table = self._table
        if seed is not None:
            table = table.shuffle(seed=seed % 2**32, buffer_size=_SHUFFLED)
            table.set_epoch(epoch)
        if world > 1:
            table = split_dataset_by_node(table, rank, world)
        for number, row in enumerate(self._read(table)):
            try:
                found = self._columns.read(row, number)
            except DataError:
                raise
            except ValueError as error:
                yield number, str(error), -1
            else:
                yield number, *found

    def _read(self, table: Any) -> Iterator[Mapping[str, Any]]:
        try:
            yield from table
        except (OSError, ValueError, tarfile.TarError) as error:
            raise DataError(f"Cannot read '{self._columns.source}' to its end: {error}") from error


class Tables(NamedTuple):
    """A data set of tables: `test` is None if there is no split for it."""

    train: TableExamples | Stream
    test: TableExamples | Stream | None
    num_classes: int
    class_names: tuple[str, ...] | None


def is_table(path: Path) -> bool:
    """Tell whether a path is a Parquet or WebDataset file, or a folder with such files."""
    if path.is_file():
        return path.suffix in _BUILDERS
    return path.is_dir() and any(True for end in _BUILDERS for _ in path.glob(f"**/*{end}"))


def load_tables(source: str, config: TrainingConfig) -> Tables:
    """Load `source`, a local path or a name on the hub.

    Raises:
        DataError: it cannot be read, has no images or labels, or the number of classes is unknown.
        ImportError: the library `datasets` is missing.
    """
    splits = _splits(source, config.streaming)
    train = splits.get("train")
    if train is None:
        raise DataError(
            f"'{source}' has no split 'train', only {', '.join(map(repr, splits)) or 'none'}. "
            "Name its files or folders so."
        )
    test = next((splits[name] for name in _TEST_SPLITS if name in splits), None)
    if test is None and config.streaming:
        raise DataError(
            f"'{source}' has no split {_TEST_SPLITS[0]!r} or {_TEST_SPLITS[1]!r}, and a stream "
            "cannot be split. Add one, or leave streaming out."
        )
    columns = _columns(source, train, config)
    count, names = _classes(source, train, columns, config)
    if names is not None:
        _require_names(Path(source), columns.label, names)
    columns = columns._replace(names=names)
    kind = _stream if config.streaming else TableExamples
    parts = [None if one is None else kind(_raw(one, columns), columns) for one in (train, test)]
    assert parts[0] is not None
    return Tables(parts[0], parts[1], count, names)


def _require_names(path: Path, column: str, names: tuple[str, ...]) -> None:
    """Require the classes' names in one order in every file: `datasets` takes those of the first.

    Raises:
        DataError: a file has them in another order, or others.
    """
    import pyarrow.parquet as pq

    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        if file.suffix != ".parquet":
            continue
        told = json.loads((pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
        feature = told.get("info", {}).get("features", {}).get(column, {})
        found = feature.get("names") if isinstance(feature, dict) else None
        if found is not None and tuple(found) != names:
            raise DataError(
                f"'{file}' numbers the classes otherwise, {', '.join(found[:10])}, than training "
                f"images, {', '.join(names[:10])}. Write all files with the same class names."
            )


def _splits(source: str, streaming: bool) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Reading '{source}' needs 'datasets', which cannot be imported: {error}. "
            'Run: pip install "biper-engine[train]"'
        ) from error
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = Path(source)
    try:
        if path.is_file():
            files = {"train": str(path)}
            return datasets.load_dataset(  # type: ignore[no-any-return, unused-ignore]
                _BUILDERS[path.suffix], data_files=files, streaming=streaming
            )
        return datasets.load_dataset(source, streaming=streaming)  # type: ignore[no-any-return, unused-ignore]
    except DatasetNotFoundError as error:
        raise DataError(
            f"There is no data set '{source}' here, and none on the hub that can be read: {error}"
        ) from error
    except (OSError, ValueError, tarfile.TarError, DatasetGenerationError) as error:
        raise DataError(f"Cannot load '{source}': {error}") from error


def _raw(table: Any, columns: _Columns) -> Any:
    """Leave images undecoded, so that a damaged one can be named."""
    from datasets import Image

    if isinstance(table.features.get(columns.image), Image):
        return table.cast_column(columns.image, Image(decode=False))
    return table


def _stream(table: Any, columns: _Columns) -> Stream:
    split = table.info.splits.get(str(table.split)) if table.info.splits and table.split else None
    return Stream(table, columns, split.num_examples if split else None)


def _columns(source: str, table: Any, config: TrainingConfig) -> _Columns:
    from datasets import ClassLabel, Image

    features = table.features
    if features is None:
        raise DataError(f"The columns of '{source}' are unknown. Write it as Parquet first.")
    found = {}
    for what, given, kind, usual in (
        ("image", config.image_column, Image, _IMAGE_NAMES),
        ("label", config.label_column, ClassLabel, _LABEL_NAMES),
    ):
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        named = [name for name in usual if name in features]
        if given is not None and given not in features:
            raise DataError(
                f"`{what}_column` (={given!r}) is not in '{source}'. Its columns: "
                f"{', '.join(features)}."
            )
        choice = given or next(iter([*(typed if len(typed) == 1 else []), *named]), None)
        if choice is None:
            raise DataError(
                f"It is unclear which column of '{source}' has the {what}. Its columns: "
                f"{', '.join(features)}. Set {what}_column."
            )
        found[what] = choice
    return _Columns(found["image"], found["label"], None, source)


def _classes(
    source: str, table: Any, columns: _Columns, config: TrainingConfig
) -> tuple[int, tuple[str, ...] | None]:
    """Return number and names of the classes."""
    from datasets import ClassLabel

    feature = table.features[columns.label]
    if isinstance(feature, ClassLabel) and feature.names:
        return feature.num_classes, tuple(feature.names)
    if config.streaming:
        if config.num_classes is None:
            raise DataError(
                f"'{source}' does not say how many classes its column '{columns.label}' has, and "
                "a stream cannot be counted. Set num_classes."
            )
        return config.num_classes, None
    values = table.with_format(None)[columns.label]
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
        return len(names), names
    if not all(isinstance(value, int) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise DataError(
            f"The column '{columns.label}' of '{source}' has {kinds}; wanted integers or names."
        )
    return counted_classes(values, f"The column '{columns.label}' of '{source}'"), None

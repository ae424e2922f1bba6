"""What a batch run reads: image files, or Parquet tables, cut into parts.

A part is a range of rows that is read, computed and written as one. The parts of an input are the
same each time, whoever computes them: a run that was interrupted goes on with the missing ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from biper_engine.errors import DataError
from biper_engine.files import os_error

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "Inputs", "Part", "Row", "find_images", "open_inputs"]

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes")
_LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label", "target")


class Row(NamedTuple):
    """One image of an input.

    Attributes:
        number: its place in the whole input, from 0.
        image: its path below the folder, or the path that the table has for it; None without one.
        source: file, or contents; None if the cell is empty.
    """

    number: int
    image: str | None
    source: Path | bytes | None


class Columns(NamedTuple):
    """Names of a table's columns, and the type of labels in results as Arrow prints it."""

    image: str
    label: str | None
    label_type: str | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of an input.

    Attributes:
        first, rows: number of the first row, and of rows.
        path: the folder of image files, or a Parquet file.
        names: of the files below the folder; empty for a table.
        groups: row groups of the Parquet file.
        columns: of the table.
    """

    first: int
    rows: int
    path: str
    names: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    columns: Columns | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        return {**vars(self), "columns": self.columns and list(self.columns)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Part:
        """Build from `to_dict`, also after JSON made lists of tuples."""
        columns = values["columns"] and Columns(*values["columns"])
        lists = {name: tuple(values[name]) for name in ("names", "groups")}
        return cls(**{**values, **lists, "columns": columns})

    def read(self) -> Iterator[Row]:
        """Yield the rows; files are not opened, tables are read bit by bit.

        Raises:
            DataError: the table cannot be read, or changed.
        """
        if self.columns is not None:
            yield from self._read_table(self.columns)
            return
        for offset, name in enumerate(self.names):
            yield Row(self.first + offset, _printable(name), Path(self.path, name))

    def _read_table(self, columns: Columns) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = self.first
        try:
            with pq.ParquetFile(self.path, buffer_size=2**20) as file:
                for batch in file.iter_batches(64, row_groups=self.groups, columns=[columns.image]):
                    for cell in batch.column(columns.image):
                        yield _table_row(number, cell.as_py(), Path(self.path).parent)
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(f"at row {number - self.first}", error) from error

    def labels(self) -> pa.ChunkedArray | None:
        """Return the labels of the rows as results have them; None if there is no column of them.

        Raises:
            DataError: the table cannot be read, or changed.
        """
        if self.columns is None or self.columns.label is None:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self.columns.label
        try:
            with pq.ParquetFile(self.path) as file:
                found = file.read_row_groups(list(self.groups), columns=[name]).column(name)
                return found.cast(_label_type(found.type))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise self._unreadable(f"in the column '{name}'", error) from error

    def _unreadable(self, where: str, error: Exception) -> DataError:
        return DataError(
            f"Cannot read '{self.path}' {where} of its groups {list(self.groups)}: "
            f"{' '.join(str(error).split())} Was it replaced or damaged? Start again with another "
            "folder for the results."
        )


def _table_row(number: int, cell: Any, folder: Path) -> Row:
    """Return the row of a cell: contents, or a struct of contents and path as `datasets` has it."""
    contents = cell.get("bytes") if isinstance(cell, dict) else cell
    path = cell.get("path") if isinstance(cell, dict) else None
    source = contents if contents is not None or path is None else folder / path
    return Row(number, path, source)


def _printable(name: str) -> str:
    """Return a file's name as text: bytes that are not UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


Stamp = tuple[int, int] | None
"""Size and time of a file; None for a link that leads nowhere."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All parts of an input.

    Attributes:
        source: what the user named.
        parts: in order.
        sha256: of everything that tells one input from another: names, sizes and times of files.
        stamps: size and time of each file.
    """

    source: str
    parts: tuple[Part, ...]
    sha256: str
    stamps: dict[Path, Stamp]

    @property
    def rows(self) -> int:
        """Number of images."""
        return sum(part.rows for part in self.parts)

    def require_unchanged(self) -> None:
        """Require that what was read is what `sha256` tells of; a file may be gone by now.

        Raises:
            DataError: a file was changed since.
        """
        for file, stamp in self.stamps.items():
            if _stamp(file) not in (stamp, None):
                raise DataError(
                    f"'{file}' was changed while the run read it, so that nobody knows which "
                    "contents its rows are of. Start again with another folder for the results."
                )


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths`, and every image below each directory, in order.

    Raises:
        ValueError: a path does not exist, or a directory has no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"There is no image or directory '{path}'.")
        if not path.is_dir():
            found.append(path)
            continue
        inside = _images_below(path)
        if not inside:
            raise ValueError(
                f"No image file in '{path}' or below. "
                f"Wanted one of: {', '.join(sorted(_SUFFIXES))}."
            )
        found += inside
    return found


def _images_below(folder: Path) -> list[Path]:
    return [file for file in _files_below(folder) if file.suffix.lower() in _SUFFIXES]


def _files_below(folder: Path) -> list[Path]:
    """Return every file in a folder and its folders, by path; links to folders are not followed.

    A link that leads nowhere is one of them, so that somebody says that its file is missing.

    Raises:
        OSError: a folder cannot be read: its images would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise os_error(
            error.errno or errno.EIO,
            f"Cannot read the folder '{error.filename}': {error.strerror}.",
        ) from error

    walk = os.walk(folder, onerror=refuse)
    return sorted(
        path
        for top, _, names in walk
        for name in names
        if (path := Path(top, name)).is_file() or not path.exists()
    )


def open_inputs(
    images: str | os.PathLike[str],
    *,
    rows_per_part: int,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Inputs:
    """Find the images of a run and cut them into parts; no image is opened.

    Args:
        images: a folder with image files at any depth; a Parquet file, or a folder of such files.
        rows_per_part: rows of a part. Those of a table have whole row groups, and are larger where
            a row group is.
        image_column: of tables; None takes the usual names.
        label_column: of tables; None takes the usual names, and there need not be one.

    Raises:
        ValueError: there is nothing there, no image, or a folder has images and tables.
        DataError: a table cannot be read, or lacks a column.
    """
    path = Path(images)
    if not path.exists():
        raise ValueError(f"There is no folder or file '{path}'.")
    tables = _tables(path)
    files = [] if path.is_file() else _images_below(path)
    if tables and files:
        raise ValueError(
            f"'{path}' has image files and Parquet files, {len(files):,} and {len(tables):,}. "
            "Name the folder of one kind only, or one Parquet file."
        )
    if tables:
        parts = list(_table_parts(tables, rows_per_part, image_column, label_column))
        return _inputs(path, parts, tables)
    if image_column is not None or label_column is not None:
        raise ValueError(f"Columns are for Parquet files; '{path}' has none.")
    if not files:
        files = find_images([path])
    root = path if path.is_dir() else path.parent
    names = [str(file.relative_to(root)) for file in files]
    starts = range(0, len(names), rows_per_part)
    parts = [
        Part(first=start, rows=len(some), path=str(root.absolute()), names=tuple(some))
        for start in starts
        for some in [names[start : start + rows_per_part]]
    ]
    return _inputs(path, parts, files)


def _inputs(path: Path, parts: list[Part], files: Sequence[Path]) -> Inputs:
    if not parts:
        raise ValueError(f"'{path}' has no rows: its Parquet files are empty.")
    root = path if path.is_dir() else path.parent
    digest = hashlib.sha256()
    stamps = {file.absolute(): _stamp(file) for file in files}
    for file, stamp in zip(files, stamps.values(), strict=True):
        name = os.fsencode(file.relative_to(root))
        digest.update(b"%s\0%d %d\n" % (name, *(stamp or (-1, -1))))
    return Inputs(
        source=str(path.absolute()),
        parts=tuple(parts),
        sha256=digest.hexdigest(),
        stamps=stamps,
    )


def _stamp(file: Path) -> Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return [file for file in _files_below(path) if file.suffix == ".parquet"]


def _table_parts(
    tables: Sequence[Path], rows_per_part: int, image: str | None, label: str | None
) -> Iterator[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    columns: Columns | None = None
    for table in tables:
        try:
            with pq.ParquetFile(table) as file:
                found = _columns(table, file.schema_arrow, image, label)
                sizes = [
                    file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)
                ]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"Cannot read '{table}' as Parquet: {error}. Is it complete?"
            ) from error
        if columns is not None and found != columns:
            raise DataError(
                f"'{table}' has the columns {_told(found)}, but '{tables[0]}' has "
                f"{_told(columns)}. All tables of a run must have the same."
            )
        columns = found
        for groups in _grouped(sizes, rows_per_part):
            rows = sum(sizes[group] for group in groups)
            path = str(table.absolute())
            yield Part(first=first, rows=rows, path=path, groups=groups, columns=columns)
            first += rows


def _told(columns: Columns) -> str:
    label = f" and '{columns.label}' ({columns.label_type})" if columns.label else ""
    return f"'{columns.image}'{label}"


def _grouped(sizes: Sequence[int], rows_per_part: int) -> Iterator[tuple[int, ...]]:
    """Yield neighbouring row groups of `rows_per_part` rows together, or of one group if more."""
    taken: list[int] = []
    rows = 0
    for group, size in enumerate(sizes):
        if taken and rows + size > rows_per_part:
            yield tuple(taken)
            taken, rows = [], 0
        if size:
            taken.append(group)
            rows += size
    if taken:
        yield tuple(taken)


def _columns(table: Path, schema: pa.Schema, image: str | None, label: str | None) -> Columns:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"'{table}' has several columns '{twice[0]}'. Rename all but one.")
    usable = [name for name in _IMAGE_NAMES if name in schema.names]
    chosen = image or next(iter(usable), None)
    if chosen is None or chosen not in schema.names:
        wanted = f"'{image}'" if image else f"one of {', '.join(_IMAGE_NAMES)}"
        raise DataError(
            f"'{table}' has no column of images: it has {', '.join(schema.names) or 'none'}, "
            f"wanted {wanted}. Name it with --image-column."
        )
    if not _holds_images(schema.field(chosen).type):
        raise DataError(
            f"The column '{chosen}' of '{table}' is {schema.field(chosen).type}; wanted the "
            "contents of image files (binary), or structs of bytes and path, as the library "
            "datasets writes."
        )
    labelled = label or next((name for name in _LABEL_NAMES if name in schema.names), None)
    if labelled is not None and labelled not in schema.names:
        raise DataError(
            f"'{table}' has no column '{labelled}' of labels: it has {', '.join(schema.names)}."
        )
    kind = None if labelled is None else str(_label_type(schema.field(labelled).type))
    return Columns(chosen, labelled, kind)


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    is_text: bool

    def is_binary(one: pa.DataType) -> bool:
        return bool(pa.types.is_binary(one) or pa.types.is_large_binary(one))

    if not pa.types.is_struct(kind):
        return is_binary(kind)
    held = {field.name: field.type for field in kind}
    contents, path = held.get("bytes"), held.get("path", pa.null())
    is_text = pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return contents is not None and (is_binary(contents) or contents == pa.null()) and is_text


def _label_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of labels in results: the widest of their kind, in which nothing is lost.

    So the tables of a run may differ in width, as those of pandas do. Others stay as they are.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _label_type(kind.value_type)
    if pa.types.is_integer(kind):
        return pa.uint64() if pa.types.is_uint64(kind) else pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return kind

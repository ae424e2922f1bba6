"""The table of tensors in a file: names, dtypes, shapes, and positions of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biper_engine.errors import FileFormatError
from biper_engine.serialization.regular_file import RegularFile

__all__ = ["DTYPES", "TableEntry", "tensor_table"]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of tensors, by their names in safetensors."""

_MOST = (1 << 31) - 1  # largest size
_MAX_RANK = 8
_MAX_VALUES = 1 << 40


@dataclass(frozen=True)
class TableEntry:
    """A tensor of a file.

    Attributes:
        name: its key.
        dtype: one of DTYPES.
        shape: its sizes.
        start: position of its first byte, counted from the end of the header.
        end: position after its last byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self, file: RegularFile, digest: Any) -> Tensor:
        """Return the tensor, in its own memory, and add its bytes to a digest.

        The file must be at its first byte.
        """
        # A file may hold any byte, a bool tensor only 0 and 1.
        is_bool = self.dtype == torch.bool
        tensor = torch.empty(self.shape, dtype=torch.uint8 if is_bool else self.dtype)
        if tensor.numel():
            bytes_of_it: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            memory = memoryview(bytes_of_it)
            file.fill(memory)
            digest.update(memory)
        return tensor.ne(0) if is_bool else tensor


def tensor_table(
    name: str, outer: Mapping[str, Any], header_end: int, size: int
) -> list[TableEntry]:
    """Return the tensors of a file in the order of their bytes.

    Args:
        name: name of the file, for messages.
        outer: header of the file.
        header_end: position at which the tensors' bytes begin.
        size: size of the whole file.

    Raises:
        FileFormatError: an entry has another form, or the tensors do not fill the rest of the file.
    """
    entries = [_entry(name, key, entry) for key, entry in outer.items() if key != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    promised = header_end + max((entry.end for entry in entries), default=0)
    if size < promised:
        raise FileFormatError(
            f"{name} is truncated: file is {size:,} bytes, header promises {promised:,}; copy "
            "or download it again."
        )
    if size > promised:
        raise FileFormatError(
            f"{name} has bytes after its end: file is {size:,} bytes, header promises "
            f"{promised:,}; copy or download it again."
        )
    end = 0
    for entry in entries:
        if entry.start != end:
            raise _damaged(name, entry.name, "does not begin where the one before it ends")
        end = entry.end
    return entries


def _entry(name: str, key: str, entry: Any) -> TableEntry:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest}:
            if rest:
                raise _damaged(name, key, "has unknown entries")
        case _:
            raise FileFormatError(
                f"{name} is damaged: its table of tensors is unreadable; copy or save it again."
            )
    if dtype not in DTYPES:
        raise FileFormatError(
            f"{name} cannot be read: tensor {key!r:.100} has dtype {dtype!r:.100}; known are "
            f"{', '.join(DTYPES)}."
        )
    if len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n <= _MOST for n in shape):
        raise _damaged(name, key, f"cannot have shape {shape!r:.200}")
    if type(start) is not int or type(end) is not int or not 0 <= start <= end < 1 << 60:
        raise _damaged(name, key, f"cannot be at the bytes {[start, end]!r:.200}")
    count = 1
    for length in shape:
        count *= length
    if count > _MAX_VALUES or count * DTYPES[dtype].itemsize != end - start:
        raise _damaged(name, key, f"of shape {shape!r:.200} is not {end - start:,} bytes")
    return TableEntry(key, DTYPES[dtype], tuple(shape), start, end)


def _damaged(name: str, key: str, what: str) -> FileFormatError:
    return FileFormatError(f"{name} is damaged: tensor {key!r:.100} {what}; save it again.")

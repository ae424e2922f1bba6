"""Regular files, read from start to end."""

from __future__ import annotations

import errno
import os
import stat
from types import TracebackType
from typing import Self

from biper_engine.errors import FileFormatError
from biper_engine.files import os_error

__all__ = ["RegularFile"]

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.EACCES: "you may not read it",
    errno.ELOOP: "it is a symbolic link that leads to itself",
}


class RegularFile:
    """A file that is open for reading; a context manager.

    Attributes:
        name: path of the file, for messages.
        size: its size in bytes when it was opened.

    Raises:
        FileFormatError: the path is a directory, a pipe, a device or a socket.
        OSError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fsdecode(os.fspath(path))
        # Without O_NONBLOCK, opening a pipe would block until a process writes to it.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = _open(path, flags, self.name)
        try:
            self.size = _checked_size(self.name, os.fstat(descriptor))
            self._file = os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        """Return the next bytes, or fewer at the end of the file."""
        memory = bytearray(min(count, self.size))
        return bytes(memory[: self._fill(memoryview(memory))])

    def fill(self, memory: memoryview) -> None:
        """Read the next bytes into memory.

        Raises:
            FileFormatError: the file ended early because it became shorter.
        """
        if self._fill(memory) != len(memory):
            raise FileFormatError(
                f"{self.name} is truncated: it was {self.size:,} bytes, and became shorter while "
                "it was read; copy or download it again."
            )

    def _fill(self, memory: memoryview) -> int:
        filled = 0
        while filled < len(memory):
            count = self._file.readinto(memory[filled:])
            if not count:
                break
            filled += count
        return filled


def _open(path: str | os.PathLike[str], flags: int, name: str) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        if os.path.exists(path) and not os.path.isfile(path):  # for example a socket
            raise _irregular(name, os.stat(path).st_mode) from None
        if error.errno is None or error.strerror is None:
            raise
        reason = _REASONS.get(error.errno, error.strerror.lower())
        raise os_error(error.errno, f"Cannot read '{name}': {reason}.") from error


def _checked_size(name: str, status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise _irregular(name, status.st_mode)
    return status.st_size


def _irregular(name: str, mode: int) -> FileFormatError:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
    return FileFormatError(
        f"{name} is {kind}, not a regular file; pass a file that `engine.save` wrote."
    )

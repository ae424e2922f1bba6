"""Write files completely or not at all, and tell one from another."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment, unused-ignore]

__all__ = ["os_error", "sha256_of", "write_atomically"]

_LONGEST_NAME_BYTES = 255
# ".", ".", 16 digits, ".tmp": what a temporary name adds to its target's name.
_EXTRA_BYTES = 22
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link that leads to itself",
}
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it is larger than a file may be here",
    errno.EROFS: "the file system is read-only",
    errno.EBUSY: "it is a mount point, which no other file can take the place of",
}


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name beside it, sync it, and rename it over `path`.

    Permissions of an existing file are kept, and also its owner and group if the system allows it;
    other hard links to it keep the old contents. A file that the user may not write is refused, as
    by `open(path, "wb")`, although a rename could replace it. Temporary files of this target whose
    writer was killed are removed first. A writer locks its own file, so an active writer is never
    taken for a killed one. On Windows there is no lock, and such files stay.

    Args:
        path: file to write; an existing one is replaced, a link's target instead of the link.
        write: called with the open file. If it raises, `path` is unchanged and nothing is left.

    Raises:
        OSError: `path` is not a regular file, or may not be written; the directory is missing,
            read-only or full. An existing file is unchanged.
    """
    target = Path(os.path.realpath(path))
    with _explained(path, target):
        older = _replaceable(path, target)
        _remove_leftovers(target)
        descriptor, temporary = _create(target, 0o666 if older is None else 0o600)
    try:
        with _explained(path, target), os.fdopen(descriptor, "wb") as file:
            recorder = _Recorder(file)
            try:
                write(cast(BinaryIO, recorder))
                file.flush()
            except Exception as error:
                # If writing to its file fails, torch.save raises its own RuntimeError.
                if recorder.failure is None or error is recorder.failure:
                    raise
                raise recorder.failure from error
            if older is not None:
                _keep_owner_and_mode(file.fileno(), older)
            os.fsync(file.fileno())
            if fcntl is not None:  # under the lock, so that nobody takes it for a leftover
                temporary.replace(target)
        if fcntl is None:  # Windows cannot rename an open file
            temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class _Recorder:
    """A binary file that remembers the first OSError of a write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str], target: Path) -> Iterator[None]:
    """Put the path that could not be written before the system's reason; keep the error's class."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and Path(error.filename).parent != target.parent
        if error.errno is None or error.strerror is None or elsewhere:  # ours, or that of `write`
            raise
        if not target.parent.is_dir():
            reason = f"there is no directory '{target.parent}'"
        elif error.errno in (errno.EACCES, errno.EPERM):
            reason = f"you may not create files in '{target.parent}'"
        else:
            reason = _REASONS.get(error.errno, error.strerror.lower())
        kept = " The file that was there is unchanged." if os.path.lexists(target) else ""
        raise os_error(error.errno, f"Cannot write '{os.fspath(path)}': {reason}.{kept}") from error


def os_error(number: int, message: str) -> OSError:
    """Return the OSError class of an error number, with a message instead of `[Errno n]`."""
    failure = type(OSError(number, ""))(message)
    failure.errno = number
    return failure


def _replaceable(path: str | os.PathLike[str], target: Path) -> os.stat_result | None:
    """Return the status of the regular file at `target`, or None if there is no file.

    Raises:
        OSError: there is something else, or a file that may not be written.
    """
    try:
        found = target.lstat()
    except FileNotFoundError:
        if os.fspath(path).endswith(os.sep):
            raise os_error(
                errno.EISDIR, f"Cannot write '{os.fspath(path)}': it is the name of a directory."
            ) from None
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise os_error(
            errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL,
            f"Cannot write '{os.fspath(path)}': it is {kind}. Pass the name of a regular file, "
            "or of a new file.",
        )
    try:
        # This writes nothing, and it would not block if the file has become a pipe meanwhile.
        os.close(os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)))
    except PermissionError as error:
        raise os_error(
            error.errno or errno.EACCES,
            f"Cannot write '{os.fspath(path)}': the file exists and you may not write it. "
            "Change its permissions, or pass another name.",
        ) from error
    return found


def _create(target: Path, mode: int) -> tuple[int, Path]:
    """Create and lock a temporary file beside the target.

    This uses O_EXCL and an explicit mode, so that a new file gets the user's usual permissions;
    `tempfile` would restrict them.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = target.with_name(f".{_stem(target.name)}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, flags, mode)
        if fcntl is None:
            return descriptor, temporary
        # Before the lock is taken, a concurrent writer of the same target may remove the file.
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink > 0:
            return descriptor, temporary
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool | None:
    """Lock a file; False if another process holds the lock, None if there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _stem(name: str) -> str:
    """Return the part of temporary names from the target: its name, or a digest of a long one."""
    encoded = os.fsencode(name)
    if len(encoded) + _EXTRA_BYTES <= _LONGEST_NAME_BYTES:
        return name
    return hashlib.sha256(encoded).hexdigest()


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed writers: those that nobody has locked.

    A file that cannot be examined or removed stays.
    """
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(_stem(target.name))}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if pattern.fullmatch(name):
                _remove_leftover(target.with_name(name))


def _remove_leftover(path: Path) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.lstat().st_mode):
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


def _keep_owner_and_mode(descriptor: int, older: os.stat_result) -> None:
    """Give a new file the older one's permissions, and its group and owner if allowed."""
    mode = stat.S_IMODE(older.st_mode)
    if hasattr(os, "fchown"):
        for owner, group in ((-1, older.st_gid), (older.st_uid, -1)):
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, owner, group)
        made = os.fstat(descriptor)
        if (made.st_uid, made.st_gid) != (older.st_uid, older.st_gid):
            mode &= 0o777  # no setuid or setgid bits with another owner or group
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, mode)


def _sync_directory(directory: Path) -> None:
    """Make the rename durable; the file itself is already complete and in place."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open directories
        return
    # Directories without read permission cannot be opened, and some network file systems refuse.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

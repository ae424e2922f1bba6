"""Files are written completely or not at all."""

import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from biper_engine import files
from biper_engine.files import write_atomically

LEFTOVER = ".file.0123456789abcdef.tmp"


def write(path: Path, data: bytes = b"new") -> None:
    write_atomically(path, lambda file: file.write(data))


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new", lambda file: file.write(b"abc"))
    assert (tmp_path / "new").read_bytes() == b"abc"
    (tmp_path / "usual").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "usual")]
    assert modes[0] == modes[1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def break_off(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, break_off)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^Cannot write '.*file': there is no directory "):
        write(tmp_path / "none" / "file")


def test_a_link_to_nothing_gets_its_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("target")
    write(link)
    assert link.is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices cannot be made by this user")


def make_circle(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = {
    "a directory": Path.mkdir,
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a character device": make_device,
    "a symbolic link that leads to itself": make_circle,
}


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_anything_but_a_regular_file_is_refused_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, through_link: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    KINDS[kind](Path("target"))
    before = os.lstat("target")
    if through_link:
        Path("link").symlink_to("target")
    path = Path("link" if through_link else "target")
    with pytest.raises(OSError, match=f"^Cannot write '{path}': it is {kind}. Pass the name of"):
        write(path)
    after = os.lstat("target")
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert set(os.listdir()) <= {"target", "link"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755, 0o4711])
def test_the_mode_of_an_existing_file_is_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_no_other_user_reads_what_will_be_private(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o600)
    seen = []

    def look(file: BinaryIO) -> None:
        seen.extend(stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir())

    write_atomically(path, look)
    assert seen == [0o600, 0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def run_unprivileged(code: str, folder: Path) -> str:
    """Run code that has `write` and a `folder`, as a user who may not do everything."""
    program = (
        "import os, runpy, sys\n"
        "write_atomically = runpy.run_path(sys.argv[1])['write_atomically']\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.chdir(sys.argv[2])\n"
        "def write(path):\n"
        "    try: write_atomically(path, lambda file: file.write(b'new'))\n"
        "    except OSError as error: print(type(error).__name__, error)\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", program, files.__file__, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture
def common_folder(tmp_path: Path) -> Path:
    """A folder that another user may reach and write to."""
    for part in (tmp_path, *tmp_path.parents[:3]):  # one more where tests run in parallel
        if part.stat().st_uid == os.geteuid():
            part.chmod(part.stat().st_mode | 0o055)
    folder = tmp_path / "common"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_a_file_that_may_not_be_written_is_refused_as_by_open(common_folder: Path) -> None:
    path = common_folder / "file"
    path.write_bytes(b"old")
    path.chmod(0o444)
    said = run_unprivileged("write('file')", common_folder)
    assert said.startswith("PermissionError Cannot write 'file': the file exists and you may not")
    assert path.read_bytes() == b"old"
    assert os.listdir(common_folder) == ["file"]


def test_a_folder_that_may_not_be_written_is_an_error(common_folder: Path) -> None:
    path = common_folder / "file"
    path.write_bytes(b"old")
    path.chmod(0o666)
    common_folder.chmod(0o555)
    said = run_unprivileged("write('file'); write('new')", common_folder).splitlines()
    assert said[0].startswith("PermissionError Cannot write 'file': you may not create files in '")
    assert said[0].endswith("The file that was there is unchanged.")
    assert said[1].startswith("PermissionError Cannot write 'new': you may not create files in '")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("size", [100, 200_000])
def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path, size: int) -> None:
    """A limit on the size of files stands for the full disk; torch.save hides its error."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"larger than a file may be here. The file .* unchanged"):
            write(path, b"x" * size)
        with pytest.raises(OSError, match="larger than a file may be here") as caught:
            write_atomically(path, lambda file: torch.save(torch.zeros(size), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = {
        ".file.0123456789abcde.tmp",
        ".file.0123456789abcdef.tmp.gz",
        ".file2.0123456789abcdef.tmp",
        "file.0123456789abcdef.tmp",
    }
    for name in (LEFTOVER, *others):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".file.aaaaaaaaaaaaaaaa.tmp").symlink_to("elsewhere")
    (tmp_path / ".file.bbbbbbbbbbbbbbbb.tmp").mkdir()
    others |= {".file.aaaaaaaaaaaaaaaa.tmp", ".file.bbbbbbbbbbbbbbbb.tmp"}
    write(tmp_path / "file")
    assert set(os.listdir(tmp_path)) == others | {"file"}


def test_leftovers_go_before_the_new_file_needs_their_space(tmp_path: Path) -> None:
    seen: list[str] = []
    (tmp_path / LEFTOVER).write_bytes(b"half")
    write_atomically(tmp_path / "file", lambda _: seen.extend(os.listdir(tmp_path)))
    assert LEFTOVER not in seen


def test_a_writer_at_work_is_not_taken_for_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def wait(file: BinaryIO) -> None:
        file.write(b"slow")
        started.set()
        assert go_on.wait(60)

    started, go_on = threading.Event(), threading.Event()
    slow = threading.Thread(target=write_atomically, args=(path, wait))
    slow.start()
    assert started.wait(60)
    write(path, b"quick")
    assert path.read_bytes() == b"quick"
    assert len(os.listdir(tmp_path)) == 2
    go_on.set()
    slow.join()
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["file"]


def test_many_writers_of_one_file_at_once(tmp_path: Path) -> None:
    path, problems = tmp_path / "file", []

    def repeat(letter: bytes) -> None:
        try:
            for _ in range(40):
                write(path, letter * 1000)
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=repeat, args=(bytes([65 + i]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(set(path.read_bytes())) == 1
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 255, "x" * 234, "x" * 233, "\u00e9" * 127])
def test_names_may_be_as_long_as_the_system_lets_them(tmp_path: Path, name: str) -> None:
    def die(file: BinaryIO) -> None:
        file.flush()
        os._exit(9)

    child = os.fork()
    if child == 0:
        write_atomically(tmp_path / name, die)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]

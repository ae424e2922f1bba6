"""The outer form of a file: which parts are read, and in which order."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from biper_engine.engine import load
from biper_engine.errors import FileFormatError
from biper_engine.serialization import container
from tests.networks_by_hand import classifier


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("files") / "net.biper"
    classifier().save(path)
    return path.read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe.biper"
    os.mkfifo(path)
    with pytest.raises(FileFormatError, match=r"pipe.biper is a named pipe, not a regular file"):
        load(path)


def test_a_directory_and_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is a directory, not a regular file"):
        load(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(FileFormatError, match="/dev/zero is a device, not a regular file"):
            load("/dev/zero")


def test_the_header_is_read_before_the_body(tmp_path: Path, blob: bytes) -> None:
    """A file of 1 TB that is no .biper file is refused by its first bytes."""
    path = tmp_path / "huge.biper"
    with path.open("wb") as file:
        file.write(b"no header at all")
        file.truncate(1 << 40)
    with pytest.raises(FileFormatError, match=r"not a \.biper file"):
        load(path)
    with path.open("wb") as file:
        file.write(blob)
        file.truncate(1 << 40)
    with pytest.raises(FileFormatError, match="has bytes after its end"):
        load(path)


def _outer(blob: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + length]), blob[8 + length :]


def _file(path: Path, text: str, body: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1 << 31]}, "cannot have shape"),
        ({"shape": [True]}, "cannot have shape"),
        ({"shape": [1] * 9}, "cannot have shape"),
        ({"shape": [3]}, "is not 40 bytes"),
        ({"shape": "x"}, "its table of tensors is unreadable"),
        ({"data_offsets": [0, 1 << 62]}, "cannot be at the bytes"),
        ({"data_offsets": [-40, 0]}, "cannot be at the bytes"),
        ({"data_offsets": [0.0, 40.0]}, "cannot be at the bytes"),
        ({"data_offsets": [0, 40, 80]}, "its table of tensors is unreadable"),
        ({"dtype": "F8_E4M3"}, "has dtype 'F8_E4M3'; known are BOOL"),
        ({"more": 1}, "has unknown entries"),
    ],
)
def test_a_wrong_entry_of_the_table_is_refused(
    tmp_path: Path, blob: bytes, change: dict[str, Any], message: str
) -> None:
    outer, body = _outer(blob)
    outer["fc.bias"].update(change)
    with pytest.raises(FileFormatError, match=message):
        load(_file(tmp_path / "net.biper", json.dumps(outer), body))


def test_tensors_that_share_bytes_are_refused(tmp_path: Path, blob: bytes) -> None:
    outer, body = _outer(blob)
    names = [name for name in outer if outer[name].get("shape") == [33]]
    outer[names[0]]["data_offsets"] = outer[names[1]]["data_offsets"]
    with pytest.raises(FileFormatError, match="does not begin where the one before it ends"):
        load(_file(tmp_path / "net.biper", json.dumps(outer), body))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"fc.bias":', '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":', "a key twice"),
        ('"shape":[10]', '"shape":[NaN]', "NaN is no number"),
        ('"shape":[10]', '"shape":[1e999]', "1e999 is no number"),
        ('"shape":[10]', '"shape":[-Infinity]', "-Infinity is no number"),
        ('"shape":[10]', '"shape":[' + "9" * 5000 + "]", "header is not JSON"),
        ('"shape":[10]', '"shape":' + "[" * 100_000, "header is not JSON"),
    ],
)
def test_json_that_json_does_not_define_is_refused(
    tmp_path: Path, blob: bytes, old: str, new: str, message: str
) -> None:
    outer, body = _outer(blob)
    text = json.dumps(outer, separators=(",", ":"))
    assert old in text
    with pytest.raises(FileFormatError, match=message):
        load(_file(tmp_path / "net.biper", text.replace(old, new, 1), body))


def test_a_file_that_shrinks_while_it_is_read_is_truncated(
    tmp_path: Path, blob: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.biper"
    path.write_bytes(blob)
    check_format = container._check_format

    def shrink(*arguments: Any) -> None:
        os.truncate(path, len(blob) - 7)
        check_format(*arguments)

    monkeypatch.setattr(container, "_check_format", shrink)
    with pytest.raises(FileFormatError, match="became shorter while it was read"):
        load(path)


def test_every_tensor_has_memory_of_its_own(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "net.biper"
    path.write_bytes(blob)
    _, tensors = container.read(path)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(pointers) == len(tensors)
    flags = tensors["layer1.0.conv1.sense"]
    assert flags.dtype == torch.bool
    assert set(flags.view(torch.uint8).tolist()) <= {0, 1}

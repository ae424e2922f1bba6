"""Files of `torch.save` that declare more than they contain, and files of other kinds."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from biper_engine.errors import CheckpointError
from biper_engine.models import pickles
from biper_engine.models.torch_file import read_config_txt, read_torch_file

STATE = {"weight": torch.arange(6.0).view(2, 3)}


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is refused must be refused before torch.load sees it."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.load was called")

    if "reads" not in request.node.name:
        monkeypatch.setattr(torch, "load", refuse)


def entries_of(contents: Any) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return str(path)


def with_pickle(path: Path, data: bytes) -> str:
    return write_zip(path, {"archive/data.pkl": data, "archive/version": b"3\n"})


def call(module: str, name: str, *args: bytes) -> bytes:
    """Return a pickle of {"x": module.name(*args)}; each argument is an opcode with its value."""
    return (
        b"\x80\x02}X\x01\x00\x00\x00x"
        + f"c{module}\n{name}\n".encode()
        + (b"(" + b"".join(args) + b"tRs.")
    )


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_save_writes_reads(tmp_path: Path, old: bool) -> None:
    options = argparse.Namespace(lr=0.1)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    contents = {
        "state_dict": STATE,
        "args": options,
        "optimizer": optimizer.state_dict(),
        "shared": [STATE["weight"], STATE["weight"][0]],
        "types": [
            torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.bool, torch.int8)
        ],
        "plain": (1, 2.5, None, True, "text", b"bytes", {3: {4, 5}}, 1 + 2j, 10**30),
    }
    path = tmp_path / "a.pt"
    torch.save(contents, path, _use_new_zipfile_serialization=not old)
    read = read_torch_file(str(path))
    assert torch.equal(read["state_dict"]["weight"], STATE["weight"])
    assert read["args"] == options
    assert read["plain"] == contents["plain"]


@pytest.mark.parametrize(
    ("module", "name", "argument"),
    [
        ("__builtin__", "bytearray", number(10**13)),
        ("torch", "FloatTensor", number(10**13)),
        ("torch", "Tensor", number(10**13)),
        ("torch.storage", "UntypedStorage", number(10**13)),
        ("numpy", "zeros", number(10**13)),
    ],
)
def test_memory_by_a_number_is_refused(
    tmp_path: Path, module: str, name: str, argument: bytes
) -> None:
    data = call(module, name, argument)
    with pytest.raises(CheckpointError, match=f"more than tensors and plain values: .*{name}"):
        read_torch_file(with_pickle(tmp_path / "a.pt", data))
    through = f"c{module}\n{name}\n".encode()
    hidden = call(
        "torch._tensor", "_rebuild_from_type_v2", through, b"N", b"(" + argument + b"t", b"N"
    )
    with pytest.raises(CheckpointError, match=f"more than tensors and plain values: .*{name}"):
        read_torch_file(with_pickle(tmp_path / "b.pt", hidden))


def test_encodings_that_double_are_refused(tmp_path: Path) -> None:
    data = call("_codecs", "encode", b"U\x02ab", b"X\x03\x00\x00\x00hex")
    with pytest.raises(CheckpointError, match="would make an encoding"):
        read_torch_file(with_pickle(tmp_path / "a.pt", data))


def test_keys_of_nested_tuples_are_refused(tmp_path: Path) -> None:
    """Each level doubles the time that a hash takes."""
    nested = b"K\x01" + b"q\x00h\x00\x86" * 60  # t = (t, t), sixty times
    with pytest.raises(CheckpointError, match="a key of nested tuples"):
        read_torch_file(with_pickle(tmp_path / "a.pt", b"\x80\x02}" + nested + b"K\x01s."))


def test_a_storage_larger_than_its_entry_is_refused(tmp_path: Path) -> None:
    entries = entries_of(STATE)
    (name,) = [name for name in entries if name.endswith("data.pkl")]
    huge = entries[name].replace(b"K\x06", b"J\xff\xff\xff\x7f", 1)
    assert huge != entries[name]
    path = write_zip(tmp_path / "a.pt", {**entries, name: huge})
    with pytest.raises(CheckpointError, match=r"is damaged: a tensor needs 8,589,934,588 bytes of"):
        read_torch_file(path)


def test_a_tensor_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"would make a tensor of 4,000,000,000,000 bytes"):
        read_torch_file(str(tmp_path / "a.pt"))


def test_a_storage_larger_than_an_old_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x06", b"J\xff\xff\xff\x7f", 1))
    with pytest.raises(CheckpointError, match="would make more than its own size"):
        read_torch_file(str(path))


def test_a_compressed_archive_is_not_inflated(tmp_path: Path) -> None:
    entries = {name: data + bytes(10**7) for name, data in entries_of(STATE).items()}
    path = write_zip(tmp_path / "a.pt", entries, zipfile.ZIP_DEFLATED)
    with pytest.raises(
        CheckpointError, match=r"is compressed \(entry '.*'\)\. torch\.save never compresses"
    ):
        read_torch_file(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """The directory of a zip archive may name the same bytes again and again."""
    entries = entries_of({"weight": torch.zeros(10_000)})
    path = tmp_path / "a.pt"
    write_zip(path, entries)
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    count, _, size, start = struct.unpack("<HHII", data[end + 8 : end + 20])
    directory = bytes(data[start : start + size])
    more = directory.replace(b"data/0", b"data/1")
    ending = data[:end][:start] + directory + more + data[end:]
    at = ending.rfind(b"PK\x05\x06")
    ending[at + 8 : at + 20] = struct.pack("<HHII", 2 * count, 2 * count, 2 * size, start)
    path.write_bytes(ending)
    with pytest.raises(
        CheckpointError, match=r"would make (two entries of one name|more than its)"
    ):
        read_torch_file(str(path))


def test_a_long_pickle_is_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST_PICKLE_BYTES", 1000)
    monkeypatch.setattr("biper_engine.models.torch_file.MOST_PICKLE_BYTES", 1000)
    for old in (False, True):
        torch.save(
            {str(i): i for i in range(1000)},
            path := tmp_path / f"{old}.pt",
            _use_new_zipfile_serialization=not old,
        )
        with pytest.raises(CheckpointError, match="bytes beside its tensors"):
            read_torch_file(str(path))


def test_a_whole_module_is_named_and_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(str(tmp_path / "whole.pt"))
    assert "more than tensors and plain values: torch.nn.modules.linear.Linear." in str(
        caught.value
    )
    assert "weights_only=False).state_dict(), 'weights.pt')" in str(caught.value)


FOREIGN: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "onnx": (b"\x08\x08\x12\x07pytorch", "is perhaps an ONNX model"),
    "hdf5": (b"\x89HDF\r\n", "is an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08", "is a gzip archive.*Unpack it first"),
    "html": (b"<!DOCTYPE html>", "is a web page.*Download the file itself"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS.*git lfs pull"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is a safetensors file"),
    "biper": (
        struct.pack("<Q", 99) + b'{"__metadata__":{"biper":"{}"}}' + b" " * 99,
        r"is a \.biper file under another name.*biper_engine\.load",
    ),
    "pickle": (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
    "pickle of nothing": (b"\x80\x02.", "is a pickle that torch.save did not write"),
    "zip": (
        lambda path: write_zip(path, {"net.pth": b"x"}),
        "is a zip archive, but not one of torch.save: it has 'net.pth'.*unpack it first",
    ),
    "torchscript": (
        lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        r"is a TorchScript archive.*torch.jit.load\('.*'\).state_dict\(\)",
    ),
    "folder": (Path.mkdir, "Cannot read checkpoint .*: it is a directory"),
    "pipe": (os.mkfifo, "Cannot read checkpoint .*: it is not a regular file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_named_by_their_kind(tmp_path: Path, kind: str) -> None:
    contents, message = FOREIGN[kind]
    path = tmp_path / "a.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        contents(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(str(path))
    assert str(caught.value).count(str(path)) == 1 + ("torch.jit.load" in message)
    assert "is damaged" not in str(caught.value)


def test_a_config_txt_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.txt"
    with path.open("wb") as file:
        file.truncate(10**10)
    with pytest.raises(CheckpointError, match=r"it has 10,000,000,000 bytes"):
        read_config_txt(path)

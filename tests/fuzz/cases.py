"""Files made from seeds: the same file for the same seed, with a correct checksum."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from biper_engine.errors import FileFormatError
from biper_engine.serialization.container import read
from biper_engine.serialization.native_program import SEAL, seal_of
from tests.fuzz.bases import BASES
from tests.fuzz.mutations import Header, Tensors, mutate

_SUM = b'\\"sha256\\":\\"'
# The small networks that native programs run are mutated more often than each dozen of operators.
_WEIGHTS = {"classifier": 6, "binary": 8, "float": 6, "two": 2, "half": 3, "bfloat": 2}


@dataclass(frozen=True)
class Case:
    """A file made from a seed.

    Attributes:
        base: the network it was.
        mutations: what happened to it.
        data: its bytes; None where they cannot be expressed.
    """

    base: str
    mutations: tuple[str, ...]
    data: bytes | None


class Cases:
    """Makes cases from the files of a folder, which `write_bases` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[str, Tensors, bytes]] = {}

    def __getitem__(self, seed: int) -> Case:
        r = random.Random(seed)
        base = r.choices(list(BASES), [_WEIGHTS.get(name, 1) for name in BASES])[0]
        text, tensors, data = self._base(base)
        kind = r.random()
        if kind < 0.05:
            return Case(base, ("outer header",), _outer(r, data))
        if kind < 0.08:
            return Case(base, ("bytes",), _bytes(r, data))
        header, tensors = json.loads(text), dict(tensors)
        names = mutate(r, header, tensors)
        return Case(base, tuple(names), sealed(header, tensors))

    def _base(self, name: str) -> tuple[str, Tensors, bytes]:
        if name not in self._known:
            path = self._folder / f"{name}.biper"
            header, tensors = read(path)
            self._known[name] = (json.dumps(header), tensors, path.read_bytes())
        return self._known[name]


def sealed(header: Header, tensors: Tensors) -> bytes | None:
    """Return the bytes of a file with correct sums, None where they cannot be expressed."""
    try:
        if SEAL in header:
            header = {**header, SEAL: seal_of(header, tensors)}
        text = json.dumps({**header, "sha256": "0" * 64}, sort_keys=True, separators=(",", ":"))
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return _resealed(safetensors.torch.save(plain, {"biper": text}))
    except (FileFormatError, RecursionError, RuntimeError, TypeError, ValueError):
        return None


def _resealed(data: bytes) -> bytes:
    start = data.find(_SUM)
    if start < 0:
        return data
    start += len(_SUM)
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    return zeroed[:start] + hashlib.sha256(zeroed).hexdigest().encode() + zeroed[start + 64 :]


def _outer(r: random.Random, data: bytes) -> bytes:
    """Change the table of tensors, or what stands beside our header in it."""
    length = struct.unpack("<Q", data[:8])[0]
    outer, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    keys = [key for key in outer if key != "__metadata__"]
    entry, other, kind = outer[r.choice(keys)], outer[r.choice(keys)], r.randint(0, 8)
    more = ""
    if kind == 0:
        entry["data_offsets"][r.randint(0, 1)] += r.choice((1, -1, 4, 64, 1 << 40, -(1 << 40)))
    elif kind == 1:
        entry["data_offsets"] = list(other["data_offsets"])
    elif kind == 2:
        entry["shape"] = r.choice(
            ([10**9], [10**9] * 2, [0, 10**18], [-1], [1 << 64], [2] * 80, [1.5])
        )
    elif kind == 3:
        entry["dtype"] = r.choice(("F8_E4M3", "U64", "F64", "I8", "BOOL", "C64", "", 7, "f32"))
    elif kind == 4:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == 5:
        outer["__metadata__"][r.choice(("x", "biper"))] = r.choice(("y", 1, None, ["biper"]))
    elif kind == 6:
        key = r.choice((*keys, "__metadata__", "new"))
        more = f',{json.dumps(key)}:{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    elif kind == 7:
        entry["shape"] = [*entry["shape"], r.choice((0, 1, 2))]
    else:
        del outer[r.choice(keys)]
    text = json.dumps(outer, separators=(",", ":"))[:-1] + more + "}"
    encoded = text.encode()
    return _resealed(struct.pack("<Q", len(encoded)) + encoded + body)


def _bytes(r: random.Random, data: bytes) -> bytes:
    changed, kind = bytearray(data), r.randint(0, 2)
    if kind == 0:
        for _ in range(r.choice((1, 3, 30, 3000))):
            changed[r.randrange(len(changed))] = r.randrange(256)
    elif kind == 1:
        del changed[r.randrange(len(changed)) :]
    else:
        length = r.choice((0, 1, 7, len(data), 1 << 26, 1 << 63, (1 << 64) - 1))
        changed[:8] = struct.pack("<Q", length)
    return _resealed(bytes(changed)) if r.random() < 0.7 else bytes(changed)

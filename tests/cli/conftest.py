"""A tiny binary network in a module in the current directory, as a user would have it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

import biper_engine
from biper_engine.cli import main

TINY_NETWORK = """
import torch
from torch import nn

from biper_engine import Metadata


class SignConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(torch.sign(x), torch.sign(self.weight), None)


class RealConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, torch.sign(self.weight), None)


def build(size=16):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32)),
        *(SignConv(32, 32, 3, 1, 1), nn.BatchNorm2d(32)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    ).eval()


def with_metadata():
    model = build()
    model.input_shape = (3, 16, 16)
    names = ("ant", "bee", "[cat]", "dog")
    model.metadata = Metadata(input_size=(3, 16, 16), class_names=names)
    return model


def needs_argument(size):
    return build(size)


def no_module():
    return 3


def half_binary():
    model = with_metadata()
    model[2] = nn.Conv2d(32, 32, 3, 1, 1)
    return model


def one_binary():
    model = with_metadata()
    model.insert(4, nn.Softshrink())
    model.insert(5, RealConv(32, 32, 1).eval())
    return model


def with_zero():
    model = with_metadata()
    zero = SignConv(32, 32, 1)
    with torch.no_grad():
        zero.weight[0, 0, 0, 0] = 0.0
    model.insert(4, zero.eval())
    return model


number = 3
"""


def tiny_network(name: str = "build") -> torch.nn.Module:
    """Call a function of `TINY_NETWORK`."""
    names: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(TINY_NETWORK, names)
    return names[name]()


@dataclass(frozen=True)
class Outcome:
    """What a command gave back."""

    code: int
    out: str
    err: str


Biper = Callable[..., Outcome]


@pytest.fixture
def biper(capsys: pytest.CaptureFixture[str]) -> Biper:
    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def user_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the current directory, with `tinynet.py` in it."""
    (tmp_path / "tinynet.py").write_text(TINY_NETWORK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tinynet", None)


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of the tiny network's file, converted once."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.biper"
    biper_engine.convert(tiny_network("with_metadata"), check=False).save(path)
    return path.read_bytes()


@pytest.fixture
def tiny(user_directory: Path, tiny_bytes: bytes) -> Path:
    """Return the tiny network's file, in the current directory."""
    path = Path("tiny.biper")
    path.write_bytes(tiny_bytes)
    return path


@pytest.fixture
def photos(user_directory: Path) -> Path:
    """Return a directory with three images, one of them deeper, and a file that is none."""
    directory = Path("photos")
    (directory / "deep").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.JPG", "green"), ("deep/c.bmp", "blue")):
        Image.new("RGB", (20, 17), color).save(directory / name)
    (directory / "notes.txt").write_text("no image", encoding="utf-8")
    return directory

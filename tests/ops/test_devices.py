"""A device that is named, but not there, is refused in one sentence wherever one is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import biper_engine
from biper_engine import BackendUnavailableError, models
from biper_engine.ops import devices
from tests.networks_by_hand import classifier

NO_CUDA = not torch.cuda.is_available()
NAME = "digits/resnet20_1w1a"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("devices") / "net.biper"
    classifier().save(path)
    return path


WAYS: dict[str, Callable[[Path, Any], Any]] = {
    "load": lambda path, device: biper_engine.load(path, device=device),
    "models.load": lambda path, device: models.load(NAME, device=device),
    "to": lambda path, device: biper_engine.load(path).to(device),
    "to, by name": lambda path, device: biper_engine.load(path).to(device=device),
}


@pytest.mark.skipif(not NO_CUDA, reason="this machine has a GPU")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_cuda_that_is_not_there_is_said_in_a_sentence(path: Path, way: str, device: Any) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        WAYS[way](path, device)
    message = str(caught.value)
    assert message.startswith(f"`device` (='{device}') cannot be used: ")
    assert torch.__version__ in message
    assert "to run on the CPU" in message
    assert "\n" not in message


@pytest.mark.skipif(not NO_CUDA, reason="this machine has a GPU")
@pytest.mark.parametrize("device", [None, 1, torch.device("cuda")])
def test_the_method_for_cuda_says_it_too(path: Path, device: Any) -> None:
    engine = biper_engine.load(path)
    with pytest.raises(BackendUnavailableError, match=r"^`device` \(='cuda.*cannot be used"):
        engine.cuda(device)
    assert engine.device == torch.device("cpu")
    assert engine(torch.zeros(1, *engine.input_shape)).isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_what_names_no_device_is_said(path: Path, way: str) -> None:
    with pytest.raises(ValueError, match=r"^`device` \(='gpu'\) is no device of PyTorch; wanted"):
        WAYS[way](path, "gpu")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_other_devices_are_said_by_their_type(path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"or this machine has no mps\. Leave it out"):
        biper_engine.load(path, device="mps")


def test_devices_that_are_there_work(path: Path) -> None:
    for device in ("cpu", torch.device("cpu"), "meta"):
        assert biper_engine.load(path, device=device).device == torch.device(device)
    engine = biper_engine.load(path)
    assert engine.to(torch.zeros(1)).to("cpu", non_blocking=True) is engine
    with pytest.raises(TypeError, match="dtypes are fixed"):
        engine.to("cpu", torch.float16)


def test_what_keeps_cuda_away_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 3)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "was built without CUDA" in devices._obstacle(cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "finds no GPU here" in devices._obstacle(cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices._obstacle(cuda) == "there are 2 GPUs, cuda:0 to cuda:1"

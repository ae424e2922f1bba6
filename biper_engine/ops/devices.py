"""Devices that a caller names, checked before PyTorch is asked for them."""

from __future__ import annotations

import torch

from biper_engine.errors import BackendUnavailableError

__all__ = ["require_device"]


def require_device(device: str | int | torch.device) -> torch.device:
    """Return a device that tensors can be on here.

    Raises:
        ValueError: it names no device.
        BackendUnavailableError: PyTorch or this machine does not have it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"`device` (={device!r}) is no device of PyTorch; wanted 'cpu', 'cuda', 'cuda:1' and "
            f"so on. PyTorch says: {_first_line(error)}"
        ) from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"`device` (={str(found)!r}) cannot be used: {_obstacle(found)}. Leave it out to run "
            f"on the CPU. PyTorch says: {_first_line(error)}"
        ) from error
    return found


def _obstacle(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this PyTorch ({torch.__version__}) or this machine has no {device.type}"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this PyTorch ({torch.__version__}) was built without CUDA, install one that has it "
            "(pytorch.org)"
        )
    count = torch.cuda.device_count()
    if count == 0:
        return f"PyTorch ({torch.__version__}) finds no GPU here, see nvidia-smi"
    return f"there are {count} GPUs, cuda:0 to cuda:{count - 1}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]

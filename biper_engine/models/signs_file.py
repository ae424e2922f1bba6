"""The weights of a trained BiPer network in a small file: signs as bits, the rest as it is.

A safetensors file with one tensor for each entry of the state dict, under its name:

    latent weights of binary layers   uint8; bit i % 8 of byte i // 8 is 1 if sign(wave(w_i)) is +1
    all others                        as in the state dict

and a JSON header `biper` with what `build` needs. Stage 2 multiplies with the signs alone, so the
network that is read gives the same bits as the one that was written. Its latent weights are
+-pi / (2 * w0), where the sine is +-1: the training does not go on from them as it would have.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import pi
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from biper_engine.errors import CheckpointError
from biper_engine.files import write_atomically
from biper_engine.metadata import Metadata
from biper_engine.models.checkpoints import common_binarizer, common_settings, network_name
from biper_engine.models.network import Network
from biper_engine.models.registry import architecture, build
from biper_engine.nn import BinaryConv2d, BinaryLinear, binary_layers

__all__ = ["latent_of", "read_signs", "write_signs"]

_VERSION = 0


def latent_of(bits: Tensor, frequency: float) -> Tensor:
    """Return latent weights, float32, whose wave has the sign + where `bits` is True, else -.

    They are +-pi / (2 * frequency), in the middle of a half wave of every binarizer.
    """
    weight = torch.full(bits.shape, pi / (2 * frequency))
    return torch.where(bits, weight, -weight)


def write_signs(path: str | os.PathLike[str], network: Network) -> None:
    """Write a network of BiPer in stage 2.

    Raises:
        ValueError: the network is another one, or a weight is at a zero of its wave, so that it
            has no sign.
    """
    name = network_name(network)
    frequency, stage = common_settings(network)
    if stage != 2 or frequency is None:
        raise ValueError(
            f"`network` is {name} of stage {stage}, whose weights are more than their signs. Pass "
            "a network of BiPer in stage 2."
        )
    bits = _bits(network)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    header = {
        "version": _VERSION,
        "model": name,
        "num_classes": len(state[f"{architecture(name).classifier}.weight"]),
        "frequency": frequency,
        "weight_binarizer": common_binarizer(network),
        "metadata": None if network.metadata is None else network.metadata.to_dict(),
    }
    blob = save({**state, **bits}, {"biper": json.dumps(header, sort_keys=True)})
    write_atomically(path, lambda file: file.write(blob))


def read_signs(path: str | os.PathLike[str]) -> Network:
    """Build the network that `write_signs` wrote, on the CPU and in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, or none of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("biper", "null"))
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read the weights '{os.fspath(path)}': {error}.") from error
    try:
        with torch.device("cpu"):  # whatever `set_default_device` says
            return _network(header, held)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"'{os.fspath(path)}' does not hold the weights of a network of this version of "
            f"biper_engine. Install the package again. {type(error).__name__}: {error}"
        ) from error


def _bits(network: Network) -> dict[str, Tensor]:
    """Return the packed signs of all binary layers, by the name of their weight."""
    packed = {}
    for name, layer in binary_layers(network):
        assert isinstance(layer, BinaryConv2d | BinaryLinear), "a network with a frequency"
        signs = layer.quantized_weight().detach()
        if bool((signs == 0).any()):
            raise ValueError(f"`{name}.weight` has a weight without a sign: its wave is 0 there.")
        bits = np.packbits((signs > 0).cpu().numpy().reshape(-1), bitorder="little")
        packed[f"{name}.weight"] = torch.from_numpy(bits)
    return packed


def _network(header: Mapping[str, Any], held: dict[str, Tensor]) -> Network:
    if header["version"] != _VERSION:
        raise ValueError(f"the file has version {header['version']}, wanted {_VERSION}")
    with torch.random.fork_rng(devices=()):  # random weights are drawn, then replaced
        network = build(
            header["model"],
            num_classes=header["num_classes"],
            frequency=header["frequency"],
            weight_binarizer=header["weight_binarizer"],
        )
    for name, layer in binary_layers(network):
        key, latent = f"{name}.weight", layer.latent()
        packed = held[key].numpy()
        if packed.dtype != np.uint8 or packed.shape != (-(-latent.numel() // 8),):
            raise ValueError(f"{key} is {packed.dtype} {list(packed.shape)}")
        bits = np.unpackbits(packed, count=latent.numel(), bitorder="little").astype(bool)
        held[key] = latent_of(torch.from_numpy(bits).view_as(latent), header["frequency"])
    network.load_state_dict(held)
    values = header["metadata"]
    network.metadata = None if values is None else Metadata.from_dict(values)
    return network.eval()

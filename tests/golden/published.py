"""Networks that are not BiPer's: names of their checkpoints, small forms with varied weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biper_engine.models.adabin import AdaBinResNet20
from biper_engine.models.binaryvit import BinaryViT
from biper_engine.models.birealnet import BiRealNet18, ReActResNet18
from biper_engine.models.bnext import BNext
from biper_engine.models.network import Network
from biper_engine.models.reactnet import ReActNetA

Shapes = Mapping[str, list[int]]


def names() -> dict[str, Any]:
    """Return what `published.json` has for each network: names and shapes, or their digest."""
    held = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {name: one if isinstance(one, str) else _flat(one) for name, one in held.items()}


def digest(shapes: Shapes) -> str:
    """Return the SHA-256 of names and shapes in sorted order."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            found[f"{before}{key}"] = value
        else:
            found |= _flat(value, f"{before}{key}.")
    return found


# Name of the equations, constructor, size of images.
SMALL: dict[str, tuple[Callable[[], Network], int]] = {
    "bireal": (lambda: BiRealNet18(10, width=8), 16),
    "react_resnet": (lambda: ReActResNet18(10, width=8), 64),
    "reactnet_a": (lambda: ReActNetA(10, width=4), 64),
    "adabin": (lambda: AdaBinResNet20(10), 16),
    "bnext": (lambda: BNext(10, width=8, depths=(1, 2, 1, 1)), 64),
    "binaryvit": (lambda: BinaryViT(10, image_size=64, width=8, depths=(1, 2, 1, 1)), 64),
}


def small(name: str) -> Network:
    """Return a network whose every parameter and statistic differs from its first value."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = SMALL[name][0]()
        for module in network.modules():
            for key, parameter in module.named_parameters(recurse=False):
                _vary(module, key, parameter)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return network


def _vary(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    if key == "att_prob_clip":  # near the shares of 16 keys or fewer
        nn.init.constant_(parameter, 0.1)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and key == "weight":
        nn.init.uniform_(parameter, 0.5, 1.5)
    elif isinstance(module, nn.PReLU):
        nn.init.uniform_(parameter, 0.1, 0.4)
    elif key in ("alpha", "alpha_a", "scale", "pos_scale", "neg_scale"):
        nn.init.uniform_(parameter, 0.3, 0.9)
    elif key in ("bias", "move", "beta_a") or key.startswith("move"):
        nn.init.normal_(parameter, 0, 0.2)

"""The networks of this package by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from biper_engine.metadata import Metadata, Provenance
from biper_engine.models.adabin import AdaBinResNet20
from biper_engine.models.binaryvit import BinaryViT
from biper_engine.models.birealnet import BiRealNet18, ReActResNet18
from biper_engine.models.bnext import BNext
from biper_engine.models.cifar_resnet import (
    FloatResNet20,
    ResNet18,
    ResNet20,
    ResNet20BinaryWeights,
)
from biper_engine.models.imagenet_resnet import ImageNetResNet
from biper_engine.models.mobilenet import MobileNet
from biper_engine.models.network import Network
from biper_engine.models.reactnet import ReActNetA
from biper_engine.models.vgg import VGGSmall
from biper_engine.nn import binary_layers, set_binarizers

__all__ = ["Architecture", "architecture", "available", "build", "state_dict_shapes"]

# The official CIFAR code normalises with ImageNet's statistics, too.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_CIFAR10 = Metadata(
    input_size=(3, 32, 32),
    mean=_MEAN,
    std=_STD,
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
)


# Shorter side to 256, centre crop; the names of the 1,000 classes come with the data set.
_IMAGENET = Metadata(
    input_size=(3, 224, 224), interpolation="bilinear", crop_pct=0.875, mean=_MEAN, std=_STD
)

_OFFICIAL_README = "README of github.com/edmav4/BiPer at 0c07fdd"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One network of the registry.

    Attributes:
        name: `dataset/network`; the network part of BiPer's is the official code's function name.
        constructor: called as `constructor(num_classes, stage=..., **options)`, and with
            `frequency=...` if it has one.
        metadata: preprocessing and classes of the task in the name.
        num_classes: classes of that task.
        classifier: name of the last layer, whose weight has one row per class.
        options: arguments in which it differs from other networks of the same constructor.
        reported_top1: accuracy in percent of the trained network according to `source`, or None.
        source: where this accuracy is published.
        frequency: w0 unless the caller says otherwise; None if it is not a network of BiPer.
        published_stage: stage of a checkpoint that does not say its own; None if it could be
            either one.
        is_binary: False for a float twin, which has no binary layer to convert.
    """

    name: str
    constructor: Callable[..., Network]
    metadata: Metadata
    num_classes: int
    classifier: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reported_top1: float | None = None
    source: str = _OFFICIAL_README
    frequency: float | None = 20.0
    published_stage: int | None = None
    is_binary: bool = True


_TASKS = {"cifar10": (_CIFAR10, 10), "imagenet": (_IMAGENET, 1000)}


def _network(
    name: str,
    constructor: Callable[..., Network],
    classifier: str,
    *,
    reported_top1: float | None = None,
    **options: Any,
) -> Architecture:
    """Describe a network of BiPer."""
    metadata, num_classes = _TASKS[name.partition("/")[0]]
    return Architecture(
        name=name,
        constructor=constructor,
        metadata=metadata,
        num_classes=num_classes,
        classifier=classifier,
        options=options,
        reported_top1=reported_top1,
    )


def _published(
    name: str,
    constructor: Callable[..., Network],
    source: str,
    reported_top1: float | None,
    *,
    classifier: str = "fc",
    published_stage: int | None = 2,
    preprocessing: Mapping[str, Any] | None = None,
    **options: Any,
) -> Architecture:
    """Describe a network of another paper, whose binary weights are a scale times a sign."""
    entry = _network(name, constructor, classifier, reported_top1=reported_top1, **options)
    return replace(
        entry,
        metadata=replace(entry.metadata, **(preprocessing or {})),
        source=source,
        frequency=None,
        published_stage=published_stage,
    )


_BIREAL = "Bi-Real Net, ECCV 2018, which has results for ImageNet only"
_REACTNET = "README of github.com/liuzechun/ReActNet"
_BNEXT = "README of github.com/hpi-xnor/BNext"
_ADABIN = "README of BinaryNetworks/AdaBin in github.com/huawei-noah/Efficient-Computing"
_BICUBIC = {"interpolation": "bicubic"}
_BNEXT_IMAGES = {"interpolation": "bicubic", "crop_pct": 0.95}


_ARCHITECTURES = {
    entry.name: entry
    for entry in (
        _network("cifar10/resnet20_1w1a", ResNet20, "linear", reported_top1=86.98),
        _network("cifar10/resnet20_1w32a", ResNet20BinaryWeights, "linear"),
        _network("cifar10/resnet18_1w1a", ResNet18, "linear", reported_top1=93.75),
        _network("cifar10/resnet18A_1w1a", ResNet18, "linear", widths=(32, 32, 64, 128)),
        _network("cifar10/resnet18B_1w1a", ResNet18, "linear", widths=(32, 64, 128, 256)),
        _network("cifar10/resnet18C_1w1a", ResNet18, "linear", widths=(64, 64, 128, 256)),
        _network("cifar10/vgg_small_1w1a", VGGSmall, "fc", reported_top1=92.46),
        _network(
            "imagenet/resnet18_1w1a", ImageNetResNet, "fc", reported_top1=61.40, blocks=(2, 2, 2, 2)
        ),
        _network(
            "imagenet/resnet34_1w1a", ImageNetResNet, "fc", reported_top1=65.73, blocks=(3, 4, 6, 3)
        ),
        _network("imagenet/mobilenet_1w1a", MobileNet, "fc"),
        # The float twin that binary networks are compared with, trained alike.
        replace(
            _network("cifar10/resnet20", FloatResNet20, "linear"), frequency=None, is_binary=False
        ),
        _published("cifar10/birealnet18", BiRealNet18, _BIREAL, None),
        _published("cifar10/adabin_resnet20", AdaBinResNet20, _ADABIN, 88.1, classifier="linear"),
        # Its two steps of training write the same names and shapes.
        _published(
            "imagenet/reactnet_resnet18", ReActResNet18, _REACTNET, 65.9, published_stage=None
        ),
        _published("imagenet/reactnet_a", ReActNetA, _REACTNET, 69.5),
        *(
            _published(
                f"imagenet/bnext_{size}",
                BNext,
                _BNEXT,
                top1,
                preprocessing=_BNEXT_IMAGES,
                width=width,
                depths=depths,
            )
            for size, top1, width, depths in (
                ("tiny", 72.4, 32, (2, 2, 6, 2)),
                ("small", 76.1, 48, (2, 2, 6, 2)),
                ("middle", 78.3, 48, (4, 4, 8, 4)),
                ("large", 80.6, 64, (4, 4, 16, 4)),
            )
        ),
        _published(
            "imagenet/binaryvit_small",
            BinaryViT,
            "arXiv:2306.16678",
            None,
            classifier="classifier",
            preprocessing=_BICUBIC,
        ),
    )
}


def available() -> tuple[str, ...]:
    """Return the names that `build` accepts."""
    return tuple(_ARCHITECTURES)


def architecture(name: str) -> Architecture:
    """Return the registry entry of `name`.

    Raises:
        ValueError: unknown name; the message has the closest match and every known name.
    """
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    close = get_close_matches(name, _ARCHITECTURES, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"Unknown network {name!r}.{hint} Known: {', '.join(_ARCHITECTURES)}.")


def build(
    name: str,
    *,
    num_classes: int | None = None,
    frequency: float | None = None,
    stage: int = 2,
    weight_binarizer: str | None = None,
    activation_surrogate: str | None = None,
) -> Network:
    """Build a network with initial weights drawn from PyTorch's global generator.

    PyTorch draws an exact 0 about once in 2^24 normal numbers. A latent weight of 0 has no sign, so
    it becomes 1e-8.

    Args:
        name: one of `available()`, such as "cifar10/resnet20_1w1a".
        num_classes: None takes the classes of the task in the name; `metadata` then has the
            preprocessing and class names of that task. With a number, the task is your own, and
            `metadata` is None until you set it.
        frequency: w0 of sin(w0*w) in the networks of BiPer; None takes 20. The others have none.
        stage: 1 for real weights (BiPer: sin(w0*w)), 2 for binary ones (BiPer: sign(sin(w0*w))).
        weight_binarizer: "periodic", "sign", "sawtooth" or "triangle" in the networks of BiPer
            (`nn.set_binarizers`); None takes "periodic". The others have their own.
        activation_surrogate: "bireal", "clip" or "identity" in the networks of BiPer, in training
            only; None takes "bireal".

    Returns:
        A module in training mode with `input_shape`, `provenance` and `metadata`. Its state dict
        has the names and shapes of the official code.

    Raises:
        ValueError: unknown name, a number out of range, or a frequency, binarizer or surrogate for
            a network that is not BiPer's.
    """
    entry = architecture(name)
    classes = entry.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ValueError(f"`num_classes` (={num_classes}) must be 1 or more.")
    settings: dict[str, Any] = {"stage": stage, **entry.options}
    if entry.frequency is not None:
        frequency = entry.frequency if frequency is None else frequency
        settings["frequency"] = frequency
    elif frequency is not None:
        raise ValueError(
            f"`frequency` (={frequency}) is for the networks of BiPer; {name} has signs of its "
            "weights, not of their sine. Leave it out."
        )
    elif weight_binarizer is not None or activation_surrogate is not None:
        raise ValueError(
            f"`weight_binarizer` (={weight_binarizer!r}) and `activation_surrogate` "
            f"(={activation_surrogate!r}) are for the networks of BiPer; {name} has its own. Leave "
            "them out."
        )
    network = entry.constructor(classes, **settings)
    set_binarizers(network, weight=weight_binarizer, activation=activation_surrogate)
    with torch.no_grad():
        for _, layer in binary_layers(network):
            latent = layer.latent()
            if not latent.is_meta:
                latent.masked_fill_(latent == 0, 1e-8)
    network.provenance = Provenance(
        architecture=name,
        frequency=None if frequency is None else float(frequency),
        stage=stage,
        weight_binarizer=None if weight_binarizer == "periodic" else weight_binarizer,
    )
    network.metadata = entry.metadata if num_classes is None else None
    return network


class _WithoutValues(TorchFunctionMode):
    """Leave initial values out: on the meta device, drawing them imports PyTorch's compiler."""

    # Of tensors, and of torch.nn.init, which may give the tensor by name.
    _FILLERS = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_")
    _INITIALIZERS = ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "constant_")

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__name__", "") in (*self._FILLERS, *self._INITIALIZERS):
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@cache
def state_dict_shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    """Return name and shape of every state-dict entry, without allocating the weights."""
    with torch.device("meta"), _WithoutValues():
        network = build(name, num_classes=num_classes)
    return {key: value.shape for key, value in network.state_dict().items()}

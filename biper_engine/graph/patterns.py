"""What single operators of a network say: the questions that fusing asks, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from biper_engine.geometry import Pool2dGeometry
from biper_engine.graph.reading import arguments, biper_op

__all__ = ["clamp_limits", "is_binarize", "max_pool_of", "only_user", "pair"]

_aten = torch.ops.aten


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the node that alone uses a value, None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pair(value: Any) -> tuple[int, int]:
    """Return an argument for two axes that PyTorch also takes as one number."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values[0], values[-1]


def max_pool_of(node: fx.Node) -> Pool2dGeometry | None:
    """Return a max pool's geometry; None for another node, or with dilation or ceil_mode."""
    if node.target is not _aten.max_pool2d.default:
        return None
    named = arguments(node)
    if named["ceil_mode"] or pair(named["dilation"]) != (1, 1):
        return None
    kernel = pair(named["kernel_size"])
    stride = pair(named["stride"]) if named["stride"] else kernel
    return Pool2dGeometry(kernel_size=kernel, stride=stride, padding=pair(named["padding"]))


def clamp_limits(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return a clamp's lower and upper limit, None for no limit; None for another node."""
    if node.target is _aten.relu.default:
        return 0.0, None
    if node.target is _aten.hardtanh.default:
        names = ("min_val", "max_val")
    elif node.target is _aten.clamp.default:
        names = ("min", "max")
    else:
        return None
    named = arguments(node)
    low, high = (None if named[name] is None else float(named[name]) for name in names)
    return low, high


def is_binarize(node: fx.Node) -> bool:
    """Whether a node is a `binarize` with constant parameters."""
    if biper_op(node) != "binarize":
        return False
    named = arguments(node)
    parameters = (named["threshold"], named["sense"])
    return all(value is None or value.op == "get_attr" for value in parameters)

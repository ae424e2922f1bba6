"""Verify: prove segment by segment that an engine computes what its model computes.

Every node of the engine gets the float graph's own bits and residual, so that no difference
cascades. Accumulators must be equal, as integers. A bit may differ only where the value is within
rounding of its threshold,

    |v - threshold| <= 8 * 2^-24 * (|multiplier| * K + |bias| + |residual| + |shift| + |threshold|),

and each one is counted. A float map must agree within the rounding of its dtype. Where the model's
own sign met an exact 0, which no bit can hold, the contract says +1: such inputs are counted, and
the outputs they reach are left out of the comparison of bits and floats. Logit error and top-1
agreement of the whole network are reported, not judged: one legitimate flip moves logits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from biper_engine.conversion.graphs import arguments
from biper_engine.conversion.pipeline import Built, build
from biper_engine.conversion.segments import check_segments
from biper_engine.conversion.verify_report import SegmentReport, VerifyReport
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError
from biper_engine.runtime import isolate_outputs

__all__ = ["SegmentReport", "VerifyReport", "verify"]

_CHUNK = 64


def verify(
    engine: Engine,
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    limit: int | None = None,
) -> VerifyReport:
    """Compare an engine with the model it was converted from.

    Args:
        engine: an engine, converted or loaded.
        model: the model; it is captured again and is not changed.
        data: a batch of inputs [N, ...], or an iterable of batches; of a batch that is a tuple or
            list, as data loaders give, the first entries are the inputs and a label is ignored.
        limit: compare at most this many images.

    Returns:
        A report; `report.ok` is the verdict, `report.table()` the evidence.

    Raises:
        ConversionError: the model cannot be captured with the engine's input size.
        ValueError: `data` holds no image.
    """
    batches = _batches(data, len(engine.signature.inputs), limit)
    first = next(batches, None)
    if first is None:
        raise ValueError("`data` holds no image; pass a tensor [N, ...] or an iterable of batches.")
    built = _rebuild(engine, model, first)
    mismatch = _mismatch(engine.graph_module, built.lowered)
    if mismatch:
        return VerifyReport(mismatch=mismatch)
    return check_segments(engine, built, chain([first], batches))


def _batches(
    data: Tensor | Iterable[Any], inputs: int, limit: int | None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat inputs of at most `_CHUNK` images, since every map of a batch is kept."""
    left = limit if limit is not None else sys.maxsize
    for batch in [data] if isinstance(data, Tensor) else data:
        leaves = pytree.tree_leaves(batch)[:inputs]
        count = min(left, leaves[0].shape[0])
        for start in range(0, count, _CHUNK):
            yield tuple(leaf[start : min(start + _CHUNK, count)] for leaf in leaves)
        left -= count
        if left < 1:
            return


def _rebuild(engine: Engine, model: nn.Module, batch: tuple[Tensor, ...]) -> Built:
    args, kwargs = pytree.tree_unflatten(list(batch), engine.signature.in_spec)
    if kwargs:
        raise ConversionError("Models with keyword inputs cannot be captured again.")
    options = engine.options
    return build(
        model,
        tuple(args),
        keep_float=tuple(options.get("keep_float", ())),
        compute_dtype=getattr(torch, options.get("compute_dtype", "float32")),
    )


def _mismatch(own: fx.GraphModule, fresh: fx.GraphModule) -> str:
    """Return how an engine differs from a fresh conversion of the model, or an empty string."""
    mine, theirs = dict(own.named_buffers()), dict(fresh.named_buffers())
    for name in sorted(mine.keys() ^ theirs.keys()):
        return f"the engine and the model do not have the same layers (first difference: {name})"
    for name, value in mine.items():
        other = theirs[name]
        same = value.shape == other.shape and value.dtype == other.dtype
        if not same or not torch.equal(value.cpu(), other.cpu()):
            return f"the engine was not made from this model: {name} differs"
    isolated = fx.GraphModule(fresh, copy.deepcopy(fresh.graph))
    isolate_outputs(isolated)
    return _graph_difference(_operators(own), _operators(isolated))


def _operators(graph_module: fx.GraphModule) -> list[tuple[str, Any]]:
    """Return every node's operator and arguments, with positions in place of names."""
    positions: dict[fx.Node, str] = {}
    listed = []
    for index, node in enumerate(graph_module.graph.nodes):
        positions[node] = f"%{index}"
        values: dict[str, Any] = {str(place): value for place, value in enumerate(node.args)}
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            values = arguments(node)
        values = {name: _plain(value, positions) for name, value in values.items()}
        listed.append(
            (node.op if node.op in ("placeholder", "output") else str(node.target), values)
        )
    return listed


def _plain(value: Any, positions: dict[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return positions[value]
    if isinstance(value, list | tuple):
        return [_plain(item, positions) for item in value]
    return value


def _graph_difference(own: list[tuple[str, Any]], fresh: list[tuple[str, Any]]) -> str:
    if len(own) != len(fresh):
        return f"the engine has {len(own)} operators and tensors, the model {len(fresh)}"
    for (mine, my_arguments), (theirs, their_arguments) in zip(own, fresh, strict=True):
        if mine != theirs:
            return f"the engine has {mine} where the model has {theirs}"
        for name, value in my_arguments.items():
            if _scalar_lists(value) != _scalar_lists(their_arguments.get(name)):
                return (
                    f"`{name}` of {mine} is {value} in the engine and "
                    f"{their_arguments.get(name)} in the model"
                )
    return ""


def _scalar_lists(value: Any) -> Any:
    """A list that repeats one number and the number itself are one argument to PyTorch."""
    repeated = isinstance(value, list) and len(value) > 0 and all(v == value[0] for v in value)
    return value[0] if repeated and not isinstance(value[0], str) else value

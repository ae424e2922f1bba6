"""Verify: prove that an engine computes what its model computes.

The proof has three parts, and `VerifyReport.ok` needs the first two.

1. The model itself. A copy of it is called in eval mode, with batches of two or more sizes, and
   with the first batch again after others. The captured graph must give the same outputs: bit for
   bit, or within rounding if PyTorch runs a module with a kernel whose sums have another order. The
   simplified graph must give the values of the captured one. A call that changes the model, or that
   gives different outputs for the same input, is refused, and the cause is named.
2. Segment by segment. Every node of the engine gets the model's own bits and residual, so that
   differences do not accumulate. Accumulators must be equal, as integers. A bit may differ only if
   the value is within rounding of its threshold,

       |v - threshold| <= 8 * 2^-24 *
           ((|multiplier| * K + |bias|) * |gate| + |offset| + |residual| + |shift| + |threshold|),

   to which a float16 or bfloat16 residual adds 2^-10 or 2^-7 of its magnitude, a gate as much of
   what it multiplies, and each such bit is counted. A float map must agree within the rounding of
   its dtype: that of its largest value or, where the terms of a sum cancel, that of the terms; the
   latter values are counted. If the argument of the model's sign is exactly 0, which a bit cannot
   represent, the engine uses +1: such inputs are counted, and the outputs they reach are counted
   and left out of the comparison of bits and floats.
3. End to end, from the input on: bits that differ in each binary layer, error of the outputs, top-1
   agreement. These are reported, not judged: one bit that rounding flips changes the outputs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from biper_engine.conversion.check import Batch, check_against_model
from biper_engine.conversion.observe import first_difference
from biper_engine.conversion.pipeline import Built, build
from biper_engine.conversion.verify_report import SegmentReport, VerifyReport
from biper_engine.engine import Engine
from biper_engine.graph.memory import isolate_outputs
from biper_engine.graph.reading import arguments
from biper_engine.graph.signature import Signature

__all__ = ["SegmentReport", "VerifyReport", "verify"]

_CHUNK = 64


def verify(
    engine: Engine,
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    limit: int | None = None,
) -> VerifyReport:
    """Compare an engine with the model from which it was converted.

    Args:
        engine: an engine, converted or loaded.
        model: the model; it is captured again and is not changed.
        data: a batch of inputs [N, ...]; or the arguments of a call as a tuple or a dict, as
            `convert` takes them; or an iterable of batches, in which a data loader's label comes
            last and is ignored.
        limit: compare at most this many images.

    Returns:
        A report; `report.ok` is the verdict, `report.table()` shows the details.

    Raises:
        ConversionError: the model cannot be captured with the engine's input size, its calls
            change it, or it takes the sign of NaN.
        ValueError: `data` contains no image, or batches with too few inputs.
    """
    batches = _batches(data, engine.signature, limit)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            "`data` contains no image; pass a tensor [N, ...] or an iterable of batches."
        )
    built = _rebuild(engine, model, first)
    mismatch = _mismatch(engine.graph_module, built.lowered)
    if mismatch:
        return VerifyReport(mismatch=mismatch)
    return check_against_model(engine, model, built, chain([first], batches))


def _batches(data: Any, signature: Signature, limit: int | None) -> Iterator[Batch]:
    """Yield flat inputs of at most `_CHUNK` images, since every map of a batch is kept."""
    call = data if isinstance(data, Tensor) else _one_call(data, signature)
    wanted = len(signature.inputs)
    left = limit if limit is not None else sys.maxsize
    for batch in data if call is None else [call]:
        leaves = pytree.tree_leaves(batch)
        leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)][:wanted]
        if len(leaves) < wanted:
            raise ValueError(
                f"The engine takes {wanted} tensor{'s' * (wanted != 1)} ({signature}), but a batch "
                f"of `data` is {_described(batch)}. Pass the arguments of a call as a tuple, or an "
                "iterable of such tuples."
            )
        count = min(left, leaves[0].shape[0])
        for start in range(0, count, _CHUNK):
            yield tuple(leaf[start : min(start + _CHUNK, count)] for leaf in leaves)
        left -= count
        if left < 1:
            return


def _one_call(data: Any, signature: Signature) -> list[Any] | None:
    """Return the tensors of a single call, or None if `data` is an iterable of batches."""
    if not isinstance(data, tuple | Mapping):
        return None
    args, kwargs = (data, {}) if isinstance(data, tuple) else ((), dict(data))
    try:
        leaves = signature.flatten(args, kwargs)
    except TypeError:
        return None
    return leaves if all(isinstance(leaf, Tensor) for leaf in leaves) else None


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"one tensor of shape {list(batch.shape)}"
    return f"a {type(batch).__name__} of {len(pytree.tree_leaves(batch))}"


def _rebuild(engine: Engine, model: nn.Module, batch: tuple[Tensor, ...]) -> Built:
    args, kwargs = pytree.tree_unflatten(list(batch), engine.signature.in_spec)
    options = engine.options
    return build(
        model,
        tuple(args),
        example_kwargs=kwargs,
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
        if first_difference([value.cpu()], [other.cpu()]):
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
            values = {name: value for name, value in arguments(node).items() if name != "device"}
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
    """Return a list that repeats one number as the number: PyTorch treats both alike."""
    repeated = isinstance(value, list) and len(value) > 0 and all(v == value[0] for v in value)
    return value[0] if repeated and not isinstance(value[0], str) else value

"""Native steps of reductions, softmax and normalisation along dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from biper_engine.ops.cpu_program import Map
from biper_engine.runtime.placement import (
    Placed,
    constant_of,
    dense_image,
    fills,
    is_dense,
    memory_order,
    reshaped,
)
from biper_engine.runtime.runs import RunMaps, Unsupported, count_of
from biper_engine.runtime.steps_arithmetic import apply, number

__all__ = ["HANDLERS", "softmax"]

Handler = Callable[[RunMaps, fx.Node, dict[str, Any]], None]


def _dims(x: Placed, dims: Sequence[int] | int | None) -> tuple[int, ...]:
    """Return dimensions from the front, all if none are given; none may be the batch."""
    rank = len(x.sizes)
    given = [dims] if isinstance(dims, int) else list(dims or range(rank))
    found = tuple(sorted(dim % rank for dim in given))
    if x.batch in found:
        raise Unsupported("reduces the batch")
    return found


def _reduced_image(image: Any, dims: Sequence[int], order: Sequence[int], keepdim: bool) -> Any:
    """Return where the results lie, in the order in memory of the dimensions that are kept."""
    sizes = [1 if dim in dims else size for dim, size in enumerate(image.shape)]
    made = dense_image(sizes, order)
    if keepdim:
        return made
    kept = [dim for dim in range(len(sizes)) if dim not in dims]
    return made.as_strided(
        [sizes[dim] for dim in kept], [made.stride(dim) for dim in kept], made.storage_offset()
    )


def reduce(
    run: RunMaps, x: Placed, dims: Sequence[int], keepdim: bool, function: str, **options: Any
) -> Placed:
    """Add a step that makes a number of those along some dimensions.

    Args:
        run: the program.
        x: a float value.
        dims: dimensions from the front, in order, none of them the batch.
        keepdim: whether the result has them, with size 1.
        function: one of those of csrc/cpu/step_rows.cpp that make numbers.
        options: its other arguments.
    """
    x = run.settled(x)
    order = memory_order(x.image)
    made = _pooled(run, x, dims, order, function)
    if made is None:
        kept = [dim for dim in order if dim not in dims]
        rows = run.in_order(x, (*kept, *dims))
        length = count_of([x.image.shape[dim] for dim in dims])
        (made,) = run.emit("rows", x=rows, function=function, length=length, **options)
    return Placed(made, _reduced_image(x.image, dims, order, keepdim))


_POOLS = {
    "mean": ("average", {}),
    "sum": ("average", {"divisor": 1}),
    "maximum": ("maximum", {}),
}


def _pooled(
    run: RunMaps, x: Placed, dims: Sequence[int], order: Sequence[int], function: str
) -> Map | None:
    """Add a pool, where the dimensions lie side by side in memory and others inside of them."""
    wide = [dim for dim in order if x.image.shape[dim] > 1]
    at = [wide.index(dim) for dim in dims if x.image.shape[dim] > 1]
    together = bool(at) and sorted(at) == list(range(min(at), min(at) + len(at)))
    if function not in _POOLS or not together or max(at) == len(wide) - 1:
        return None
    if isinstance(x.source, torch.Tensor) or not fills(x) or not is_dense(x.image, order):
        return None
    sizes = [x.image.shape[dim] for dim in wide]
    outer, inner = count_of(sizes[: min(at)]), count_of(sizes[max(at) + 1 :])
    window = count_of(sizes[min(at) : max(at) + 1])
    step, options = _POOLS[function]
    view = run.seen(x.source, inner, outer * window, 1)
    pool: dict[str, Any] = {"pool": (window, 1, window, 1, 0, 0), "size": (outer, 1)}
    (made,) = run.emit(step, x=view, **pool, **options)
    return made


def _reduction(function: str) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        x = run.flowing(named["self"])
        dims = _dims(x, named.get("dim"))
        run.set(node, reduce(run, x, dims, named.get("keepdim", False), function))

    return handler


def _spread(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["self"])
    dims = _dims(x, named["dim"])
    count = count_of([x.sizes[dim] for dim in dims])
    divisor = count - (1 if named["correction"] is None else named["correction"])
    if divisor <= 0:
        raise Unsupported("divides by nothing")
    keepdim, target = named["keepdim"], str(node.target)
    function = "deviation" if target.startswith("aten.std") else "variance"
    made = reduce(run, x, dims, keepdim, function, divisor=float(divisor))
    if "var_mean" in target:
        run.set(node, (made, reduce(run, x, dims, keepdim, "mean")))
    else:
        run.set(node, made)


def _norm(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x, order = run.flowing(named["self"]), named["ord"]
    if order not in (1, 2):
        raise Unsupported(f"is a norm of order {order}")
    dims = _dims(x, named["dim"])
    run.set(node, reduce(run, x, dims, named["keepdim"], f"norm{int(order)}"))


def _extreme_at(function: str) -> Handler:
    """Return the handler of a reduction whose second result, the positions, nobody may use."""

    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        if any(user.args[1] != 0 for user in node.users):
            raise Unsupported("says where its results are")
        x = run.flowing(named["self"])
        dims = _dims(x, named["dim"])
        run.set(node, (reduce(run, x, dims, named["keepdim"], function), None))

    return handler


# -- rows to rows ----------------------------------------------------------------------------------


def _rows(run: RunMaps, x: Placed, dims: Sequence[int], function: str, **options: Any) -> Placed:
    """Add a step that makes a row of each row along some dimensions."""
    x = run.settled(x)
    order = (*(dim for dim in memory_order(x.image) if dim not in dims), *dims)
    length = count_of([x.image.shape[dim] for dim in dims])
    (made,) = run.emit(
        "rows", x=run.in_order(x, order), function=function, length=length, **options
    )
    return Placed(made, dense_image(x.image.shape, order))


def softmax(run: RunMaps, x: Placed, dim: int, function: str = "softmax") -> Placed:
    """Add a softmax along a dimension, which must not be the batch."""
    return _rows(run, x, _dims(x, dim), function)


def _softmax(function: str) -> Handler:
    def handler(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
        run.set(node, softmax(run, run.flowing(named["self"]), named["dim"], function))

    return handler


def _layer_norm(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    x = run.flowing(named["input"])
    rank, count = len(x.sizes), len(named["normalized_shape"])
    dims = _dims(x, range(rank - count, rank))
    affine = {name: run.optional_tensor(named[name]) for name in ("weight", "bias")}
    run.set(node, _rows(run, x, dims, "normalize", epsilon=named["eps"], **affine))


def _group_norm(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    if any(user.args[1] != 0 for user in node.users):
        raise Unsupported("returns its statistics")
    x, groups = run.flowing(named["input"]), named["group"]
    affine = [run.optional_tensor(named[name]) for name in ("weight", "bias")]
    images, channels, *rest = x.sizes
    grouped = reshaped(x, (images, groups, channels // groups, *rest), 0)
    dims = range(2, 3 + len(rest))
    made = _rows(run, grouped, tuple(dims), "normalize", epsilon=named["eps"])
    made = run.settled(reshaped(made, x.sizes, 0))
    ones = (1,) * len(rest)
    weight, bias = (None if v is None else constant_of(v.view(1, -1, *ones)) for v in affine)
    if weight is not None or bias is not None:
        made = apply(run, "add_product", bias or number(0.0), made, weight or number(1.0))
    run.set(node, (made, None, None))


def _instance_norm(run: RunMaps, node: fx.Node, named: dict[str, Any]) -> None:
    """Normalise [1, images * C, ...], each channel of each image by its own numbers."""
    if any(user.args[1] != 0 for user in node.users):
        raise Unsupported("returns its statistics")
    x = run.settled(run.placed(named["input"]))
    if x.batch != 1 or x.sizes[0] != 1:
        raise Unsupported("takes its statistics from the batch")
    maps = x.viewed(x.image.squeeze(0), 0)
    rank = len(maps.sizes)
    made = _rows(run, maps, tuple(range(1, rank)), "normalize", epsilon=named["eps"])
    affine: list[Placed | None] = []
    for value in (named["weight"], named["bias"]):
        one = None if value is None else run.settled(run.flowing(value))
        ones = (None,) * (rank - 1)
        affine.append(one and one.viewed(one.image[(slice(None), *ones)], 0))
    weight, bias = affine
    if weight is not None or bias is not None:
        made = apply(run, "add_product", bias or number(0.0), made, weight or number(1.0))
    run.set(node, (made.viewed(made.image.unsqueeze(0), 1), None, None))


HANDLERS: dict[str, Handler] = {
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("maximum"),
    "amin": _reduction("minimum"),
    "logsumexp": _reduction("log_sum_exp"),
    "variance": _spread,
    "deviation": _spread,
    "variance_mean": _spread,
    "norm": _norm,
    "max": _extreme_at("maximum"),
    "min": _extreme_at("minimum"),
    "softmax": _softmax("softmax"),
    "log_softmax": _softmax("log_softmax"),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_statistics_norm": _instance_norm,
}
"""The native steps along dimensions, by the names of their declarations."""

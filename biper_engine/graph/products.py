"""Products of matrices, and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from biper_engine.graph import rows
from biper_engine.graph.arguments import BOOL, FLOAT, TENSOR, Kind, number, optional
from biper_engine.graph.operator import Operator
from biper_engine.graph.sizes import ImagesSize, divided
from biper_engine.graph.values import FLOATS, Value, broadcast, require, same_dtype

__all__ = ["OPERATORS"]

_aten = torch.ops.aten


def _linear(input: Value, weight: Value, bias: Value | None) -> Value:
    same_dtype(FLOATS, input=input, weight=weight, bias=bias)
    fits = input.rank >= 1 and weight.rank == 2 and weight.shape[1] == input.shape[-1]
    require(fits, f"`weight` (={weight}) does not fit `input` (={input})")
    outputs = weight.shape[0]
    require(isinstance(outputs, int), f"`weight` is {weight}")
    fits = bias is None or bias.shape == (outputs,)
    require(fits, f"`bias` must be [{outputs}], but it is {bias}")
    return input.like(*input.shape[:-1], outputs)


def _matmul(self: Value, mat2: Value) -> Value:
    return _product(self, mat2, 2)


def _batch_matmul(self: Value, mat2: Value) -> Value:
    return _product(self, mat2, 3)


def _product(a: Value, b: Value, rank: int) -> Value:
    same_dtype(FLOATS, self=a, mat2=b)
    fits = a.rank == b.rank == rank and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    require(fits, f"`mat2` (={b}) does not fit `self` (={a})")
    return a.like(*a.shape[:-1], b.shape[-1])


def _vector_product(self: Value, vec: Value) -> Value:
    same_dtype(FLOATS, self=self, vec=vec)
    fits = self.rank == 2 and vec.shape == self.shape[1:]
    require(fits, f"`vec` (={vec}) does not fit `self` (={self})")
    return self.like(self.shape[0])


def _plus_product(a: Value, b: Value, self: Value, rank: int) -> Value:
    found = _product(a, b, rank)
    same_dtype(FLOATS, mat1=a, self=self)
    fits = broadcast(self.shape, found.shape) == found.shape
    require(fits, f"`self` (={self}) cannot be added to {found}")
    return found


def _addmm(self: Value, mat1: Value, mat2: Value, beta: Any, alpha: Any) -> Value:
    return _plus_product(mat1, mat2, self, 2)


def _baddbmm(self: Value, batch1: Value, batch2: Value, beta: Any, alpha: Any) -> Value:
    return _plus_product(batch1, batch2, self, 3)


def _addbmm(self: Value, batch1: Value, batch2: Value, beta: Any, alpha: Any) -> Value:
    product = _product(batch1, batch2, 3)
    same_dtype(FLOATS, batch1=batch1, self=self)
    found = batch1.like(*product.shape[1:])
    fits = broadcast(self.shape, found.shape) == found.shape
    require(fits, f"`self` (={self}) cannot be added to {found}")
    return found


def _bilinear(i1: Value, i2: Value, i3: Value, **options: Any) -> Value:
    """Check the product of rows, matrices and rows of an `nn.Bilinear`."""
    same_dtype(FLOATS, i1=i1, i2=i2, i3=i3)
    fits = i1.rank == i3.rank == 2 and i2.rank == 3 and i1.shape[0] == i3.shape[0]
    fits = fits and (i1.shape[1], i3.shape[1]) == i2.shape[1:]
    require(fits, f"`i1` is {i1}, `i2` {i2}, `i3` {i3}")
    return i1.like(i1.shape[0], i2.shape[0])


def _distances(x1: Value, x2: Value, **options: Any) -> Value:
    same_dtype((torch.float32, torch.float64), x1=x1, x2=x2)
    fits = x1.rank == x2.rank >= 2 and x1.shape[:-2] == x2.shape[:-2]
    require(fits and x1.shape[-1] == x2.shape[-1], f"`x1` is {x1}, `x2` {x2}")
    return x1.like(*x1.shape[:-1], x2.shape[-2])


def _attention(
    query: Value, key: Value, value: Value, attn_mask: Value | None, **options: Any
) -> tuple[Value, ...]:
    """Check what PyTorch does not check: its CPU kernel reads memory without looking at shapes."""
    same_dtype(FLOATS, query=query, key=key, value=value)
    same = query.rank == key.rank == 4 and key.shape == value.shape
    fits = same and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    require(fits, f"`query` is {query}, `key` {key}, `value` {value}")
    divided(query.shape[1], key.shape[1])  # several heads of `query` may share one of `key`
    for size in query.shape[1:] + key.shape[1:]:
        require(not isinstance(size, ImagesSize) and size >= 1, f"`query` is {query}, `key` {key}")
    scores = (*query.shape[:3], key.shape[2])
    if attn_mask is not None:
        same_dtype(FLOATS, query=query, attn_mask=attn_mask)
        fits = attn_mask.rank in (2, 4) and broadcast(attn_mask.shape, scores) == scores
        require(fits, f"`attn_mask` (={attn_mask}) does not fit {query.like(*scores)}")
    return (query.like(*query.shape),)  # the second result is only for gradients


def _matrices(named: Mapping[str, Any], result: Any) -> bool:
    """Require a batch whose rows have their own shape, and constant parameters."""
    return rows.first_flows(named, result) and next(iter(named.values())).rank >= 2


def _attention_rows(named: Mapping[str, Any], result: Any) -> bool:
    mask = named["attn_mask"]
    operands = (named[name] for name in ("query", "key", "value"))
    flowing = all(x.flows and rows.is_batch(x) for x in operands)
    return flowing and (mask is None or mask.rank == 2 or mask.shape[0] == 1)


def _dims(*wanted: int) -> Kind:
    return Kind(f"{list(wanted)}", lambda v: isinstance(v, list | tuple) and tuple(v) == wanted)


_BILINEAR = {
    **dict.fromkeys(("i1", "i2", "i3"), TENSOR),
    **{"expand1": _dims(1, 3), "expand2": _dims(0), "expand3": _dims(1, 2)},
    **{"sumdim": _dims(2, 3), "unroll_dim": Kind("1", lambda v: type(v) is int and v == 1)},
}
_PAIR = dict.fromkeys(("x1", "x2"), TENSOR)
_MODE = Kind("0, 1, 2 or None", lambda v: v is None or (type(v) is int and 0 <= v <= 2))

OPERATORS: list[Operator] = [
    Operator(
        name="linear",
        target=_aten.linear.default,
        arguments={"input": TENSOR, "weight": TENSOR, "bias": optional(TENSOR)},
        result=_linear,
        rows=_matrices,
    ),
    Operator(
        name="matmul",
        target=_aten.mm.default,
        arguments={"self": TENSOR, "mat2": TENSOR},
        result=_matmul,
        rows=_matrices,
    ),
    Operator(
        name="batch_matmul",
        target=_aten.bmm.default,
        arguments={"self": TENSOR, "mat2": TENSOR},
        result=_batch_matmul,
        rows=rows.all_flow,
    ),
    Operator(
        name="vector_matmul",
        target=_aten.mv.default,
        arguments={"self": TENSOR, "vec": TENSOR},
        result=_vector_product,
        rows=_matrices,
    ),
    Operator(
        name="add_matmul",
        target=_aten.addmm.default,
        arguments=dict.fromkeys(("self", "mat1", "mat2"), TENSOR)
        | dict.fromkeys(("beta", "alpha"), FLOAT),
        result=_addmm,
    ),
    Operator(
        name="add_batch_matmul",
        target=_aten.baddbmm.default,
        arguments=dict.fromkeys(("self", "batch1", "batch2"), TENSOR)
        | dict.fromkeys(("beta", "alpha"), FLOAT),
        result=_baddbmm,
        rows=rows.all_flow,
    ),
    Operator(
        name="add_sum_of_matmuls",
        target=_aten.addbmm.default,
        arguments=dict.fromkeys(("self", "batch1", "batch2"), TENSOR)
        | dict.fromkeys(("beta", "alpha"), FLOAT),
        result=_addbmm,
    ),
    Operator(
        name="bilinear", target=_aten._trilinear.default, arguments=_BILINEAR, result=_bilinear
    ),
    Operator(
        name="distances",
        target=_aten._cdist_forward.default,
        arguments={
            **_PAIR,
            "p": Kind("a number from 0, or inf", lambda v: type(v) is float and v >= 0),
            "compute_mode": _MODE,
        },
        result=_distances,
    ),
    Operator(
        name="euclidean_distances",
        target=_aten._euclidean_dist.default,
        arguments=_PAIR,
        result=_distances,
    ),
    Operator(
        name="attention",
        target=_aten._scaled_dot_product_flash_attention_for_cpu.default,
        arguments={
            **dict.fromkeys(("query", "key", "value"), TENSOR),
            "dropout_p": number(0, 0),
            "is_causal": BOOL,
            "attn_mask": optional(TENSOR),
            "scale": optional(FLOAT),
        },
        result=_attention,
        rows=_attention_rows,
    ),
]

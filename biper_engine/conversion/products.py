"""Products: every operator of a captured graph that multiplies and accumulates.

2-d convolutions and linear layers can run on bits. All other products stay in floating point and
are also reported, with their cost and the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.graph.reading import arguments, constant, is_call, parent, shape

__all__ = ["Factor", "Product", "find_product"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Factor:
    """One factor of a product.

    Attributes:
        node: its value.
        axis: the dimension that is summed over, or the channels of a map.
        by_output: reshapes a constant factor to [outputs, ...], as `analyse_weight` takes it.
    """

    node: fx.Node
    axis: int
    by_output: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """A multiplying operator.

    Attributes:
        node: the call.
        kind: "conv2d", "linear", "conv1d", "conv_transpose2d", "matmul" and so on.
        factors: the input and the weight; of a product of two activations, left and right.
        shape: shape of the weight, or of the right factor without batches.
        macs: multiply-accumulates for one image.
        plural: name of such operators in a message.
    """

    node: fx.Node
    kind: str
    factors: tuple[Factor, ...]
    shape: tuple[int, ...]
    macs: int
    plural: str

    @property
    def packable(self) -> bool:
        """Whether such operators can run on bits."""
        return self.kind in ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "linear")


def find_product(graph_module: fx.GraphModule, node: fx.Node) -> Product | None:
    """Return the product that a call computes, or None if it does not multiply."""
    if node.op != "call_function":
        return None
    find = _FINDERS.get(getattr(node.target, "overloadpacket", None))
    return None if find is None else find(graph_module, node)


def _of_one_image(size: Any) -> int:
    """Return a size for a batch of 1; sizes that depend on the batch are expressions."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(_of_one_image(size) for size in shape(node))


def _held(node: fx.Node) -> fx.Node:
    """Return the constant that a value repeats along new dimensions, or the value itself."""
    origin = node
    while is_call(origin, aten.expand.default):
        origin = parent(origin)
    return origin if origin.op == "get_attr" else node


def _rows(weight: Tensor) -> Tensor:
    """Return a weight [..., outputs, inputs] as [outputs, everything else]."""
    return weight.movedim(-2, 0).flatten(1) if weight.dim() > 1 else weight[None]


def _columns(weight: Tensor) -> Tensor:
    """Return a weight [..., inputs, outputs] as [outputs, everything else]."""
    return weight.movedim(-1, 0).flatten(1) if weight.dim() > 1 else weight[None]


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


# -- layers ---------------------------------------------------------------------------------------


def _linear(_: fx.GraphModule, node: fx.Node) -> Product:
    named = arguments(node)
    weight, x = named["weight"], named["input"]
    factors = (Factor(x, len(shape(x)) - 1, _rows), Factor(weight, 1, _as_it_is))
    sizes = _sizes(weight)
    macs = math.prod(_sizes(x)) * sizes[0]
    return Product(node, "linear", factors, sizes, macs, "linear layers")


def _convolution(_: fx.GraphModule, node: fx.Node) -> Product:
    named = arguments(node)
    x, weight = named["input"], named["weight"]
    transposed, groups = named.get("transposed", False), named["groups"]
    sizes = _sizes(weight)
    dimensions = len(sizes) - 2
    kind = f"conv{'_transpose' * transposed}{dimensions}d"
    written = node.meta.get("written_as", kind)  # of height 1, or of another operator
    # Every input position of a transposed convolution is multiplied by the whole kernel.
    positions = _sizes(x if transposed else node)

    def by_output(held: Tensor) -> Tensor:
        if not transposed:
            return held
        grouped = held.reshape(groups, -1, *held.shape[1:]).transpose(1, 2)
        return grouped.reshape(-1, *grouped.shape[2:])

    return Product(
        node=node,
        kind=written,
        factors=(
            Factor(x, len(shape(x)) - dimensions - 1, _as_it_is),
            Factor(weight, 1, by_output),
        ),
        shape=sizes[:2] + sizes[3:] if written.endswith("1d") and dimensions == 2 else sizes,
        macs=math.prod(positions) * math.prod(sizes[1:]),
        plural=f"{'transposed ' * transposed}{dimensions}-D convolutions",
    )


# -- matrix products ------------------------------------------------------------------------------


def _matrices(left: str, right: str) -> Callable[[fx.GraphModule, fx.Node], Product]:
    """Return a finder of products [..., M, K] by [..., K, N] or [K], given argument names."""

    def find(graph_module: fx.GraphModule, node: fx.Node) -> Product:
        named = arguments(node)
        a, b = named[left], named[right]
        vector = len(shape(b)) == 1
        summed = 0 if vector else len(shape(b)) - 2
        factors = (Factor(_held(a), len(shape(a)) - 1, _rows), Factor(_held(b), summed, _columns))
        if constant(graph_module, factors[0].node) is not None:
            factors = factors[::-1]
        columns = 1 if vector else _sizes(b)[-1]
        sizes = _sizes(factors[1].node)[-2:]
        macs = math.prod(_sizes(a)) * columns
        return Product(node, "matmul", factors, sizes, macs, "such matrix products")

    return find


def _attention(_: fx.GraphModule, node: fx.Node) -> Product:
    named = arguments(node)
    query, key, value = (named[name] for name in ("query", "key", "value"))
    rows, length = math.prod(_sizes(query)[:-1]), _sizes(key)[-2]
    macs = rows * length * (_sizes(query)[-1] + _sizes(value)[-1])
    factors = tuple(Factor(factor, len(shape(factor)) - 1, _rows) for factor in (query, key))
    sizes = _sizes(key)[-2:]
    return Product(node, "attention", factors, sizes, macs, "fused attention products")


def _bilinear(_: fx.GraphModule, node: fx.Node) -> Product:
    named = arguments(node)
    x, weight = named["i1"], named["i2"]
    factors = (Factor(x, len(shape(x)) - 1, _rows), Factor(weight, 1, _as_it_is))
    sizes = _sizes(weight)
    macs = math.prod(_sizes(node)) * math.prod(sizes[1:])
    return Product(node, "bilinear", factors, sizes, macs, "bilinear layers")


def _recurrent(_: fx.GraphModule, node: fx.Node) -> Product:
    """A fused recurrent layer: its weights multiply the input and the state at every step."""
    named = arguments(node)
    x = named["input"]
    weights = list(_matrices_of(named))
    steps = math.prod(_sizes(x)[:-1])
    factors = (
        Factor(x, len(shape(x)) - 1, _rows),
        *(Factor(weight, 1, _as_it_is) for weight in weights),
    )
    macs = steps * sum(math.prod(_sizes(weight)) for weight in weights)
    sizes = _sizes(weights[0]) if weights else ()
    return Product(node, "recurrent", factors, sizes, macs, "fused recurrent layers")


def _matrices_of(named: dict[str, Any]) -> Iterator[fx.Node]:
    for name, value in named.items():
        nodes = value if isinstance(value, (list, tuple)) else [value]
        for held in nodes:
            if "weight" in name and isinstance(held, fx.Node) and len(shape(held)) == 2:
                yield held


_FINDERS: dict[object, Callable[[fx.GraphModule, fx.Node], Product]] = {
    aten.conv2d: _convolution,
    aten.convolution: _convolution,
    aten.linear: _linear,
    aten.mm: _matrices("self", "mat2"),
    aten.addmm: _matrices("mat1", "mat2"),
    aten.bmm: _matrices("self", "mat2"),
    aten.baddbmm: _matrices("batch1", "batch2"),
    aten.addbmm: _matrices("batch1", "batch2"),
    aten.mv: _matrices("self", "vec"),
    aten.addmv: _matrices("mat", "vec"),
    aten.dot: _matrices("self", "tensor"),
    aten._trilinear: _bilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_attention_math: _attention,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent,
    aten.miopen_rnn: _recurrent,
}

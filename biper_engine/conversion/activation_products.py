"""Products of two binary activations, as in attention: rewrite a batched product on bits.

Both factors of `bmm` are steps of float maps. The bits of the left one are packed along its last
dimension and those of the right one along its second to last, so that both are packed maps whose
channels are summed: a factor [N, H, M, K] becomes the map [N, K, H, M]. Moves after a sign are made
before it, on the float map, and a permutation that undoes another disappears.

If both factors are heads of one map, [N, M, H * K] cut into H parts, its bits are packed whole and
the product has groups. An element is -1 or 1, or 0 or 1; for factors s * element + m, the sums of
rows and columns add the terms of m (see `biper_engine.ops.matrix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import StepRule
from biper_engine.conversion.operands import Operands
from biper_engine.conversion.products import Product
from biper_engine.conversion.ranges import is_move
from biper_engine.conversion.values import Steps, is_float
from biper_engine.geometry import MAX_REDUCTION
from biper_engine.graph.editing import call, repeat_call, substitute
from biper_engine.graph.reading import is_call, parent, shape
from biper_engine.ops.matrix import MatrixScale, MatrixShape

__all__ = ["ActivationProduct", "FactorValue", "pack_activation_product"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FactorValue:
    """A factor of a product: its values in the float graph, as `verify` reads them.

    Attributes:
        value: name of the binary value, whose last two dimensions are those of the factor.
        source: the float map of which it is an elementwise step, or None.
        rule: the step.
        summed: the dimension of `value` that is summed: -1 or -2.
    """

    value: str
    source: str | None
    rule: StepRule
    summed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that must be numbers."""
        return (self.value,) if self.source is None else (self.value, self.source)

    @property
    def low(self) -> int:
        """The element where a bit is 0; where it is 1, it is 1."""
        return 0 if self.rule.low == 0 else -1

    @property
    def scale(self) -> float:
        """S of the values s * element + m."""
        return (self.rule.high - self.rule.low) / (1 - self.low)

    @property
    def middle(self) -> float:
        """M of the values s * element + m."""
        return 0.0 if self.low == 0 else (self.rule.high + self.rule.low) / 2


@dataclass(frozen=True)
class ActivationProduct:
    """A product of two activations, in `meta["product"]` of its call.

    Attributes:
        left, right: the factors.
        result: name of the product in the float graph.
        depth: number of elements that are summed.
    """

    left: FactorValue
    right: FactorValue
    result: str
    depth: int

    def scaled(self) -> MatrixScale:
        """Return the scale of the integer sums."""
        a, b = self.left, self.right
        return MatrixScale(
            a.scale * b.scale,
            a.scale * b.middle,
            a.middle * b.scale,
            self.depth * a.middle * b.middle,
        )


@dataclass(frozen=True)
class _Factor:
    """A factor under construction: the float map whose step it is, in the factor's dimensions."""

    held: FactorValue
    rank: int
    source: fx.Node
    moves: tuple[fx.Node, ...]  # what is done to the source, the last move first


def pack_activation_product(
    graph_module: fx.GraphModule, product: Product, operands: Operands
) -> str | None:
    """Replace a batched product of two binary activations by one on bits, in place.

    Args:
        graph_module: the graph.
        product: the product.
        operands: finds its factors.

    Returns:
        None, or the reason why the product stays in floating point, as a clause.
    """
    node = product.node
    if not is_call(node, aten.bmm.default):
        return f"{product.plural} do not run on bits"
    if node.meta["val"].dtype != torch.float32:
        return "it does not compute in float32"
    found = [_factor(operands, parent(node, at), -1 - at, merged=False) for at in (0, 1)]
    if len({factor.rank for factor in found if isinstance(factor, _Factor)}) > 1:
        found = [_factor(operands, parent(node, at), -1 - at, merged=True) for at in (0, 1)]
    left, right = found
    if isinstance(left, str):
        return f"its left factor {left}"
    if isinstance(right, str):
        return f"its right factor {right}"
    sizes = [_sizes(node, position) for position in (0, 1)]
    rows, depth, columns = sizes[0][-2], sizes[0][-1], sizes[1][-1]
    if not all(isinstance(size, int) for size in (rows, depth, columns)):
        return "its sizes depend on the batch size"
    if depth >= MAX_REDUCTION:
        return f"it sums {depth} products, more than float32 can count"
    heads = [_heads(left), _heads(right)]
    if left.rank == 3 or right.rank == 3 or heads[0] != heads[1]:
        heads = [1, 1]
    _emit(graph_module, product, left, right, int(heads[0]), (rows, depth, columns))
    return None


def _sizes(node: fx.Node, position: int) -> tuple[Any, ...]:
    return shape(parent(node, position))


# -- factors --------------------------------------------------------------------------------------


def _factor(operands: Operands, x: fx.Node, summed: int, *, merged: bool) -> _Factor | str:
    """Find the float map of which a factor is a step, before its batches were merged or after."""
    x = x if merged else _before_merging(x)
    axis = len(shape(x)) + summed
    moves, root = [], x
    while is_move(root):
        moves.append(root)
        root = parent(root)
    step = _uniform_step(operands, root) if moves else operands.steps_of(x, axis)
    if isinstance(step, Steps) and len(step.rules) == 1 and is_float(step.source):
        (rule,) = step.rules
        rule = rule.resized(int(shape(x)[axis])) if moves else rule
        source = None if moves else step.source.meta.get("source", step.source.name)
        return _made(x, source, rule, summed, step.source, moves)
    operand = operands.find(x, axis)  # two numbers; its bits are those of the value
    if isinstance(operand, str):
        return operand
    if len(operand.rules) > 1:
        return f"takes {len(operand.rules) + 1} values"
    (rule,) = operand.rules
    middle = torch.full_like(rule.threshold, operand.offset)
    rule = replace(rule, threshold=middle, sense=torch.zeros_like(rule.sense))
    return _made(x, None, rule, summed, x, [])


def _made(
    x: fx.Node,
    source: str | None,
    rule: StepRule,
    summed: int,
    root: fx.Node,
    moves: Sequence[fx.Node],
) -> _Factor:
    held = FactorValue(x.meta.get("source", x.name), source, rule, summed)
    return _Factor(held, len(shape(x)), root, tuple(moves))


def _before_merging(x: fx.Node) -> fx.Node:
    """Return the value before its leading dimensions were merged into one batch of matrices."""
    inner = x
    while is_call(inner, aten.reshape.default, aten.clone.default):
        source = parent(inner)
        if len(shape(source)) < 3 or list(shape(source)[-2:]) != list(shape(x)[-2:]):
            break
        inner = source
    return inner if len(shape(inner)) in (3, 4) else x


def _uniform_step(operands: Operands, x: fx.Node) -> Steps | None:
    """Return the step of a value if all its elements share one."""
    last = len(shape(x)) - 1
    for axis in dict.fromkeys((last, min(1, last))):
        steps = operands.steps_of(x, axis)
        if isinstance(steps, Steps) and len(steps.rules) == 1 and steps.rules[0].uniform:
            return steps
    return None


def _heads(factor: _Factor) -> int:
    """Return H if a factor [N, H, M, K] is the parts of a map [N, M, H * K], else 1."""
    tokens = _tokens(factor)
    return 1 if tokens is None else int(shape(tokens)[2]) // len(factor.held.rule.threshold)


def _tokens(factor: _Factor) -> fx.Node | None:
    """Return the map [N, M, H * K] whose parts a factor is, or None."""
    dims, base = _dims(factor)
    if dims != [0, 3, 2, 1] or not is_call(base, aten.reshape.default):
        return None
    tokens = parent(base)
    while is_call(tokens, aten.reshape.default) and len(shape(tokens)) != 3:
        tokens = parent(tokens)
    sizes, parts = shape(tokens), shape(base)
    whole = len(sizes) == 3 and str(sizes[1]) == str(parts[1]) and factor.held.rule.uniform
    return tokens if whole and sizes[2] == parts[2] * parts[3] else None


def _dims(factor: _Factor) -> tuple[list[int] | None, fx.Node]:
    """Return the permutation that makes a factor's map, and the value that it permutes.

    None stands for moves other than permutations.
    """
    dims = _map_dims(factor)
    for move in factor.moves:
        if not is_call(move, aten.permute.default):
            return None, factor.source
        dims = _composed(move, dims)
    base = factor.source
    while is_call(base, aten.permute.default):
        dims, base = _composed(base, dims), parent(base)
    return dims, base


def _map_dims(factor: _Factor) -> list[int]:
    """Return the permutation of a factor [N, H, M, K] or [N, M, K] that puts K second."""
    channel = factor.rank + factor.held.summed
    return [0, channel, *(d for d in range(1, factor.rank) if d != channel)]


def _composed(permute: fx.Node, dims: Sequence[int]) -> list[int]:
    """Return the dimensions that a permutation of a permuted value takes from the value."""
    inner: Any = permute.args[1]
    rank = len(inner)
    return [inner[dim] % rank for dim in dims]


# -- calls ----------------------------------------------------------------------------------------


def _emit(
    graph_module: fx.GraphModule,
    product: Product,
    left: _Factor,
    right: _Factor,
    groups: int,
    sizes: tuple[int, int, int],
) -> None:
    node, graph = product.node, graph_module.graph
    rows, depth, columns = sizes
    bits = [_bits(graph_module, node, factor, groups) for factor in (left, right)]
    layer = str(node.meta.get("layer") or node.name)
    result = node.meta.get("source", node.name)
    held = ActivationProduct(left.held, right.held, result, depth)
    matrix = MatrixShape(depth * groups, groups, left.held.low, right.held.low)
    height = int(shape(bits[0])[1]) * groups
    options = {**vars(held.scaled()), "dtype": torch.float32, **vars(matrix)}
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.biper.bmatmul_float.default, tuple(bits), options)
    value: Tensor = node.meta["val"].reshape(-1, height, rows, columns)
    new.meta = {"product": held, "layer": layer, "val": value.permute(0, 3, 1, 2)}
    matrices = call(graph, node, aten.permute.default, new, [0, 2, 3, 1], like=node)
    matrices.meta = {"val": value}
    flat = [-1, rows, columns]
    substitute(node, call(graph, node, aten.reshape.default, matrices, flat, like=node))


def _bits(graph_module: fx.GraphModule, before: fx.Node, factor: _Factor, groups: int) -> fx.Node:
    """Insert the calls that make the packed map of a factor."""
    rule = factor.held.rule
    tokens = _tokens(factor) if groups > 1 else None
    if tokens is not None:
        channels = int(shape(tokens)[2])
        pixels = _permuted(graph_module, before, tokens, [0, 2, 1])
        source = _reshaped(graph_module, before, pixels, [-1, channels, 1, shape(tokens)[1]])
        rule = rule.resized(channels)
    else:
        dims, base = _dims(factor)
        if dims is None:
            base = factor.source
            for move in reversed(factor.moves):
                base = repeat_call(graph_module.graph, before, move, base)
                base.meta.pop("source", None)
            dims = _map_dims(factor)
        source = _permuted(graph_module, before, base, dims)
        if factor.rank == 3:
            _, channels, pixels_of_row = shape(source)
            source = _reshaped(graph_module, before, source, [-1, channels, 1, pixels_of_row])
    for user in source.users:
        if is_call(user, ir.binarize) and user.meta["rule"] is rule:
            return user
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.call_function(ir.binarize, (source,))
    node.meta = {"rule": rule, "val": source.meta["val"].permute(0, 2, 3, 1)}
    return node


def _permuted(
    graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, dims: list[int]
) -> fx.Node:
    if dims == sorted(dims):
        return x
    new = call(graph_module.graph, before, aten.permute.default, x, dims, like=x)
    new.meta = {"val": x.meta["val"].permute(dims)}
    return new


def _reshaped(
    graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, sizes: list[Any]
) -> fx.Node:
    new = call(graph_module.graph, before, aten.reshape.default, x, sizes, like=x)
    new.meta = {"val": x.meta["val"].reshape(sizes)}
    return new

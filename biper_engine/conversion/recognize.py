"""Recognize: find every convolution and linear layer that is binary, and write it as one.

A layer is binary when its weight takes two values in every output channel (`weights`) and its input
is a step of a float map (`values`), reached through operators that only move values: zero padding
becomes the convolution's own, max pooling is done on bits, reshape, permute and cat are done on the
float map instead. With activations `sx * (+-1) + mx` and weights `sw * (+-1) + mw`,

    conv(x, w) = sx * sw * dot  +  sx * mw * (sum of activation bits over the valid taps)
                                +  mx * (sum of weights over the valid taps),

of which all but the first term vanish for +-s. Names are read for the report and `keep_float` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.graphs import (
    arguments,
    call,
    constant,
    constant_node,
    is_call,
    parent,
    repeat_call,
    shape,
    substitute,
)
from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.conversion.values import Step, find_step
from biper_engine.conversion.weights import BinaryWeight, analyse_weight
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.report import LayerReport

__all__ = ["recognize"]

aten = torch.ops.aten

_MOVES = (aten.reshape.default, aten.permute.default, aten.slice.Tensor)
"""Operators that move or drop values."""


@dataclass(frozen=True)
class _Operand:
    """A recognised activation: how to get its bits, and what of the float graph it stands for."""

    value: fx.Node
    rule: StepRule
    build: Callable[[fx.Node], fx.Node]  # inserts what makes the bits before a node
    source: str | None = None  # the float map, where nothing moves values in between


def recognize(
    graph_module: fx.GraphModule,
    *,
    keep_float: Sequence[str] = (),
    zero_weights: str = "float",
) -> list[LayerReport]:
    """Replace binary layers by `ir.binary_conv`, in place; return a report row per layer."""
    rows = []
    for node in list(graph_module.graph.nodes):
        if is_call(node, aten.conv2d.default, aten.linear.default):
            weight = constant(graph_module, arguments(node)["weight"])
            rows.append(_layer(graph_module, node, weight, keep_float, zero_weights))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return rows


def _layer(
    graph_module: fx.GraphModule,
    node: fx.Node,
    weight: Tensor | None,
    keep_float: Sequence[str],
    zero_weights: str,
) -> LayerReport:
    name = str(node.meta.get("layer") or node.name)
    kind = "conv2d" if is_call(node, aten.conv2d.default) else "linear"
    out_shape = shape(node)
    positions = math.prod(out_shape[2:] if kind == "conv2d" else out_shape[1:-1])
    weight_shape = tuple(weight.shape) if weight is not None else shape(arguments(node)["weight"])
    row = LayerReport(
        name=name,
        kind=kind,
        packed=False,
        reason="",
        shape=weight_shape,
        macs=positions * math.prod(weight_shape),
        weight_bits_before=32 * math.prod(weight_shape),
        weight_bits_after=32 * math.prod(weight_shape),
        zero_weights=0 if weight is None else int((weight == 0).sum()),
    )
    if weight is None:
        return replace(row, reason="its weight depends on the input")
    if weight.dtype != torch.float32:
        name = str(weight.dtype).removeprefix("torch.")
        return replace(row, reason=f"it computes in {name}, under an autocast of the model's own")
    split = analyse_weight(weight, zero_weights)
    operand = _operand(graph_module, node, kind)
    binary_weight = isinstance(split, BinaryWeight)
    # One weight per channel is always +-s; that alone makes no layer binary.
    binary_weight = binary_weight and math.prod(weight_shape[1:]) > 1
    row = replace(
        row,
        binary=binary_weight or isinstance(operand, _Operand),
        binary_weight=binary_weight,
    )
    path = name.partition("#")[0]  # numbered where a module is called again
    if any(fnmatchcase(path, pattern) or fnmatchcase(name, pattern) for pattern in keep_float):
        return replace(row, reason="kept by `keep_float`")
    if isinstance(split, str) or isinstance(operand, str):
        weight_alone = "its weight is binary, but " if binary_weight else ""
        clauses = [f"{weight_alone}its input {operand}"] if isinstance(operand, str) else []
        clauses += [f"its weight {split}"] if isinstance(split, str) else []
        ternary = isinstance(split, str) and "exactly 0" in split
        return replace(row, reason=", ".join(clauses), binary=row.binary or ternary)
    packed = _pack(graph_module, node, kind, operand, split)
    return replace(row, packed=True, weight_bits_after=32 * math.prod(packed.geometry.weight_shape))


# -- activations ----------------------------------------------------------------------------------


def _operand(graph_module: fx.GraphModule, node: fx.Node, kind: str) -> _Operand | str:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if kind == "conv2d":
        _, x = _peel_padding(x)
        return _binary_value(graph_module, x, axis=1)
    return _binary_value(graph_module, x, axis=len(shape(x)) - 1)


def _peel_padding(x: fx.Node) -> tuple[tuple[int, int, int, int], fx.Node]:
    """Return (top, bottom, left, right) of the zero pads before a layer, and what they pad."""
    total = (0, 0, 0, 0)
    while is_call(x, aten.constant_pad_nd.default):
        named = arguments(x)
        pad = list(named["pad"])
        if named["value"] not in (0, None) or any(pad[4:]) or min(pad) < 0:
            break
        left, right, top, bottom = ([*pad, 0, 0, 0, 0])[:4]
        total = (total[0] + top, total[1] + bottom, total[2] + left, total[3] + right)
        x = named["self"]
    return total, x


def _binary_value(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> _Operand | str:
    moved = _moved(graph_module, x, axis)
    if moved is not None:
        return moved
    step = find_step(graph_module, x, axis)
    if isinstance(step, str):
        return step

    def build(before: fx.Node) -> fx.Node:
        return _bits(graph_module, before, _as_map(graph_module, before, step.source, axis), step)

    return _Operand(x, step.rule, build, step.source.meta.get("source", step.source.name))


def _as_map(graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, axis: int) -> fx.Node:
    """Return `x` as [N, C, H, W]; features in the last dimension become channels of 1x1 maps."""
    if len(shape(x)) == 4 and axis == 1:
        return x
    features = int(shape(x)[-1])
    new = call(graph_module.graph, before, aten.reshape.default, x, [-1, features, 1, 1], like=x)
    new.meta["val"] = x.meta["val"].reshape(-1, features, 1, 1)
    new.meta.pop("source", None)
    return new


def _bits(graph_module: fx.GraphModule, before: fx.Node, source: fx.Node, step: Step) -> fx.Node:
    """Return the node of the bits of `source`, shared by all layers that use the same step."""
    for user in source.users:
        if ir.is_marker(user, ir.binarize) and _same_rule(user.meta["rule"], step.rule):
            return user
    with graph_module.graph.inserting_after(source):
        node = graph_module.graph.call_function(ir.binarize, (source,))
    node.meta = {"rule": step.rule}
    return node


def _same_rule(a: StepRule, b: StepRule) -> bool:
    return torch.equal(a.threshold, b.threshold) and torch.equal(a.sense, b.sense)


def _moved(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> _Operand | None:
    """Recognise a binary value behind an operator that moves values, or return None."""
    if is_call(x, aten.max_pool2d.default) and axis == 1:
        return _pooled(graph_module, x)
    if is_call(x, *_MOVES):
        return _rearranged(graph_module, x, axis)
    if is_call(x, aten.cat.default) and axis == arguments(x)["dim"] % len(shape(x)):
        return _concatenated(graph_module, x, axis)
    if is_call(x, aten.constant_pad_nd.default):
        return _padded(graph_module, x, axis)
    return None


def _pooled(graph_module: fx.GraphModule, x: fx.Node) -> _Operand | None:
    pool = pool_geometry(x)
    inner = _binary_value(graph_module, parent(x), 1) if pool is not None else "is a general pool"
    if isinstance(inner, str):
        return None

    def build(before: fx.Node) -> fx.Node:
        bits = inner.build(before)
        with graph_module.graph.inserting_after(bits):
            node = graph_module.graph.call_function(ir.binary_max_pool, (bits,))
        node.meta = {"pool": pool, "channels": int(shape(x)[1])}
        return node

    return _Operand(x, inner.rule, build)


def pool_geometry(x: fx.Node) -> Pool2dGeometry | None:
    """Return the geometry of a max_pool2d node, or None where it has dilation or ceil_mode."""
    named = arguments(x)
    kernel = _pair(named["kernel_size"])
    stride = _pair(named["stride"]) if named["stride"] else kernel
    if named["ceil_mode"] or _pair(named["dilation"]) != (1, 1):
        return None
    return Pool2dGeometry(kernel_size=kernel, stride=stride, padding=_pair(named["padding"]))


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (values[0], values[-1])


def _rearranged(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> _Operand | None:
    """sign(x) rearranged is x rearranged, then sign, if all elements share one step."""
    moves, root = [x], parent(x)
    while is_call(root, *_MOVES):
        moves.append(root)
        root = parent(root)
    step = find_step(graph_module, root, 1 if len(shape(root)) > 1 else 0)
    if isinstance(step, str) or not step.rule.uniform:
        return None
    rule = step.rule.resized(int(shape(x)[axis]))

    def build(before: fx.Node) -> fx.Node:
        moved = step.source
        for move in reversed(moves):
            moved = repeat_call(graph_module.graph, before, move, moved)
            moved.meta.pop("source", None)
        source = _as_map(graph_module, before, moved, axis)
        return _bits(graph_module, before, source, Step(source, rule))

    return _Operand(x, rule, build)


def _concatenated(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> _Operand | None:
    joined_nodes: Sequence[fx.Node] = arguments(x)["tensors"]
    parts = [find_step(graph_module, part, axis) for part in joined_nodes]
    steps = [part for part in parts if isinstance(part, Step)]
    if len(steps) < len(parts) or len({(s.rule.low, s.rule.high) for s in steps}) != 1:
        return None
    rule = StepRule(
        torch.cat([s.rule.threshold for s in steps]),
        torch.cat([s.rule.sense for s in steps]),
        steps[0].rule.low,
        steps[0].rule.high,
        any(s.rule.tie for s in steps),
    )

    def build(before: fx.Node) -> fx.Node:
        joined = call(
            graph_module.graph,
            before,
            aten.cat.default,
            [s.source for s in steps],
            *x.args[1:],
            like=x,
        )
        joined.meta.pop("source", None)
        source = _as_map(graph_module, before, joined, axis)
        return _bits(graph_module, before, source, Step(source, rule))

    return _Operand(x, rule, build)


def _padded(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> _Operand | None:
    """Padding with one of the two levels pads the float source beyond the step instead."""
    named = arguments(x)
    step = find_step(graph_module, named["self"], axis)
    if axis != 1 or isinstance(step, str) or not step.rule.uniform or any(named["pad"][4:]):
        return None
    value = named["value"] or 0.0
    if value not in (step.rule.low, step.rule.high):
        return None
    above = (value == step.rule.high) != bool(step.rule.sense[0])

    def build(before: fx.Node) -> fx.Node:
        beyond = math.inf if above else -math.inf
        wider = call(
            graph_module.graph,
            before,
            aten.constant_pad_nd.default,
            step.source,
            named["pad"],
            beyond,
            like=x,
        )
        wider.meta.pop("source", None)
        return _bits(graph_module, before, wider, Step(wider, step.rule))

    return _Operand(x, step.rule, build)


# -- layers ---------------------------------------------------------------------------------------


def _pack(
    graph_module: fx.GraphModule, node: fx.Node, kind: str, operand: _Operand, split: BinaryWeight
) -> BinaryConv:
    if kind == "linear":
        whole = _whole_map(graph_module, node, operand, split)
        if whole is not None:
            operand, split = whole
    geometry = _geometry(node, kind, split.positive)
    positive = split.positive.reshape(
        geometry.out_channels, geometry.group_channels, *geometry.kernel_size
    )
    scale = (operand.rule.high - operand.rule.low) / 2
    bias = constant(graph_module, arguments(node)["bias"])
    channels = geometry.out_channels
    conv = BinaryConv(
        layer=str(node.meta.get("layer") or node.name),
        value=operand.value.meta.get("source", operand.value.name),
        source=operand.source,
        float_conv=node.meta.get("source", node.name),
        rule=operand.rule,
        geometry=geometry,
        positive=positive,
        multiplier=split.scale * scale,
        bias=torch.zeros(channels, dtype=torch.float64)
        if bias is None
        else ir.float64(bias, channels),
        filled=split.filled,
    )
    bits = operand.build(node)
    result = _emit(graph_module, node, bits, conv)
    result = _asymmetric_terms(graph_module, node, bits, conv, operand.rule, split, result)
    if kind == "linear":
        result = call(
            graph_module.graph, node, aten.reshape.default, result, _linear_shape(node), like=node
        )
    else:
        result.meta["source"] = conv.float_conv
    result.meta["val"] = node.meta["val"]
    substitute(node, result)
    return conv


def _linear_shape(node: fx.Node) -> list[int]:
    return [-1, *(int(size) for size in shape(node)[1:])]


def _emit(
    graph_module: fx.GraphModule, before: fx.Node, bits: fx.Node, conv: BinaryConv
) -> fx.Node:
    with graph_module.graph.inserting_before(before):
        result = graph_module.graph.call_function(ir.binary_conv, (bits,))
    result.meta = {"conv": conv, "layer": conv.layer, "val": _map_of(before, conv)}
    return result


def _map_of(node: fx.Node, conv: BinaryConv) -> Tensor:
    """Return the fake value of a layer's result as a map."""
    value: Tensor = node.meta["val"]
    return value if value.dim() == 4 else value.reshape(-1, conv.geometry.out_channels, 1, 1)


def _geometry(node: fx.Node, kind: str, positive: Tensor) -> Conv2dGeometry:
    if kind == "linear":
        kernel = (int(positive.shape[2]), int(positive.shape[3])) if positive.dim() == 4 else (1, 1)
        return Conv2dGeometry(
            in_channels=positive.shape[1], out_channels=positive.shape[0], kernel_size=kernel
        )
    named = arguments(node)
    (top, bottom, left, right), _ = _peel_padding(named["input"])
    vertical, horizontal = _pair(named["padding"])
    return Conv2dGeometry(
        in_channels=positive.shape[1] * named["groups"],
        out_channels=positive.shape[0],
        kernel_size=(positive.shape[2], positive.shape[3]),
        stride=_pair(named["stride"]),
        padding=(top + vertical, bottom + vertical, left + horizontal, right + horizontal),
        dilation=_pair(named["dilation"]),
        groups=named["groups"],
    )


def _whole_map(
    graph_module: fx.GraphModule, node: fx.Node, operand: _Operand, split: BinaryWeight
) -> tuple[_Operand, BinaryWeight] | None:
    """Turn a linear layer on a flattened [N, C, H, W] map into a convolution by the whole map."""
    flat = parent(node)
    if not is_call(flat, aten.reshape.default):
        return None
    inner = parent(flat)
    sizes = shape(inner)
    if len(sizes) != 4 or len(shape(flat)) != 2 or math.prod(sizes[1:]) != split.positive.shape[1]:
        return None
    value = _binary_value(graph_module, inner, 1)
    if isinstance(value, str):
        return None
    return value, replace(split, positive=split.positive.reshape(-1, *(int(s) for s in sizes[1:])))


def _asymmetric_terms(
    graph_module: fx.GraphModule,
    node: fx.Node,
    bits: fx.Node,
    conv: BinaryConv,
    rule: StepRule,
    split: BinaryWeight,
    result: fx.Node,
) -> fx.Node:
    """Add what pairs other than +-s contribute; see the module."""
    graph, geometry = graph_module.graph, conv.geometry
    middle = (rule.high + rule.low) / 2
    if bool((split.offset != 0).any()):
        box = replace(
            conv,
            layer=f"{conv.layer}.box",
            positive=torch.ones_like(conv.positive),
            multiplier=split.offset * (rule.high - rule.low) / 2,
            bias=torch.zeros_like(conv.bias),
        )
        extra = _emit(graph_module, node, bits, box)
        result = _sum(graph, node, result, extra)
    if middle:
        sums = _weight_sums(graph_module, node, geometry, split) * middle
        if bool((sums == sums[..., :1, :1]).all()):
            conv.bias = conv.bias + sums[0, :, 0, 0]
        else:
            held = constant_node(graph_module, node, sums.float())
            result = _sum(graph, node, result, held)
    return result


def _sum(graph: fx.Graph, before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(aten.add.Tensor, (a, b))
    node.meta = {"val": a.meta["val"]}
    return node


def _weight_sums(
    graph_module: fx.GraphModule, node: fx.Node, geometry: Conv2dGeometry, split: BinaryWeight
) -> Tensor:
    """Return the sum of weights over the valid taps of each position, float64 [1, O, OH, OW]."""
    x = parent(node)
    if is_call(node, aten.conv2d.default):
        height, width = (int(size) for size in shape(_peel_padding(x)[1])[2:])
    else:
        height, width = geometry.kernel_size
    signs = torch.where(split.positive, 1.0, -1.0).double()
    weight = (
        signs * split.scale.view(-1, 1, 1, 1)
        if signs.dim() == 4
        else signs * split.scale.view(-1, 1)
    )
    weight = weight + split.offset.view([-1] + [1] * (weight.dim() - 1))
    weight = weight.reshape(geometry.out_channels, geometry.group_channels, *geometry.kernel_size)
    top, bottom, left, right = geometry.padding
    ones = F.pad(
        torch.ones(1, geometry.in_channels, height, width).double(), (left, right, top, bottom)
    )
    return F.conv2d(ones, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)

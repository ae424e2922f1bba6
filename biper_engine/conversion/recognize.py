"""Recognize: find every operator that multiplies, and rewrite the binary ones on bits.

A convolution or linear layer is binary if its weight takes two values in every output channel, or
three of which one is 0 (`weights`), and its input is binary (`operands`). A weight is a sum of one
or two terms of `sw * (+-1)`; with activations `sx * (+-1) + mx`,

    conv(x, w) = sum over the terms of sx * sw * dot  +  mx * (sum of weights over the valid taps).

One term becomes one binary convolution, two become two with the same bits. Names are only used for
the report and `keep_float`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.activation_products import pack_activation_product
from biper_engine.conversion.costs import slower_on_bits
from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.conversion.operands import Operand, binary_value, peel_padding
from biper_engine.conversion.products import Factor, Product, find_product
from biper_engine.conversion.weights import BinaryWeight, analyse_weight
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.editing import call, constant_node, substitute
from biper_engine.graph.patterns import conv2d_geometry
from biper_engine.graph.reading import arguments, constant, is_call, parent, shape
from biper_engine.ops.epilogue import Epilogue
from biper_engine.report import LayerReport

__all__ = ["KEPT", "recognize"]

aten = torch.ops.aten


KEPT = "kept by `keep_float`"
_HALF = (torch.float16, torch.bfloat16)


def recognize(graph_module: fx.GraphModule, *, keep_float: Sequence[str] = ()) -> list[LayerReport]:
    """Replace binary layers by `ir.binary_conv`, in place; return a row for every product."""
    rows = []
    for node in list(graph_module.graph.nodes):
        product = find_product(graph_module, node)
        if product is not None:
            rows.append(_layer(graph_module, product, keep_float))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return rows


def _layer(
    graph_module: fx.GraphModule, product: Product, keep_float: Sequence[str]
) -> LayerReport:
    node = product.node
    found = [_factor(graph_module, product, factor) for factor in product.factors]
    weights = [item for item, held in found if held is not None]
    binary_weight = any(isinstance(item, BinaryWeight) for item in weights)
    # One weight per channel is always +-s; that alone does not make a layer binary.
    binary_weight = binary_weight and math.prod(product.shape[1:]) > 1
    bits = 32 * math.prod(product.shape) if weights else 0
    row = LayerReport(
        name=str(node.meta.get("layer") or node.name),
        kind=product.kind,
        packed=False,
        reason="",
        shape=product.shape,
        macs=product.macs,
        weight_bits_before=bits,
        weight_bits_after=bits,
        zero_weights=sum(int((held == 0).sum()) for _, held in found if held is not None),
        binary=binary_weight or any(isinstance(item, Operand) for item, _ in found),
        binary_weight=binary_weight,
    )
    path = row.name.partition("#")[0]  # numbered if a module is called again
    if any(fnmatchcase(path, pattern) or fnmatchcase(row.name, pattern) for pattern in keep_float):
        return replace(row, reason=KEPT, by_choice=True)
    half = [held.dtype for _, held in found if held is not None and held.dtype in _HALF]
    if half:
        name = str(half[0]).removeprefix("torch.")
        return replace(row, reason=f"it computes in {name}, under the model's own autocast")
    if not weights and product.kind == "matmul" and all(_is_operand(item) for item, _ in found):
        reason = pack_activation_product(graph_module, product)
        return replace(row, packed=reason is None, reason=reason or "")
    operand, split = found[0][0], found[1][0]
    if not product.packable or not isinstance(operand, Operand) or len(weights) != 1:
        return replace(row, reason=_reason(product, found, binary_weight))
    if not isinstance(split, BinaryWeight):
        return replace(row, reason=_reason(product, found, binary_weight))
    if product.kind == "linear" and _linear_shape(node).count(-1) > 1:
        return replace(row, reason="its result depends on the batch size in several dimensions")
    operand, split, geometry = _on_maps(graph_module, product, operand, split)
    slower = slower_on_bits(geometry, split.terms)
    if slower is not None:
        _read_signs_from_bits(graph_module, node, operand)
        return replace(row, reason=slower, by_choice=True)
    _pack(graph_module, node, geometry, operand, split)
    after = 32 * math.prod(geometry.weight_shape) * split.terms
    return replace(row, packed=True, weight_bits_after=after)


def _is_operand(item: object) -> bool:
    return isinstance(item, Operand)


def _read_signs_from_bits(graph_module: fx.GraphModule, node: fx.Node, operand: Operand) -> None:
    """Let a float layer take its signs from bits, which costs less than a sign in floats."""
    rule, value = operand.rule, operand.value
    if (rule.low, rule.high) != (-1, 1) or rule.tie or value not in node.all_input_nodes:
        return
    bits = operand.build(node)
    with graph_module.graph.inserting_before(node):
        signs = graph_module.graph.call_function(ir.unbinarize, (bits,))
    layer = str(node.meta.get("layer") or node.name)
    signs.meta = {"val": value.meta["val"], "channels": len(rule.threshold), "layer": layer}
    node.replace_input_with(value, signs)


_Found = tuple[Operand | BinaryWeight | str, Tensor | None]
"""Return what a factor is, or why it is not binary as a clause; and its value, if constant."""


def _factor(graph_module: fx.GraphModule, product: Product, factor: Factor) -> _Found:
    x = factor.node
    while is_call(x, aten.clone.default):  # in another memory layout, as in recurrent layers
        x = parent(x)
    held = constant(graph_module, x)
    if held is not None:
        return analyse_weight(factor.by_output(held)), held
    if product.kind == "conv2d" and factor is product.factors[0]:
        _, x = peel_padding(x)
    return binary_value(graph_module, x, factor.axis), None


def _reason(product: Product, found: Sequence[_Found], binary_weight: bool) -> str:
    """Return why a product stays in floating point."""
    names = ["its input", *["its weight"] * (len(found) - 1)]
    if all(held is None for _, held in found):
        if product.packable:
            return "its weight depends on the input"
        if len(found) == 2:
            names = ["its left factor", "its right factor"]
    binary, clauses = [], []
    for name, (item, _) in zip(names, found, strict=True):
        if isinstance(item, str):
            clauses.append(f"{name} {item}")
        elif isinstance(item, Operand) or binary_weight:
            binary.append(name)
    binary, clauses = list(dict.fromkeys(binary)), list(dict.fromkeys(clauses))
    if not product.packable and binary:
        verb = "is" if len(binary) == 1 else "are"
        listed = f"{' and '.join(binary)} {verb} binary"
        clauses.insert(0, f"{product.plural} do not run on bits, though {listed}")
    elif binary_weight and isinstance(found[0][0], str):
        clauses[0] = f"its weight is binary, but {clauses[0]}"
    return ", ".join(clauses)


# -- layers ---------------------------------------------------------------------------------------


def _on_maps(
    graph_module: fx.GraphModule, product: Product, operand: Operand, split: BinaryWeight
) -> tuple[Operand, BinaryWeight, Conv2dGeometry]:
    """Return a layer as a convolution of maps; its weight as [O, C / groups, KH, KW]."""
    if product.kind == "linear":
        whole = _whole_map(graph_module, product.node, operand, split)
        if whole is not None:
            operand, split = whole
    geometry = _geometry(product.node, product.kind, split.positive)
    shape_of_maps = (geometry.out_channels, geometry.group_channels, *geometry.kernel_size)
    return operand, split.reshaped(shape_of_maps), geometry


def _pack(
    graph_module: fx.GraphModule,
    node: fx.Node,
    geometry: Conv2dGeometry,
    operand: Operand,
    split: BinaryWeight,
) -> None:
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
        positive=split.positive,
        epilogue=Epilogue(
            multiplier=split.scale * scale,
            bias=ir.float64(0.0 if bias is None else bias, channels),
        ),
    )
    bits = operand.build(node)
    result = _emit(graph_module, node, bits, conv)
    result = _other_terms(graph_module, node, bits, conv, operand.rule, split, result)
    if is_call(node, aten.linear.default):
        result = call(
            graph_module.graph, node, aten.reshape.default, result, _linear_shape(node), like=node
        )
    else:
        result.meta["source"] = conv.float_conv
    result.meta["val"] = node.meta["val"]
    substitute(node, result)


def _linear_shape(node: fx.Node) -> list[int]:
    """Return the shape of a result, with -1 for sizes that depend on the batch."""
    return [size if isinstance(size, int) else -1 for size in shape(node)]


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
    geometry = conv2d_geometry(node, positive)
    (top, bottom, left, right), _ = peel_padding(parent(node))
    own = geometry.padding
    return replace(geometry, padding=(top + own[0], bottom + own[1], left + own[2], right + own[3]))


def _whole_map(
    graph_module: fx.GraphModule, node: fx.Node, operand: Operand, split: BinaryWeight
) -> tuple[Operand, BinaryWeight] | None:
    """Turn a linear layer on a flattened [N, C, H, W] map into a convolution over the whole map."""
    flat = parent(node)
    if not is_call(flat, aten.reshape.default):
        return None
    inner = parent(flat)
    sizes = shape(inner)
    if len(sizes) != 4 or len(shape(flat)) != 2 or math.prod(sizes[1:]) != split.positive.shape[1]:
        return None
    value = binary_value(graph_module, inner, 1)
    if isinstance(value, str):
        return None
    return value, split.reshaped((-1, *(int(size) for size in sizes[1:])))


def _other_terms(
    graph_module: fx.GraphModule,
    node: fx.Node,
    bits: fx.Node,
    conv: BinaryConv,
    rule: StepRule,
    split: BinaryWeight,
    result: fx.Node,
) -> fx.Node:
    """Add the contribution of two-term weights and activations other than +-s; see the module."""
    graph, geometry = graph_module.graph, conv.geometry
    middle = (rule.high + rule.low) / 2
    if split.second is not None:
        second = replace(
            conv,
            layer=f"{conv.layer}.second",
            positive=split.second.positive,
            epilogue=Epilogue(
                multiplier=split.second.scale * (rule.high - rule.low) / 2,
                bias=torch.zeros_like(conv.epilogue.bias),
            ),
        )
        extra = _emit(graph_module, node, bits, second)
        result = _sum(graph, node, result, extra)
    if middle:
        sums = _weight_sums(graph_module, node, geometry, split) * middle
        if bool((sums == sums[..., :1, :1]).all()):
            bias = conv.epilogue.bias + sums[0, :, 0, 0]
            conv.epilogue = replace(conv.epilogue, bias=bias)
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
        height, width = (int(size) for size in shape(peel_padding(x)[1])[2:])
    else:
        height, width = geometry.kernel_size
    weight = split.weight()
    top, bottom, left, right = geometry.padding
    ones = F.pad(
        torch.ones(1, geometry.in_channels, height, width).double(), (left, right, top, bottom)
    )
    return F.conv2d(ones, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)

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
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.activation_products import pack_activation_product
from biper_engine.conversion.costs import slower_on_bits
from biper_engine.conversion.layers import insert
from biper_engine.conversion.operands import Operand, Operands, peel_padding
from biper_engine.conversion.packing import Layer
from biper_engine.conversion.products import Factor, Product, find_product
from biper_engine.conversion.scales import Scale, scaled_operand
from biper_engine.conversion.transposed import TransposedAxis, interleaved
from biper_engine.conversion.weights import BinaryWeight, analyse_weight
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.editing import constant_node, substitute
from biper_engine.graph.patterns import conv2d_geometry, pair
from biper_engine.graph.reading import arguments, constant, is_call, parent, shape
from biper_engine.report import LayerReport

__all__ = ["KEPT", "recognize"]

aten = torch.ops.aten


KEPT = "kept by `keep_float`"
_REAL_WEIGHTS = "its input is a sign, but its weights are real"
_HALF = (torch.float16, torch.bfloat16)


def recognize(graph_module: fx.GraphModule, *, keep_float: Sequence[str] = ()) -> list[LayerReport]:
    """Replace binary layers by `ir.binary_conv`, in place; return a row for every product."""
    rows = []
    operands = Operands(graph_module)
    for node in list(graph_module.graph.nodes):
        product = find_product(graph_module, node)
        if product is not None:
            rows.append(_layer(graph_module, product, operands, keep_float))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return rows


def _layer(
    graph_module: fx.GraphModule, product: Product, operands: Operands, keep_float: Sequence[str]
) -> LayerReport:
    node = product.node
    found = [_factor(graph_module, product, factor, operands) for factor in product.factors]
    scales = _pull_scales(graph_module, product, found, operands)
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
        reason = pack_activation_product(graph_module, product, operands)
        return replace(row, packed=reason is None, reason=reason or "")
    operand, split = found[0][0], found[1][0]
    if not product.packable or not isinstance(operand, Operand) or len(weights) != 1:
        return replace(row, reason=_reason(product, found, binary_weight))
    if not isinstance(split, BinaryWeight):
        return replace(row, reason=_reason(product, found, binary_weight))
    if product.kind == "linear" and _linear_shape(node).count(-1) > 1:
        return replace(row, reason="its result depends on the batch size in several dimensions")
    if not scales:
        operand, split = _on_whole_map(product, operand, split, operands)
    split, geometry = _on_maps(product, split)
    terms = split.terms * len(operand.rules)
    slower = slower_on_bits(geometry, terms)
    if slower is not None:
        _read_signs_from_bits(graph_module, node, operand)
        return replace(row, reason=slower, by_choice=True)
    _pack(graph_module, node, geometry, operand, split, scales)
    after = 32 * math.prod(geometry.weight_shape) * split.terms
    return replace(row, packed=True, weight_bits_after=after)


def _is_operand(item: object) -> bool:
    return isinstance(item, Operand)


def _read_signs_from_bits(graph_module: fx.GraphModule, node: fx.Node, operand: Operand) -> None:
    """Let a float layer take its signs from bits, which costs less than a sign in floats."""
    (rule, *more), value = operand.rules, operand.value
    if more or (rule.low, rule.high) != (-1, 1) or rule.tie or value not in node.all_input_nodes:
        return
    (bits,) = operand.bits(graph_module, node)
    with graph_module.graph.inserting_before(node):
        signs = graph_module.graph.call_function(ir.unbinarize, (bits,))
    layer = str(node.meta.get("layer") or node.name)
    signs.meta = {"val": value.meta["val"], "channels": len(rule.threshold), "layer": layer}
    node.replace_input_with(value, signs)


_Found = tuple[Operand | BinaryWeight | str, Tensor | None]
"""Return what a factor is, or why it is not binary as a clause; and its value, if constant."""


def _factor(
    graph_module: fx.GraphModule, product: Product, factor: Factor, operands: Operands
) -> _Found:
    x = factor.node
    while is_call(x, aten.clone.default):  # in another memory layout, as in recurrent layers
        x = parent(x)
    held = constant(graph_module, x)
    if held is not None:
        return analyse_weight(factor.by_output(held)), held
    if product.kind in ("conv1d", "conv2d") and factor is product.factors[0]:
        _, x = peel_padding(x)
    return operands.find(x, factor.axis), None


def _pull_scales(
    graph_module: fx.GraphModule, product: Product, found: list[_Found], operands: Operands
) -> list[Scale]:
    """Return the scales that a layer's input has, and write what is under them into `found`."""
    if not product.packable or not isinstance(found[0][0], str) or found[0][1] is not None:
        return []
    if not isinstance(found[1][0], BinaryWeight):
        return []
    scaled = scaled_operand(graph_module, product, operands)
    if isinstance(scaled, str):
        found[0] = scaled, None
    if scaled is None or isinstance(scaled, str):
        return []
    operand, scales = scaled
    found[0] = operand, None
    return scales


def _reason(product: Product, found: Sequence[_Found], binary_weight: bool) -> str:
    """Return why a product stays in floating point."""
    names = ["its input", *["its weight"] * (len(found) - 1)]
    if all(held is None for _, held in found):
        if product.packable:
            return "its weight depends on the input"
        if len(found) == 2:
            names = ["its left factor", "its right factor"]
    weight, held = found[-1]
    reads_signs = product.packable and isinstance(found[0][0], Operand) and held is not None
    if reads_signs and isinstance(weight, str) and weight.startswith("has "):
        return f"{_REAL_WEIGHTS} ({weight.removeprefix('has ')}): binarise them first"
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


def _on_whole_map(
    product: Product, operand: Operand, split: BinaryWeight, operands: Operands
) -> tuple[Operand, BinaryWeight]:
    """Let a linear layer on a flattened map read the map."""
    whole = _whole_map(product.node, split, operands) if product.kind == "linear" else None
    return whole or (operand, split)


def _on_maps(product: Product, split: BinaryWeight) -> tuple[BinaryWeight, Conv2dGeometry]:
    """Return a weight as [O, C / groups, KH, KW], and the geometry as a convolution."""
    geometry = _geometry(product.node, product.kind, split.positive)
    shape_of_maps = (geometry.out_channels, geometry.group_channels, *geometry.kernel_size)
    return split.reshaped(shape_of_maps), geometry


def _pack(
    graph_module: fx.GraphModule,
    node: fx.Node,
    geometry: Conv2dGeometry,
    operand: Operand,
    split: BinaryWeight,
    scales: Sequence[Scale],
) -> None:
    """Replace a layer by binary convolutions, and by what scales of its input do to their sum."""
    layer = Layer(graph_module, node, operand, operand.bits(graph_module, node))
    named = arguments(node)
    bias = constant(graph_module, named["bias"])
    own = None if scales else bias
    if named.get("transposed"):
        result = interleaved(layer, _transposed_axes(node), split, geometry.groups, own)
    else:
        result = layer.convolved(geometry, split, own)
    if is_call(node, aten.linear.default):
        result = insert(graph_module, node, aten.reshape.default, result, _linear_shape(node))
    for scale in scales:
        result = scale.apply(graph_module, node, result)
    if scales and bias is not None:
        flat = bias if is_call(node, aten.linear.default) else bias.reshape(1, -1, 1, 1)
        held = constant_node(graph_module, node, flat)
        result = insert(graph_module, node, aten.add.Tensor, result, held)
    result.meta |= {"source": node.meta.get("source", node.name), "val": node.meta["val"]}
    substitute(node, result)


def _transposed_axes(node: fx.Node) -> tuple[TransposedAxis, TransposedAxis]:
    named = arguments(node)
    names = ("stride", "padding", "dilation")
    sizes = shape(parent(node))[2:], shape(node)[2:], shape(named["weight"])[2:]
    vertical, horizontal = (
        TransposedAxis(
            *(int(size[axis]) for size in sizes), *(pair(named[name])[axis] for name in names)
        )
        for axis in (0, 1)
    )
    return vertical, horizontal


def _linear_shape(node: fx.Node) -> list[int]:
    """Return the shape of a result, with -1 for sizes that depend on the batch."""
    return [size if isinstance(size, int) else -1 for size in shape(node)]


def _geometry(node: fx.Node, kind: str, positive: Tensor) -> Conv2dGeometry:
    if kind == "linear":
        kernel = (int(positive.shape[2]), int(positive.shape[3])) if positive.dim() == 4 else (1, 1)
        return Conv2dGeometry(
            in_channels=positive.shape[1], out_channels=positive.shape[0], kernel_size=kernel
        )
    if kind.startswith("conv_transpose"):  # for its channels and taps only
        outputs, group_channels, *taps = positive.shape
        groups = arguments(node)["groups"]
        return Conv2dGeometry(
            in_channels=group_channels * groups,
            out_channels=outputs,
            kernel_size=(taps[0], taps[1]),
            groups=groups,
        )
    geometry = conv2d_geometry(node, positive)
    (top, bottom, left, right), _ = peel_padding(parent(node))
    own = geometry.padding
    return replace(geometry, padding=(top + own[0], bottom + own[1], left + own[2], right + own[3]))


def _whole_map(
    node: fx.Node, split: BinaryWeight, operands: Operands
) -> tuple[Operand, BinaryWeight] | None:
    """Turn a linear layer on a flattened [N, C, H, W] map into a convolution over the whole map."""
    flat = parent(node)
    if not is_call(flat, aten.reshape.default):
        return None
    inner = parent(flat)
    sizes = shape(inner)
    if len(sizes) != 4 or len(shape(flat)) != 2 or math.prod(sizes[1:]) != split.positive.shape[1]:
        return None
    value = operands.find(inner, 1)
    if isinstance(value, str):
        return None
    return value, split.reshaped((-1, *(int(size) for size in sizes[1:])))

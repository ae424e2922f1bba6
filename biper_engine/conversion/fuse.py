"""Fuse operators after a binary convolution into its epilogue, and BatchNorm into float layers.

Parameters are folded in float64 here and rounded once, in `lower`. An operator is absorbed if the
convolution's value has no other user and the epilogue's order (see `biper_engine.ops.epilogue`)
allows it: scale and bias, then one gate, then one residual, then one activation, then a shift. A
scale and an offset behind the gate become those of the convolution and the gate's. The rows [...,
C] of a linear layer are fused like the map [N, C, 1, 1] that they are made of. A max pool moves
before the whole epilogue, onto the accumulators, because the epilogue is monotone in them: it takes
the maximum if the multiplier is >= 0 and the minimum if it is negative. If the residual is another
binary convolution without other users, as for a weight of two terms, a scale of the sum scales
both, and a second residual becomes the residual of that convolution. Convolutions of the same bits
whose results are concatenated become one (see `merge`).

In float layers, BatchNorm and scales are folded into the convolution or linear layer before or
after them, and a clamp moves after a max pool, which leaves it at most a quarter of the values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.conversion import ir
from biper_engine.conversion.ir import BinaryConv
from biper_engine.conversion.layers import insert
from biper_engine.conversion.merge import merge
from biper_engine.conversion.piecewise import two_slopes
from biper_engine.conversion.weights import analyse_weight
from biper_engine.graph.editing import call, constant_node, repeat_call, substitute
from biper_engine.graph.patterns import (
    clamp_limits,
    max_pool_geometry,
    only_user,
    per_channel,
)
from biper_engine.graph.reading import arguments, constant, is_call, parent, same_shape, shape
from biper_engine.ops.epilogue import SUMS

__all__ = ["fuse"]

aten = torch.ops.aten


def fuse(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    _collapse_reshapes(graph_module)
    for node in list(graph_module.graph.nodes):
        if is_call(node, ir.binary_conv):
            while (grown := _absorb(graph_module, node) or merge(graph_module, node)) is not None:
                node = grown
    _fold_scales(graph_module)
    _fold_batch_norms(graph_module)
    _pool_before_clamps(graph_module)
    _collapse_reshapes(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _collapse_reshapes(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if not is_call(node, aten.reshape.default):
            continue
        inner = parent(node)
        while is_call(inner, aten.reshape.default):
            inner = parent(inner)
        node.update_arg(0, inner)
        if same_shape(inner, node):
            substitute(node, inner)


# -- epilogues ------------------------------------------------------------------------------------


def _absorb(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Absorb the only user of a binary convolution; return the new node, or None if it has none."""
    user = only_user(node)
    flattened = user if user is not None and _flattens(user) else None
    value = flattened or node
    user = only_user(value)
    conv: BinaryConv = node.meta["conv"]
    residual = node.args[1] if len(node.args) > 1 else None
    if user is None:
        return _two_slopes(graph_module, node, flattened, conv, residual)
    if user.op != "call_function":
        return None
    fused = _affine(graph_module, user, value, node)
    if fused is None:
        sloped = _two_slopes(graph_module, node, flattened, conv, residual)
        if sloped is not None:
            return sloped
    fused = fused or _activation(graph_module, user, value, conv)
    gate = None if fused or residual is not None else _gate(graph_module, user, value, conv)
    if gate is not None:
        fused = conv.fused(offset=ir.float64(0.0, conv.geometry.out_channels))
    if fused is None and flattened is None and residual is None:
        fused = _pool(user, conv)
    other = None if fused else _residual(graph_module, user, value, conv)
    if other is not None and _takes_residual(graph_module, node, user, other):
        residual = residual or _as_map(graph_module, user, other, node)
        fused = conv
    if fused is None:
        return None
    return _replace(graph_module, node, flattened, user, fused, residual, gate)


def _partners(node: fx.Node) -> list[fx.Node] | None:
    """Return the convolutions that are added to one and have no other user, the next one first.

    Return None if the last of them has a residual that is not such a convolution.
    """
    partners = []
    while len(node.args) > 1:
        node = parent(node, 1)
        if not is_call(node, ir.binary_conv) or len(node.users) > 1:
            return None
        if node.meta["conv"].activated:
            return None
        partners.append(node)
    return partners


def _takes_residual(
    graph_module: fx.GraphModule, node: fx.Node, user: fx.Node, other: fx.Node
) -> bool:
    """Whether `node` or the last of its partners can add `other`; the partner then does."""
    partners = _partners(node)
    if partners is None or other in partners:
        return False
    added = _as_map(graph_module, user, other, partners[-1]) if partners else other
    for partner in reversed(partners):  # after `added`, before each other
        user.prepend(partner)
    if partners:
        partners[-1].args = (partners[-1].args[0], added)
    for partner in partners:
        partner.meta.pop("source", None)  # no value of the float graph any more
    return True


def _flattens(user: fx.Node) -> bool:
    """Whether `user` makes rows [..., C] of the map [N, C, 1, 1] that a linear layer has."""
    if not is_call(user, aten.reshape.default):
        return False
    before, after = shape(parent(user)), shape(user)
    return len(after) >= 2 and tuple(before[1:]) == (after[-1], 1, 1)


def _as_map(graph_module: fx.GraphModule, before: fx.Node, x: fx.Node, node: fx.Node) -> fx.Node:
    """Return a value, in the shape of a convolution's result or of rows made of it, as a map."""
    if same_shape(x, node):
        return x
    return insert(graph_module, before, aten.reshape.default, x, [-1, *shape(node)[1:]])


def _channel_axis(value: fx.Node) -> int:
    """Return the dimension of the channels of a convolution's result, or of rows made of it."""
    return 1 if is_call(value, ir.binary_conv) else len(shape(value)) - 1


def _replace(
    graph_module: fx.GraphModule,
    node: fx.Node,
    flattened: fx.Node | None,
    user: fx.Node,
    conv: BinaryConv,
    residual: Any,
    gate: fx.Node | None = None,
) -> fx.Node:
    args = (node.args[0],) if residual is None else (node.args[0], residual)
    new = call(graph_module.graph, user, ir.binary_conv, *args, like=user)
    new.kwargs = node.kwargs if gate is None else {"gate": gate}
    new.meta |= {"conv": conv, "layer": node.meta["layer"]}
    result = new
    if flattened is not None:
        new.meta["val"] = node.meta["val"]
        result = call(
            graph_module.graph, user, aten.reshape.default, new, flattened.args[1], like=user
        )
    substitute(user, result)
    for dead in (flattened, node):
        if dead is not None:
            graph_module.graph.erase_node(dead)
    return new


def _per_channel(
    value: Any, graph_module: fx.GraphModule, like: fx.Node, channels: int, axis: int = 1
) -> Tensor | None:
    """Return a float operand as float64 [channels], or None if it is not constant per channel."""
    held = constant(graph_module, value)
    if held is not None and not held.is_floating_point():
        return None
    rank = len(shape(like))
    if held is not None and 1 < axis == rank - 1 and held.dim() <= rank:  # the last dimension
        if any(size != 1 for size in held.shape[:-1]):
            return None
        held, rank = held.reshape(1, -1), 2
    return per_channel(value if held is None else held, channels, rank)


def _affine(
    graph_module: fx.GraphModule, user: fx.Node, value: fx.Node, node: fx.Node
) -> BinaryConv | None:
    """Absorb a scale and an offset per channel; partners of the convolution are also scaled."""
    conv: BinaryConv = node.meta["conv"]
    affine = _scale_and_offset(graph_module, user, value, conv.geometry.out_channels)
    if affine is None:
        return None
    scale, offset = affine
    if scale is None:
        return _add(conv, offset)
    partners = _partners(node)
    if conv.activated or partners is None:
        return None
    for partner in partners:
        part: BinaryConv = partner.meta["conv"]
        partner.meta["conv"] = _scaled(part, scale, ir.float64(0.0, len(scale)))
        partner.meta.pop("source", None)  # no value of the float graph any more
    return _scaled(conv, scale, offset)


def _scaled(conv: BinaryConv, scale: Tensor, offset: Tensor) -> BinaryConv:
    return replace(conv, epilogue=conv.epilogue.scaled(scale, offset))


def _scale_and_offset(
    graph_module: fx.GraphModule, user: fx.Node, value: fx.Node, channels: int
) -> tuple[Tensor | None, Tensor] | None:
    """Return scale and offset that `user` applies to `value` (scale None for 1), or None."""
    nothing = ir.float64(0.0, channels)
    axis = _channel_axis(value)
    if is_call(user, aten.batch_norm.default):
        own = user.args[0] is value and axis == 1
        return batch_norm_affine(graph_module, user) if own else None
    if is_call(user, aten.neg.default):
        return ir.float64(-1.0, channels), nothing
    if not is_call(user, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
        return None
    named = arguments(user)
    left, right = named["self"], named["other"]
    commutes = is_call(user, aten.mul.Tensor, aten.add.Tensor)
    if named.get("alpha", 1) != 1 or (left is not value and not commutes):
        return None
    other = right if left is value else left
    number = _per_channel(other, graph_module, user, channels, axis)
    if number is not None and not same_shape(user, value):
        return None
    if number is None:
        return None
    if is_call(user, aten.add.Tensor):
        return None, number
    if is_call(user, aten.sub.Tensor):
        return None, -number
    return (1 / number if is_call(user, aten.div.Tensor) else number), nothing


def _add(conv: BinaryConv, term: Tensor) -> BinaryConv:
    if not conv.activated:
        return _scaled(conv, torch.ones_like(term), term)
    shift = conv.epilogue.shift
    return conv.fused(shift=term if shift is None else shift + term)


def batch_norm_affine(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Return scale and offset, float64 [C], of a batch norm in eval mode."""
    named = arguments(node)
    tensors = {
        name: constant(graph_module, named[name])
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    mean, var = tensors["running_mean"], tensors["running_var"]
    assert mean is not None
    assert var is not None
    scale = (var.double() + named["eps"]).rsqrt()
    if tensors["weight"] is not None:
        scale = scale * tensors["weight"].double()
    offset = -mean.double() * scale
    if tensors["bias"] is not None:
        offset = offset + tensors["bias"].double()
    return scale, offset


def _activation(
    graph_module: fx.GraphModule, user: fx.Node, value: fx.Node, conv: BinaryConv
) -> BinaryConv | None:
    if conv.activated or not user.args or user.args[0] is not value:
        return None
    limits = clamp_limits(user)
    if limits is not None:
        low, high = limits
        return conv.fused(
            clamp_min=None if low == -math.inf else low,
            clamp_max=None if high == math.inf else high,
        )
    return None


def _two_slopes(
    graph_module: fx.GraphModule,
    node: fx.Node,
    flattened: fx.Node | None,
    conv: BinaryConv,
    residual: Any,
) -> fx.Node | None:
    """Absorb a function with two slopes that several operators compute."""
    channels = conv.geometry.out_channels
    axis = _channel_axis(flattened or node)

    def constant_of(value: Any, user: fx.Node) -> Tensor | None:
        if is_call(user, aten._prelu_kernel.default):  # its weight has one dimension
            held = constant(graph_module, value)
            known = held is not None and (axis == 1 or held.numel() == 1)
            return ir.float64(held, channels) if held is not None and known else None
        return _per_channel(value, graph_module, user, channels, axis)

    if conv.activated:
        return None
    function = two_slopes(flattened or node, channels, constant_of)
    if function is None:
        return None
    *inner, last = function.nodes
    gain = None if bool((function.gain == 1).all()) else function.gain
    if gain is None and bool((function.slope == 0).all()):
        fused = conv.fused(clamp_min=0.0)
    else:
        fused = conv.fused(slope=function.slope, gain=gain)
    for dead in reversed(inner):
        dead.replace_all_uses_with(flattened or node)
        graph_module.graph.erase_node(dead)
    return _replace(graph_module, node, flattened, last, fused, residual)


def _gate(
    graph_module: fx.GraphModule, user: fx.Node, value: fx.Node, conv: BinaryConv
) -> fx.Node | None:
    """Return what multiplies a value, if it is a number for each image and channel, or for all."""
    if not is_call(user, aten.mul.Tensor) or conv.activated or conv.gated:
        return None
    left, right = user.args[:2]
    other = right if left is value else left
    while isinstance(other, fx.Node) and is_call(other, aten.expand.default):
        other = parent(other)
    if not isinstance(other, fx.Node) or other is value or not same_shape(user, value):
        return None
    if constant(graph_module, other) is not None:
        return None
    held, wanted = other.meta.get("val"), user.meta["val"]
    if not isinstance(held, Tensor) or held.dtype != wanted.dtype or held.dim() != wanted.dim():
        return None
    if _channel_axis(value) > 1:
        return _gate_of_rows(graph_module, user, other)
    sizes = shape(other)
    batches = ("1", str(shape(user)[0]))
    fits = str(sizes[0]) in batches and sizes[1] in (1, conv.geometry.out_channels)
    return other if fits and all(size == 1 for size in sizes[2:]) else None


def _gate_of_rows(graph_module: fx.GraphModule, user: fx.Node, gate: fx.Node) -> fx.Node | None:
    """Return the factors of rows [..., C] as a matrix of rows [N, C] or [N, 1]."""
    wanted, sizes = shape(user), shape(gate)
    expanded = []
    for size, own in zip(wanted[:-1], sizes[:-1], strict=True):
        if str(size) != str(own) and not isinstance(size, int):
            return None  # one for all images
        expanded.append(-1 if str(size) == str(own) else size)
    if any(size != -1 for size in expanded):
        gate = insert(graph_module, user, aten.expand.default, gate, [*expanded, -1])
    return insert(graph_module, user, aten.reshape.default, gate, [-1, sizes[-1]])


def _pool(user: fx.Node, conv: BinaryConv) -> BinaryConv | None:
    pool = max_pool_geometry(user)
    if conv.gated:  # which may be negative
        return None
    if pool is None or not conv.epilogue.monotone or not conv.epilogue.pool.is_identity:
        return None
    if conv.epilogue.steps().intersection(SUMS):
        return None
    return conv.fused(pool=pool, pool_min=conv.epilogue.multiplier < 0)


def _residual(
    graph_module: fx.GraphModule, user: fx.Node, value: fx.Node, conv: BinaryConv
) -> fx.Node | None:
    """Return the other operand of an add if it is a float value of the same shape."""
    if not is_call(user, aten.add.Tensor) or conv.activated or arguments(user)["alpha"] != 1:
        return None
    other = user.args[1] if user.args[0] is value else user.args[0]
    if not isinstance(other, fx.Node) or constant(graph_module, other) is not None:
        return None
    if other is value or not same_shape(other, value):
        return None
    return other if other.meta["val"].dtype.is_floating_point else None


# -- float layers ---------------------------------------------------------------------------------


def _fold_scales(graph_module: fx.GraphModule) -> None:
    """Fold a product with one constant per channel, such as alpha, into the layer before it."""
    for node in list(graph_module.graph.nodes):
        if not is_call(node, aten.mul.Tensor):
            continue
        for layer, factor in (node.args[:2], node.args[1::-1]):
            if isinstance(layer, fx.Node) and _folds_behind(layer):
                scale = _per_channel(factor, graph_module, node, int(shape(layer)[1]))
                if scale is not None and same_shape(layer, node):
                    _fold_behind(graph_module, layer, node, scale, torch.zeros_like(scale))
                    break


def _fold_batch_norms(graph_module: fx.GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if not is_call(node, aten.batch_norm.default):
            continue
        before = parent(node)
        after = only_user(node)
        if _folds_behind(before):
            scale, offset = batch_norm_affine(graph_module, node)
            _fold_behind(graph_module, before, node, scale, offset)
        elif after is not None and is_call(after, aten.linear.default) and len(shape(node)) == 2:
            _fold_in_front(graph_module, node, after)
    graph_module.graph.eliminate_dead_code()


def _pool_before_clamps(graph_module: fx.GraphModule) -> None:
    """`max_pool(clamp(x))` becomes `clamp(max_pool(x))`, the same values: a clamp is monotone."""
    for pool in list(graph_module.graph.nodes):
        if not is_call(pool, aten.max_pool2d.default):
            continue
        clamp = parent(pool)
        if clamp_limits(clamp) is None or only_user(clamp) is None:
            continue
        pooled = repeat_call(graph_module.graph, pool, pool, parent(clamp))
        pooled.meta.pop("source", None)
        clamped = repeat_call(graph_module.graph, pool, clamp, pooled)
        clamped.meta = dict(pool.meta)
        substitute(pool, clamped)
        graph_module.graph.erase_node(clamp)


def _folds_behind(layer: fx.Node) -> bool:
    """Whether an operation on channels of the layer's result can be applied to its weight."""
    linear = is_call(layer, aten.linear.default) and len(shape(layer)) == 2
    return len(layer.users) == 1 and (linear or is_call(layer, aten.conv2d.default))


def _layer_constants(graph_module: fx.GraphModule, layer: fx.Node) -> tuple[Tensor, Tensor] | None:
    named = arguments(layer)
    weight, bias = constant(graph_module, named["weight"]), constant(graph_module, named["bias"])
    if weight is None or (named["bias"] is not None and bias is None):
        return None
    if weight.dtype != torch.float32:  # under the model's own autocast, which rounds in between
        return None
    zeros = torch.zeros(weight.shape[0], dtype=torch.float64)
    return weight.double(), zeros if bias is None else bias.double()


def _rewrite_layer(
    graph_module: fx.GraphModule, layer: fx.Node, x: Any, weight: Tensor, bias: Tensor, old: fx.Node
) -> None:
    constants = [constant_node(graph_module, old, value.float()) for value in (weight, bias)]
    args = (x, *constants, *layer.args[3:])
    new = call(graph_module.graph, old, layer.target, *args, like=old)  # type: ignore[arg-type]
    new.meta["layer"] = layer.meta.get("layer", layer.name)
    substitute(old, new)


def _fold_behind(
    graph_module: fx.GraphModule, layer: fx.Node, affine: fx.Node, scale: Tensor, offset: Tensor
) -> None:
    held = _layer_constants(graph_module, layer)
    if held is None:
        return
    weight, bias = held
    weight = weight * scale.view([-1] + [1] * (weight.dim() - 1))
    _rewrite_layer(graph_module, layer, layer.args[0], weight, bias * scale + offset, affine)


def _fold_in_front(graph_module: fx.GraphModule, norm: fx.Node, layer: fx.Node) -> None:
    held = _layer_constants(graph_module, layer)
    if held is None:
        return
    weight, bias = held
    if not isinstance(analyse_weight(weight), str):
        return  # weights of two values are worth more than one operator less
    scale, offset = batch_norm_affine(graph_module, norm)
    _rewrite_layer(graph_module, layer, norm.args[0], weight * scale, bias + weight @ offset, layer)

"""A converted network in float operators only, for programs that have no operators on bits.

A packed map becomes a float map of +-1, and packed weights become weights of +-1. Sums of +-1 are
exact in float32, so accumulators are equal. The multiply-add after them is rounded twice here and
once in an engine: a value next to its threshold may become the other bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from biper_engine.bits import unpack_channels, unpack_weight
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.reading import get_constant, interpret, output_values, with_defaults
from biper_engine.ops.epilogue import SUMS, Epilogue
from biper_engine.ops.registration import conv_geometry, split_options

__all__ = ["float_form"]

_aten, _biper = torch.ops.aten, torch.ops.biper


def float_form(network: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return the network with every operator on bits written in float operators.

    Operators that are not on bits, and their tensors, are those of the network.

    Args:
        network: the graph of a converted network, on a CPU.
        inputs: a tensor for each input; only shapes and dtypes matter.

    Returns:
        A graph of the same inputs and outputs.
    """
    return _Writer(network, _row_sizes(network, inputs)).write()


def _row_sizes(network: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, int]:
    """Return the length of the rows of every `weight_linear`, which its packed weights hide."""
    sizes: dict[fx.Node, int] = {}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is _biper.weight_linear.default:
            sizes[node] = (args[0] if args else kwargs["x"]).shape[-1]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        interpret(network, [mode.from_tensor(x) for x in inputs], call)
    return sizes


class _Writer:
    """Copies a graph call by call, and replaces the operators on bits."""

    def __init__(self, network: fx.GraphModule, row_sizes: Mapping[fx.Node, int]) -> None:
        self._network = network
        self._row_sizes = row_sizes
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._tracer = fx.proxy.GraphAppendingTracer(self._graph)
        self._made: dict[int, Any] = {}
        self._tensors = 0
        rules: dict[Any, Callable[..., Any]] = {
            _biper.binarize: self._binarize,
            _biper.unbinarize: lambda bits, channels, dtype: _to(bits, dtype),
            _biper.bmaxpool2d: self._max_pool,
            _biper.bconv2d: self._accumulators,
            _biper.bconv2d_float: lambda dtype, **named: _to(self._fused(**named), dtype),
            _biper.bconv2d_bits: self._to_bits,
            _biper.bconv2d_float_bits: self._to_both,
            _biper.bmatmul: lambda a, b, **named: _to(_product(a, b, named), torch.int32),
            _biper.bmatmul_float: self._scaled_product,
            _biper.weight_linear: self._weight_linear,
            _biper.unpack_weight: _biper.unpack_weight.default,
        }
        self._rules = {packet.default: rule for packet, rule in rules.items()}

    def write(self) -> fx.GraphModule:
        values: dict[fx.Node, Any] = {}

        def value_of(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda node: values[node])

        for node in self._network.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._proxy(self._graph.placeholder(node.name))
            elif node.op == "get_attr":
                values[node] = get_constant(self._network, node.target)
            elif node.op == "call_function":
                values[node] = self._call(node, value_of(node.args), value_of(node.kwargs))
        outputs = [self._argument(value_of(v)) for v in output_values(self._network.graph)]
        self._graph.output(fx.node.map_arg(tuple(outputs), lambda node: node))
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._root, self._graph).eval()

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = self._rules.get(node.target)
        if rule is None:
            if node.target is operator.getitem and isinstance(args[0], tuple):
                return args[0][args[1]]  # one result of `_to_both`
            args, kwargs = (self._argument(value) for value in (args, kwargs))
            target: Any = node.target
            return self._proxy(self._graph.call_function(target, args, kwargs))
        assert isinstance(node.target, OpOverload)
        named = with_defaults(node.target, args, kwargs)
        if node in self._row_sizes:
            named["inputs"] = self._row_sizes[node]
        return rule(**named)

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self._tracer)

    def _argument(self, value: Any) -> Any:
        """Return a value as the argument of a call: nodes instead of proxies and tensors."""
        if isinstance(value, fx.Proxy):
            return value.node
        if isinstance(value, Tensor):
            return self._constant(value).node
        if isinstance(value, Mapping):
            return {name: self._argument(entry) for name, entry in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._argument(entry) for entry in value)
        return value

    def _constant(self, tensor: Tensor) -> Any:
        """Return the proxy of a tensor, which the new network holds once."""
        known = self._made.get(id(tensor))
        if known is None:
            name = f"constant_{self._tensors}"
            self._tensors += 1
            self._root.register_buffer(name, tensor.detach())
            # The tensor is kept alive with its proxy, so that no other one gets its id.
            known = self._made[id(tensor)] = (self._proxy(self._graph.get_attr(name)), tensor)
        return known[0]

    def _held(self, value: Any) -> Any:
        return self._constant(value) if isinstance(value, Tensor) else value

    def _channels(self, values: Tensor) -> Any:
        return self._constant(values.float().view(1, -1, 1, 1))

    # -- bits ----------------------------------------------------------------------------------

    def _binarize(self, x: Any, threshold: Tensor | None, sense: Tensor | None) -> Any:
        """Return 1 where the bit is set, else -1."""
        x = _to(self._held(x), torch.float32)
        if sense is not None and bool(sense.any()):
            # v <= t is -v >= -t, without any rounding.
            sign = torch.where(sense, -1.0, 1.0)
            x = x * self._channels(sign)
            threshold = None if threshold is None else threshold * sign
        limit = torch.zeros(1) if threshold is None else threshold
        above = _aten.ge.Tensor(x, self._channels(limit))
        one, minus = (self._constant(torch.tensor(value)) for value in (1.0, -1.0))
        return _aten.where.self(above, one, minus)

    def _max_pool(
        self,
        bits: Any,
        channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        take_and: Tensor | None,
    ) -> Any:
        window = [list(kernel_size), list(stride), list(padding)]
        return self._signed_pool(bits, window, take_and)

    def _signed_pool(self, x: Any, window: list[Any], lowest: Tensor | None) -> Any:
        """Pool a map: channels with `lowest` by the minimum, the others by the maximum."""
        if lowest is None or not bool(lowest.any()):
            return _aten.max_pool2d.default(x, *window)
        sign = self._channels(torch.where(lowest, -1.0, 1.0))
        return _aten.max_pool2d.default(x * sign, *window) * sign

    # -- convolutions --------------------------------------------------------------------------

    def _accumulators(self, bits: Any, weight: Tensor, **options: Any) -> Any:
        geometry = conv_geometry(weight, options)
        signs = self._constant(_signs(weight, geometry))
        return _to(self._sums_of_products(bits, signs, geometry), torch.int32)

    def _sums_of_products(self, x: Any, weight: Any, geometry: Conv2dGeometry) -> Any:
        top, bottom, left, right = geometry.padding
        padding = [top, left]
        if (top, left) != (bottom, right):
            x, padding = _aten.constant_pad_nd.default(x, [left, right, top, bottom], 0.0), [0, 0]
        options = (list(geometry.stride), padding, list(geometry.dilation), geometry.groups)
        return _aten.conv2d.default(x, weight, None, *options)

    def _fused(
        self, bits: Any, weight: Tensor, multiplier: Tensor, bias: Tensor, **options: Any
    ) -> Any:
        """Return v of `biper_engine.ops.epilogue`, float32."""
        geometry, epilogue, residual, _ = split_options(weight, multiplier, bias, options)
        signs = _signs(weight, geometry)
        v = self._sums_of_products(bits, self._constant(signs), geometry)
        if not epilogue.pool.is_identity:
            pool = epilogue.pool
            window = [list(pool.kernel_size), list(pool.stride), list(pool.padding)]
            v = self._signed_pool(v, window, epilogue.pool_min)
        v = v * self._channels(multiplier) + self._channels(bias)
        for name in SUMS:
            factor = getattr(epilogue, name)
            if factor is not None:
                v = v + self._sum(name, bits, signs, geometry) * self._channels(factor)
        return self._activated(self._gated(v, options.get("gate"), epilogue), epilogue, residual)

    def _sum(self, name: str, bits: Any, signs: Tensor, geometry: Conv2dGeometry) -> Any:
        """Return one of the sums of `biper_engine.ops.epilogue`, per output channel."""
        if name == "window":
            return self._sums_of_products(bits, self._constant(torch.ones_like(signs)), geometry)
        ones = _aten.ones_like.default(bits)
        weight = signs if name == "taps" else torch.ones_like(signs)
        return self._sums_of_products(ones, self._constant(weight), geometry)

    def _gated(self, v: Any, gate: Any, epilogue: Epilogue) -> Any:
        if gate is None:
            return v
        # A gate is [N, C] or [N, C, 1, 1], and its number of channels may be 1.
        factor = _aten.flatten.using_ints(_to(self._held(gate), torch.float32), 1, -1)
        v = v * _aten.unsqueeze.default(_aten.unsqueeze.default(factor, 2), 3)
        return v if epilogue.offset is None else v + self._channels(epilogue.offset)

    def _activated(self, v: Any, epilogue: Epilogue, residual: Any) -> Any:
        if residual is not None:
            v = v + _to(self._held(residual), torch.float32)
        if epilogue.clamped:
            v = _aten.clamp.default(v, epilogue.clamp_min, epilogue.clamp_max)
        if epilogue.slope is not None or epilogue.gain is not None:
            zero = self._constant(torch.tensor(0.0))
            negative, positive = (
                v if factor is None else v * self._channels(factor)
                for factor in (epilogue.slope, epilogue.gain)
            )
            v = _aten.where.self(_aten.lt.Tensor(v, zero), negative, positive)
        return v if epilogue.shift is None else v + self._channels(epilogue.shift)

    def _to_bits(self, threshold: Tensor, sense: Tensor, **named: Any) -> Any:
        return self._binarize(self._fused(**named), threshold, sense)

    def _to_both(
        self, threshold: Tensor, sense: Tensor, dtype: torch.dtype, **named: Any
    ) -> tuple[Any, Any]:
        v = self._fused(**named)
        return _to(v, dtype), self._binarize(v, threshold, sense)

    # -- matrices ------------------------------------------------------------------------------

    def _weight_linear(
        self,
        x: Any,
        weight: Tensor,
        multiplier: Tensor,
        bias: Tensor | None,
        offset: Tensor | None,
        inputs: int,
    ) -> Any:
        x = self._held(x)
        rows, signs = _to(x, torch.float32), unpack_channels(weight, inputs)
        v = _aten.linear.default(rows, self._constant(signs.float() * 2 - 1))
        v = v * self._constant(multiplier)
        if offset is not None:
            v = v + _aten.sum.dim_IntList(rows, [-1], True) * self._constant(offset)
        return _aten.type_as.default(v if bias is None else v + self._constant(bias), x)

    def _scaled_product(
        self,
        a: Any,
        b: Any,
        multiplier: float,
        row_multiplier: float,
        column_multiplier: float,
        bias: float,
        dtype: torch.dtype,
        **shape: Any,
    ) -> Any:
        v = _product(a, b, shape) * multiplier
        if row_multiplier:
            rows = _aten.sum.dim_IntList(_elements(a, shape, shape["low_a"]), [-1], True)
            v = v + _outer(rows) * row_multiplier
        if column_multiplier:
            columns = _aten.sum.dim_IntList(_elements(b, shape, shape["low_b"]), [-1], True)
            v = v + _outer(_aten.transpose.int(columns, -1, -2)) * column_multiplier
        return _to(v + bias if bias else v, dtype)


def _to(x: Any, dtype: torch.dtype) -> Any:
    return _aten._to_copy.default(x, dtype=dtype)


def _signs(weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Return packed weights as +-1, [O, C / groups, KH, KW]."""
    return unpack_weight(weight, geometry.group_channels).float() * 2 - 1


def _elements(bits: Any, shape: Mapping[str, Any], low: int) -> Any:
    """Return the elements of a map of +-1 as [N, H, groups, W, depth]; see `ops.matrix`."""
    groups = shape["groups"]
    parts = _aten.unflatten.int(bits, 1, [groups, shape["channels"] // groups])
    values = _aten.permute.default(parts, [0, 3, 1, 4, 2])
    return values if low == -1 else (values + 1.0) * 0.5


def _outer(x: Any) -> Any:
    """Return [N, H, groups, W, V] as the map [N, V, H * groups, W]."""
    return _aten.permute.default(_aten.flatten.using_ints(x, 1, 2), [0, 3, 1, 2])


def _product(a: Any, b: Any, shape: Mapping[str, Any]) -> Any:
    """Return the sums of a product of two maps of +-1, float32."""
    left, right = _elements(a, shape, shape["low_a"]), _elements(b, shape, shape["low_b"])
    return _outer(_aten.matmul.default(left, _aten.transpose.int(right, -1, -2)))

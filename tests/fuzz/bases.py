"""Networks whose files are mutated: together they call every declared operator.

Weights and images are small multiples of 1/4. Sums of their products are exact in float32 in any
order, so that native programs and the reference must agree bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from biper_engine.bits import pack_weight
from biper_engine.engine import Engine
from biper_engine.graph import OPERATORS, ImagesSize
from biper_engine.graph.signature import InputSpec, Signature
from tests.graph.calls import CALLS, Flowing
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature, two_inputs

_aten, _biper = torch.ops.aten, torch.ops.biper

_SAME: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1, 1, 1]}
_CALLS_PER_NETWORK = 12


def quarters(tensor: Tensor) -> Tensor:
    """Return a float tensor rounded to quarters, and no zero."""
    rounded = (tensor * 4).round() / 4
    return torch.where(rounded == 0, 0.25, rounded).to(tensor.dtype)


class ExactBuilder(GraphBuilder):
    """Makes networks of quarters."""

    def normal(self, *shape: int) -> Tensor:
        return quarters(super().normal(*shape))


def exact_classifier() -> Engine:
    """The classifier by hand, in quarters."""
    engine = classifier()
    for tensor in engine.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(quarters(tensor))
    return engine


def binary_network(dtype: torch.dtype = torch.float32) -> Engine:
    """Residuals, a gate, groups, dilation, fused and separate pools; in one dtype."""
    g = ExactBuilder(5)
    x = g.input("x")
    if dtype != torch.float32:
        x = g.call("cast", _aten._to_copy.default, x, dtype=dtype)
    bits = g.call("bits", _biper.binarize.default, x, g.constant("t", g.normal(40)))
    first = g.call(
        "a",
        _biper.bconv2d_float_bits.default,
        *(bits, *g.operands("a", 40, 40, bits=True)),
        dtype=dtype,
        residual=x,
        clamp_min=-1.0,
        clamp_max=1.0,
        in_channels=40,
        **_SAME,
    )
    floats = g.call("af", operator.getitem, first, 0)
    second = g.call("ab", operator.getitem, first, 1)
    take_and = g.constant("pool.take_and", g.normal(40) > 0)
    pooled = g.call(
        "pool", _biper.bmaxpool2d.default, second, 40, [2, 2], stride=[2, 2], take_and=take_and
    )
    third = g.call(
        "c",
        _biper.bconv2d_bits.default,
        *(pooled, *g.operands("c", 40, 70, bits=True)),
        slope=g.constant("c.slope", g.normal(70).abs()),
        shift=g.constant("c.shift", g.normal(70)),
        in_channels=40,
        **_SAME,
    )
    last = g.call(
        "e",
        _biper.bconv2d_float.default,
        *(third, *g.operands("e", 70, 40, bits=False)),
        dtype=dtype,
        gate=g.call("gate", _aten.mean.dim, floats, [2, 3], True),
        offset=g.constant("e.offset", g.normal(40)),
        in_channels=70,
        **_SAME,
    )
    short = g.call("short", _aten.avg_pool2d.default, floats, [2, 2], [2, 2])
    total = g.call("total", _aten.add.Tensor, last, short)
    grouped = g.call(
        "g",
        _biper.bconv2d_float.default,
        g.call("gb", _biper.binarize.default, total),
        g.constant("g.weight", pack_weight(g.normal(64, 20, 3, 3) >= 0)),
        *(g.constant("g.multiplier", g.normal(64)), g.constant("g.bias", g.normal(64))),
        dtype=dtype,
        pool_kernel_size=[2, 2],
        pool_stride=[1, 1],
        pool_min=g.constant("g.pool_min", g.normal(64) > 0),
        in_channels=40,
        groups=2,
        stride=[1, 1],
        padding=[2, 2, 2, 2],
        dilation=[2, 2],
    )
    plain = g.call("ub", _biper.unbinarize.default, third, 70, dtype=dtype)
    return _engine(g.module(grouped, plain), {"x": (40, 8, 8)}, (0, 0))


def float_network() -> Engine:
    """Float layers that native programs take: convolutions, pools, sums, clamps, a classifier."""
    g = ExactBuilder(3)
    x = g.input("x")
    weight = g.constant("stem.weight", g.normal(32, 3, 3, 3))
    x = g.call("stem", _aten.conv2d.default, x, weight, None, [2, 2], [1, 1], [1, 1], 1)
    x = g.call("pool", _aten.max_pool2d.default, x, [3, 3], [1, 1], [1, 1], [1, 1], False)
    x = g.call("act", _aten.hardtanh.default, x, -4.0, 4.0)
    bits = g.call("bits", _biper.binarize.default, x)
    y = g.call(
        "c",
        _biper.bconv2d_float.default,
        *(bits, *g.operands("c", 32, 32, bits=False)),
        residual=x,
        in_channels=32,
        **_SAME,
    )
    y = g.call("sum", _aten.add.Tensor, y, x)
    y = g.call("relu", _aten.relu.default, y)
    half = g.call("half", _aten._adaptive_avg_pool2d.default, y, [2, 2])
    wide = g.call("wide", _aten.constant_pad_nd.default, half, [0, 0, 0, 0, 1, 2], 0.0)
    flat = g.call("flat", _aten.reshape.default, wide, [-1, 140])
    head = g.constant("fc.weight", g.normal(5, 140))
    logits = g.call("logits", _aten.linear.default, flat, head, g.constant("fc.bias", g.normal(5)))
    return _engine(g.module(logits, y), {"x": (3, 9, 8)}, (0, {"map": 0}))


def _engine(module: fx.GraphModule, inputs: dict[str, tuple[int, ...]], out: Any) -> Engine:
    form = signature(inputs, (0,) * len(inputs), {}, out)
    return engine_of(module, form)


# -- every operator --------------------------------------------------------------------------------


class _CallBuilder(ExactBuilder):
    """Writes calls into one network, with an input for every kind of tensor that flows."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: list[InputSpec] = []
        self.outputs: list[fx.Node] = []
        self._flowing: dict[Any, fx.Node] = {}
        self._images = self.flowing(Flowing((ImagesSize(1), 3)))

    def add(self, position: int, name: str, arguments: Any) -> None:
        declared = OPERATORS[name]
        named = {key: self._argument(value) for key, value in arguments.items()}
        overload = isinstance(declared.target, torch._ops.OpOverload)
        node = self.graph.create_node(
            "call_function",
            declared.target,
            () if overload else tuple(named.values()),
            named if overload else {},
            name=f"call_{position}",
        )
        said = declared.infer({key: _described(value) for key, value in arguments.items()})
        if isinstance(said, tuple):
            picks = [
                self.call(f"{node.name}_{i}", operator.getitem, node, i) for i in range(len(said))
            ]
            self.outputs.extend(picks)
        else:
            self.outputs.append(node)

    def add_constant(self) -> None:
        """Also return the sum of an input and a constant, so that the network has a tensor."""
        constant = self.constant("added", self.normal(3))
        self.outputs.append(self.call("sum", _aten.add.Tensor, self._images, constant))

    def engine(self) -> Engine:
        """Return the network."""
        taken = {spec.name: spec for spec in self.specs}
        specs = [taken[node.name] for node in self.graph.find_nodes(op="placeholder")]
        form = Signature(
            in_spec=pytree.tree_structure(((0,) * len(specs), {})),
            out_spec=pytree.tree_structure([0] * len(self.outputs)),
            inputs=tuple(specs),
        )
        return engine_of(self.module(*self.outputs), form)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Flowing):
            return self.flowing(value)
        if isinstance(value, Tensor):
            return self.constant(f"c{len(self.constants)}", value)
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        return self._size(value) if isinstance(value, ImagesSize) else value

    def _size(self, size: ImagesSize) -> fx.Node:
        node = self.graph.call_function(_aten.sym_size.int, (self._images, 0))
        if size.images != 1:
            node = self.graph.call_function(operator.mul, (node, size.images))
        return node if not size.more else self.graph.call_function(operator.add, (node, size.more))

    def flowing(self, wanted: Flowing) -> fx.Node:
        """Return a node of a kind of value, made of an input of its own where it must be."""
        key = (wanted.shape, wanted.dtype, wanted.channels)
        if key not in self._flowing:
            self._flowing[key] = self._make(wanted)
        return self._flowing[key]

    def _make(self, wanted: Flowing) -> fx.Node:
        position = len(self._flowing)
        if wanted.channels is not None:
            batch, height, width, _ = wanted.shape
            source = self.flowing(Flowing((batch, wanted.channels, height, width)))
            return self.call(f"packed_{position}", _biper.binarize.default, source)
        if not wanted.shape or wanted.shape[0] != ImagesSize(1):
            return self._fixed(wanted, position)
        spec = InputSpec(f"x{position}", wanted.dtype, (None, *wanted.shape[1:]))  # type: ignore[arg-type]
        self.specs.append(spec)
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first):
            return self.graph.placeholder(spec.name)

    def _fixed(self, wanted: Flowing, position: int) -> fx.Node:
        sizes = [self._argument(size) for size in wanted.shape]
        options = {"dtype": wanted.dtype}
        return self.graph.create_node(
            "call_function", _aten.full.default, (sizes, 1), options, name=f"fixed_{position}"
        )


def _described(value: Any) -> Any:
    from tests.graph.test_operators import described

    return described(value)


def operator_network(part: int) -> Engine:
    """Calls of a dozen operators side by side."""
    builder = _CallBuilder()
    first = part * _CALLS_PER_NETWORK
    for position, (name, arguments) in enumerate(CALLS[first : first + _CALLS_PER_NETWORK]):
        builder.add(first + position, name, arguments)
    return builder.engine()


def call_networks() -> Iterator[tuple[str, Engine]]:
    """Yield a network for each call, which also adds a constant to an input, and its name."""
    for position, (name, arguments) in enumerate(CALLS):
        builder = _CallBuilder()
        builder.add(position, name, arguments)
        builder.add_constant()
        yield name, builder.engine()


_PARTS = range(-(-len(CALLS) // _CALLS_PER_NETWORK))

BASES: dict[str, Callable[[], Engine]] = {
    "classifier": exact_classifier,
    "two": two_inputs,
    "binary": binary_network,
    "half": lambda: binary_network(torch.float16),
    "bfloat": lambda: binary_network(torch.bfloat16),
    "float": float_network,
    **{f"operators{part}": (lambda part=part: operator_network(part)) for part in _PARTS},
}


def write_bases(folder: Path) -> None:
    """Write the file of every base that is not there yet."""
    for name, build in BASES.items():
        path = folder / f"{name}.biper"
        if not path.exists():
            build().save(path)

"""Lower: write the fused graph in `torch.ops.biper` and float operators, with named tensors.

This pass rounds float64 parameters to float32, once. It also decides whether each convolution
returns floats, bits or both, depending on its users.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from biper_engine import bits as contract
from biper_engine.conversion import ir
from biper_engine.conversion.ir import BinaryConv, StepRule
from biper_engine.graph.reading import biper_op, constant, is_call
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.functional import epilogue_options, geometry_options

__all__ = ["lower"]

aten = torch.ops.aten
biper = torch.ops.biper


def lower(graph_module: fx.GraphModule, compute_dtype: torch.dtype) -> fx.GraphModule:
    """Return a new graph module with only operators; `verify` reads `meta` of its nodes."""
    return _Lowering(graph_module, compute_dtype).run()


class _Lowering:
    def __init__(self, graph_module: fx.GraphModule, compute_dtype: torch.dtype) -> None:
        self._old = graph_module
        self._dtype = compute_dtype
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._bits: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self._old.graph.nodes:
            if node in self._bits:
                self._new[node] = self._bits[node]
            elif node.op == "placeholder":
                self._new[node] = self._placeholder(node)
            elif node.op == "output":
                self._output(node)
            elif is_call(node, ir.binary_conv):
                self._conv(node)
            elif is_call(node, ir.binarize):
                self._new[node] = self._binarize(node)
            elif is_call(node, ir.unbinarize):
                self._new[node] = self._signs(node)
            elif is_call(node, ir.binary_max_pool):
                self._new[node] = self._max_pool(node)
            elif node.op == "call_function":
                self._new[node] = self._float_op(node)
        result = fx.GraphModule(self._root, self._graph)
        result.graph.lint()
        return result

    # -- nodes ------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node) -> fx.Node:
        position = sum(old.op == "placeholder" for old in self._new)
        new = self._graph.placeholder(f"input_{position}")
        new.meta["source"] = node.name
        if self._dtype != torch.float32 and node.meta["val"].dtype.is_floating_point:
            new = self._graph.call_function(aten._to_copy.default, (new,), {"dtype": self._dtype})
        return new

    def _output(self, node: fx.Node) -> None:
        leaves = list(node.args[0])  # type: ignore[arg-type]
        results = []
        for leaf in leaves:
            new = self._operand(leaf, "constants.output")
            if self._dtype != torch.float32 and leaf.meta["val"].dtype == torch.float32:
                new = self._graph.call_function(
                    aten._to_copy.default, (new,), {"dtype": torch.float32}
                )
            results.append(new)
        self._graph.output(tuple(results))

    def _float_op(self, node: fx.Node) -> fx.Node:
        layer = node.meta.get("layer")
        names = _argument_names(node)
        owner = str(layer) if layer else "constants"

        def convert(value: Any, name: str) -> Any:
            if isinstance(value, fx.Node):
                path = f"{owner}.{name}" if layer else f"constants.{node.name}_{name}"
                held = constant(self._old, value) if biper_op(node) is not None else None
                # Our operators take float32 parameters, whatever the dtype of maps.
                return self._operand(value, path) if held is None else self._hold(path, held)
            if isinstance(value, (list, tuple)):
                return [convert(item, f"{name}{index}") for index, item in enumerate(value)]
            exact = node.meta.get("exact", False)  # integers, which half precision may not hold
            return self._dtype if value is torch.float32 and not exact else value

        args = tuple(convert(value, name) for value, name in zip(node.args, names, strict=False))
        kwargs = {name: convert(value, name) for name, value in node.kwargs.items()}
        if "dtype" not in kwargs and _creates_float32(node):
            kwargs["dtype"] = self._dtype  # if missing, it is PyTorch's default
        new = self._named(str(layer) if layer else node.name, node.target, args, kwargs)
        return self._keep(new, node)

    def _binarize(self, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        threshold, sense = self._step(node.meta["rule"], f"{self._owner(node)}.input")
        args = (self._operand(source, "constants.binarized"), threshold, sense)
        new = self._named(f"{self._owner(node)}_bits", biper.binarize.default, args, {})
        new.meta["rule"] = node.meta["rule"]
        return new

    def _owner(self, node: fx.Node) -> str:
        """Return the path of the first layer that uses some bits."""
        for user in node.users:
            if is_call(user, ir.binary_conv):
                return str(user.meta["layer"])
            if is_call(user, ir.binary_max_pool):
                return self._owner(user)
            if "product" in user.meta:
                side = "left" if user.args[0] is node else "right"
                return f"{user.meta['layer']}.{side}"
        return str(node.name)

    def _step(self, rule: StepRule, owner: str) -> tuple[fx.Node | None, fx.Node | None]:
        """Return the nodes of a rule's tensors; None for those equal to the default."""
        sense = self._hold(f"{owner}.sense", rule.sense) if bool(rule.sense.any()) else None
        plain = sense is None and bool((rule.threshold == 0).all())
        return None if plain else self._hold(f"{owner}.threshold", rule.threshold), sense

    def _signs(self, node: fx.Node) -> fx.Node:
        args = (self._operand(node.args[0], ""), node.meta["channels"])
        name = f"{node.meta['layer']}_signs"
        return self._named(name, biper.unbinarize.default, args, {"dtype": self._dtype})

    def _max_pool(self, node: fx.Node) -> fx.Node:
        pool = node.meta["pool"]
        options = {"stride": list(pool.stride), "padding": list(pool.padding)}
        args = (self._operand(node.args[0], ""), node.meta["channels"], list(pool.kernel_size))
        return self._named(f"{self._owner(node)}_pool", biper.bmaxpool2d.default, args, options)

    def _conv(self, node: fx.Node) -> None:
        conv: BinaryConv = node.meta["conv"]
        layer = str(node.meta["layer"])
        steps = [user for user in node.users if is_call(user, ir.binarize)]
        # The convolution returns the bits of one rule; a second rule reads the floats.
        floats_leave = len(node.users) > len(steps[:1])
        epilogue = self._epilogue(conv, steps[0].meta["rule"] if steps else None)
        held = {
            name: self._hold(f"{layer}.{name}", value) for name, value in epilogue.tensors().items()
        }
        weight = self._hold(f"{layer}.weight", contract.pack_weight(conv.positive))
        args: list[Any] = [
            self._operand(node.args[0], ""),
            weight,
            held.pop("multiplier"),
            held.pop("bias"),
        ]
        if steps:
            args += [held.pop("threshold"), held.pop("sense")]
        options = {**epilogue_options(epilogue), **held, **geometry_options(conv.geometry)}
        if len(node.args) > 1:
            options["residual"] = self._operand(node.args[1], f"{layer}.residual")
        if conv.gated:
            options["gate"] = self._operand(node.kwargs["gate"], f"{layer}.gate")
        if (
            floats_leave
        ):  # a part of a sum, which is no value of the model, is not rounded to half precision
            options["dtype"] = self._dtype if "source" in node.meta else torch.float32
        options = {name: value for name, value in options.items() if value is not None}
        target = _TARGETS[floats_leave, bool(steps)]
        new = self._keep(self._named(layer, target, tuple(args), options), node)
        new.meta |= {"conv": conv, "tie": bool(steps) and steps[0].meta["rule"].tie}
        self._bind(node, new, steps, floats_leave)

    def _bind(self, node: fx.Node, new: fx.Node, steps: list[fx.Node], floats_leave: bool) -> None:
        """Map a convolution and its binarize users to the results of the new node."""
        floats, bits = new, new
        if floats_leave and steps:
            floats = self._graph.call_function(operator.getitem, (new, 0))
            bits = self._graph.call_function(operator.getitem, (new, 1))
            floats.meta["source"] = new.meta.get("source")
        self._new[node] = floats
        if steps:
            self._bits[steps[0]] = bits

    def _epilogue(self, conv: BinaryConv, rule: StepRule | None) -> Epilogue:
        epilogue = conv.epilogue.rounded()
        if epilogue.pool_min is not None and not bool(epilogue.pool_min.any()):
            epilogue = replace(epilogue, pool_min=None)
        if epilogue.offset is not None and not bool(epilogue.offset.any()):
            epilogue = replace(epilogue, offset=None)
        if rule is None:
            return epilogue
        return replace(epilogue, threshold=rule.threshold, sense=rule.sense)

    # -- names and tensors ------------------------------------------------------------------------

    def _keep(self, new: fx.Node, old: fx.Node) -> fx.Node:
        new.meta |= {
            key: old.meta[key] for key in ("source", "layer", "product") if key in old.meta
        }
        return new

    def _named(
        self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        readable = "".join(c if c.isalnum() else "_" for c in name)
        return self._graph.create_node("call_function", target, args, kwargs, name=readable)

    def _operand(self, node: Any, name: str) -> Any:
        if not isinstance(node, fx.Node) or node in self._new:
            return self._new.get(node, node) if isinstance(node, fx.Node) else node
        tensor = constant(self._old, node)
        assert tensor is not None, f"{node} has no value"
        if tensor.dtype == torch.float32 and self._dtype != torch.float32:
            tensor = tensor.to(self._dtype)
        return self._hold(name, tensor)

    def _hold(self, path: str, tensor: Tensor) -> fx.Node:
        """Register a tensor as a buffer under a unique dotted path; return its get_attr."""
        *parents, leaf = path.replace("#", "_").strip(".").split(".")
        owner = self._root
        for index, part in enumerate(parents):
            if not isinstance(getattr(owner, part, owner), nn.Module):
                parents[index] = part = f"{part}_"  # a tensor of the layer above has the name
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        unique, count = leaf, 1
        while hasattr(owner, unique):
            count += 1
            unique = f"{leaf}_{count}"
        owner.register_buffer(unique, tensor.detach().contiguous())
        return self._graph.get_attr(".".join([*parents, unique]))


def _creates_float32(node: fx.Node) -> bool:
    """Whether a call makes a float32 tensor only from numbers, such as `zeros`."""
    if not isinstance(node.target, OpOverload) or "dtype" not in _argument_names(node):
        return False
    value = node.meta.get("val")
    tensors = [i for i in node.all_input_nodes if isinstance(i.meta.get("val"), Tensor)]
    return isinstance(value, Tensor) and value.dtype == torch.float32 and not tensors


def _argument_names(node: fx.Node) -> list[str]:
    """Return the schema's argument names, or numbers for functions of Python's `operator`."""
    if isinstance(node.target, OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
        return ["input" if name == "self" else name for name in names]  # not a name of a tensor
    return [f"arg{index}" for index in range(len(node.args))]


_TARGETS = {
    (True, False): biper.bconv2d_float.default,
    (False, True): biper.bconv2d_bits.default,
    (True, True): biper.bconv2d_float_bits.default,
}

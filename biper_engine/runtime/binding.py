"""Operators of a graph bound to backends: chosen once, constants checked and re-laid once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.geometry import Pool2dGeometry
from biper_engine.graph.choice import prepack
from biper_engine.graph.reading import arguments, biper_op, get_constant
from biper_engine.ops.backends import select
from biper_engine.ops.checks import check_epilogue, check_stem_parameters
from biper_engine.ops.epilogue import steps_of
from biper_engine.ops.plan_operators import split_stem
from biper_engine.ops.registration import split_options

__all__ = ["BoundOperation", "bind_node"]

_FLOWING = ("x", "bits", "residual", "gate")
"""Arguments whose values change in each call; the others must be constants of the graph."""


@dataclass(frozen=True)
class BoundOperation:
    """A node's operator on one backend, together with its constants.

    Attributes:
        call: takes the values of `inputs` and returns the node's result.
        inputs: nodes, or None for a missing optional argument.
    """

    call: Callable[..., Any]
    inputs: tuple[fx.Node | None, ...]


def bind_node(
    module: fx.GraphModule, node: fx.Node, device: torch.device | None
) -> BoundOperation | None:
    """Bind a node's operator to the backend that runs it on `device`.

    Values between the nodes of a checked graph have the right shapes and dtypes, so that a bound
    operator needs neither the dispatcher nor the operator's checks; constants are checked here.

    Returns:
        None for a node that runs unchanged: it calls no operator of a converted network, or has
        parameters that the graph computes.

    Raises:
        BackendUnavailableError: a forced backend cannot run the node.
        GeometryError, TypeError, ValueError: its constants do not fit each other.
    """
    op = biper_op(node)
    if op is None or op not in _BINDERS or device is None:
        return None
    held = arguments(node)
    for name, value in held.items():
        if name in _FLOWING or not isinstance(value, fx.Node):
            continue
        if value.op != "get_attr":
            return None
        held[name] = get_constant(module, str(value.target))
    return _BINDERS[op](node, held, device)


def _bind_fused(node: fx.Node, arguments: dict[str, Any], device: torch.device) -> BoundOperation:
    op = str(biper_op(node))
    weight = arguments["weight"]
    geometry, epilogue, _, _ = split_options(
        weight, arguments["multiplier"], arguments["bias"], arguments
    )
    want_bits = op != "bconv2d_float"
    check_epilogue(epilogue, geometry.out_channels, device, wants_bits=want_bits)
    backend = select(op, geometry, device, steps_of(arguments))
    dtype = None if op == "bconv2d_bits" else arguments.get("dtype", torch.float32)
    run = backend.bind_fused(
        geometry, epilogue, prepack(backend, weight, geometry), dtype, want_bits
    )

    def floats_of(*operands: Tensor | None) -> Tensor | None:
        return run(*operands)[0]

    def bits_of(*operands: Tensor | None) -> Tensor | None:
        return run(*operands)[1]

    def both(*operands: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return run(*operands)  # a node of a graph calls a function with a name

    calls: dict[str, Callable[..., Any]]
    calls = {"bconv2d_float": floats_of, "bconv2d_bits": bits_of, "bconv2d_float_bits": both}
    gate = arguments.get("gate")
    operands = (arguments["bits"], arguments.get("residual"))
    return BoundOperation(calls[op], operands if gate is None else (*operands, gate))


def _bind_binarize(
    node: fx.Node, arguments: dict[str, Any], device: torch.device
) -> BoundOperation:
    backend = select("binarize", None, device)
    threshold, sense = arguments.get("threshold"), arguments.get("sense")

    def binarize(x: Tensor) -> Tensor:
        return backend.binarize(x, threshold, sense)

    return BoundOperation(binarize, (arguments["x"],))


def _bind_unbinarize(
    node: fx.Node, arguments: dict[str, Any], device: torch.device
) -> BoundOperation:
    backend = select("unbinarize", None, device)
    channels, dtype = arguments["channels"], arguments.get("dtype", torch.float32)

    def unbinarize(bits: Tensor) -> Tensor:
        return backend.unbinarize(bits, channels, dtype)

    return BoundOperation(unbinarize, (arguments["bits"],))


def _bind_bmaxpool2d(
    node: fx.Node, arguments: dict[str, Any], device: torch.device
) -> BoundOperation:
    backend = select("bmaxpool2d", None, device)
    channels, take_and = arguments["channels"], arguments.get("take_and")
    pool = Pool2dGeometry(
        kernel_size=tuple(arguments["kernel_size"]),
        stride=tuple(arguments["stride"]),
        padding=tuple(arguments.get("padding", (0, 0))),
    )

    def bmaxpool2d(bits: Tensor) -> Tensor:
        return backend.bmaxpool2d(bits, channels, pool, take_and)

    return BoundOperation(bmaxpool2d, (arguments["bits"],))


def _bind_stem(node: fx.Node, arguments: dict[str, Any], device: torch.device) -> BoundOperation:
    op = str(biper_op(node))
    used = {user.args[1] for user in node.users if user.target is operator.getitem}
    whole = op == "stem_bits" or len(used) < len(node.users)  # a stem returns both as a tuple
    stem = split_stem(
        arguments["weight"],
        arguments,
        want_float=op == "stem" and (whole or 0 in used),
        want_bits=whole or 1 in used,
    )
    check_stem_parameters(stem, device)
    run = select(op, None, device).bind_stem(stem)

    def bits_of(x: Tensor) -> Tensor | None:
        return run(x)[1]

    return BoundOperation(run if op == "stem" else bits_of, (arguments["x"],))


def _bind_pooled_linear(
    node: fx.Node, arguments: dict[str, Any], device: torch.device
) -> BoundOperation:
    backend = select("pooled_linear", None, device)
    run = backend.bind_pooled_linear(arguments["weight"], arguments.get("bias"))
    return BoundOperation(run, (arguments["x"],))


_BINDERS: dict[str, Callable[[fx.Node, dict[str, Any], torch.device], BoundOperation]] = {
    "bconv2d_float": _bind_fused,
    "bconv2d_bits": _bind_fused,
    "bconv2d_float_bits": _bind_fused,
    "binarize": _bind_binarize,
    "unbinarize": _bind_unbinarize,
    "bmaxpool2d": _bind_bmaxpool2d,
    "stem": _bind_stem,
    "stem_bits": _bind_stem,
    "pooled_linear": _bind_pooled_linear,
}

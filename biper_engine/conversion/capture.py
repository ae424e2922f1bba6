"""Capture: any PyTorch model as one functional ATen graph with a dynamic batch.

`make_fx` traces once or twice, on tensors without data whose batch is a symbol. The first trace
runs the model under modes (`tracing`) that execute, and do not record, whatever depends only on
parameters: weight binarisation, scales, `.item()` of a statistic, a branch on a buffer. The rest
depends on the input. The second trace makes mutations functional, if there are any, with the mode
that `torch.export` uses for it; export itself would trace three more times, at ten times the cost.

The model is copied first, so buffer updates and `.data` assignments never reach the caller's model.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from biper_engine.conversion.batch_size import BatchSizes
from biper_engine.conversion.copying import private_copy, unwrapped
from biper_engine.conversion.modes import callers_defaults, plain_modes
from biper_engine.conversion.short_ways import ShapeMode
from biper_engine.conversion.trace_log import TraceLog, failing_line
from biper_engine.conversion.tracing import (
    WEIGHTED_OPS,
    FoldConstants,
    WatchPython,
    first_lines,
    watch_generators,
)
from biper_engine.errors import ConversionError
from biper_engine.graph.structure import flatten_structure

__all__ = ["Capture", "capture"]

aten = torch.ops.aten

_ON_SIZES = (
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv),
    *(operator.mod, operator.neg, operator.eq, operator.ge, operator.le, operator.gt, operator.lt),
)
"""Python functions of a graph, which compute sizes or take a result of several."""


@dataclass
class Capture:
    """A captured model.

    Attributes:
        graph_module: functional ATen graph; flat tensors in, flat tuple out; batch dynamic. Nodes
            that may be a layer have their module's path in `meta["layer"]`.
        examples: the flat example inputs of the trace, batch 2 or more.
        in_spec: pytree structure of `(args, kwargs)`; its leaves are tensors, constants are part
            of it.
        out_spec: pytree structure of the result, of the same kind.
        dropped_checks: the model's checks of values that only raise, which the graph lacks.
    """

    graph_module: fx.GraphModule
    examples: tuple[Tensor, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    dropped_checks: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
) -> Capture:
    """Capture `model(*example_inputs, **example_kwargs)` in eval mode.

    Args:
        model: any module; it is not changed.
        example_inputs: positional arguments, any pytree with tensors; dimension 0 of every tensor
            is the batch. A batch of 1 is repeated to 2, since tracing would bake it in. Constants
            (None, bool, int, float, str) are fixed.
        example_kwargs: keyword arguments, of the same kind.

    Raises:
        ConversionError: the model cannot be traced, or does something that a graph cannot express;
            the message names the operator, the module and the line.
    """
    flat, in_spec = flatten_structure((example_inputs, example_kwargs or {}))
    with plain_modes():
        examples = _examples(flat)
        private = private_copy(unwrapped(model))
        log = TraceLog()

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            args, kwargs = pytree.tree_unflatten(list(tensors), in_spec)
            with (
                callers_defaults(),
                WatchPython(log, private),
                FoldConstants(log, private),
                watch_generators(log),
            ):
                result = private(*args, **kwargs)
            leaves, log.out_spec = flatten_structure(result)
            return tuple(_output_leaf(leaf) for leaf in leaves)

        graph_module = _trace(call, examples, private, log)
    assert log.out_spec is not None
    graph_module = _flatten_calling_convention(graph_module)
    _reshape_for_view(graph_module)
    _name_layers(graph_module, log.paths)
    return Capture(graph_module, examples, in_spec, log.out_spec, tuple(dict.fromkeys(log.dropped)))


def _examples(flat: list[Any]) -> tuple[Tensor, ...]:
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise ConversionError(
                f"`example_inputs` has a {type(leaf).__name__}; pass tensors, and None, bool, int, "
                "float or str for what is fixed at conversion, also in tuples, lists, dicts and "
                "dataclasses. Bind other arguments first, e.g. with a small wrapper module."
            )
        if leaf.dim() < 1 or leaf.shape[0] < 1:
            raise ConversionError(
                f"`example_inputs` has a tensor of shape {tuple(leaf.shape)}; every input needs a "
                "batch of at least 1 in dimension 0."
            )
    if not flat:
        raise ConversionError("`example_inputs` contains no tensor; pass at least one.")
    if len({leaf.shape[0] for leaf in flat}) != 1:
        shapes = [tuple(leaf.shape) for leaf in flat]
        raise ConversionError(
            f"`example_inputs` must share one batch size in dimension 0, but shapes are {shapes}; "
            "transpose inputs that have it elsewhere in a small wrapper module, as the state of "
            "an `nn.LSTM` has."
        )
    return tuple(_at_least_two(leaf.detach().clone()) for leaf in flat)


def _at_least_two(leaf: Tensor) -> Tensor:
    return leaf if leaf.shape[0] > 1 else leaf.repeat(2, *[1] * (leaf.dim() - 1))


def _output_leaf(leaf: Any) -> Tensor:
    if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise ConversionError(
            "The model returns a number that depends on the batch size; return only tensors and "
            "constants, and read `x.shape[0]` outside the model."
        )
    if not isinstance(leaf, Tensor):
        raise ConversionError(
            f"The model returns a {type(leaf).__name__} beside its tensors; only tensors and None, "
            "bool, int, float or str in tuples, lists, dicts and dataclasses can leave a converted "
            "network. Return those."
        )
    return leaf


def _trace(
    call: Callable[..., Any], examples: tuple[Tensor, ...], private: nn.Module, log: TraceLog
) -> fx.GraphModule:
    shapes = BatchSizes(log)
    fake_mode = ShapeMode(allow_non_fake_inputs=True, shape_env=shapes)
    inputs = [_fake(fake_mode, example, index) for index, example in enumerate(examples)]
    try:
        with (
            enable_python_dispatcher(),
            fake_mode,  # for results whose only symbolic argument is a size: zeros(n, 3), expand_as
            warnings.catch_warnings(),
            _quiet_logs(),
            dynamo_config.patch(
                error_on_nested_fx_trace=False
            ),  # compiled functions run uncompiled
        ):
            warnings.simplefilter("ignore")
            with _module_paths(private, log):
                recorded = make_fx(call)(*inputs)
            log.require_nothing_refused()
            shapes.require_free([x.shape[0] for x in inputs])
            graph_module: fx.GraphModule = recorded
            if _mutates(recorded):
                functional = dispatch_functionalize(recorded, FunctionalTensorMode())
                graph_module = make_fx(functional)(*inputs)
    except Exception as cause:  # a traced model may raise anything; it is re-raised with advice
        log.require_nothing_refused(cause)
        if isinstance(cause, ConversionError):
            raise
        shapes.require_free([x.shape[0] for x in inputs])
        raise ConversionError(_failure(cause)) from cause
    shapes.require_free([x.shape[0] for x in inputs])
    return graph_module


def _mutates(graph_module: fx.GraphModule) -> bool:
    """Whether a graph writes to a tensor; a graph that does not is functional, as it was traced."""
    return any(
        not isinstance(node.target, OpOverload) or node.target._schema.is_mutable
        for node in graph_module.graph.nodes
        if node.op == "call_function" and node.target not in _ON_SIZES
    )


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep PyTorch from logging the traceback of an error that it also raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _failure(cause: Exception) -> str:
    words = f"({type(cause).__name__}: {first_lines(cause)})"
    if isinstance(cause, AssertionError) and str(cause).startswith("Guard failed"):
        return (
            "The model was exported for shapes other than those of this call; export it again with "
            "`dynamic_shapes` that leave dimension 0 free, and pass an example of the same image "
            f"size. {words}"
        )
    line = failing_line(cause)
    place = f" in {line}" if line else ""
    return (
        f"The model could not be captured: its forward pass failed{place}. Check that "
        "model(*example_inputs) runs in eval mode, also with another batch size, and that no "
        f"Python branch depends on values computed from the input. {words}"
    )


def _fake(fake_mode: FakeTensorMode, example: Tensor, index: int) -> FakeTensor:
    """Return a tensor without data whose batch is a symbol, shared by all inputs."""
    sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (example.dim() - 1)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
    source = ConstantSource(f"input_{index}")
    return fake_mode.from_tensor(example, symbolic_context=context, source=source)


@contextmanager
def _module_paths(private: nn.Module, log: TraceLog) -> Iterator[None]:
    handles = []
    for path, module in private.named_modules():

        def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
            log.enter(path)

        def leave(_module: nn.Module, _args: Any, _result: Any, path: str = path) -> None:
            log.leave(path)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flatten_calling_convention(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return the graph in a module whose source is written when it is called."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module":  # guards of torch.export; the engine has its own checks
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return _LazyGraphModule(graph_module, graph)


def _reshape_for_view(graph_module: fx.GraphModule) -> None:
    """Let views copy if they must: a kernel may return strides other than those of the trace.

    On the CPU, for example, batch norm returns a dense result also for a transposed input. Values
    are the same, since nothing is written in a functional graph.
    """
    for node in graph_module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _name_layers(graph_module: fx.GraphModule, paths: list[str]) -> None:
    nodes = [
        node
        for node in graph_module.graph.nodes
        if getattr(node.target, "overloadpacket", None) in WEIGHTED_OPS
    ]
    known = paths if len(paths) == len(nodes) else [node.name for node in nodes]
    seen: dict[str, int] = {}
    for node, path in zip(nodes, known, strict=True):
        seen[path] = seen.get(path, 0) + 1
        node.meta["layer"] = path if seen[path] == 1 else f"{path}#{seen[path]}"

"""Capture: any PyTorch model as one functional ATen graph with a dynamic batch.

Two traces of `make_fx`, on tensors without data whose batch is a symbol. The first runs the model
under a mode that executes for real, unrecorded, whatever depends on parameters alone: weight
binarisation, scales, `.item()` of a statistic, a branch on a buffer. What is left depends on the
input. The second makes mutations functional, by the mode that `torch.export` uses for it; export
itself would trace three times more, at ten times the cost.

The model is deep-copied first, so buffer updates and `.data` assignments never reach the caller's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from biper_engine.errors import ConversionError

__all__ = ["Capture", "capture"]

aten = torch.ops.aten

_TORCH = Path(torch.__file__).resolve().parent
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
WEIGHTED_OPS = (
    *(aten.convolution, aten.conv2d, aten.linear, aten._trilinear, aten.mkldnn_rnn_layer),
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addbmm, aten.mv, aten.addmv, aten.dot),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
    *(aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention),
    *(aten._scaled_dot_product_attention_math, aten._cudnn_rnn, aten.miopen_rnn),
)
"""Operators that multiply; the n-th of the trace is the n-th of the captured graph."""


@dataclass
class Capture:
    """A captured model.

    Attributes:
        graph_module: functional ATen graph; flat tensors in, flat tuple out; batch dynamic. Nodes
            that may be a layer carry their module's path in `meta["layer"]`.
        examples: the flat example inputs it was traced with, batch 2 or more.
        in_spec: pytree structure of `(args, kwargs)`.
        out_spec: pytree structure of the result.
    """

    graph_module: fx.GraphModule
    examples: tuple[Tensor, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec


@dataclass
class _Trace:
    stack: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    out_spec: pytree.TreeSpec | None = None


def capture(model: nn.Module, example_inputs: tuple[Any, ...]) -> Capture:
    """Capture `model(*example_inputs)` in eval mode.

    Args:
        model: any module; it is not changed.
        example_inputs: positional arguments, any pytree with tensors; dimension 0 of every tensor
            is the batch. A batch of 1 is repeated to 2, since tracing would bake it in.

    Raises:
        ConversionError: the model cannot be traced; the message has the cause.
    """
    flat, in_spec = pytree.tree_flatten((example_inputs, {}))
    examples = _examples(flat)
    private = copy.deepcopy(model).eval()
    for tensor in [*private.parameters(), *private.buffers()]:
        tensor.requires_grad_(False)
    trace = _Trace()

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = pytree.tree_unflatten(list(tensors), in_spec)
        with _DataAssignment(), _FoldConstants(trace):
            result = private(*args, **kwargs)
        leaves, trace.out_spec = pytree.tree_flatten(result)
        return tuple(_output_leaf(leaf) for leaf in leaves)

    graph_module = _trace(call, examples, private, trace)
    assert trace.out_spec is not None
    _flatten_calling_convention(graph_module)
    _name_layers(graph_module, trace.paths)
    return Capture(graph_module, examples, in_spec, trace.out_spec)


def _examples(flat: list[Any]) -> tuple[Tensor, ...]:
    for leaf in flat:
        if not isinstance(leaf, Tensor):
            raise ConversionError(
                f"`example_inputs` must hold tensors only, but one leaf is {type(leaf).__name__}; "
                "bind other arguments first, e.g. with a small wrapper module."
            )
        if leaf.dim() < 1 or leaf.shape[0] < 1:
            raise ConversionError(
                f"`example_inputs` has a tensor of shape {tuple(leaf.shape)}; every input needs a "
                "batch of at least 1 in dimension 0."
            )
    if len({leaf.shape[0] for leaf in flat}) != 1:
        shapes = [tuple(leaf.shape) for leaf in flat]
        raise ConversionError(
            f"`example_inputs` must share one batch size, but shapes are {shapes}."
        )
    return tuple(_at_least_two(leaf.detach()) for leaf in flat)


def _at_least_two(leaf: Tensor) -> Tensor:
    return leaf if leaf.shape[0] > 1 else leaf.repeat(2, *[1] * (leaf.dim() - 1))


def _output_leaf(leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise ConversionError(
            f"The model returns a {type(leaf).__name__} beside its tensors; only tensors can leave "
            "a converted network. Wrap the model so that it returns tensors alone."
        )
    return leaf


def _trace(
    call: Callable[..., Any], examples: tuple[Tensor, ...], private: nn.Module, trace: _Trace
) -> fx.GraphModule:
    shapes = ShapeEnv()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    inputs = [_fake(fake_mode, example, index) for index, example in enumerate(examples)]
    try:
        with (
            torch.no_grad(),
            enable_python_dispatcher(),
            fake_mode,  # for results whose only symbolic argument is a size: zeros(n, 3), expand_as
            warnings.catch_warnings(),
            _module_paths(private, trace),
        ):
            warnings.simplefilter("ignore")
            recorded = make_fx(call)(*inputs)
            functional = dispatch_functionalize(recorded, FunctionalTensorMode())
            graph_module: fx.GraphModule = make_fx(functional)(*inputs)
    except ConversionError:
        raise
    except Exception as cause:  # a traced model may raise anything; it is re-raised with advice
        raise ConversionError(
            f"The model could not be captured: {type(cause).__name__}: {_first_lines(cause)} "
            "Check that model(*example_inputs) runs in eval mode, and that no Python branch "
            "depends on values computed from the input."
        ) from cause
    _require_free_batch(shapes, inputs)
    return graph_module


def _fake(fake_mode: FakeTensorMode, example: Tensor, index: int) -> FakeTensor:
    """Return a tensor without data whose batch is a symbol, shared by all inputs."""
    sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (example.dim() - 1)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
    source = ConstantSource(f"input_{index}")
    return fake_mode.from_tensor(example, symbolic_context=context, source=source)


def _require_free_batch(shapes: ShapeEnv, inputs: list[FakeTensor]) -> None:
    advice = (
        "a converted network must work for every batch size. Use x.shape[0] or -1 in its reshapes, "
        "and do not branch on the batch size."
    )
    batches: list[Any] = [x.shape[0] for x in inputs]
    if any(shapes.simplify(batch.node.expr).is_number for batch in batches):
        raise ConversionError(f"The model works for one batch size only; {advice}")
    for guard in shapes.guards:
        location: Any = guard.sloc.framework_loc
        if location is not None and not _is_of_torch(location.filename):
            raise ConversionError(
                f"The model branches on the batch size in {location.filename}, line "
                f"{location.lineno}; {advice}"
            )


def _is_of_torch(filename: str) -> bool:
    """Whether a source file is one of PyTorch's, also by way of a symbolic link."""
    return _TORCH in Path(filename).resolve().parents


def _first_lines(cause: Exception) -> str:
    text = " ".join(str(cause).split())
    return text if len(text) <= 400 else text[:400] + "..."


@contextmanager
def _module_paths(private: nn.Module, trace: _Trace) -> Iterator[None]:
    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        trace.stack.pop()

    handles = []
    for path, module in private.named_modules():

        def enter(_module: nn.Module, _args: Any, path: str = path) -> None:
            trace.stack.append(path)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _FoldConstants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs for real every op whose inputs are real; notes the module paths of other layers."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        symbolic = (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        if not any(isinstance(leaf, symbolic) for leaf in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func.overloadpacket in WEIGHTED_OPS:
            self._trace.paths.append(self._trace.stack[-1] if self._trace.stack else "")
        functional = _functional(func)
        if functional is not None:
            return args[0].copy_(functional(*args, **kwargs))
        return func(*args, **kwargs)


def _functional(func: Any) -> Any:
    """Return `relu` for `relu_` and the like: making many in-place ops functional later is slow."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and name != "copy_" else None
    return getattr(packet, func._overloadname, None)


class _DataAssignment(TorchFunctionMode):
    """Turns `x.data = value` on a traced tensor, which tracing would lose, into a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SET_DATA and isinstance(args[0], FakeTensor):
            args[0].copy_(args[1])
            return None
        return func(*args, **(kwargs or {}))


def _flatten_calling_convention(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op == "call_module":  # the guards of torch.export; the engine has its own checks
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    graph_module.recompile()


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

"""The modes under which `capture` runs a model: one for operators, one for Python functions.

Operators that depend only on parameters are executed, and their results are constants of the graph;
each constant is a copy of the value that the trace read at that moment. Values that leave the
graph, and random draws, are recorded and refused.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, set_proxy_slot
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from biper_engine.conversion import written_out
from biper_engine.conversion.trace_log import TraceLog, random_reason

__all__ = ["WEIGHTED_OPS", "FoldConstants", "WatchPython", "watch_generators"]

aten = torch.ops.aten

WEIGHTED_OPS = (
    *(aten.convolution, aten.conv2d, aten.linear, aten._trilinear, aten.mkldnn_rnn_layer),
    *(aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.addbmm, aten.mv, aten.addmv, aten.dot),
    *(aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention),
    *(aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention),
    *(aten._scaled_dot_product_attention_math, aten._cudnn_rnn, aten.miopen_rnn),
)
"""Operators that multiply; the n-th in the trace is the n-th in the captured graph."""

_SYMBOLIC = (FakeTensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_NUMBERS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")
_ONLY_IN_A_TRACE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)
"""Errors that the model itself would not raise; its `except` branch is not what it computes."""

_VIEWS_IN_PLACE: dict[Any, Callable[..., Tensor]] = {
    aten.as_strided_.default: aten.as_strided.default,
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
    aten.unsqueeze_.default: aten.unsqueeze.default,
}
"""Operators that change which memory a tensor shows, not the contents of the memory."""

_MEMORY_IN_PLACE = ("resize_", "resize_as_", "set_")

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_LEAVING = {
    Tensor.__bool__: "bool()",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    Tensor.__index__: "index()",
    Tensor.__complex__: "complex()",
    Tensor.__array__: "numpy",
    Tensor.__contains__: "in",
    Tensor.__dlpack__: "dlpack",
    Tensor.__reduce_ex__: "pickle",
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.data_ptr: ".data_ptr()",
    Tensor.untyped_storage: ".untyped_storage()",
    Tensor.storage: ".storage()",
    Tensor.is_nonzero: ".is_nonzero()",
    torch.is_nonzero: "torch.is_nonzero()",
    Tensor.equal: ".equal()",
    torch.equal: "torch.equal()",
    Tensor.allclose: ".allclose()",
    torch.allclose: "torch.allclose()",
}
"""Functions that show Python the values of a tensor, with their names in messages."""


_TRUTHS = (
    *(Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero),
    *(Tensor.equal, torch.equal, Tensor.allclose, torch.allclose),
)
"""Those that return whether something is so."""

_COPYING = (torch.tensor, torch.as_tensor, torch.asarray)
"""Functions that read tensors in lists."""


def _inside(args: tuple[Any, ...]) -> list[Any]:
    return pytree.tree_leaves(args[0]) if args and not isinstance(args[0], Tensor) else []


class FoldConstants(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Executes every op whose inputs are real; records the module paths of other layers."""

    supports_higher_order_operators = True

    def __init__(self, log: TraceLog, private: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log
        self._private = private
        self._snapshots: dict[Any, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        drawn = random_reason(func, args, kwargs)
        if drawn is not None:
            self._log.refuse(_random(drawn, self._log.place))
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, _SYMBOLIC) for leaf in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        self._require_held(func, args, kwargs)
        if _name(func) in _MEMORY_IN_PLACE:
            self._log.refuse(
                f"The model replaces the memory of a tensor: `{_name(func)}` in {self._log.place}; "
                "use `reshape`, `F.pad` or a new tensor instead."
            )
        if func in _VIEWS_IN_PLACE:
            return rebind(args[0], _VIEWS_IN_PLACE[func](*args, **kwargs))
        if any(isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) for leaf in leaves):
            if func is aten.index.Tensor:
                args = (args[0], _as_positions(args[1]))
            args, kwargs = pytree.tree_map_only(Tensor, self._snapshot, (args, kwargs))
        if func in written_out.OPERATORS:
            return written_out.OPERATORS[func](*args, **kwargs)
        if func is aten.rrelu_with_noise.default:
            func, args, kwargs = aten.leaky_relu.default, _of_rrelu(*args, **kwargs), {}
        if func.overloadpacket in WEIGHTED_OPS:
            self._log.paths.append(self._log.stack[-1] if self._log.stack else "")
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        functional = _functional(func)
        try:
            if functional is not None:
                return args[0].copy_(functional(*args, **kwargs))
            return func(*args, **kwargs)
        except _ONLY_IN_A_TRACE as cause:
            self._log.refused.append(
                f"The operator `{_name(func)}` in {self._log.place} cannot be captured; keep it "
                "outside the converted model, or write it with other operators. "
                f"({type(cause).__name__}: {first_lines(cause)})"
            )
            raise

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.name() in _CONTROL_FLOW:
            self._log.refuse(
                f"The model has control flow: `{func.name()}` in {self._log.place} runs one of "
                "several graphs, and an engine has one. Compute both sides and choose with "
                "`torch.where`, or keep it outside the converted model."
            )
        return func(*args, **kwargs)

    def _require_held(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an operator whose result or effect a graph with fixed shapes cannot express."""
        name = func._schema.name.partition("::")[2]
        if name in _NUMBERS:
            self._log.refuse(leaving(_name(func), self._log.place))
        dynamic = torch.Tag.dynamic_output_shape in func.tags and name != "one_hot"
        if name in ("index", "_unsafe_index"):
            dynamic = any(_is_mask(index) and isinstance(index, FakeTensor) for index in args[1])
        if dynamic:
            what = "indexing with a mask" if name == "index" else f"`{_name(func)}`"
            self._log.refuse(
                f"The shape of a result depends on values of the input: {what} in "
                f"{self._log.place}. An engine's shapes are fixed except for the batch: use "
                "`torch.where` or multiply by the mask, or keep that part outside the converted "
                "model."
            )
        if func._schema.is_mutable:
            self._require_own(func, args, kwargs)

    def _require_own(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse to write values that depend on the input into a tensor that does not."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for target in pytree.tree_leaves(value):
                if isinstance(target, Tensor) and not isinstance(target, FakeTensor):
                    self._log.refuse(written(self._private, target, self._log.place))

    def _snapshot(self, tensor: Tensor) -> Tensor:
        """Return a copy of a real tensor's current values, in memory that the model never writes.

        A weight that is binarised in place, used and restored is the binarised one in the graph.
        The same values at the same place are one constant.
        """
        if isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():
            if tensor.layout != torch.strided:
                return tensor.detach().clone()
            form = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
            known = self._snapshots.setdefault((tensor.data_ptr(), *form), [])
            for snapshot in known:
                if torch.equal(snapshot, tensor):
                    return snapshot
            known.append(tensor.detach().clone().requires_grad_(False))
            return known[-1]


class WatchPython(TorchFunctionMode):
    """Sees what operators do not show: values that leave, `x.data = value`, circular padding."""

    def __init__(self, log: TraceLog, private: nn.Module) -> None:
        super().__init__()
        self._log = log
        self._private = private

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _SET_DATA:
            return self._assign(*args)
        if func is torch._assert and isinstance(args[0], FakeTensor):
            if self._log.passed_check(always=True):
                return None
            self._log.refuse(leaving("torch._assert()", self._log.place))
        if func in _LEAVING and any(isinstance(value, FakeTensor) for value in args):
            answer = self._log.passed_check() if func in _TRUTHS else None
            if answer is not None:
                return answer
            self._log.refuse(leaving(_LEAVING[func], self._log.place))
        if func in _COPYING and any(isinstance(x, FakeTensor) for x in _inside(args)):
            self._log.refuse(leaving(f"torch.{func.__name__}()", self._log.place))
        if func in written_out.FUNCTIONS and any(isinstance(x, FakeTensor) for x in args):
            return written_out.FUNCTIONS[func](*args, **kwargs)
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return args[0].clone()
        return func(*args, **kwargs)

    def _assign(self, target: Tensor, value: Tensor) -> None:
        if isinstance(target, FakeTensor):
            if not isinstance(value, FakeTensor):
                value = target.new_zeros(value.shape, dtype=value.dtype).copy_(value)
            rebind(target, value)
        elif isinstance(value, FakeTensor):
            self._log.refuse(written(self._private, target, self._log.place))
        else:
            _SET_DATA(target, value)


def rebind(target: Tensor, value: Tensor) -> Tensor:
    """Replace a traced tensor by another one from now on; earlier results do not change.

    Views of its old memory keep that memory, and the new memory is shared with `value`. This is the
    meaning of `target.data = value`, and of an operator such as `unsqueeze_`.
    """
    mode = get_proxy_mode()
    assert mode is not None, "only a trace rebinds tensors"
    with _disable_current_modes():
        _SET_DATA(target, value)
    set_proxy_slot(target, mode.tracer, get_proxy_slot(value, mode.tracer))
    return target


def _functional(func: Any) -> Any:
    """Return `relu` for `relu_` and so on: making many in-place ops functional later is slow."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and name != "copy_" else None
    if torch.Tag.inplace_view in func.tags:
        return None
    return getattr(packet, func._overloadname, None)


def _of_rrelu(
    x: Tensor, _: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_rest: Any, **_kwargs: Any
) -> tuple[Tensor, float]:
    """Return the arguments of the leaky ReLU that equals a randomized one in eval mode."""
    return x, (lower + upper) / 2


def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::"))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _as_positions(indices: Any) -> list[Any]:
    """Replace constant masks by the positions that they select."""
    positions: list[Any] = []
    for index in indices:
        if _is_mask(index) and not isinstance(index, FakeTensor):
            with _disable_current_modes():
                positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions


@contextmanager
def watch_generators(log: TraceLog) -> Iterator[None]:
    """Refuse numbers that a model draws from the generators of Python and NumPy."""
    before = _generator_states()
    yield
    after = _generator_states()
    for name, state in before.items():
        if state != after[name]:
            log.refused.append(
                f"The model draws random numbers in eval mode: the generator of {name} changed "
                "during its call, and an engine is deterministic. Draw only if `self.training`, or "
                "pass the numbers as an input."
            )


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"Python's `random`": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["`numpy.random`"] = (kind, keys.tobytes(), *rest)
    return states


# -- words ----------------------------------------------------------------------------------------


def first_lines(cause: BaseException) -> str:
    """Return an exception's text on one line, shortened if it is long."""
    text = " ".join(str(cause).split())
    return text if len(text) <= 300 else text[:300] + "..."


def leaving(how: str, place: str) -> str:
    """Return the message for a value that Python sees."""
    return (
        f"A value computed from the input leaves the graph: `{how}` in {place}. The Python code of "
        "a model runs once, at conversion, so its branches, loops and numbers cannot depend on the "
        "input: use tensor operators (`torch.where`, `clamp`, a mask), or keep that part outside "
        "the converted model. Only a check that just raises or prints may ask, and only a tensor, "
        "as `if (x > 1).any(): raise ...` does."
    )


def written(private: nn.Module, target: Tensor, place: str) -> str:
    """Return the message for a tensor into which a call writes values that depend on the input."""
    name = next(
        (
            f"`{name}`"
            for name, tensor in [*private.named_parameters(), *private.named_buffers()]
            if tensor is target or _shares_memory(tensor, target)
        ),
        f"a tensor of shape {list(target.shape)} that does not depend on the input",
    )
    return (
        f"The model writes values computed from the input into {name}, in {place}; an engine keeps "
        "nothing between calls. Keep them in a new tensor made from the input, such as "
        "`x.new_zeros(...)` or `torch.cat`, or pass the state as an input and return it."
    )


def _shares_memory(tensor: Tensor, target: Tensor) -> bool:
    if tensor.layout != torch.strided or target.layout != torch.strided:
        return False
    with _disable_current_modes():
        ours, theirs = tensor.untyped_storage(), target.untyped_storage()
        return ours.nbytes() > 0 and ours.data_ptr() == theirs.data_ptr()


def _random(drawn: str, place: str) -> str:
    return (
        f"The model draws random numbers in eval mode: `{drawn}` in {place}; an engine is "
        "deterministic. Draw only if `self.training`, as `F.dropout(x, p, self.training)` does, "
        "or pass the numbers as an input."
    )

"""A copy of a model without its wrappers, which a conversion may change."""

from __future__ import annotations

import copy
import io
import logging
import os
import threading
import types
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from biper_engine.errors import ConversionError

__all__ = ["private_copy", "unwrapped"]

_SHARED_TYPES: tuple[type, ...] = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Thread,
    threading.local,
    io.IOBase,
    logging.Handler,
    types.ModuleType,
    torch.Generator,
    weakref.ReferenceType,
)
"""Types that cannot be copied, and whose contents affect results only by random draws."""


def unwrapped(model: Any) -> nn.Module:
    """Return the module that a caller means, without its wrappers.

    Raises:
        ConversionError: it is a TorchScript module, or a program for one batch size.
        TypeError: it is not a module.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        _refuse_type(model)
    _require_shown(model)
    return model


def _require_shown(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            name = f"`{path}`" if path else "This model"
            raise ConversionError(
                f"{name} is a TorchScript module, whose operators a conversion cannot see; convert "
                "the Python module that it was scripted or traced from, with the same weights "
                "(`module.load_state_dict(scripted.state_dict())`)."
            )
        for name, parameter in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(parameter):
                raise ConversionError(
                    f"`{path}.{name}` has no shape yet; call the model once on an input, then "
                    "convert it."
                )


def _inner(model: Any) -> Any:
    """Return the contents of a wrapper, or None for anything else."""
    if isinstance(model, torch.export.ExportedProgram):
        _require_free_batch(model)
        return model.module()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        return model._modules.get("_orig_mod")  # the result of `torch.compile(model)`
    return None


def _require_free_batch(program: torch.export.ExportedProgram) -> None:
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in names and isinstance(value, Tensor):
            size = value.shape[0] if value.dim() else None
            if type(size) is int:
                raise ConversionError(
                    f"The program was exported for a batch of {size} only (its input "
                    f"`{node.name}` is {list(value.shape)}); export it again with `dynamic_shapes` "
                    "that leave dimension 0 free, as `({0: torch.export.Dim('batch')},)` does."
                )


def _refuse_type(model: Any) -> NoReturn:
    advice = "pass an `nn.Module`"
    if isinstance(model, dict):
        advice = (
            "a state dict has weights but no network: build the model, `model.load_state_dict(...)`"
            ", and pass the model (`biper_engine.load_checkpoint` reads checkpoints of BiPer)"
        )
    elif isinstance(model, str | os.PathLike):
        advice = (
            "read it first: `biper_engine.load_checkpoint(path)` for a checkpoint of BiPer, "
            "`biper_engine.load(path)` for a `.biper` file, which needs no conversion"
        )
    elif isinstance(model, torch.jit.ScriptFunction):
        advice = "TorchScript does not show its operators; pass the Python module it was made from"
    elif callable(model):
        advice = "put the function into the `forward` of an `nn.Module`"
    raise TypeError(f"`model` is a {type(model).__name__}; {advice}.")


def private_copy(model: nn.Module) -> nn.Module:
    """Deep-copy a model without its inner wrappers, in eval mode and without gradients.

    This also copies what `copy.deepcopy` cannot: tensors with a history (a cached weight),
    parameters whose class has its own constructor and tensors of inference mode are copied by
    value; objects that hand on every attribute to another, attribute by attribute; locks, files,
    loggers, modules and generators are shared.

    Raises:
        ConversionError: an attribute cannot be copied; it is named.
    """
    memo = _Memo()
    for module in model.modules():
        held = [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]
        for value in held:
            if isinstance(value, Tensor) and (not value.is_leaf or value.is_inference()):
                memo[id(value)] = _copied_tensor(value)
    private = _deepcopy(model, memo)
    _take_off_wrappers(private)
    private.eval()
    for tensor in [*private.parameters(), *private.buffers()]:
        tensor.requires_grad_(False)
    return private


class _Memo(dict[int, Any]):
    """The memo of `copy.deepcopy`, which also copies some objects attribute by attribute.

    Attributes:
        by_attributes: these objects, by identity.
    """

    def __init__(self, known: Mapping[int, Any] | None = None) -> None:
        super().__init__(known or {})
        self.by_attributes: dict[int, Any] = {}

    def fresh(self) -> _Memo:
        """Return a memo that knows what this one knows."""
        other = _Memo(self)
        other.by_attributes = self.by_attributes
        return other

    def get(self, key: int, default: Any = None) -> Any:
        if key in self.by_attributes and key not in self:
            held = self.by_attributes[key]
            self[key] = shell = object.__new__(type(held))
            vars(shell).update(copy.deepcopy(vars(held), self))
        return super().get(key, default)


def _deepcopy(model: nn.Module, memo: _Memo) -> nn.Module:
    """Copy; if an object cannot be copied, copy it in another way and try again."""
    while True:
        try:
            return copy.deepcopy(model, memo.fresh())
        except Exception as cause:  # an object's `__deepcopy__` or `__reduce__` may raise any
            chain = _objects_at(cause)
            refusing = chain[-1] if chain else model
            known = id(refusing) in memo or id(refusing) in memo.by_attributes
            if known or refusing is model:
                raise ConversionError(_refusal(model, chain, cause)) from cause
            if isinstance(refusing, Tensor):
                memo[id(refusing)] = _copied_tensor(refusing)
            elif isinstance(refusing, _SHARED_TYPES):
                memo[id(refusing)] = refusing
            elif _is_plain(type(refusing)):
                memo.by_attributes[id(refusing)] = refusing
            else:
                raise ConversionError(_refusal(model, chain, cause)) from cause


def _is_plain(kind: type) -> bool:
    """Whether objects of a class are their attributes, which they hold in a dictionary."""
    parents = [vars(parent) for parent in kind.__mro__ if parent is not object]
    reducing = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__deepcopy__")
    return any("__dict__" in own for own in parents) and not any(
        own.get("__slots__") or any(name in own for name in reducing) for own in parents
    )


def _objects_at(cause: BaseException) -> list[Any]:
    """Return the objects being copied when `copy.deepcopy` raised, outermost first."""
    chain = []
    trace = cause.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code is copy.deepcopy.__code__:
            chain.append(frame.f_locals["x"])
        trace = trace.tb_next
    return chain


def _refusal(model: nn.Module, chain: list[Any], cause: BaseException) -> str:
    owner = max((i for i, x in enumerate(chain) if isinstance(x, nn.Module)), default=None)
    path, module = "", model
    for name, candidate in model.named_modules():
        if owner is not None and candidate is chain[owner]:
            path, module = name, candidate
    held = [id(x) for x in chain]
    places = {**vars(module), **module._parameters, **module._buffers}
    attribute = next((name for name, value in places.items() if id(value) in held), "")
    where = ".".join(filter(None, [path, attribute]))
    named = f"`{where}`" if where else type(model).__name__
    kind = type(chain[-1]).__name__ if chain else type(model).__name__
    return (
        f"The model cannot be copied, because of {named} (a {kind}); delete it before the "
        "conversion, or create it where it is used. "
        f"({type(cause).__name__}: {cause})"
    )


def _copied_tensor(tensor: Tensor) -> Tensor:
    """Copy a tensor by value, with its class and attributes but without its history."""
    with torch.no_grad():
        value = tensor.detach().clone()
        if type(tensor) is not Tensor:
            value = value.as_subclass(type(tensor))
        value.__dict__.update(tensor.__dict__)
    return value


def _take_off_wrappers(private: nn.Module) -> None:
    for module in list(private.modules()):
        for name, child in module._modules.items():
            if child is not None:
                inner = _inner(child)
                while inner is not None:
                    module._modules[name], inner = inner, _inner(inner)
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None  # set by `module.compile()`

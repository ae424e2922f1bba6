"""How a converted network is called: the form of its arguments, and the checks of every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from biper_engine.errors import GeometryError
from biper_engine.graph.structure import (
    CONSTANT_TYPES,
    Fixed,
    Leaf,
    count_leaves,
    fixed,
    flatten_structure,
    marked_structure,
    same_form,
    structure_of,
)

__all__ = ["InputSpec", "Signature"]


@dataclass(frozen=True)
class InputSpec:
    """One input tensor of an engine.

    Attributes:
        name: name of the graph's placeholder.
        dtype: the only accepted dtype.
        shape: sizes; None for the batch, which may have any size.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("N" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {_dtype_name(self.dtype)} [{sizes}]"


@dataclass(frozen=True)
class Signature:
    """How a network is called, and the form of what it returns.

    Attributes:
        in_spec: pytree of `(args, kwargs)`; its leaves are `inputs`, in order. Constants, such as
            None or a number, are part of it: a call must pass the same ones.
        out_spec: pytree of the result; its leaves are the graph's outputs, in order. Constants of
            the model are part of it.
        inputs: one entry per tensor.
        names: names of the model's parameters, so that a call may pass positional arguments of
            `in_spec` by keyword, and the other way round; empty if they are not known.
        defaults: constants that the model used for parameters that were not passed.
        is_positional: whether a call's positional arguments are exactly the inputs, in order.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[InputSpec, ...]
    names: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    _positionals: int = field(init=False, repr=False, compare=False)
    _keywords: tuple[str, ...] = field(init=False, repr=False, compare=False)
    is_positional: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.in_spec.num_leaves != len(self.inputs):
            raise ValueError(
                f"`in_spec` has {self.in_spec.num_leaves} leaves, but `inputs` describes "
                f"{len(self.inputs)} tensors."
            )
        # Not functools.cached_property, whose lock `torch.compile` cannot trace in Python 3.11.
        args, kwargs = marked_structure(self.in_spec)
        object.__setattr__(self, "_positionals", len(args))
        object.__setattr__(self, "_keywords", tuple(kwargs))
        positional = len(args) == len(self.inputs) and not kwargs
        positional = positional and all(isinstance(value, Leaf) for value in args)
        object.__setattr__(self, "is_positional", positional)

    def __str__(self) -> str:
        return ", ".join(map(str, self.inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        # Trees of marks replace the specs, whose own pickles depend on torch's version.
        trees = [marked_structure(spec) for spec in (self.in_spec, self.out_spec)]
        return _from_trees, (*trees, self.inputs, self.names, self.defaults)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the leaves of a call's arguments in the order of `inputs`.

        Raises:
            TypeError: their number or structure differs.
        """
        as_they_are = self.is_positional and not kwargs and len(args) == len(self.inputs)
        if as_they_are and all(isinstance(value, Tensor) for value in args):
            return list(args)
        args, kwargs = self._as_converted(args, kwargs)
        inputs, spec = flatten_structure((args, kwargs))
        if spec != self.in_spec:
            if same_form(marked_structure(spec), marked_structure(self.in_spec)):
                return inputs
            try:  # dicts with the same keys in another order have the same structure
                leaves = self.in_spec.flatten_up_to(fixed((args, kwargs)))
                inputs = [leaf.value if isinstance(leaf, Fixed) else leaf for leaf in leaves]
            except ValueError:
                self._refuse_structure(args, kwargs)
        return inputs

    def _as_converted(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments as they were passed at conversion, by position or by name."""
        bound = dict(zip(self.names, args, strict=False))
        unnamed = len(args) > len(self.names) or self._positionals > len(self.names)
        if not unnamed and not bound.keys() & kwargs.keys():
            bound |= kwargs
            for name, default in self.defaults:
                if name in bound and _is_same(bound[name], default):
                    del bound[name]
            wanted = [*self.names[: self._positionals], *self._keywords]
            if set(bound) == set(wanted):
                args = tuple(bound[name] for name in self.names[: self._positionals])
                kwargs = {name: bound[name] for name in self._keywords}
        elif set(kwargs) == set(self._keywords):
            kwargs = {name: kwargs[name] for name in self._keywords}
        return args, kwargs

    def _refuse_structure(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        wanted, got = len(self.inputs), count_leaves((args, kwargs))
        form = marked_structure(self.in_spec, lambda index: self.inputs[index].name)
        came = pytree.tree_map(_described, (args, kwargs))
        constants = " Other values are fixed at conversion." if _has_constants(form, self) else ""
        raise TypeError(
            f"The engine takes {wanted} tensor{'s' * (wanted != 1)} as (args, kwargs) = {form}; "
            f"got {got} value{'s' * (got != 1)} as {came}. Call it as the model was called when it "
            f"was converted: {self}.{constants}"
        )

    def check(self, inputs: list[Any], device: torch.device | None) -> None:
        """Require flat inputs that the network can run on; `device` is the engine's.

        A CUDA engine also takes tensors in pinned CPU memory, which it copies without waiting.

        Raises:
            TypeError: a leaf is not a tensor, or has another dtype.
            GeometryError: a shape differs, except for the batch.
            ValueError: a tensor is on another device.
            RuntimeError: a tensor requires grad while grad is enabled.
        """
        for value, spec in zip(inputs, self.inputs, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"`{spec.name}` must be a tensor, but it is {type(value)}.")
            if value.is_nested:
                raise TypeError(
                    f"`{spec.name}` must be a dense tensor, but it is nested; pass its images one "
                    "by one, or stacked by `torch.stack`."
                )
            if value.dtype != spec.dtype:
                _refuse_dtype(value, spec)
            if value.dim() != len(spec.shape) or any(
                size is not None and value.shape[axis] != size
                for axis, size in enumerate(spec.shape)
            ):
                _refuse_shape(value, spec)
            if device is not None and value.device != device and not _is_copied(value, device):
                pinned = ", or pin its memory with `.pin_memory()`"
                raise ValueError(
                    f"`{spec.name}` is on {value.device}, but the engine is on {device}; move one "
                    f"of them with `.to()`{pinned if _may_be_copied(value, device) else ''}."
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"An engine is inference only, but `{spec.name}` requires grad: call it under "
                    "`torch.no_grad()` or pass `x.detach()`, and train the original model instead."
                )


def _from_trees(
    takes: Any,
    returns: Any,
    inputs: tuple[InputSpec, ...],
    names: tuple[str, ...] = (),
    defaults: tuple[tuple[str, Any], ...] = (),
) -> Signature:
    return Signature(structure_of(takes), structure_of(returns), inputs, names, defaults)


def _is_same(value: Any, constant: Any) -> bool:
    return type(value) is type(constant) and value == constant


def _described(leaf: Any) -> Any:
    return leaf if type(leaf) in CONSTANT_TYPES else type(leaf).__name__


def _has_constants(form: Any, signature: Signature) -> bool:
    return count_leaves(form) > len(signature.inputs) or bool(signature.defaults)


def _may_be_copied(value: Tensor, device: torch.device) -> bool:
    return device.type == "cuda" and value.device.type == "cpu"


def _is_copied(value: Tensor, device: torch.device) -> bool:
    return _may_be_copied(value, device) and value.is_pinned()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_dtype(value: Tensor, spec: InputSpec) -> NoReturn:
    raise TypeError(
        f"`{spec.name}` must be {_dtype_name(spec.dtype)}, but it is {_dtype_name(value.dtype)}; "
        f"pass it with `.to({spec.dtype})`, after the same preprocessing as in training."
    )


def _refuse_shape(value: Tensor, spec: InputSpec) -> NoReturn:
    wanted = spec.shape[1:] if spec.shape and spec.shape[0] is None else spec.shape
    kind = "images" if len(spec.shape) == 4 else "inputs"
    hint = "convert again with an example of that size"
    if tuple(value.shape) == wanted:
        hint = "add the batch dimension with `x.unsqueeze(0)`"
    elif value.dim() != len(spec.shape):
        hint = f"pass {len(spec.shape)} dimensions, the batch first"
    raise GeometryError(
        f"The engine was converted for {kind} of {'x'.join(map(str, wanted))} (one engine per "
        f"image size); got `{spec.name}` of shape {list(value.shape)}; {hint}."
    )

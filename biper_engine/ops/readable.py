"""Tensors that kernels can read: plain values in their own memory, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined, unused-ignore]
from torch.autograd import forward_ad

__all__ = ["has_plain_dispatch", "in_memory", "is_wrapped", "readable", "refuse_tangents"]

_WITHOUT_MEMORY = ("meta",)


def has_plain_dispatch(x: Tensor) -> bool:
    """Whether operators on `x` are those of torch.Tensor: it is not a FakeTensor or the like."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_wrapped(x: Tensor) -> bool:
    """Whether `x` wraps another tensor: in a transform of torch.func or functionalised."""
    return _functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x)


def readable(name: str, x: Tensor) -> Tensor:
    """Return a plain, aligned tensor with the values of `x` in its memory.

    It shares the memory of `x` unless that memory is misaligned, has values with the other sign
    (`torch.Tensor.is_neg`), or has no values (tensors of zeros that forward-mode AD makes).

    Args:
        name: name of the tensor in errors.
        x: the tensor.

    Raises:
        RuntimeError: `x` has a tangent of forward-mode AD.
        TypeError: `x` is sparse, nested, quantized, in a layout of oneDNN, or wraps another
            tensor.
        ValueError: the memory of `x` was freed.
    """
    if not has_plain_dispatch(x) or is_wrapped(x) or x.is_quantized or x.is_nested:
        raise _misfit(name, x)
    if x.layout != torch.strided:
        raise _misfit(name, x)
    refuse_tangents([(name, x)])
    plain = x.detach().as_subclass(Tensor)
    if torch._is_zerotensor(plain):
        return torch.zeros(plain.shape, dtype=plain.dtype, device=plain.device)
    if plain.is_neg() or plain.is_conj():
        return plain.resolve_neg().resolve_conj()
    if plain.device.type in _WITHOUT_MEMORY or plain.numel() == 0:
        return plain
    last = sum((size - 1) * step for size, step in zip(plain.shape, plain.stride(), strict=True))
    wanted = (plain.storage_offset() + last + 1) * plain.itemsize
    if plain.untyped_storage().nbytes() < wanted:
        raise ValueError(
            f"The memory of `{name}` was freed: its storage has "
            f"{plain.untyped_storage().nbytes()} bytes, its values take {wanted}; pass a tensor "
            "that still has its values."
        )
    aligned = plain.device.type != "cpu" or plain.data_ptr() % plain.itemsize == 0
    return plain if aligned else plain.clone()


def in_memory(x: Any) -> Any:
    """Return `x`; if it is a tensor on a CPU, with its values in aligned memory.

    Raises:
        ValueError: the memory of `x` was freed.
    """
    if not isinstance(x, Tensor):
        return x
    address = x.data_ptr()
    if address == 0 and x.numel() > 0:
        raise ValueError(
            f"The memory of a tensor of shape {tuple(x.shape)} was freed: pass one that still has "
            "its values."
        )
    return x if address % x.itemsize == 0 else x.clone()


def refuse_tangents(tensors: Iterable[tuple[str | int, Any]]) -> None:
    """Raise RuntimeError if one of the named values is a tensor with a tangent."""
    if forward_ad._current_level < 0:
        return
    for name, x in tensors:
        if isinstance(x, Tensor) and _tangent(x) is not None:
            raise RuntimeError(
                f"Binary operators have no derivatives, but `{name}` has a tangent of forward-mode "
                "AD: pass its primal, and differentiate the original model instead."
            )


def _tangent(x: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent


def _misfit(name: str, x: Tensor) -> TypeError:
    kind = type(x).__name__
    if kind == "Tensor":
        kind = "tensor"
    if is_wrapped(x):
        what = f"a {kind} of a transform of torch.func, such as vmap, or of functionalization"
    elif x.is_nested:
        what = f"a nested {kind}"
    elif x.is_quantized:
        what = f"a quantized {kind}"
    elif x.layout != torch.strided:
        what = f"a {kind} of layout {x.layout}"
    else:
        what = f"a {kind} with its own operators"
    return TypeError(
        f"`{name}` must be a plain tensor with values in memory, but it is {what}; pass a dense "
        "`torch.Tensor`."
    )

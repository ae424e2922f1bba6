"""The tensors of a network: private copies, and whether the originals have changed since.

A user of an engine can do to its tensors what PyTorch allows: write to them, move them to shared
memory, swap or replace them. A plan reads none of them. It is made from copies, and checks at every
call whether the tensors are still those that were copied.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from biper_engine.graph.reading import get_constant
from biper_engine.ops.cpu_module import native
from biper_engine.ops.readable import readable

__all__ = ["Watch", "own_tensors", "refuse_gradients"]

_TRIES = 100


class Watch(Protocol):
    """Tells whether the tensors of a network have changed."""

    def holds(self) -> bool:
        """Whether they are the same objects, in the same memory, with the same values.

        For a CPU tensor above 4 kB, samples of the values are compared, and the number of writes
        that PyTorch counted; for tensors on other devices, only that number. PyTorch does not count
        writes through `tensor.data`, NumPy or another process.
        """


def own_tensors(
    module: fx.GraphModule, device: torch.device | None
) -> tuple[Watch, fx.GraphModule]:
    """Return a network with the current tensors of `module`, and a watch on those of `module`.

    The network shares the graph. Its tensors are copies on a CPU; on other devices they share the
    memory, which lives as long as they do.

    Args:
        module: a converted network.
        device: device of its tensors.

    Raises:
        RuntimeError: a tensor has a tangent of forward-mode AD, or other threads keep changing
            tensors.
        TypeError: a tensor is missing, or was replaced by something without values in memory, such
            as a sparse tensor or one of a transform of torch.func.
        ValueError: a tensor is on another device, or its memory was freed.
    """
    for _ in range(_TRIES):
        watch = _watch(module)
        owned = _Network(module, device)
        if watch.holds():
            return watch, cast(fx.GraphModule, owned)
    raise RuntimeError(
        "The engine's tensors changed at every attempt to prepare a call: let other threads change "
        "them before or after the call."
    )


def refuse_gradients(module: fx.GraphModule) -> None:
    """Raise RuntimeError if a tensor of a network requires grad while grad is enabled."""
    if not torch.is_grad_enabled():
        return
    for name, value in (*module.named_buffers(), *module.named_parameters()):
        if value.requires_grad:
            raise RuntimeError(
                f"An engine is inference only, but its tensor `{name}` requires grad: call it "
                "under `torch.no_grad()`, and train the original model instead."
            )


class _Network(nn.Module):
    """The graph of a converted network, and copies of its tensors."""

    def __init__(self, module: fx.GraphModule, device: torch.device | None) -> None:
        super().__init__()
        self.graph = module.graph
        for node in module.graph.find_nodes(op="get_attr"):
            self._hold(str(node.target), _own(module, str(node.target), device))

    def _hold(self, target: str, value: Tensor) -> None:
        *path, name = target.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.register_buffer(name, value)


def _own(module: fx.GraphModule, target: str, device: torch.device | None) -> Tensor:
    try:
        value = get_constant(module, target)
    except AttributeError as error:
        raise TypeError(
            f"The engine's tensor `{target}` is missing; load the engine again, or restore it with "
            "`load_state_dict(..., assign=True)`."
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(f"The engine's tensor `{target}` was replaced by a {type(value).__name__}.")
    if device is not None and value.device != device:
        raise ValueError(
            f"The engine's tensor `{target}` is on {value.device}, but the engine is on {device}; "
            "move the whole engine with `.to()`."
        )
    value = readable(f"engine.{target}", value)
    return _copy(value) if value.device.type == "cpu" else value


def _copy(value: Tensor) -> Tensor:
    """Return a copy; `torch.clone` could read memory that another thread frees meanwhile."""
    copied, compiled = torch.empty_like(value), native()
    if compiled is not None and compiled.copy(copied, value):
        return copied
    return value.clone()


# -- watches --------------------------------------------------------------------------------------


def _watch(module: fx.GraphModule) -> Watch:
    dicts = [
        held
        for each in module.modules()
        for held in (each._modules, each._buffers, each._parameters)
        if held
    ]
    tensors = [*module.buffers(), *module.parameters()]
    compiled = native()
    watch: Watch = (_SlowWatch if compiled is None else compiled.Watch)(dicts, tensors)
    return watch


class _SlowWatch:
    """A watch without the compiled module; it does not compare values."""

    def __init__(self, dicts: list[dict[str, Any]], tensors: list[Tensor]) -> None:
        self._dicts = [(held, list(held.values())) for held in dicts]
        self._tensors = tensors
        self._states = list(map(_state, tensors))

    def holds(self) -> bool:
        return all(
            len(held) == len(values) and all(map(_is, held.values(), values))
            for held, values in self._dicts
        ) and self._states == list(map(_state, self._tensors))


def _is(a: object, b: object) -> bool:
    return a is b


def _state(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg()

"""Observe the outputs of the model itself, and whether a call changes it.

A capture only contains what a model computes from its arguments. So a copy of the model is called
more than once, on different data, and everything that a call could change is compared with its
state before the call: parameters, buffers, attributes of its modules and of their classes,
variables of the functions that they run.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from biper_engine.conversion.copying import private_copy, unwrapped
from biper_engine.conversion.modes import callers_defaults, plain_modes
from biper_engine.errors import ConversionError
from biper_engine.graph.structure import flatten_structure

__all__ = ["FailedCallError", "Observation", "Observed", "first_difference"]

# Packages whose objects hold no state of a model. A logger leads to all others of the program.
_OPAQUE = ("torch", "builtins", "logging")
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_MAX_DEPTH = 6
_OF_MODULES = frozenset(nn.Module().__dict__)
"""Attributes that every module has: parameters, buffers, hooks. Contents are compared by name."""


class FailedCallError(ConversionError):
    """The model itself raises an error when it is called."""


@dataclass(frozen=True)
class Observation:
    """One call of the model.

    Attributes:
        inputs: the flat inputs.
        outputs: the returned tensors.
        out_spec: the structure of the result, with constants.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Any, ...]
    out_spec: pytree.TreeSpec


class Observed:
    """A model's own outputs, from a copy in eval mode that is called repeatedly.

    After every call, everything that it could have changed is compared. A value that the first call
    sets independently of its inputs, and that no later call changes, is not state: for example a
    table that is computed once and kept, or weights that are binarized in place. Weights that each
    call changes again only within rounding, such as weights that are centred in place, are none
    either: every call starts from the model's own. Nor is an attribute that the model only writes,
    as a layer's last output that is kept for a loss.

    Args:
        model: any module; it is not changed.
        in_spec: pytree structure of `(args, kwargs)`.
    """

    def __init__(self, model: nn.Module, in_spec: pytree.TreeSpec) -> None:
        self._model = unwrapped(model)
        self._in_spec = in_spec
        self._copy = private_copy(self._model)
        self._state = _state(self._copy)
        self._calls = 0
        self._is_set_up = False  # by the first call, possibly from its inputs
        self._first: Observation | None = None
        self._weights: dict[str, Tensor] = {}  # to start every call from, if calls change them
        self._unread: set[str] = set()  # attributes that the model writes and never reads
        self._own = {name: _copied(held) for name, held in self._copy.named_parameters()}

    def __call__(self, inputs: Sequence[Tensor]) -> Observation:
        """Call the copy once.

        Raises:
            ConversionError: the call changed something; the message names it.
        """
        observation, changed = self._call(inputs)
        if self._calls == 0:
            self._is_set_up, changed = bool(changed), {}
            self._first = observation
        elif changed and not self._weights and self._only_round(changed):
            self._weights = self._own
            observation, changed = self._call(inputs)
        if changed and self._calls:
            changed = self._without_unread(changed, observation)
        if self._calls and self._is_set_up and not changed:
            other = private_copy(self._model)
            self._answer(other, inputs)
            changed = self._read(_changed(self._state, _state(other)))
            self._is_set_up = False
        if changed:
            raise ConversionError(_refusal(self._model, changed))
        self._calls += 1
        return observation

    def _call(self, inputs: Sequence[Tensor]) -> tuple[Observation, dict[str, Any]]:
        """Call the copy; also return what is no longer as the first call left it."""
        with torch.no_grad():
            for name, held in self._copy.named_parameters():
                if name in self._weights:
                    held.copy_(self._weights[name])
        observation = self._answer(self._copy, inputs)
        after = _state(self._copy)
        changed = self._read(_changed(self._state, after))
        if self._calls == 0:
            self._state = after
        return observation, changed

    def _read(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Return changes without those of attributes that the model never reads."""
        return {name: value for name, value in changed.items() if _root(name) not in self._unread}

    def _without_unread(self, changed: dict[str, Any], observation: Observation) -> dict[str, Any]:
        """Find out which changed attributes a call reads, by taking them away before it."""
        places = {}
        for path, module in self._copy.named_modules():
            for key in vars(module):
                root = f"{path}.{key}" if path else key
                if key not in _OF_MODULES and root in map(_root, changed):
                    places[root] = vars(module), key
        held = {root: owner[key] for root, (owner, key) in places.items()}
        for owner, key in places.values():
            owner[key] = _TakenAway()
        other = None
        with suppress(FailedCallError):
            other, _ = self._call(observation.inputs)
        for root, (owner, key) in places.items():
            if isinstance(owner.get(key), _TakenAway):
                owner[key] = held[root]
        if other is None or first_difference(observation.outputs, other.outputs):
            return changed
        self._unread.update(places)
        return self._read(changed)

    def _only_round(self, changed: Mapping[str, Any]) -> bool:
        """Whether a call changed weights, and these by no more than rounding."""
        weights = {name: value for name, value in changed.items() if name in self._own}
        pairs = ((self._state[name], value) for name, value in weights.items())
        return bool(weights) and all(_is_rounding(before, after) for before, after in pairs)

    def again(self) -> Observation:
        """Repeat the first call, after others.

        Raises:
            ConversionError: the outputs differ from those of the first call.
        """
        assert self._first is not None, "there was no first call"
        observation = self(self._first.inputs)
        difference = first_difference(self._first.outputs, observation.outputs)
        if self._first.out_spec != observation.out_spec:
            difference = "other constants or another structure"
        if difference:
            raise ConversionError(
                "The model gives different outputs for the same input when it is called again "
                f"({difference}), so it keeps state between calls or draws random numbers, which a "
                "converted network cannot. Make the state an input and an output, and switch off "
                "randomness in eval mode."
            )
        return observation

    def values_of(self, inputs: Sequence[Tensor]) -> dict[tuple[Any, ...], list[Tensor]]:
        """Return every float value that the model computes in one call, by dtype and shape."""
        recording = _Recording()
        with recording:
            self._answer(self._copy, inputs)
        return recording.results

    def _answer(self, model: nn.Module, inputs: Sequence[Tensor]) -> Observation:
        """Call a model on copies of the inputs, since it may write to them."""
        with plain_modes(), _other_seeds(self._calls):
            args, kwargs = pytree.tree_unflatten([_copied(x) for x in inputs], self._in_spec)
            with callers_defaults():
                result = _called(model, args, kwargs)
            leaves, out_spec = flatten_structure(result)
            # An output may share memory that a later call writes to.
            return Observation(tuple(inputs), tuple(map(_copied, leaves)), out_spec)


def _called(model: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as cause:  # a model may raise anything; it is re-raised with advice
        sizes = {len(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        raise FailedCallError(
            f"The model itself fails when it is called with a batch of {max(sizes, default=0)}; "
            "it must run for every batch size. If an input must have certain values, such as "
            "positions in a table, make it an integer tensor; the example's own values are used. "
            f"({type(cause).__name__}: {' '.join(str(cause).split())[:300]})"
        ) from cause


class _Recording(TorchDispatchMode):
    """Keeps every float result of the operators that run under it, by dtype and shape."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: dict[tuple[Any, ...], list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.results.setdefault((leaf.dtype, tuple(leaf.shape)), []).append(leaf.clone())
        return result


def first_difference(wanted: Sequence[Any], got: Sequence[Any]) -> str:
    """Return how two lists of output leaves differ, or an empty string if they are equal."""
    if len(wanted) != len(got):
        return f"{len(wanted)} outputs, then {len(got)}"
    for position, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if not _same(a, b):
            return f"output {position} differs"
    return ""


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _other_seeds(seed: int) -> Iterator[None]:
    """Seed the global random generators, so that each call draws other numbers; restore them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


# -- state ----------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    """Return a copy of everything that a call could change, by name."""
    found: dict[str, Any] = {}
    seen: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = _copied(tensor)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for key, value in module.__dict__.items():
            if key not in _OF_MODULES:
                _collect(f"{prefix}{key}", value, found, seen, 0)
        for owner, key, value in _outside(type(module)):
            _collect(f"{owner}.{key}", value, found, seen, 0)
    return found


def _outside(kind: type) -> Iterator[tuple[str, str, Any]]:
    """Yield what a module's code can write to outside its instance: class, globals, closures."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for key, value in vars(owner).items():
            function = getattr(value, "__func__", value)
            code = getattr(function, "__code__", None)
            if code is None:
                if not key.startswith("__"):
                    yield owner.__qualname__, key, value
                continue
            names = getattr(function, "__globals__", {})
            for name in code.co_names:
                if name in names:
                    yield owner.__module__, name, names[name]
            for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
                if name != "__class__":
                    yield f"{owner.__qualname__}.{key}", name, _content(cell)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _collect(
    name: str, value: Any, found: dict[str, Any], seen: dict[int, str], depth: int
) -> None:
    """Add a copy of a value, or of its contents, under its name; opaque objects are left out."""
    if isinstance(value, _NUMBERS):
        found[name] = value
    elif isinstance(value, Tensor):
        found[name] = _copied(value)
    elif isinstance(value, np.ndarray):
        found[name] = value.copy()
    elif id(value) in seen or depth >= _MAX_DEPTH or isinstance(value, (type, nn.Module)):
        return
    elif isinstance(value, Mapping):
        seen[id(value)] = name
        for key, item in list(value.items()):
            _collect(f"{name}[{key!r}]", item, found, seen, depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        seen[id(value)] = name
        found[f"len({name})"] = len(value)
        for index, item in enumerate(value):
            _collect(f"{name}[{index}]", item, found, seen, depth + 1)
    elif hasattr(value, "__dict__") and not callable(value) and not hasattr(value, "__path__"):
        seen[id(value)] = name
        if type(value).__module__.partition(".")[0] not in _OPAQUE:
            for key, item in vars(value).items():
                _collect(f"{name}.{key}", item, found, seen, depth + 1)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    missing = object()
    names = [*before, *(name for name in after if name not in before)]
    return {
        name: after.get(name)
        for name in names
        if not _same(before.get(name, missing), after.get(name, missing))
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
            return False
        if a.layout != torch.strided or a.is_quantized:
            return True
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if type(a) is not type(b):
        return False
    return bool(a == b or (isinstance(a, float) and a != a and b != b))


def _is_rounding(before: Any, after: Any) -> bool:
    """Whether weights differ by rounding, which may also flip the sign of a few."""
    if not isinstance(after, Tensor) or before.shape != after.shape:
        return False
    limit = 2.0**-20 * before.abs().max() if before.numel() else 0.0
    near, turned = (after - before).abs() <= limit, (after + before).abs() <= limit
    return bool((near | turned).all() and (~near).sum() <= 1e-4 * near.numel())


class _TakenAway:
    """Stands for the value of an attribute that nobody should read."""


def _root(name: str) -> str:
    """Return the attribute, with its module's path, that a name of the state is in."""
    return re.split(r"\[", name.removeprefix("len(").removesuffix(")"), maxsplit=1)[0]


def _refusal(model: nn.Module, changed: Mapping[str, Any]) -> str:
    names = list(changed)
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    name = next((n for n in names if n in parameters or n in buffers), names[0])
    kind = "parameter" if name in parameters else "buffer" if name in buffers else "attribute"
    owner = name.removeprefix("len(").removesuffix(")")
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    advice = {
        "parameter": "compute the changed weights in a local variable, or restore the old ones "
        "before `forward` returns",
        "buffer": "switch off what updates it in eval mode, or make it an input and an output",
        "attribute": "make it a local variable, or, if later calls read it, an input and an "
        "output of the model",
    }[kind]
    return (
        f"A call of the model changes its {kind} `{owner}`{others}, and a converted network keeps "
        f"nothing from call to call: {advice}."
    )

"""Structures of arguments and results in which some leaves are constants.

A network takes and returns tensors. Other leaves of a pytree, such as None for a head that is only
used in training, are part of the structure: `tree_unflatten` of its spec restores them. Dataclasses
are containers, too, whether or not they are registered with pytree.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils import _pytree as pytree

__all__ = [
    "CONSTANT_TYPES",
    "Fixed",
    "Leaf",
    "count_leaves",
    "fixed",
    "flatten_structure",
    "marked_structure",
    "same_form",
    "structure_of",
]

CONSTANT_TYPES = (type(None), bool, int, float, str)
"""Types of constants that may be leaves beside tensors."""


class Fixed:
    """Marks a constant in a tree to be flattened; trees that are rebuilt have its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Record:
    """Marks an instance of a dataclass in a tree to be flattened; rebuilt trees have instances."""

    def __init__(self, instance: Any) -> None:
        self.kind = type(instance)
        values = {name: getattr(instance, name) for name in _fields(instance)}
        self.values = {name: fixed(value) for name, value in values.items()}


def _fields(instance: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(instance) if hasattr(instance, field.name)]


def _flatten_record(record: _Record) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return list(record.values.values()), (record.kind, tuple(record.values))


def _unflatten_record(children: Any, context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    instance: Any = object.__new__(kind)  # `__init__` may check what marks do not satisfy
    for name, value in zip(names, children, strict=True):
        object.__setattr__(instance, name, value)
    return instance


class Leaf:
    """Marks a tensor in a tree that stands for a spec."""


def _flatten_fixed(fixed: Fixed) -> tuple[list[Any], tuple[type, Any]]:
    return [], (type(fixed.value), fixed.value)  # 1, 1.0 and True are different constants


def _unflatten_fixed(_children: Any, context: tuple[type, Any]) -> Any:
    return context[1]


pytree.register_pytree_node(
    Fixed, _flatten_fixed, _unflatten_fixed, serialized_type_name="biper_engine.Fixed"
)


pytree.register_pytree_node(
    _Record, _flatten_record, _unflatten_record, serialized_type_name="biper_engine.Record"
)


def flatten_structure(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of a tree that are not constants, and its spec with the constants."""
    return pytree.tree_flatten(fixed(tree))


def fixed(tree: Any) -> Any:
    """Return a tree with its constants and dataclasses marked."""
    return pytree.tree_map(_marked, tree)


def _marked(leaf: Any) -> Any:
    if type(leaf) in CONSTANT_TYPES:
        return Fixed(leaf)
    is_record = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type | Mapping)
    return _Record(leaf) if is_record else leaf


def count_leaves(tree: Any) -> int:
    """Return the number of tensors, constants and other leaves of a tree."""
    leaves, _ = pytree.tree_flatten(fixed(tree), is_leaf=lambda node: isinstance(node, Fixed))
    return len(leaves)


def same_form(one: Any, other: Any) -> bool:
    """Whether two trees of marks are equal, except for the classes of records with equal fields.

    A loaded network has its own classes for the named tuples and dataclasses of the saved one.
    """
    if isinstance(one, Leaf) or isinstance(other, Leaf):
        return isinstance(one, Leaf) and isinstance(other, Leaf)
    parts = [_parts(tree) for tree in (one, other)]
    if None in parts:
        return type(one) is type(other) and bool(one == other)
    (kind, names, values), (its_kind, its_names, its_values) = parts  # type: ignore[misc]
    same = (kind, names, len(values)) == (its_kind, its_names, len(its_values))
    return same and all(map(same_form, values, its_values))


def _parts(tree: Any) -> tuple[Any, list[Any], list[Any]] | None:
    """Return a container's kind, the names of its parts, and the parts; None for other values."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type | Mapping):
        names = _fields(tree)
        return "record", names, [getattr(tree, name) for name in names]
    fields = getattr(type(tree), "_fields", None)
    if isinstance(tree, tuple) and isinstance(fields, tuple):
        return "named tuple", list(fields), list(tree)
    if type(tree) in (tuple, list):
        return type(tree), [], list(tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree), list(tree), list(tree.values())
    return None


def marked_structure(spec: pytree.TreeSpec, mark: Callable[[int], Any] | None = None) -> Any:
    """Return the tree of a spec, with a `Leaf` or `mark(index)` for each tensor."""
    leaves = [Leaf() if mark is None else mark(index) for index in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def structure_of(tree: Any) -> pytree.TreeSpec:
    """Return the spec of a tree made by `marked_structure`."""
    return flatten_structure(tree)[1]

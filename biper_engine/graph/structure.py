"""Structures of arguments and results in which some leaves are constants.

A network takes and returns tensors. Other leaves of a pytree, such as None for a head that is only
used in training, are part of the structure: `tree_unflatten` of its spec restores them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

__all__ = [
    "CONSTANT_TYPES",
    "Fixed",
    "Leaf",
    "fixed",
    "flatten_structure",
    "marked_structure",
    "structure_of",
]

CONSTANT_TYPES = (type(None), bool, int, float, str)
"""Types of constants that may be leaves beside tensors."""


class Fixed:
    """Marks a constant in a tree to be flattened; trees that are rebuilt have its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Leaf:
    """Marks a tensor in a tree that stands for a spec."""


def _flatten_fixed(fixed: Fixed) -> tuple[list[Any], tuple[type, Any]]:
    return [], (type(fixed.value), fixed.value)  # 1, 1.0 and True are different constants


def _unflatten_fixed(_children: Any, context: tuple[type, Any]) -> Any:
    return context[1]


pytree.register_pytree_node(
    Fixed, _flatten_fixed, _unflatten_fixed, serialized_type_name="biper_engine.Fixed"
)


def flatten_structure(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of a tree that are not constants, and its spec with the constants."""
    return pytree.tree_flatten(fixed(tree))


def fixed(tree: Any) -> Any:
    """Return a tree with its constants marked."""
    return pytree.tree_map(lambda leaf: Fixed(leaf) if type(leaf) in CONSTANT_TYPES else leaf, tree)


def marked_structure(spec: pytree.TreeSpec, mark: Callable[[int], Any] | None = None) -> Any:
    """Return the tree of a spec, with a `Leaf` or `mark(index)` for each tensor."""
    leaves = [Leaf() if mark is None else mark(index) for index in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def structure_of(tree: Any) -> pytree.TreeSpec:
    """Return the spec of a tree made by `marked_structure`."""
    return flatten_structure(tree)[1]

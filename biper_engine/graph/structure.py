"""Structures of arguments and results in which some leaves are constants.

A network takes and returns tensors. What stands between them in a pytree, such as None for a head
that is only trained, is part of the structure: `tree_unflatten` of its spec puts it back.
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
"""Types of values that may stand between tensors."""


class Fixed:
    """Marks a constant in a tree that is to be flattened; trees that are made have its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Leaf:
    """Marks a tensor in a tree that stands for a spec."""


def _flatten_fixed(fixed: Fixed) -> tuple[list[Any], tuple[type, Any]]:
    return [], (type(fixed.value), fixed.value)  # 1, 1.0 and True are three constants


def _unflatten_fixed(_children: Any, context: tuple[type, Any]) -> Any:
    return context[1]


pytree.register_pytree_node(
    Fixed, _flatten_fixed, _unflatten_fixed, serialized_type_name="biper_engine.Fixed"
)


def flatten_structure(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of a tree that are no constants, and its spec, which has the constants."""
    return pytree.tree_flatten(fixed(tree))


def fixed(tree: Any) -> Any:
    """Return a tree with its constants marked."""
    return pytree.tree_map(lambda leaf: Fixed(leaf) if type(leaf) in CONSTANT_TYPES else leaf, tree)


def marked_structure(spec: pytree.TreeSpec, mark: Callable[[int], Any] | None = None) -> Any:
    """Return a tree of a spec: a `Leaf`, or `mark(index)`, for each tensor."""
    leaves = [Leaf() if mark is None else mark(index) for index in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def structure_of(tree: Any) -> pytree.TreeSpec:
    """Return the spec of a tree that `marked_structure` made."""
    return flatten_structure(tree)[1]

"""Chains: reshapes and permutations in a row become at most one reshape, one permute, one reshape.

`einsum`, for example, is captured as many of them. A chain is followed on the factors of its
sizes: a reshape splits or joins factors, a permutation reorders them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from biper_engine.graph.editing import call, substitute
from biper_engine.graph.reading import is_call, parent, same_shape, shape

__all__ = ["shorten_chains"]

aten = torch.ops.aten

_BATCH = 1_000_003
"""A prime in place of the batch, so that no other size has it as a factor."""


def shorten_chains(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for node in list(graph_module.graph.nodes):
        if not _is_link(node) or (node.users and all(_is_link(user) for user in node.users)):
            continue
        chain, root = [node], parent(node)
        while _is_link(root):
            chain.append(root)
            root = parent(root)
        if len(chain) > 1:
            _shorten(graph_module, chain, root)


def _is_link(node: fx.Node) -> bool:
    return is_call(node, aten.reshape.default, aten.permute.default)


def _shorten(graph_module: fx.GraphModule, chain: list[fx.Node], root: fx.Node) -> None:
    node = chain[0]
    factors = _Factors(_sizes(root))
    for link in reversed(chain):
        if is_call(link, aten.permute.default):
            factors.permute(link.args[1])  # type: ignore[arg-type]
        elif not factors.reshape(_sizes(link)):
            return
    split, order = factors.shortest()
    turns = order != sorted(order)
    before = turns and split != _sizes(root)
    after = not turns or [split[at] for at in order] != _sizes(node)
    if before + turns + after >= len(chain) and not same_shape(root, node):
        return
    graph, value = graph_module.graph, root
    if before:
        value = _link(graph, node, aten.reshape.default, value, _written(split))
    if turns:
        value = _link(graph, node, aten.permute.default, value, order)
    if not turns and same_shape(root, node):
        substitute(node, root)
        return
    if after:
        value = _link(graph, node, aten.reshape.default, value, _written(_sizes(node)))
    value.meta = dict(node.meta)
    substitute(node, value)


def _link(graph: fx.Graph, node: fx.Node, target: Any, value: fx.Node, how: list[int]) -> fx.Node:
    link = call(graph, node, target, value, how, like=value)
    before = value.meta["val"]
    link.meta = {
        "val": before.permute(how) if target == aten.permute.default else before.reshape(how)
    }
    return link


def _sizes(node: fx.Node) -> list[int]:
    """Return a shape with `_BATCH` in place of the batch."""
    sizes = []
    for size in shape(node):
        if not isinstance(size, int):
            expression = size.node.expr
            size = int(expression.subs(dict.fromkeys(expression.free_symbols, _BATCH)))
        sizes.append(size)
    return sizes


def _written(sizes: Sequence[int]) -> list[int]:
    return [-1 if size % _BATCH == 0 and size else size for size in sizes]


class _Factors:
    """The dimensions of a value, each a list of factors of the dimensions of the first value."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._size: dict[int, int] = {}
        self._first: list[int] = []
        self._dims: list[list[int]] = []
        self._is_split = False
        for size in sizes:
            self._dims.append([self._new(size, len(self._first))] if size != 1 else [])

    def _new(self, size: int, position: int) -> int:
        factor = len(self._size)
        self._size[factor] = size
        self._first.insert(position, factor)
        return factor

    def permute(self, order: Sequence[int]) -> None:
        """Reorder dimensions."""
        self._dims = [self._dims[dim] for dim in order]

    def reshape(self, sizes: Sequence[int]) -> bool:
        """Divide the factors among other dimensions; return False if that does not work out."""
        left = [factor for dim in self._dims for factor in dim]
        if 0 in sizes or 0 in self._size.values():
            return False
        dims = []
        for size in sizes:
            dim = []
            while size != 1:
                factor = left.pop(0)
                if self._size[factor] % size == 0 and self._size[factor] != size:
                    left.insert(0, self._split(factor, size))
                if size % self._size[factor]:
                    return False
                size //= self._size[factor]
                dim.append(factor)
            dims.append(dim)
        self._dims = dims
        return True

    def _split(self, factor: int, size: int) -> int:
        """Split a factor into `size` and the rest; return the rest."""
        self._is_split = True
        rest = self._new(self._size[factor] // size, self._first.index(factor) + 1)
        self._size[factor] = size
        for dim in self._dims:
            if factor in dim:
                dim.insert(dim.index(factor) + 1, rest)
        return rest

    def _joins(self, before: int, factor: int) -> bool:
        """Whether a factor follows another from the first to the last value; the batch is apart."""
        follows = self._first.index(factor) == self._first.index(before) + 1
        batch = any(self._size[at] % _BATCH == 0 for at in (before, factor))
        return follows and self._is_split and not batch

    def shortest(self) -> tuple[list[int], list[int]]:
        """Return the fewest sizes into which to split the first value, and their order at last."""
        last = [factor for dim in self._dims for factor in dim]
        groups: list[list[int]] = []
        for factor in last:
            if groups and self._joins(groups[-1][-1], factor):
                groups[-1].append(factor)
            else:
                groups.append([factor])
        first = sorted(groups, key=lambda group: self._first.index(group[0]))
        sizes = [math.prod(self._size[factor] for factor in group) for group in first]
        return sizes, [first.index(group) for group in groups]

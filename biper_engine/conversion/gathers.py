"""Gathers: a new tensor that is written slice by slice with parts of one map becomes an index.

Circular padding is captured like this. Running the same operators on the positions of the map's
values shows which value goes where. Any order of such writes is either understood or left alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from biper_engine.graph.editing import constant_node, substitute
from biper_engine.graph.reading import is_call, shape

__all__ = ["index_written_maps"]

aten = torch.ops.aten

_WRITES = (aten.slice_scatter.default, aten.select_scatter.default)
_READS = (aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default)
_NEW = (
    *(aten.new_empty.default, aten.new_zeros.default, aten.empty.memory_format),
    *(aten.zeros.default, aten.empty_like.default, aten.zeros_like.default),
)
_NOWHERE = -1


def index_written_maps(graph_module: fx.GraphModule) -> None:
    """Rewrite `graph_module` in place; see the module."""
    for node in list(graph_module.graph.nodes):
        if not is_call(node, *_WRITES) or any(is_call(user, *_WRITES) for user in node.users):
            continue
        chain, source = _chain(node)
        if source is None or len(shape(source)) != len(shape(node)):
            continue
        indices = _indices(chain, source, node)
        if indices is not None:
            _index(graph_module, node, source, indices)


def _chain(last: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Return the reads and writes that make a value, in order, and the one map that they read."""
    members: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    left = [last]
    while left:
        node = left.pop()
        if node in members or is_call(node, aten.sym_size.int):
            continue
        if is_call(node, *_NEW):
            members.add(node)
        elif is_call(node, *_WRITES, *_READS):
            members.add(node)
            left += node.all_input_nodes
        else:
            sources.add(node)
    # A read of the map before any write also belongs to them.
    chain = [node for node in last.graph.nodes if node in members]
    return chain, sources.pop() if len(sources) == 1 else None


def _one(size: Any) -> Any:
    """Return a size for a batch of 1."""
    return size if isinstance(size, int) else 1


def _indices(chain: list[fx.Node], source: fx.Node, last: fx.Node) -> list[Tensor] | None:
    """Return the index into the source for each dimension after the batch, or None."""
    sizes = [_one(size) for size in shape(source)]
    if sizes[0] != 1 or not all(isinstance(size, int) for size in shape(source)[1:]):
        return None
    values: dict[fx.Node, Any] = {source: torch.arange(math.prod(sizes)).reshape(sizes)}

    def look_up(leaf: Any) -> Any:
        return values.get(leaf, 1) if isinstance(leaf, fx.Node) else leaf

    for node in chain:
        if is_call(node, *_NEW):
            values[node] = torch.full([_one(size) for size in shape(node)], _NOWHERE)
        else:
            args, kwargs = pytree.tree_map(look_up, (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return _by_dimension(values[last], sizes)


def _by_dimension(positions: Tensor, sizes: list[int]) -> list[Tensor] | None:
    """Split positions into one index per dimension, if each depends only on its own dimension."""
    if positions.shape[0] != 1 or not positions.numel() or bool((positions == _NOWHERE).any()):
        return None
    found = []
    coordinates = torch.unravel_index(positions, sizes)
    for dim, coordinate in enumerate(coordinates):
        layout = [-1 if other == dim else 1 for other in range(positions.dim())]
        index = coordinate.movedim(dim, 0).flatten(1)[:, 0]
        if not torch.equal(coordinate, index.reshape(layout).expand_as(coordinate)):
            return None
        found.append(index)
    return found[1:]


def _index(
    graph_module: fx.GraphModule, node: fx.Node, source: fx.Node, indices: list[Tensor]
) -> None:
    """Replace a value by one `index_select` for each dimension that changes."""
    value = source
    for dim, index in enumerate(indices, start=1):
        if torch.equal(index, torch.arange(int(shape(source)[dim]))):
            continue
        held = constant_node(graph_module, node, index.contiguous())
        sizes = [*shape(value)]
        sizes[dim] = len(index)
        with graph_module.graph.inserting_before(node):
            new = graph_module.graph.call_function(aten.index_select.default, (value, dim, held))
        new.meta = {"val": source.meta["val"].new_empty(sizes)}
        value = new
    if value is not source:
        value.meta = dict(node.meta)
    substitute(node, value)

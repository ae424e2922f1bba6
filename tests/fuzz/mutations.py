"""Mutations of files: of their graph, their tensors, their other entries and their bytes.

Each takes a random generator, a header and its tensors, and changes them in place. A mutation that
does not apply changes nothing.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biper_engine.graph import DTYPES, OPERATORS, ImagesSize
from tests.graph.calls import CALLS, Flowing

Header = dict[str, Any]
Tensors = dict[str, Tensor]
Mutation = Callable[[random.Random, Header, Tensors], None]

INTEGERS = (
    *range(-3, 10),
    *(16, 31, 32, 33, 61, 63, 64, 65, 127, 255, 256, 1000, 4096, 65535, 65536, 1 << 20),
    *((1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32, 1 << 40, 1 << 62),
    *((1 << 63) - 1, -(1 << 63), 1 << 63, 1 << 80, 10**400),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 3.5, 1e-45, 1e38, 1e39, -1e39, 1e308, 1e-308)
STRINGS = (
    *("", "*", "x", "float32", "int8", "none", "tanh", "é", "\u0000", "a b", "__class__", "self"),
    *(
        "print",
        "forward",
        "graph_module",
        "..",
        "a.b",
        "\ud800",
        "reference",
        "x" * 3000,
        "_modules",
    ),
    *("training", "proof/output/0", "a'b", "a." * 400 + "b", "class", "0", "nan"),
)
_INAPPLICABLE = (
    *(AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError),
)
NAMED_FLOATS = ("nan", "inf", "-inf")


def value(r: random.Random, header: Header, depth: int = 0) -> Any:
    """Return any JSON value."""
    kind = r.random()
    if kind < 0.4:
        return r.choice(INTEGERS)
    if kind < 0.5:
        return r.choice(FLOATS)
    if kind < 0.55:
        return r.choice((None, True, False))
    if kind < 0.6:
        return r.choice(STRINGS)
    if kind < 0.7:
        return {"node": r.choice(node_names(header["graph"]))}
    if kind < 0.75:
        return {"dtype": r.choice(list(DTYPES))}
    if kind < 0.78:
        return {"float": r.choice(NAMED_FLOATS)}
    if kind < 0.8:
        return {"layout": r.choice(("contiguous", "channels_last", "preserve", "x"))}
    if depth < 3:
        return [value(r, header, depth + 1) for _ in range(r.randint(0, 4))]
    return r.randint(-5, 70)


def node_names(graph: list[Any]) -> list[str]:
    found = [n.get("input") or n.get("name") for n in graph if isinstance(n, dict)]
    return [name for name in found if isinstance(name, str)] or ["x"]


def calls(header: Header) -> list[Any]:
    nodes = [n for n in header["graph"] if isinstance(n, dict) and isinstance(n.get("args"), dict)]
    return [n for n in nodes if isinstance(n.get("op"), str) and n["op"] in OPERATORS]


def leaves(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((*at, key))
        if isinstance(item, dict | list):
            found += leaves(item, (*at, key))
    return found


def holder(tree: Any, way: tuple[Any, ...]) -> Any:
    for step in way[:-1]:
        tree = tree[step]
    return tree


# -- the graph -------------------------------------------------------------------------------------


def any_leaf(r: random.Random, h: Header, t: Tensors) -> None:
    tree = r.choice((h, h["graph"], h["graph"]))
    way = r.choice(leaves(tree))
    holder(tree, way)[way[-1]] = value(r, h)


def integer(r: random.Random, h: Header, t: Tensors) -> None:
    ways = [w for w in leaves(h["graph"]) if type(holder(h["graph"], w)[w[-1]]) is int]
    way = r.choice(ways)
    place, old = holder(h["graph"], way), holder(h["graph"], way)[way[-1]]
    near = (old + 1, old - 1, -old, old * 2, 0, 1, old * 1000)
    place[way[-1]] = r.choice((*near, r.choice(INTEGERS)))


def geometry(r: random.Random, h: Header, t: Tensors) -> None:
    """Change windows and channels, often to what is small and looks right."""
    keys = (
        *("stride", "padding", "dilation", "groups", "kernel_size", "pool_kernel_size", "shape"),
        *("pool_stride", "pool_padding", "in_channels", "channels", "output_size", "dim", "dims"),
        *("size", "pad", "repeats", "start", "end", "step", "index", "output_padding"),
    )
    places = [(n, key) for n in calls(h) for key in keys if key in OPERATORS[n["op"]].arguments]
    for node, key in r.sample(places, min(len(places), r.randint(1, 3))):
        old = node["args"].get(key)
        if isinstance(old, list) or (old is None and "size" in key):
            length = len(old) if old and r.random() < 0.8 else r.randint(0, 4)
            node["args"][key] = [r.choice(INTEGERS[:13]) for _ in range(length)]
            if r.random() < 0.2 and length:
                node["args"][key][r.randrange(length)] = r.choice(INTEGERS)
        else:
            node["args"][key] = r.choice(INTEGERS[:20] if r.random() < 0.7 else INTEGERS)


def drop_argument(r: random.Random, h: Header, t: Tensors) -> None:
    node = r.choice([n for n in calls(h) if n["args"]])
    del node["args"][r.choice(list(node["args"]))]


def add_argument(r: random.Random, h: Header, t: Tensors) -> None:
    node = r.choice(calls(h))
    node["args"][r.choice(list(OPERATORS[node["op"]].arguments))] = value(r, h)


def other_operator(r: random.Random, h: Header, t: Tensors) -> None:
    node = r.choice(calls(h))
    node["op"] = r.choice(list(OPERATORS))
    known = OPERATORS[node["op"]].arguments
    node["args"] = {key: item for key, item in node["args"].items() if key in known}


def new_call(r: random.Random, h: Header, t: Tensors) -> None:
    """Insert a call that fits somewhere, and use or return its result."""
    name, arguments = r.choice(CALLS)
    at = r.randint(1, len(h["graph"]) - 1)
    names = node_names(h["graph"][:at])
    node = {
        "op": name,
        "name": f"new{r.randint(0, 999)}",
        "args": {key: _argument(r, item, names) for key, item in arguments.items()},
    }
    h["graph"].insert(at, node)
    later = [
        n for n in h["graph"][at + 1 :] if isinstance(n, dict) and isinstance(n.get("args"), dict)
    ]
    if later and r.random() < 0.6:
        taker = r.choice(later)
        keys = [k for k, v in taker["args"].items() if isinstance(v, dict) and "node" in v]
        if keys:
            taker["args"][r.choice(keys)] = {"node": node["name"]}
    else:
        outputs = h["graph"][-1]["output"]
        outputs[r.randrange(len(outputs))] = {"node": node["name"]}


def _argument(r: random.Random, item: Any, names: list[str]) -> Any:
    if isinstance(item, Flowing | Tensor | ImagesSize):
        return {"node": r.choice(names)}
    if isinstance(item, list):
        return [_argument(r, part, names) for part in item]
    if isinstance(item, torch.dtype):
        return {"dtype": str(item).removeprefix("torch.")}
    if isinstance(item, torch.memory_format):
        return {"layout": "contiguous"}
    return item if not isinstance(item, float) or math.isfinite(item) else {"float": str(item)}


def rewire(r: random.Random, h: Header, t: Tensors) -> None:
    way = r.choice([w for w in leaves(h["graph"]) if w[-1] in ("node", "of")])
    holder(h["graph"], way)[way[-1]] = r.choice(node_names(h["graph"]))


def nodes(r: random.Random, h: Header, t: Tensors) -> None:
    graph = h["graph"]
    i, j, kind = r.randrange(len(graph)), r.randrange(len(graph)), r.randint(0, 4)
    if kind == 0:
        graph[i], graph[j] = graph[j], graph[i]
    elif kind == 1:
        graph.insert(j, copy.deepcopy(graph[i]))
    elif kind == 2:
        del graph[i]
    elif kind == 3:
        graph[i]["name"] = r.choice((*STRINGS, *node_names(graph)))
    else:
        count = r.choice((0, 1, 1, 2, 3, 50))
        graph[-1]["output"] = [{"node": r.choice(node_names(graph))} for _ in range(count)]


# -- tensors ---------------------------------------------------------------------------------------


def swap_tensors(r: random.Random, h: Header, t: Tensors) -> None:
    a, b = r.sample([n for n in h["graph"] if isinstance(n, dict) and "tensor" in n], 2)
    a["tensor"], b["tensor"] = b["tensor"], r.choice((a["tensor"], b["tensor"]))


def tensor_values(r: random.Random, h: Header, t: Tensors) -> None:
    name = r.choice(list(t))
    flat = t[name].clone().flatten()
    new: Any = r.choice((0, -1, 2147483647, -2147483648, 1))
    if flat.is_floating_point():
        infinities = (float("nan"), float("inf"), -float("inf"))
        new = r.choice((*infinities, 0.0, -0.0, 1e38, -1e38, 1e-45, 1e20, 0.25, -3.0))
    elif flat.dtype == torch.bool:
        new = r.random() < 0.5
    some = range(flat.numel()) if r.random() < 0.5 else r.sample(range(flat.numel()), 1)
    flat[list(some)] = new
    t[name] = flat.reshape(t[name].shape)


def tensor_shape(r: random.Random, h: Header, t: Tensors) -> None:
    name = r.choice(list(t))
    x = t[name]
    t[name] = r.choice(
        (
            lambda: x[..., :-1].contiguous(),
            lambda: torch.cat([x, x], r.randrange(x.dim())),
            lambda: x.reshape(-1),
            lambda: x.transpose(0, -1).contiguous(),
            lambda: x.unsqueeze(r.randint(0, x.dim())),
            lambda: torch.zeros([r.randint(0, 4) for _ in range(r.randint(0, 5))], dtype=x.dtype),
        )
    )()


def tensor_dtype(r: random.Random, h: Header, t: Tensors) -> None:
    name = r.choice(list(t))
    t[name] = t[name].to(r.choice(list(DTYPES.values())))


def tensor_name(r: random.Random, h: Header, t: Tensors) -> None:
    name, new = r.choice(list(t)), r.choice(STRINGS)
    new.encode()  # safetensors has no surrogates
    t[new] = t.pop(name)
    for node in h["graph"]:
        if isinstance(node, dict) and node.get("tensor") == name:
            node["tensor"] = new


def more_tensors(r: random.Random, h: Header, t: Tensors) -> None:
    t[r.choice(("extra", "proof/output/7", "é"))] = torch.zeros(r.randint(0, 3))


# -- other entries ---------------------------------------------------------------------------------


def inputs(r: random.Random, h: Header, t: Tensors) -> None:
    entries = h["signature"]["inputs"]
    entry, kind = r.choice(entries), r.randint(0, 4)
    if kind <= 1:
        entry["shape"][r.randrange(len(entry["shape"]))] = r.choice((*INTEGERS, None))
    elif kind == 2:
        entry["dtype"] = r.choice((*DTYPES, "float8", 7))
    elif kind == 3:
        entries.append(copy.deepcopy(entry))
    else:
        entries.remove(entry)


def forms(r: random.Random, h: Header, t: Tensors) -> None:
    leaf: Any = "*"
    h["signature"][r.choice(("in", "out"))] = r.choice(
        (
            *(leaf, {"list": [leaf]}, {"tuple": [leaf, leaf]}, {"tuple": []}, {"set": [leaf]}),
            *({"dict": [["a", leaf]]}, {"dict": [["a", leaf], ["a", leaf]]}, {"dict": [[1, leaf]]}),
            {"ordered": [["a", leaf]]},
            {"namedtuple": {"name": r.choice(("Out", *STRINGS)), "fields": [["a", leaf]]}},
            {"namedtuple": {"name": "Out", "fields": [[r.choice(STRINGS), leaf]]}},
            {"tuple": [{"tuple": [leaf]}, {"dict": []}]},
            {"tuple": [{"tuple": []}, {"dict": [["x", leaf]]}]},
        )
    )


def nesting(r: random.Random, h: Header, t: Tensors) -> None:
    deep: Any = "*"
    for _ in range(r.choice((5, 30, 50, 400, 900))):
        deep = r.choice(([deep], {"a": deep}, {"tuple": [deep]}))
    key = r.choice(("options", "report", "metadata", "provenance", "proof", "signature", "graph"))
    if key == "signature":
        h["signature"]["out"] = deep
    elif key == "graph":
        node = r.choice(calls(h))
        node["args"][r.choice(list(OPERATORS[node["op"]].arguments))] = deep
    else:
        h[key] = {"a": deep}


def entry(r: random.Random, h: Header, t: Tensors) -> None:
    """Change something in the proof, the report, the metadata, the provenance or the options."""
    key = r.choice(("proof", "proof", "report", "metadata", "provenance", "options"))
    if not isinstance(h.get(key), dict) or not h[key]:
        h[key] = value(r, h)
        return
    way = r.choice(leaves(h[key]))
    holder(h[key], way)[way[-1]] = value(r, h)


# -- the native program ----------------------------------------------------------------------------


def program_value(r: random.Random, h: Header, t: Tensors) -> None:
    """Change something in the native program, mostly a number a little."""
    tree = h["program"]
    ways = leaves(tree)
    whole = [w for w in ways if type(holder(tree, w)[w[-1]]) is int]
    for way in r.sample(whole, min(len(whole), r.choice((1, 1, 2, 5)))):
        old = holder(tree, way)[way[-1]]
        near = (old + 1, old - 1, -old, old * 2, 0, 1, 2, 3, old + 32, r.choice(INTEGERS))
        holder(tree, way)[way[-1]] = r.choice(near)
    if r.random() < 0.3:
        way = r.choice(ways)
        holder(tree, way)[way[-1]] = value(r, h)


def program_steps(r: random.Random, h: Header, t: Tensors) -> None:
    """Move, copy or leave out steps, or let them swap kinds or arguments."""
    steps = h["program"]["steps"]
    i, j, kind = r.randrange(len(steps)), r.randrange(len(steps)), r.randint(0, 5)
    if kind == 0:
        steps[i], steps[j] = steps[j], steps[i]
    elif kind == 1:
        steps.insert(i, copy.deepcopy(steps[j]))
    elif kind == 2:
        del steps[i]
    elif kind == 3:
        steps[i]["step"] = steps[j]["step"]
    elif kind == 4:
        del steps[i]["args"][r.choice(list(steps[i]["args"]))]
    else:
        name = r.choice(list(steps[j]["args"]))
        steps[i]["args"][name] = copy.deepcopy(steps[j]["args"][name])


def program_tensors(r: random.Random, h: Header, t: Tensors) -> None:
    """Let steps read other tensors, other views of them, or other maps."""
    steps = [s for s in h["program"]["steps"] if "args" in s]
    named = [a for s in steps for a in s["args"].values() if isinstance(a, dict) and "tensor" in a]
    if named and r.random() < 0.7:
        chosen = r.choice(named)
        if r.random() < 0.5:
            chosen["tensor"] = r.choice(list(t))
        else:
            rank = r.randint(1, 4)
            chosen["sizes"] = [r.choice((1, 2, 3, 32, 64, 1 << 31)) for _ in range(rank)]
            chosen["strides"] = [r.choice((0, 1, 2, 9, 64, -1)) for _ in range(rank)]
            chosen["offset"] = r.choice((0, 0, 1, 5, -1, 1 << 40))
    forms = [*h["program"]["inputs"], *h["program"]["outputs"]]
    form = r.choice(forms)
    key = r.choice(list(form))
    old = form[key]
    if key == "sizes":
        form[key] = r.choice((old[::-1], [1, *old], old[1:], [*old, 1], [2, *old[1:]]))
    else:
        form[key] = not old if isinstance(old, bool) else r.choice(INTEGERS[:12])


_PROGRAM_MUTATIONS = (program_value, program_value, program_steps, program_tensors)
_FILE_MUTATIONS = (tensor_values, tensor_shape, tensor_dtype, inputs)


def mutate_program(r: random.Random, header: Header, tensors: Tensors) -> None:
    """Change a file's native program, and sometimes the tensors that it reads."""
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        other = r.random() < 0.15
        mutation = r.choice(_FILE_MUTATIONS if other else _PROGRAM_MUTATIONS)
        try:
            mutation(r, header, tensors)
        except _INAPPLICABLE:
            continue


# -- all -------------------------------------------------------------------------------------------

MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    *((any_leaf, 8), (integer, 10), (geometry, 18), (drop_argument, 4), (add_argument, 8)),
    *((other_operator, 8), (new_call, 16), (rewire, 9), (nodes, 5), (swap_tensors, 5)),
    *((tensor_values, 9), (tensor_shape, 6), (tensor_dtype, 4), (tensor_name, 3)),
    *((more_tensors, 1), (inputs, 6), (forms, 3), (nesting, 2), (entry, 5)),
)


def mutate(r: random.Random, header: Header, tensors: Tensors) -> list[str]:
    """Apply one to three mutations; return their names."""
    names = []
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        mutation = r.choices([m for m, _ in MUTATIONS], [weight for _, weight in MUTATIONS])[0]
        names.append(mutation.__name__)
        try:
            mutation(r, header, tensors)
        except _INAPPLICABLE:
            continue  # nothing in this file to change so, perhaps after what came before
    return names

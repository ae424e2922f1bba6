"""Find a network's tensors in the contents of a checkpoint file, whatever is around them.

Training scripts put a state dict under various entries ("state_dict", "model", "ema", ...),
and wrappers put a prefix before its names ("module.", "model.", "_orig_mod.", ...). The search uses
none of these words: the network's own names show which dict and which prefix are meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biper_engine.errors import CheckpointError

__all__ = ["Candidate", "candidates", "check_dense", "is_foreign_spare", "listing", "the_one"]

# Modules that PyTorch's wrappers put between others; their names occur anywhere.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that profilers leave in a module; the module does not compute with them.
_SPARE = ("total_ops", "total_params")
_MOST_DEPTH = 6


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Tensors of a file that may belong to a network.

    Attributes:
        where: their name in messages; empty for the file as a whole.
        keys: entries of the file that lead to them.
        found: how many of the network's names are among them.
        state: the tensors by the network's names; unknown ones by their names in the file.
    """

    where: str
    keys: tuple[str, ...] = ()
    found: int
    state: dict[str, Tensor]


def candidates(contents: Mapping[Any, Any], names: Collection[str]) -> list[Candidate]:
    """Return what may be the tensors of `names`; those with most of the names come first.

    Args:
        contents: the contents of a file.
        names: the names in a network's state dict.
    """
    wanted = _by_plain_name(names)
    ways = [wanted]
    shared = _common_prefix(wanted)
    if shared:  # the network itself is wrapped, and the file may not be
        ways.append({plain.removeprefix(shared): name for plain, name in wanted.items()})
    found: list[Candidate] = []
    for place, tensors in _dicts_of_tensors(contents):
        own, plain = {name: name for name in tensors}, _by_plain_name(tensors)
        for way in ways:
            for keys in (own,) if plain == own else (own, plain):
                found.extend(_with_prefixes(place, tensors, keys, way))
    return sorted(found, key=lambda candidate: -candidate.found)


def the_one(path: str, fitting: list[Candidate], names: Collection[str]) -> Candidate:
    """Return the candidate that fits; if several fit, they must be equal.

    Raises:
        CheckpointError: they are different networks.
    """
    first = fitting[0]
    for other in fitting[1:]:
        if not all(
            name not in first.state
            or name not in other.state
            or torch.equal(first.state[name], other.state[name])
            for name in names
        ):
            raise CheckpointError(
                f"'{path}' holds two networks that fit: {first.where or 'its own entries'}, and "
                f"{other.where or 'its own entries'}. Save the one that you want separately: "
                f"{_saving(path, first if first.keys else other)}."
            )
    return first


def _saving(path: str, one: Candidate) -> str:
    if not one.keys:
        return "put its entries into a dict of their own, and write that with `torch.save`"
    entry = "".join(f"[{key!r}]" for key in one.keys)
    return f"`torch.save(torch.load({path!r}){entry}, 'weights.pt')`"


def check_dense(path: str, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not stored as in training.

    Raises:
        CheckpointError: an entry is sparse, quantized, complex, or without data.
    """
    for key, entry in state.items():
        odd = entry.layout != torch.strided or entry.is_quantized or entry.is_complex()
        if odd or entry.is_meta:
            kind = "without data" if entry.is_meta else f"{entry.dtype}, {entry.layout}"
            raise CheckpointError(
                f"'{path}': entry '{key}' is {kind}; wanted a dense tensor of real numbers. Only "
                "latent weights, as training stores them, can be read."
            )


def is_foreign_spare(name: str) -> bool:
    """Whether a profiler left an entry, which no network needs."""
    return name.rpartition(".")[2] in _SPARE


def listing(differences: list[str]) -> str:
    """Join the first differences into the end of a sentence."""
    shown = "; ".join(differences[:3])
    rest = len(differences) - 3
    return f"{shown}; and {rest} more." if rest > 0 else f"{shown}."


def _dicts_of_tensors(
    contents: Mapping[Any, Any],
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield (keys that lead to it, its tensors) for every dict, and all tensors as one tree."""
    tree: dict[str, Tensor] = {}
    seen: set[int] = set()
    deep = False
    pending: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), contents)]
    while pending:
        place, entries = pending.pop(0)
        if id(entries) in seen:
            continue
        seen.add(id(entries))
        tensors = {key: value for key, value in entries.items() if _is_entry(key, value)}
        if tensors:
            yield place, tensors
        tree.update({".".join((*place, key)): value for key, value in tensors.items()})
        deep = deep or (bool(tensors) and len(place) > 1)
        if len(place) < _MOST_DEPTH:
            pending.extend(
                ((*place, str(key)), value)
                for key, value in entries.items()
                if isinstance(value, Mapping)
            )
    if deep:  # perhaps a dict for each module
        yield (), tree


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def _by_plain_name(names: Collection[str]) -> dict[str, str]:
    """Return names by their form without wrappers, or by themselves if that is ambiguous."""
    plain = {_plain(name): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _common_prefix(names: Collection[str]) -> str:
    first = {name.partition(".")[0] for name in names}
    return f"{first.pop()}." if len(first) == 1 and all("." in name for name in names) else ""


def _with_prefixes(
    place: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, str],
    wanted: Mapping[str, str],
) -> Iterator[Candidate]:
    """Yield a candidate for each prefix whose removal leaves names of the network.

    Args:
        place: keys that lead to the tensors.
        tensors: by the file's names.
        keys: those names, by the form that is compared.
        wanted: the network's names, by the form that is compared.
    """
    counts: Counter[str] = Counter({"": 0})
    for name in keys:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    likely = [prefix for prefix, count in counts.items() if 2 * count >= max(counts.values())]
    for prefix in likely:
        inside = {
            name.removeprefix(prefix): tensors[key]
            for name, key in keys.items()
            if name.startswith(prefix)
        }
        yield Candidate(
            where=_where(place, prefix),
            keys=place,
            found=counts[prefix],
            state={wanted.get(name, name): value for name, value in inside.items()},
        )


def _where(place: tuple[str, ...], prefix: str) -> str:
    parts = [f"'{key}'" for key in place] + ([f"'{prefix}*'"] if prefix else [])
    return f"what is under {' / '.join(parts)}" if parts else ""

"""Read and write training checkpoints: our own format and that of the official code.

Our format is a plain dict in a `torch.save` file, so that `torch.load(weights_only=True)` reads it:

    format       "biper_engine.checkpoint"
    version      0
    model        name for `build`
    num_classes  int
    frequency    float, or None for a network that is not BiPer's
    stage        1 or 2
    weight_binarizer  name for `build`; absent is "periodic", or the network's own
    state_dict   the official names and shapes
    metadata     dict of `Metadata`, or None
    config       dict of JSON values: how the network was trained; may be empty
    metrics      dict of JSON values: what was measured; may be empty

The official format is a dict with `state_dict` and `model`, or a bare state dict. Frequency and
stage are only in the `config.txt` that the official training script writes beside the file.
The module `official` writes this format.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from biper_engine.errors import CheckpointError
from biper_engine.files import write_atomically
from biper_engine.metadata import Metadata
from biper_engine.models.network import Network
from biper_engine.models.registry import architecture, available, build, state_dict_shapes
from biper_engine.models.state_dicts import (
    Candidate,
    candidates,
    check_dense,
    is_foreign_spare,
    listing,
    the_one,
)
from biper_engine.models.torch_file import CONFIG_NAME, read_config_txt, read_torch_file
from biper_engine.nn import binary_layers
from biper_engine.nn.binarizers import WEIGHT_BINARIZERS

__all__ = [
    "common_binarizer",
    "common_settings",
    "load_checkpoint",
    "network_name",
    "save_checkpoint",
]

_T = TypeVar("_T", float, int)

_FORMAT = "biper_engine.checkpoint"
_VERSION = 0
_short = reprlib.repr  # a file's values may be long, or nested without end
# Entries that do not change what is computed: a file may lack them, or have more of them.
_OPTIONAL = ("beta", "tau", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """What a file says, before it is compared with what the caller says.

    `raw` has the network's tensors somewhere. `model`, `frequency` and `stage` are None if the file
    does not say them; `source` names the origin of the latter two.
    """

    path: str
    raw: Mapping[Any, Any]
    model: str | None = None
    frequency: float | None = None
    stage: int | None = None
    source: str = "the file"
    metadata: Metadata | None = None
    weight_binarizer: str | None = None
    own: bool = False


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    frequency: float | None = None,
    stage: int | None = None,
) -> Network:
    """Build the network that a training checkpoint holds, with its weights, in eval mode.

    Reads our own files and those of the official repository: bare state dicts, or nested in dicts
    under any keys, with or without a prefix such as `module.`; `tau` of shape [] or [1]; with or
    without `beta`. Other entries, such as an optimizer's, are ignored. A file with two different
    networks that fit, such as a second one of averaged weights, is refused. Only tensors and plain
    values are ever unpickled, and a file that declares more bytes than it has is not read.

    Args:
        path: the checkpoint file.
        arch: one of `models.available()`; None takes it from the file's `model` entry, the `model:`
            line of a `config.txt` beside it, and the shapes.
        frequency: w0 that a network of BiPer was trained with. Required if neither the file nor the
            `freq:` line of a `config.txt` beside it has it; otherwise it must agree with them.
        stage: 1 or 2. Required if neither the file nor the `stage2:` line of `config.txt` has it
            and both stages of its training write such files; otherwise it must agree with them.

    Returns:
        Network on the CPU in float32. `metadata` comes from the file. For an official checkpoint
        with the classes of the task in the network's name, it is the metadata of that task.

    Raises:
        CheckpointError: the file is missing, truncated or not a checkpoint; frequency or stage is
            missing or contradictory; the shapes fit another network (the message names the
            first entries that differ) or several.
        ValueError: `arch` is unknown.
    """
    contents = _read(os.fspath(path))
    name, held = _choose_architecture(contents, arch)
    check_dense(contents.path, held)
    settings = _settings(contents, name, frequency, stage)
    try:
        with torch.random.fork_rng(devices=()):  # random weights are drawn, then replaced
            network = build(name, num_classes=_num_classes(held, name), **settings)
    except ValueError as error:
        raise CheckpointError(f"'{contents.path}': {error}") from error
    state = {}
    for key, value in network.state_dict().items():
        optional = key.rpartition(".")[2] in _OPTIONAL
        stored = held.get(key, value) if optional else held[key]
        state[key] = stored.reshape(value.shape) if optional else stored
    network.load_state_dict(state)
    _check_stage(contents, network, settings["stage"])
    network.metadata = contents.metadata
    if not contents.own and _num_classes(state, name) == architecture(name).num_classes:
        network.metadata = architecture(name).metadata
    return network.eval()


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a network from `build` to a file that `load_checkpoint` reads.

    The file is written completely or not at all.

    Args:
        path: file to write; an existing one is replaced.
        model: a network from `models.build` or `load_checkpoint`, on any device.
        config: JSON values that describe the training.
        metrics: JSON values that were measured.

    Raises:
        ValueError: `model` is not from `build`, or its layers differ in frequency or stage.
        TypeError: `config` or `metrics` holds a value that JSON cannot store.
    """
    name = network_name(model)
    frequency, stage = common_settings(model)
    binarizer = common_binarizer(model)
    metadata = getattr(model, "metadata", None)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    contents = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": name,
        "num_classes": _num_classes(state, name),
        "frequency": frequency,
        "stage": stage,
        **({} if binarizer in (None, "periodic") else {"weight_binarizer": binarizer}),
        "state_dict": state,
        "metadata": None if metadata is None else metadata.to_dict(),
        "config": json.loads(json.dumps(dict(config or {}))),
        "metrics": json.loads(json.dumps(dict(metrics or {}))),
    }
    write_atomically(path, lambda file: torch.save(contents, file))


def _read(path: str) -> _Contents:
    raw = read_torch_file(path)
    if "pytorch-lightning_version" in raw and "biper_config" in raw:
        raise CheckpointError(
            f"'{path}' is the state of a training run, from which it resumes. Pass the stage1.pt "
            "or stage2.pt that training wrote when the stage was finished."
        )
    if raw.get("format") == _FORMAT:
        return _read_own(path, raw)
    model = raw.get("model")
    contents = _Contents(path=path, raw=raw, model=model if isinstance(model, str) else None)
    config = read_config_txt(Path(path).with_name(CONFIG_NAME))
    if config is None:
        return contents
    if None not in (contents.model, config.model) and contents.model != config.model:
        raise CheckpointError(
            f"'{path}' holds a network '{contents.model}', but '{config.path}' describes the "
            f"training of '{config.model}'. Put the config.txt of its own training beside it."
        )
    return replace(
        contents,
        model=contents.model or config.model,
        frequency=config.frequency,
        stage=config.stage,
        source=f"'{config.path}'",
    )


def _read_own(path: str, raw: Mapping[str, Any]) -> _Contents:
    version = raw.get("version")
    if version != _VERSION:
        raise CheckpointError(
            f"'{path}' has checkpoint version {_short(version)}; this biper_engine reads "
            f"{_VERSION}. Load it with the version that wrote it, or train again."
        )
    _require(path, raw, "model", str)
    if raw["model"] not in available():
        raise CheckpointError(
            f"'{path}' holds a network that this biper_engine does not know: "
            f"{_short(raw['model'])}. Known: {', '.join(available())}."
        )
    _require(path, raw, "stage", int)
    if architecture(raw["model"]).frequency is not None:
        _require(path, raw, "frequency", float)
    return _Contents(
        path=path,
        raw=_state_dict(path, raw.get("state_dict")),
        model=raw["model"],
        frequency=raw.get("frequency"),
        stage=raw["stage"],
        metadata=_metadata(path, raw.get("metadata")),
        weight_binarizer=_binarizer(path, raw.get("weight_binarizer")),
        own=True,
    )


def _binarizer(path: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in WEIGHT_BINARIZERS):
        return value
    raise CheckpointError(
        f"'{path}' has the weight binarizer {_short(value)}, which is unknown here. Known: "
        f"{', '.join(WEIGHT_BINARIZERS)}."
    )


def _require(path: str, raw: Mapping[str, Any], key: str, kind: type) -> None:
    if not isinstance(raw.get(key), kind):
        raise CheckpointError(
            f"'{path}': entry '{key}' is {_short(raw.get(key))}, wanted {kind.__name__}. "
            "The file was edited or written by something else."
        )


def _metadata(path: str, value: Any) -> Metadata | None:
    if value is None:
        return None
    try:
        return Metadata.from_dict(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{path}': entry 'metadata' is invalid: {error}") from error


def _state_dict(path: str, value: Any) -> dict[str, Tensor]:
    """Check that an entry in our own format is a state dict."""
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"'{path}' has no state dict: found {type(value).__name__}.")
    for key, entry in value.items():
        if not isinstance(key, str) or not isinstance(entry, Tensor):
            raise CheckpointError(
                f"'{path}' has no state dict: entry {_short(key)} is {type(entry).__name__}, "
                "wanted a tensor. The file was edited or written by something else."
            )
    check_dense(path, value)
    return dict(value)


def _choose_architecture(contents: _Contents, arch: str | None) -> tuple[str, dict[str, Tensor]]:
    """Return the network that a file holds, and its tensors by the network's names."""
    if arch is not None:
        architecture(arch)
        names = [arch]
    else:
        named = [name for name in available() if contents.model in (name, name.split("/")[1])]
        names = named or list(available())
    held = {name: candidates(contents.raw, state_dict_shapes(name, 1)) for name in names}
    if not any(held.values()):
        keys = ", ".join(_short(key) for key in list(contents.raw)[:5])
        raise CheckpointError(
            f"'{contents.path}' has no state dict: there is no tensor in it, only "
            f"{keys or 'an empty dict'}. Save model.state_dict() with torch.save."
        )
    fitting = {
        name: [one for one in held[name] if not _differences(one.state, name)] for name in names
    }
    matching = [name for name in names if fitting[name]]
    if len(matching) > 1:  # they differ only in entries that a file may lack, or in no shape
        with_beta = [name for name in matching if _has_beta(fitting[name][0].state, name)]
        matching = with_beta or matching
    if len(matching) > 1:
        raise CheckpointError(
            f"'{contents.path}' fits {' and '.join(matching)} and does not say which one it is. "
            f"Pass arch='{matching[0]}' or the other."
        )
    if not matching:
        raise _no_match(contents, held)
    (name,) = matching
    covering = [one for one in held[name] if _covers(one.state, name)]
    one = the_one(contents.path, covering, state_dict_shapes(name, 1))
    return name, one.state if one in fitting[name] else fitting[name][0].state


def _no_match(contents: _Contents, held: Mapping[str, list[Candidate]]) -> CheckpointError:
    """Describe the candidate that is closest to a network."""
    name = max(held, key=lambda name: held[name][0].found)
    nearest = held[name][0]
    differences = listing(_differences(nearest.state, name))
    said = f" (the file itself says '{contents.model}')" if contents.model else ""
    place = f", by {nearest.where}" if nearest.where else ""
    if len(held) > 1:
        return CheckpointError(
            f"'{contents.path}' fits no known network{said}. For a network of your own, pass its "
            f"code and this file: biper convert mynet.py:build --weights {contents.path}. The "
            f"nearest known one is {name}{place}: {differences}"
        )
    return CheckpointError(
        f"'{contents.path}' is not a checkpoint of {name}{said}{place}: {differences}"
    )


def _covers(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether `state` has everything that the network needs, whatever else is in it."""
    return all(found.endswith(" is unknown") for found in _differences(state, name))


def _num_classes(state: Mapping[str, Tensor], name: str) -> int:
    weight = state.get(f"{architecture(name).classifier}.weight")
    if weight is None or weight.dim() != 2 or len(weight) == 0:
        return architecture(name).num_classes
    return len(weight)


def _differences(state: Mapping[str, Tensor], name: str) -> list[str]:
    """Describe each entry of `state` that network `name` would not accept, in network order."""
    wanted = state_dict_shapes(name, _num_classes(state, name))
    found = []
    for key, shape in wanted.items():
        last = key.rpartition(".")[2]
        if key not in state:
            if last not in _OPTIONAL:
                found.append(f"{key} is missing")
        elif state[key].shape != shape and not (last == "tau" and state[key].numel() == 1):
            found.append(f"{key} is {list(state[key].shape)}, wanted {list(shape)}")
    unknown = [key for key in state if key not in wanted and not _is_spare(key, wanted)]
    return found + [f"{key} is unknown" for key in unknown]


def _is_spare(key: str, wanted: Mapping[str, torch.Size]) -> bool:
    """Whether the network is complete without `key`: an optional entry of a binary layer."""
    owner, _, last = key.rpartition(".")
    return is_foreign_spare(key) or (last in _OPTIONAL and f"{owner}.tau" in wanted)


def _has_beta(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether both the file and the network have `beta` entries."""
    shapes = state_dict_shapes(name, _num_classes(state, name))
    return any(key.endswith(".beta") and key in state for key in shapes)


def _settings(
    contents: _Contents, name: str, frequency: float | None, stage: int | None
) -> dict[str, Any]:
    """Return frequency and stage for `build`, on which file and caller agree."""
    entry = architecture(name)
    if stage is None and contents.stage is None:
        stage = entry.published_stage
    settings: dict[str, Any] = {"stage": _agree("stage", contents.stage, stage, contents)}
    if entry.frequency is not None:
        settings["frequency"] = _agree("frequency", contents.frequency, frequency, contents)
        settings["weight_binarizer"] = contents.weight_binarizer
    elif frequency is not None or contents.frequency is not None:
        raise CheckpointError(
            f"'{contents.path}' holds {name}, whose weights have no frequency, but one of "
            f"{contents.frequency if frequency is None else frequency} was given. Leave "
            "`frequency` out, or check that this is the right file."
        )
    return settings


def _check_stage(contents: _Contents, network: Network, stage: int) -> None:
    """Compare with what the loaded weights themselves say of their stage."""
    found = common_settings(network)[1]
    if found != stage:
        raise CheckpointError(
            f"'{contents.path}' is of stage {found} by the temperature of its weights, not of "
            f"stage {stage}. Pass stage={found}, or check that this is the right file."
        )


def _agree(what: str, stored: _T | None, given: _T | None, file: _Contents) -> _T:
    """Return the one value that file and caller agree on."""
    if stored is not None and given is not None and stored != given:
        raise CheckpointError(
            f"'{file.path}': `{what}` (={given}) contradicts {file.source}, which says {stored}. "
            f"Leave `{what}` out, or check that this is the right file."
        )
    value = stored if stored is not None else given
    if value is not None:
        return value
    advice = {
        "frequency": "Pass frequency=20.0 if it was trained with the value of the official scripts "
        "(their evaluation default of 30 is wrong for it)",
        "stage": "Pass stage=2 for binary weights (BiPer: sign(sin(w))) or stage=1 for real ones "
        "(BiPer: sin(w))",
    }[what]
    raise CheckpointError(
        f"'{file.path}' does not say its {what}, and neither does a config.txt beside it. "
        f"{advice}, or put the config.txt of its training beside it."
    )


def network_name(model: nn.Module) -> str:
    """Return the registry's name of a network.

    Raises:
        ValueError: `models.build` did not make it.
    """
    name = model.provenance.architecture if isinstance(model, Network) else None
    if name is None:
        raise ValueError(
            f"`model` is a {type(model).__name__} that biper_engine.models.build did not make, so "
            "its architecture has no name. Save it with torch.save(model.state_dict())."
        )
    return name


def common_settings(model: nn.Module) -> tuple[float | None, int]:
    """Return frequency, or None if there is none, and stage of all binary layers.

    A float network of `models.build` has the stage with which it was built.

    Raises:
        ValueError: they differ, or there is no binary layer and no such stage.
    """
    layers = (layer for _, layer in binary_layers(model))
    settings = {(getattr(layer, "frequency", None), layer.stage) for layer in layers}
    if not settings and isinstance(model, Network) and model.provenance.stage is not None:
        return None, model.provenance.stage
    if len(settings) != 1:
        raise ValueError(
            f"`model` mixes (frequency, stage) pairs: {sorted(settings)}; a checkpoint stores one."
        )
    return settings.pop()


def common_binarizer(model: nn.Module) -> str | None:
    """Return the weight binarizer of all layers of BiPer, or None if there is no such layer.

    Raises:
        ValueError: they differ.
    """
    layers = (layer for _, layer in binary_layers(model))
    found = {getattr(layer, "weight_binarizer", None) for layer in layers} or {None}
    if len(found) != 1:
        listing = ", ".join(sorted(map(str, found)))
        raise ValueError(f"`model` mixes weight binarizers: {listing}; a checkpoint stores one.")
    return found.pop()

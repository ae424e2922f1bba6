"""Find the model that a command names: a checkpoint file, `module:callable`, or a known name."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Arch",
    "Frequency",
    "InputShape",
    "ModelSource",
    "Stage",
    "Weights",
    "example_input",
    "find_model",
    "load_model",
    "load_weights",
    "random_network",
]

Arch = Annotated[
    str | None,
    typer.Option(help="Network of a checkpoint, where the file is silent.", show_default=False),
]
Frequency = Annotated[
    float | None,
    typer.Option(help="w0 it was trained with, where the file is silent.", show_default=False),
]
Stage = Annotated[
    int | None,
    typer.Option(
        help="Training stage, where the file is silent.", min=1, max=2, show_default=False
    ),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="N,C,H,W",
        help="Shape of the input; once for each of several.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="State dict for module:callable (.pt, .safetensors).", show_default=False),
]

_REFERENCE = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model as the command line names it.

    Attributes:
        text: path of a checkpoint, or `module:callable`.
        weights: state dict for a callable's network.
        arch, frequency, stage: as in `biper_engine.load_checkpoint`.
    """

    text: str
    weights: Path | None = None
    arch: str | None = None
    frequency: float | None = None
    stage: int | None = None

    @property
    def reference(self) -> tuple[str, str] | None:
        """Module and callable, or None for a checkpoint."""
        match = None if Path(self.text).exists() else _REFERENCE.fullmatch(self.text)
        return (match[1], match[2]) if match else None


def load_model(source: ModelSource) -> nn.Module:
    """Return the model that `source` names, in eval mode.

    Raises:
        CheckpointError: the checkpoint or the weights cannot be read, or do not fit.
        ValueError: `module:callable` does not lead to an `nn.Module`.
        typer.BadParameter: an option is for the other kind of source.
    """
    if source.reference is None:
        return _from_checkpoint(source)
    if source.arch is not None or source.frequency is not None or source.stage is not None:
        raise typer.BadParameter(
            "--arch, --frequency and --stage are for checkpoints; "
            f"'{source.text}' is a module:callable."
        )
    model = _from_reference(*source.reference)
    if source.weights is not None:
        load_weights(model, source.weights)
    return model.eval()


def find_model(source: ModelSource) -> nn.Module:
    """Return what `load_model` does, and for a network's name that network with random weights.

    Raises:
        CheckpointError, ValueError: as `load_model`; ValueError also for an unknown name.
        typer.BadParameter: an option is for another kind of source.
    """
    from biper_engine import models

    groups = {name.partition("/")[0] for name in models.available()}
    group, slash, _ = source.text.partition("/")
    if not slash or group not in groups or Path(source.text).exists():
        return load_model(source)
    if source != ModelSource(text=source.text):
        raise typer.BadParameter(
            "--arch, --frequency, --stage and --weights are for files; "
            f"'{source.text}' is a network's name."
        )
    return random_network(source.text)


def _from_checkpoint(source: ModelSource) -> nn.Module:
    from biper_engine import load_checkpoint

    path = Path(source.text)
    if source.weights is not None:
        raise typer.BadParameter(
            f"--weights is for module:callable, such as mynet:build; '{source.text}' is not one."
        )
    if path.suffix == ".biper":
        raise ValueError(
            f"'{path}' is a converted network, wanted what it was made from: a checkpoint or "
            f"module:callable. To check the file itself: biper verify {path}"
        )
    return load_checkpoint(path, arch=source.arch, frequency=source.frequency, stage=source.stage)


def _from_reference(module_name: str, attribute: str) -> nn.Module:
    from torch import nn

    text = f"{module_name}:{attribute}"
    target: Any = _import(module_name)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(f"'{text}': module {module_name} has no '{attribute}'.")
        target = getattr(target, name)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ValueError(
            f"'{text}' is a {type(target).__name__}, wanted a callable without required "
            "arguments that returns an nn.Module."
        )
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise ValueError(
            f"'{text}' cannot be called without arguments: {error}. "
            "Write a function that calls it and name that one."
        ) from error
    model = target()
    if not isinstance(model, nn.Module):
        raise ValueError(f"'{text}' returned a {type(model).__name__}, wanted an nn.Module.")
    return model


def _import(name: str) -> Any:
    """Import a module, also from the current directory, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"No module '{name}' in '{here}' or among the installed packages. "
                "Run biper where the file is, or pass the path of a checkpoint."
            ) from error
        raise
    finally:
        sys.path.remove(here)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, every name and shape of it, unpickling only tensors.

    Raises:
        CheckpointError: the file is unreadable, or its names or shapes are not the model's.
    """
    from torch import Tensor

    entries = _read_weights(path)
    state = entries.get("state_dict", entries)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"'{path}' has no state dict. Wanted a dict of tensors, or a dict with one under "
            "'state_dict'."
        )
    state = dict(state)
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"'{path}' does not fit {type(model).__name__}: {error}") from error


def _read_weights(path: Path) -> dict[Any, Any]:
    if path.suffix != ".safetensors":
        from biper_engine.models.torch_file import read_torch_file

        return read_torch_file(str(path))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read weights '{path}': {error}.") from error


def random_network(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return a network of the registry as if it were trained: seeded weights and statistics.

    A fresh network has BatchNorm biases of 0, and so exact zeros before its signs, which no trained
    network has. Speed does not depend on the values.

    Raises:
        ValueError: unknown name.
    """
    import torch
    from torch import nn

    from biper_engine import models

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = models.build(name, num_classes=num_classes).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return network


def example_input(model: nn.Module, shapes: Sequence[str] | None) -> Tensor | tuple[Tensor, ...]:
    """Return the input to convert with: seeded random values, their sizes from `--input`.

    Args:
        model: its `input_shape` is used where there are no shapes.
        shapes: one for each argument, sizes with commas, the batch first.

    Returns:
        A tensor, or a tuple of them where there are several shapes.

    Raises:
        typer.BadParameter: shapes are missing or malformed.
    """
    import torch

    if shapes:
        sizes = [_sizes(shape) for shape in shapes]
    else:
        own = getattr(model, "input_shape", None)
        if own is None:
            raise typer.BadParameter(
                f"{type(model).__name__} does not say which input it takes. "
                "Pass its shape, such as --input 1,3,224,224."
            )
        sizes = [[2, *own]]
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(size, generator=generator) for size in sizes)
    return tensors[0] if len(tensors) == 1 else tensors


def _sizes(shape: str) -> list[int]:
    parts = [part.strip() for part in shape.split(",")]
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"--input (={shape!r}) must be sizes with commas, such as 1,3,224,224."
        )
    return [int(part) for part in parts]

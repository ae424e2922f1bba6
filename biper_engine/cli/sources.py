"""Load the model that a command names: a checkpoint file, `module:callable`, or a known name.

A name is that of a trained network that comes with the package, or of one with random weights.

The module may also be a file, as in `mynet.py:build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine import references
from biper_engine.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "Arch",
    "Backend",
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
    typer.Option(metavar="NAME", help="Network, if the file lacks it.", show_default=False),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Only cuda, triton, cpu or reference; see biper backends.",
        show_default=False,
    ),
]
Frequency = Annotated[
    float | None,
    typer.Option(metavar="W0", help="w0, if the file lacks it.", show_default=False),
]
Stage = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Stage, if the file lacks it.", min=1, max=2, show_default=False
    ),
]
InputShape = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="N,C,H,W",
        help="Shape, once for each input.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="State dict for module:callable.", show_default=False),
]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model named on the command line.

    Attributes:
        text: path of a checkpoint, `module:callable`, or name of a trained network.
        weights: file with a state dict for the network of a callable.
        arch, frequency, stage: as in `biper_engine.load_checkpoint`.
    """

    text: str
    weights: Path | None = None
    arch: str | None = None
    frequency: float | None = None
    stage: int | None = None

    @property
    def reference(self) -> tuple[str, str] | None:
        """Module, or file of Python code, and callable; None for a checkpoint."""
        return None if Path(self.text).exists() else references.parsed(self.text)


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
    """Return the model as `load_model` does, or a network of this name with random weights.

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
    if not path.exists() and source == ModelSource(text=source.text):
        from biper_engine import models

        if source.text in models.shipped():
            return models.pretrained(source.text)
    if source.weights is not None:
        raise typer.BadParameter(
            f"--weights is for module:callable, such as mynet:build or mynet.py:build; "
            f"'{source.text}' is not one."
        )
    if path.suffix == ".py":
        raise ValueError(
            f"'{path}' is Python code, wanted also the function or the class in it that makes the "
            f"model, without arguments, as in {path}:build."
        )
    if path.suffix == ".biper":
        raise ValueError(
            f"'{path}' is a converted network, wanted the model it was made from: a checkpoint or "
            f"module:callable. To check the file itself: biper verify {path}"
        )
    return load_checkpoint(path, arch=source.arch, frequency=source.frequency, stage=source.stage)


def _from_reference(module_name: str, attribute: str) -> nn.Module:
    from torch import nn

    text = f"{module_name}:{attribute}"
    target = references.resolve(module_name, attribute)
    if isinstance(target, nn.Module):
        return target
    model = references.call(
        target, text, "an nn.Module", "and pass a checkpoint of it by --weights"
    )
    if not isinstance(model, nn.Module):
        raise ValueError(f"'{text}' returned a {type(model).__name__}, wanted an nn.Module.")
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, every name and shape of it, unpickling only tensors.

    Raises:
        CheckpointError: the file is unreadable, or its names or shapes are not the model's.
    """
    from torch import Tensor

    from biper_engine.models import state_dicts

    wanted = {k: v.shape for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    held = state_dicts.candidates(_read_weights(path), wanted)
    if not held:
        raise CheckpointError(
            f"'{path}' has no state dict: there is no tensor in it. Wanted a dict of tensors, or "
            "one in a dict, under any key."
        )
    covering = [one for one in held if _covers(one.state, wanted)]
    one = state_dicts.the_one(str(path), covering, wanted) if covering else held[0]
    state_dicts.check_dense(str(path), one.state)
    wrong = _weight_differences(one.state, wanted)
    if wrong:
        place = f", by {one.where}" if one.where else ""
        raise CheckpointError(
            f"'{path}' does not fit {type(model).__name__}{place}: {wrong}. "
            "Pass the weights of exactly this network."
        )
    try:
        model.load_state_dict({k: v for k, v in one.state.items() if k in wanted}, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"'{path}' does not fit {type(model).__name__}: {error}") from error


def _covers(state: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> bool:
    """Whether a state dict has all that a model needs; PyTorch adds BatchNorm's counters."""
    return all(
        state[key].shape == shape if key in state else key.endswith("num_batches_tracked")
        for key, shape in wanted.items()
    )


def _weight_differences(state: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> str:
    """Describe the entries that a model would not accept, in the model's order, or return ""."""
    from biper_engine.models.state_dicts import is_foreign_spare

    kinds = {
        "of another shape": [
            f"{key} ({list(state[key].shape)}, wanted {list(shape)})"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
        "missing": [
            key for key in wanted if key not in state and not key.endswith("num_batches_tracked")
        ],
        "unknown": [key for key in state if key not in wanted and not is_foreign_spare(key)],
    }
    parts = []
    for kind, keys in kinds.items():
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        if keys:
            parts.append(f"{kind} {'is' if len(keys) == 1 else 'are'} {', '.join(keys[:3])}{more}")
    return "; ".join(parts)


def _read_weights(path: Path) -> dict[Any, Any]:
    if path.suffix != ".safetensors":
        from biper_engine.models.torch_file import read_torch_file

        return read_torch_file(str(path))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from biper_engine.models.torch_file import require_file

    require_file(str(path))
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read weights '{path}': {error}.") from error


def random_network(name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return a network of the registry with seeded weights and statistics, as if trained.

    An untrained network has biases and shifts of 0, and therefore exact zeros before its signs,
    whose outputs cannot be told by one threshold. No trained network has these. Otherwise speed
    does not depend on the values.

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
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return network


def example_input(model: nn.Module, shapes: Sequence[str] | None) -> Tensor | tuple[Tensor, ...]:
    """Return the example input for conversion: seeded random values of the sizes in `--input`.

    Args:
        model: its `input_shape` is used if there are no shapes.
        shapes: one for each argument, sizes with commas, the batch first.

    Returns:
        A tensor, or a tuple of tensors if there are several shapes.

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
            f"--input (={shape!r}) must be sizes separated by commas, such as 1,3,224,224."
        )
    return [int(part) for part in parts]

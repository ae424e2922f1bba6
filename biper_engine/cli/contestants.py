"""The contestants of `biper bench`: an engine and its float network, checked to agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from biper_engine.cli.console import shown_warnings, status
from biper_engine.cli.sources import ModelSource, example_input, find_model, random_network
from biper_engine.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from biper_engine import Engine

__all__ = ["Contestants", "contestants", "random_images"]

_CHECKED_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Contestants:
    """An engine and a float network of the same layers.

    Attributes:
        engine: an engine that takes one tensor.
        model: the network in eval mode.
        checked: a line that says how their answers were compared.
    """

    engine: Engine
    model: nn.Module
    checked: str


def contestants(
    source: ModelSource, against: str | None, input_shape: Sequence[str] | None
) -> Contestants:
    """Load, convert and check the source of a command line; wrong answers are an error.

    Args:
        source: a `.biper` file, a checkpoint, `module:callable` or a network's name.
        against: the model of a `.biper` file; None takes the network that the file names, with
            random weights, and compares the engine with the reference backend instead.
        input_shape: the input shape, for a model that does not know it.

    Raises:
        ConversionError: the engine differs.
        typer.BadParameter: an option is for another kind of source, or `against` is needed.
    """
    import biper_engine

    path = Path(source.text)
    if path.suffix == ".biper":
        return _of_file(path, source, against, input_shape)
    if against is not None:
        raise typer.BadParameter("--against is for .biper files; other sources are the model.")
    with status("Loading the model"):
        model = find_model(source)
        example = example_input(model, input_shape)
    with status("Converting"), shown_warnings():
        engine = biper_engine.convert(model, example, check=False)
    return _checked_against(engine, model)


def _of_file(
    path: Path, source: ModelSource, against: str | None, input_shape: Sequence[str] | None
) -> Contestants:
    import biper_engine

    if input_shape:
        raise typer.BadParameter("--input is not for a .biper file, which knows its own.")
    if against is None and source != ModelSource(text=source.text):
        raise typer.BadParameter(
            "With a .biper file, --arch, --frequency, --stage and --weights are for --against."
        )
    with status("Loading"):
        engine = biper_engine.load(path)
    if against is None:
        return _beside_twin(engine, path)
    with status("Loading the model"):
        model = find_model(replace(source, text=against))
    return _checked_against(engine, model)


def _beside_twin(engine: Engine, path: Path) -> Contestants:
    """Check an engine against the reference; its rival has the same layers and random weights."""
    from biper_engine import models
    from biper_engine.serialization import check_backend

    architecture = engine.provenance.architecture if engine.provenance is not None else None
    if architecture not in models.available():
        raise typer.BadParameter(
            f"'{path}' does not say which known network it was made from, so there is no float "
            "network to compare with. Pass the model: --against CHECKPOINT, or module:callable."
        )
    with status("Comparing each operator with the reference"):
        report = check_backend(engine.network)
    if not report.ok:
        raise ConversionError(f"Nothing was timed: the engine differs.\n{report.table()}")
    classes = engine(random_images(engine, 1)).shape[1]
    return Contestants(
        engine=engine,
        model=random_network(architecture, num_classes=classes),
        checked=(
            f"{len(report.nodes)} of {len(report.nodes)} operators equal the reference. The float "
            f"network is {architecture} with random weights: the same work, different answers."
        ),
    )


def _checked_against(engine: Engine, model: nn.Module) -> Contestants:
    import biper_engine

    with status("Comparing with the model"):
        report = biper_engine.verify(engine, model, random_images(engine, _CHECKED_IMAGES))
    if not report.ok:
        raise ConversionError(f"Nothing was timed: the engine differs.\n{report.table()}")
    return Contestants(
        engine=engine,
        model=model,
        checked=(
            f"{report.layers_equal} of {report.layers} binary layers equal the float network's; "
            f"{report.differing_bits()} end to end."
        ),
    )


def random_images(engine: Engine, count: int) -> Tensor:
    """Return seeded images of the size that an engine takes.

    Raises:
        ValueError: the engine takes several tensors.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *engine.input_shape, generator=generator)

"""`biper train`: two stages in one command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import command_line, print_json, results, status

if TYPE_CHECKING:
    from biper_engine.training import TrainingConfig, TrainingResult

__all__ = ["fit_quietly", "train"]


def train(
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, a folder with a folder "
            "for each class, Parquet, WebDataset, hub:name, or module:callable."
        ),
    ] = "digits",
    data_dir: Annotated[
        str | None, typer.Option(help="Where that data set's files are.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="Network.")] = "cifar10/resnet20_1w1a",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for checkpoints and logs.")
    ] = Path("biper-train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in that directory.")
    ] = False,
    stage1_epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of stage 1.", show_default=False)
    ] = None,
    stage2_epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of stage 2.", show_default=False)
    ] = None,
    frequency: Annotated[
        float | None, typer.Option(help="w0 of sin(w0*w), BiPer.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images per step.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default=False)] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="32-true, bf16-mixed, ... (Lightning's names).", show_default=False),
    ] = None,
    hold_out: Annotated[
        bool, typer.Option("--hold-out", help="Measure on held-out training images.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu or auto.")] = "auto",
    devices: Annotated[str, typer.Option(help="How many devices, or auto.")] = "auto",
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard logs, too.")
    ] = False,
    export_official: Annotated[
        bool,
        typer.Option("--export-official", help="Write checkpoints for the official code, too."),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Train a binary network in two stages; interrupted runs can be resumed.

    [bold]Examples[/bold]
    biper train
    biper train --resume --output biper-train
    biper train --model cifar10/vgg_small_1w1a -o vgg --stage1-epochs 20
    biper train --resume --export-official
    """
    from biper_engine import training
    from biper_engine.models.registry import architecture
    from biper_engine.training import RunOptions, TrainingConfig

    if frequency is not None and architecture(model).frequency is None:
        raise typer.BadParameter(
            f"--frequency is for the networks of BiPer; {model} has none. Leave it out."
        )
    if export_official and architecture(model).frequency is None:
        raise typer.BadParameter(
            f"--export-official is for the networks of BiPer; {model} is not one. Leave it out."
        )
    config = _with_epochs(
        TrainingConfig(dataset=data, data_dir=data_dir, architecture=model),
        (stage1_epochs, stage2_epochs),
    )
    given = {
        "frequency": frequency,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "hold_out": hold_out,
    }
    changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    options = RunOptions(
        accelerator=accelerator,
        devices=int(devices) if devices.isdigit() else devices,
        num_nodes=nodes,
        progress_bar=sys.stderr.isatty(),
        tensorboard=tensorboard,
    )
    result = fit_quietly(replace(config, **changed), output, resume=resume, options=options)
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0":
        exported = training.export_official(result) if export_official else ()
        _show(result, exported, json_output)


def _with_epochs(config: TrainingConfig, epochs: tuple[int | None, int | None]) -> TrainingConfig:
    first, second = epochs
    if first is not None:
        config = replace(config, stage1=replace(config.stage1, epochs=first))
    if second is not None:
        config = replace(config, stage2=replace(config.stage2, epochs=second))
    return config


def fit_quietly(
    config: TrainingConfig | None, output: Path, *, resume: bool, options: Any
) -> TrainingResult:
    """Train with the trainer's output on stderr, so that stdout has only the result."""
    from biper_engine import training

    with status("Loading the trainer"), suppress(ImportError):  # `fit` says what to install
        import lightning  # noqa: F401  (takes seconds)
    with redirect_stdout(sys.stderr):
        return training.fit(config=config, output_dir=output, resume=resume, options=options)


def _show(result: TrainingResult, exported: Sequence[Path], json_output: bool) -> None:
    following = command_line("convert", result.stage2.path)
    stages = (result.stage1, result.stage2)
    if json_output:
        rows = [{"path": str(stage.path), **stage.to_dict()} for stage in stages]
        official = [str(path) for path in exported]
        print_json({"stage1": rows[0], "stage2": rows[1], "official": official, "next": following})
        return
    console = results()
    for number, stage in enumerate(stages, start=1):
        held_out = stage.validation_accuracy is not None
        accuracy = stage.validation_accuracy if held_out else stage.test_accuracy
        where = "held-out training" if held_out else "test"
        measured = "" if accuracy is None else f", {accuracy:.2%} of {where} images right"
        console.print(f"stage {number}: {stage.epochs} epochs, {stage.seconds:.1f} s{measured}")
        console.print(f"  {stage.path}", soft_wrap=True, markup=False)
    for path in exported:
        console.print(f"for the official code: {path}", soft_wrap=True, markup=False)
    console.print(f"next: {following}", soft_wrap=True, markup=False)

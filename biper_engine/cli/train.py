"""`biper train`: two stages and a verified file in one command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biper_engine.cli.console import command_line, print_json, results, shown_warnings, status
from biper_engine.cli.sweep import run_sweep, show_sweep
from biper_engine.cli.trained import Packed, pack, summary

if TYPE_CHECKING:
    from biper_engine.training import RunOptions, TrainingConfig, TrainingResult

__all__ = ["fit_quietly", "train"]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe: digits, fashion_mnist, folder, cifar10_resnet18, ..., or a YAML file. "
            "By default the one for the data.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A folder for each class in a folder, Parquet, WebDataset, hub:name, "
            "module:callable, or digits, mnist, fashion-mnist, cifar10, cifar100, imagenet.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where that data set's files are.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Network.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="As optimizer.lr=0.01; repeatable.",
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=A,B,C",
            help="Train with each value; repeatable.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="For all files.")
    ] = Path("biper-train"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in DIR.")] = False,
    stage1_epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Epochs of stage 1.", show_default=False)
    ] = None,
    stage2_epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Epochs of stage 2.", show_default=False)
    ] = None,
    frequency: Annotated[
        float | None, typer.Option(metavar="W0", help="w0 of sin(w0*w), BiPer.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Images per step.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Random seed.", show_default=False)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="32-true, bf16-mixed or another of Lightning.", show_default=False
        ),
    ] = None,
    hold_out: Annotated[
        bool, typer.Option("--hold-out", help="Measure on held-out training images.")
    ] = False,
    accelerator: Annotated[str, typer.Option(metavar="NAME", help="cpu, gpu or auto.")] = "auto",
    devices: Annotated[str, typer.Option(metavar="N", help="How many, or auto.")] = "auto",
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="Number of machines.")] = 1,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="Lightning's, as ddp.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Processes that read images.", show_default=False),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Train through torch.compile.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Save every N steps, as well as each epoch.",
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard logs, too.")
    ] = False,
    export_official: Annotated[
        bool,
        typer.Option("--export-official", help="Checkpoints for the official code, too."),
    ] = False,
    convert: Annotated[bool, typer.Option(help="Convert and verify at the end.")] = True,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the merged recipe only.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """Train a binary network in two stages, and convert it into a verified .biper file.

    Interrupted runs can be resumed.

    [bold]Examples[/bold]
    biper train
    biper train --data photos -o run
    biper train fashion_mnist --set optimizer.lr=0.05 --set augment.flip=false
    biper train cifar10_resnet18 --data-dir cifar-10-batches-bin --devices 2
    biper train --sweep frequency=5,10,20,40 -o sweep
    biper train --resume --output biper-train --export-official
    """
    from biper_engine import training
    from biper_engine.training import RunOptions

    given = {
        "dataset": data,
        "data_dir": data_dir,
        "architecture": model,
        "stage1.epochs": stage1_epochs,
        "stage2.epochs": stage2_epochs,
        "frequency": frequency,
        "batch_size": batch_size,
        "seed": seed,
        "precision": precision,
        "hold_out": hold_out or None,
    }
    config = _config(recipe, given, settings or [])
    runs = training.sweep_configs(config, sweep) if sweep else {}
    swept = any(one.partition("=")[0].strip() == "frequency" for one in sweep or ())
    for one in (config, *runs.values()):
        _require_biper(one, frequency is not None or swept, export_official)
    if print_recipe:
        typer.echo(training.to_yaml(config), nl=False)
        return
    options = RunOptions(
        accelerator=accelerator,
        devices=int(devices) if devices.isdigit() else devices,
        num_nodes=nodes,
        strategy=strategy,
        workers=workers,
        compile=compile_,
        save_every_steps=save_every,
        progress_bar=sys.stderr.isatty(),
        tensorboard=tensorboard,
    )
    first = training.is_first_process()
    if first:
        results(json_output=json_output).print(
            training.to_yaml(config), markup=False, soft_wrap=True
        )

    def one_run(config: TrainingConfig, output: Path) -> tuple[TrainingResult, list[str], Any]:
        with shown_warnings(), _interruptible():
            result = fit_quietly(config, output, resume=resume, options=options)
        if not first:
            return result, [], None
        exported = training.export_official(result) if export_official else ()
        packed = pack(result) if convert and _is_binary(config) else None
        return result, list(map(str, exported)), packed

    if runs:
        values = run_sweep(runs, output, one_run, resume=resume, convert=convert)
        if first:
            show_sweep(values, output, json_output)
        return
    result, exported, packed = one_run(config, output)
    if first:
        _show(result, exported, packed, config, json_output)


def _config(recipe: str | None, given: dict[str, Any], settings: list[str]) -> TrainingConfig:
    """Merge the recipe, the options that were given, and `--set`, in this order."""
    from biper_engine.training import read_recipe, recipe_for
    from biper_engine.training.recipe import with_settings

    name = recipe or recipe_for(given["dataset"] or "digits")
    config = read_recipe(name)
    groups: dict[str, dict[str, Any]] = {"": {}, "stage1": {}, "stage2": {}}
    for key, value in given.items():
        if value is not None:
            group, _, one = key.rpartition(".")
            groups[group][one] = value
    for stage in ("stage1", "stage2"):
        groups[""][stage] = replace(getattr(config, stage), **groups[stage])
    return with_settings(replace(config, **groups[""]), settings)


def _require_biper(config: TrainingConfig, frequency: bool, export_official: bool) -> None:
    from biper_engine.models.registry import architecture

    model = config.architecture
    if architecture(model).frequency is not None:
        return
    if frequency:
        raise typer.BadParameter(
            f"--frequency is for the networks of BiPer; {model} has none. Leave it out."
        )
    if export_official:
        raise typer.BadParameter(
            f"--export-official is for the networks of BiPer; {model} is not one. Leave it out."
        )


def _is_binary(config: TrainingConfig) -> bool:
    from biper_engine.models.registry import architecture

    return architecture(config.architecture).is_binary


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say after Ctrl-C how to go on, and end with the shell's code for it."""
    try:
        yield
    except KeyboardInterrupt:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        console = results(json_output=True)  # stderr
        console.print("Interrupted; the latest state is saved. To go on:", markup=False)
        console.print(f"  {command_line(*words, '--resume')}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None


def fit_quietly(
    config: TrainingConfig | None, output: Path, *, resume: bool, options: RunOptions
) -> TrainingResult:
    """Train with the trainer's output on stderr, so that stdout has only the result."""
    from biper_engine import training

    with status("Loading the trainer"), suppress(ImportError):  # `fit` says what to install
        import lightning  # noqa: F401  (takes seconds)
    with redirect_stdout(sys.stderr):
        return training.fit(config=config, output_dir=output, resume=resume, options=options)


def _show(
    result: TrainingResult,
    exported: list[str],
    packed: Packed | None,
    config: TrainingConfig,
    json_output: bool,
) -> None:
    lines, values = summary(result, packed, is_binary=_is_binary(config))
    if json_output:
        print_json({**values, "official": exported, "recipe": config.to_dict()})
        return
    console = results()
    following = lines.pop()
    for line in [*lines, *(f"for the official code: {path}" for path in exported), following]:
        console.print(line, soft_wrap=True, markup=False)

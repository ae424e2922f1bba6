"""`fit`: stage 1, then stage 2 from its latent weights, resumable at any time.

Files in `output_dir`:

    config.json                     the settings; a resumed run must have the same
    data.json                       classes and labels; a resumed run must have the same
    versions.json                   Python and libraries of the latest start
    stage1.pt, stage2.pt            finished stages, for `models.load_checkpoint`
    official/stage1/, .../stage2/   the same in the official format, by `export_official`
    result.json                     measurements of finished stages
    checkpoints/stage1.ckpt, ...    Lightning's latest state
    logs/stage1/metrics.csv, ...    loss, accuracies, learning rate, flips by epoch
    logs/stage1/layers.csv, ...     sign flips and quantization error by epoch and layer
    logs/stage1/predictions.json    confusions and some wrong images of a finished stage

Each file is complete at any time, in its old or its new version; only TensorBoard's logs grow.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from biper_engine import models
from biper_engine.errors import DataError
from biper_engine.models import Network, registry
from biper_engine.nn import binary_layers
from biper_engine.training import data
from biper_engine.training.config import RunOptions, TrainingConfig
from biper_engine.training.directory import check_claim, check_state, claim, versions
from biper_engine.training.distillation import find_teacher
from biper_engine.training.feed import Feed
from biper_engine.training.result import StageResult, TrainingResult, read_json, write_json

if TYPE_CHECKING:
    from lightning import Trainer

__all__ = ["export_official", "fit"]


def fit(
    model: str | Network | None = None,
    *,
    train: Dataset[Any] | None = None,
    validation: Dataset[Any] | None = None,
    teacher: nn.Module | None = None,
    config: TrainingConfig | None = None,
    output_dir: str | os.PathLike[str],
    resume: bool = False,
    options: RunOptions | None = None,
) -> TrainingResult:
    """Train a network in BiPer's two stages.

    Stage 1 learns latent weights through sin(w0*w) with binary activations; stage 2 starts from
    them and trains with sign(sin(w0*w)). PyTorch's random state is restored afterwards.

    Args:
        model: a name from `models.available()`, or a network from `models.build`, whose weights
            stage 1 starts from and which is not changed; None takes `config.architecture`.
        train: data to train on, in place of `config.dataset`. Items are (image, label); an image is
            a PIL image or a uint8 tensor [C, H, W], which are resized, augmented and normalised, or
            a float tensor in the network's size, which is taken as it is.
        validation: data to measure on after each epoch, with `train`; None measures nothing.
        teacher: a module with the same images and classes, whose logits the network learns from as
            `config.distillation` says; in place of its checkpoint.
        config: what to train; None trains the digits with settings chosen for them.
        output_dir: directory for all files, created if missing.
        resume: continue the run in `output_dir` from its latest saved state, in either stage, with
            the same result as if it had not stopped. A finished run returns its result at once; an
            empty directory starts a run.
        options: devices, progress bar, logs.

    Returns:
        Paths, accuracies, seconds and epochs of both stages.

    Raises:
        DataError: unknown, missing or damaged data, or another number of classes.
        ValueError: unknown network; a network for images of another size; `resume` with a different
            config or other data; devices that are not here, or an option that Lightning refuses.
        CheckpointError: the state to resume from is damaged or of another run.
        FileExistsError: `output_dir` holds a run and `resume` is False.
        OSError: `output_dir` cannot be written.
        NotFiniteError: the loss became infinite or NaN.
        ImportError: the extra `train` is not installed.
        KeyboardInterrupt: Ctrl-C; the latest state is kept for `resume`.
    """
    config, options = config or TrainingConfig(), options or RunOptions()
    config = _named(model, config, train, teacher)
    entry = registry.architecture(config.architecture)
    _require_extra()
    directory = Path(output_dir)
    check_claim(directory, config, resume=resume)
    feed = _feed(config, options, entry.metadata, train, validation)
    if isinstance(model, Network):
        _require_classes(model, feed.num_classes, entry.classifier)
    if config.distillation.teacher is not None:
        teacher = find_teacher(teacher, config.distillation, feed)
    _require_hardware(config, options)
    claim(directory, config, feed.summary())

    stages = []
    with torch.random.fork_rng():
        for number in (1, 2):
            done = _finished(directory, number)
            stages.append(done or _run_stage(number, feed, directory, model, teacher))
    return TrainingResult(output_dir=directory, stage1=stages[0], stage2=stages[1], feed=feed)


def _named(
    model: str | Network | None,
    config: TrainingConfig,
    train: Dataset[Any] | None,
    teacher: nn.Module | None,
) -> TrainingConfig:
    """Return the config of a model, data and a teacher that are given as objects."""
    if isinstance(model, str):
        config = replace(config, architecture=model)
    elif isinstance(model, Network):
        name, made = model.provenance.architecture, model.provenance
        if name is None:
            raise ValueError(
                f"`model` is a {type(model).__name__} that biper_engine.models.build did not make, "
                "so that its checkpoint could not say what it is. Build it with that."
            )
        config = replace(
            config,
            architecture=name,
            frequency=made.frequency or config.frequency,
            weight_binarizer=made.weight_binarizer or config.weight_binarizer,
        )
    elif model is not None:
        raise TypeError(
            f"`model` is a {type(model).__name__}; wanted a name, such as "
            "'cifar10/resnet20_1w1a', or a network from biper_engine.models.build."
        )
    if train is not None:
        config = replace(config, dataset=f"{type(train).__module__}.{type(train).__qualname__}")
    if teacher is not None:
        name = f"{type(teacher).__module__}.{type(teacher).__qualname__}"
        config = replace(config, distillation=replace(config.distillation, teacher=name))
    entry = registry.architecture(config.architecture)
    own = (config.weight_binarizer, config.activation_surrogate) == ("periodic", "bireal")
    if entry.frequency is None and not own:
        raise ValueError(
            f"`weight_binarizer` (={config.weight_binarizer!r}) and `activation_surrogate` "
            f"(={config.activation_surrogate!r}) are for the networks of BiPer; "
            f"{config.architecture} has its own. Leave them out."
        )
    return config


def _feed(
    config: TrainingConfig,
    options: RunOptions,
    task: Any,
    train: Dataset[Any] | None,
    validation: Dataset[Any] | None,
) -> Feed:
    """Load the data and choose what is trained on and what measured."""
    if train is None and validation is not None:
        raise ValueError("`validation` was given without `train`. Pass both, or neither.")
    if train is None:
        dataset = data.load(config, task)
        held_out, test = None, dataset.test
    else:
        measured = train if validation is None else validation
        dataset = data.from_datasets(train, measured, config, task)
        held_out, test = (None if validation is None else dataset.test), None
    _require_size(config, dataset.metadata.input_size, task.input_size)
    for line in dataset.skipped:
        warnings.warn(f"{line} It is left out.", stacklevel=3)
    trained = dataset.train
    if config.hold_out and train is None:
        (trained, held_out), test = dataset.held_out(), None
    feed = Feed(
        train=trained,
        held_out=held_out,
        test=test,
        metadata=dataset.metadata,
        num_classes=dataset.num_classes,
        config=config,
        options=options,
        skipped=dataset.skipped,
    )
    feed.check()
    feed.batches_of_an_epoch(1)  # raises where there are too few images
    if options.save_every_steps and not feed.is_indexed:
        raise ValueError(
            "`save_every_steps` is for data with an index; a stream is resumed at the start of an "
            "epoch. Leave it out, or leave streaming out."
        )
    return feed


def _require_extra() -> None:
    for name in ("lightning", "sklearn", "yaml"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"Training needs '{name}', which cannot be imported: {error}. "
                'Run: pip install "biper-engine[train]"'
            ) from error


def _require_size(config: TrainingConfig, given: Any, wanted: Any) -> None:
    if given == wanted:
        return
    fitting = [
        name
        for name in models.available()
        if registry.architecture(name).metadata.input_size == given
    ]
    sizes = ["x".join(map(str, size)) for size in (wanted, given)]
    raise ValueError(
        f"`architecture` (={config.architecture!r}) takes images of {sizes[0]}, but those of "
        f"{config.dataset!r} are {sizes[1]}. Networks for them: {', '.join(fitting)}."
    )


def export_official(result: TrainingResult) -> tuple[Path, Path]:
    """Write both stages of a finished run in the format of the official scripts, too.

    Args:
        result: from `fit`; its directory gets `official/stage1` and `official/stage2`.

    Returns:
        The two checkpoints; see `models.export_official`.

    Raises:
        CheckpointError: a stage's checkpoint is missing.
    """
    paths = []
    config = TrainingConfig.from_dict(read_json(result.output_dir / "config.json") or {})
    for number, stage in ((1, result.stage1), (2, result.stage2)):
        settings = config.stage(number)
        measured = (stage.test_accuracy, stage.validation_accuracy)
        path = models.export_official(
            result.output_dir / "official" / f"stage{number}",
            models.load_checkpoint(stage.path),
            epochs=stage.epochs,
            top1=100 * next((value for value in measured if value is not None), 0.0),
            settings={
                "dataset": config.dataset,
                "lr": settings.lr,
                "weight_decay": settings.weight_decay,
                "momentum": config.optimizer.momentum,
                "batch_size": config.batch_size,
                "tau": settings.tau,
                "seed": config.seed,
            },
        )
        paths.append(path)
    return paths[0], paths[1]


def _require_classes(model: Network, wanted: int, classifier: str) -> None:
    found = len(model.get_parameter(f"{classifier}.weight"))
    if found != wanted:
        raise DataError(
            f"`model` has {found} classes, but the data has {wanted}. Build it with "
            f"num_classes={wanted}."
        )


def _finished(directory: Path, number: int) -> StageResult | None:
    measured = (read_json(directory / "result.json") or {}).get(f"stage{number}")
    path = directory / f"stage{number}.pt"
    if measured is None or not path.exists():
        return None
    return StageResult.from_dict(measured, path)


def _run_stage(
    number: int,
    feed: Feed,
    directory: Path,
    model: str | Network | None,
    teacher: nn.Module | None,
) -> StageResult:
    from biper_engine.training.module import StageModule

    config = feed.config
    network = _start_network(number, feed, directory, model)
    compiled = feed.options.compile
    module = StageModule(network, config, number, feed, compiled=compiled, teacher=teacher)
    latest = directory / "checkpoints" / f"stage{number}.ckpt"
    if latest.exists():
        check_state(latest, config)
    with _quiet_lightning():
        trainer = _trainer(number, feed, directory)
        with _interruptible():
            trainer.fit(
                module,
                val_dataloaders=feed.validation(),
                ckpt_path=latest if latest.exists() else None,
                weights_only=True,
            )
    if trainer.is_global_zero:  # the others wait
        device = trainer.strategy.root_device
        measured = [
            None if part is None else feed.predictions(network, part, device)
            for part in (feed.held_out, feed.test)
        ]
        accuracies = [None if found is None else found.accuracy for found in measured]
        for found in filter(None, measured):  # one of them at most
            write_json(directory / "logs" / f"stage{number}" / "predictions.json", found.to_dict())
        result = StageResult(
            path=directory / f"stage{number}.pt",
            epochs=config.stage(number).epochs,
            seconds=round(module.seconds, 3),
            validation_accuracy=accuracies[0],
            test_accuracy=accuracies[1],
            skipped=tuple(module.skipped),
        )
        _record(result, number, network.cpu(), directory, config)
    trainer.strategy.barrier()
    finished = _finished(directory, number)
    assert finished is not None
    return finished


def _start_network(
    number: int, feed: Feed, directory: Path, model: str | Network | None
) -> Network:
    """Build the stage's network: new in stage 1, with stage 1's latent weights in stage 2."""
    config = feed.config
    torch.manual_seed(config.seed)
    periodic = registry.architecture(config.architecture).frequency is not None
    network = models.build(
        config.architecture,
        num_classes=feed.num_classes,
        frequency=config.frequency if periodic else None,
        stage=number,
        weight_binarizer=config.weight_binarizer if periodic else None,
        activation_surrogate=config.activation_surrogate if periodic else None,
    )
    network.metadata = feed.metadata
    start = models.load_checkpoint(directory / "stage1.pt") if number == 2 else model
    if isinstance(start, Network):
        network.load_state_dict(start.state_dict())
        for _, layer in binary_layers(network):  # some keep it in their state
            layer.stage = number
    # On CPU, a step in this layout takes 0.75 to 0.9 of the time.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _record(
    result: StageResult, number: int, network: Network, directory: Path, config: TrainingConfig
) -> None:
    stored = {**config.to_dict(), "versions": versions()}
    models.save_checkpoint(result.path, network, config=stored, metrics=result.to_dict())
    recorded = read_json(directory / "result.json") or {}
    write_json(directory / "result.json", {**recorded, f"stage{number}": result.to_dict()})


def _hardware(config: TrainingConfig, options: RunOptions) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer about devices."""
    return {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
        "strategy": options.strategy,
        "sync_batchnorm": options.sync_batchnorm,
        "precision": config.precision,
    }


def _require_hardware(config: TrainingConfig, options: RunOptions) -> None:
    """Let Lightning look at its arguments before anything is written."""
    from lightning import Trainer
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    settings = _hardware(config, options)
    try:
        with _quiet_lightning():
            Trainer(**settings, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError) as error:
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ValueError(f"Lightning cannot train with {told}: {error}") from error


def _trainer(number: int, feed: Feed, directory: Path) -> Trainer:
    from lightning import Trainer
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    from biper_engine.training.layer_history import LayerHistory
    from biper_engine.training.lightning_files import AtomicCheckpoints, MetricsFile
    from biper_engine.training.module import LatestState

    config, options = feed.config, feed.options
    logs = directory / "logs" / f"stage{number}"
    loggers: list[Logger] = [MetricsFile(logs / "metrics.csv")]
    if options.tensorboard:
        loggers.append(
            TensorBoardLogger(directory / "logs", name=f"stage{number}", version="tensorboard")
        )
    latest = directory / "checkpoints" / f"stage{number}.ckpt"
    trainer = Trainer(
        **_hardware(config, options),
        enable_progress_bar=options.progress_bar,
        max_epochs=config.stage(number).epochs,
        accumulate_grad_batches=config.accumulate,
        callbacks=[
            LayerHistory(logs / "layers.csv"),
            LatestState(latest, options.save_every_steps),
        ],
        logger=loggers,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the loader knows the processes
    )
    if not feed.is_indexed:
        trainer.limit_train_batches = feed.batches_of_an_epoch(trainer.world_size)
    # Strategies with their own kind of files, such as those for TPUs, keep them.
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpoints()
    return trainer


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's advice on hardware and worker counts, which does not apply here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Undo how Lightning handles Ctrl-C: it ignores further ones and exits the process."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGINT, handler)

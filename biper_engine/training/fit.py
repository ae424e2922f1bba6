"""`fit`: stage 1, then stage 2 from its latent weights, resumable at every epoch.

Files in `output_dir`:

    config.json                     the settings; a resumed run must have the same
    stage1.pt, stage2.pt            finished stages, for `models.load_checkpoint`
    official/stage1/, .../stage2/   the same in the official format, by `export_official`
    result.json                     measurements of finished stages
    checkpoints/stage1.ckpt, ...    Lightning's state after the latest epoch
    logs/stage1/metrics.csv, ...    losses by epoch

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from biper_engine import models
from biper_engine.models import Network, registry
from biper_engine.nn import binary_layers
from biper_engine.training import data
from biper_engine.training.config import RunOptions, TrainingConfig
from biper_engine.training.data import DataSet, Part
from biper_engine.training.result import StageResult, TrainingResult, read_json, write_json

if TYPE_CHECKING:
    from lightning import Trainer

__all__ = ["export_official", "fit"]

_EVALUATION_BATCH = 128


def fit(
    config: TrainingConfig | None = None,
    *,
    output_dir: str | os.PathLike[str],
    resume: bool = False,
    options: RunOptions | None = None,
) -> TrainingResult:
    """Train a network in BiPer's two stages.

    Stage 1 learns latent weights through sin(w0*w) with binary activations; stage 2 starts from
    them and trains with sign(sin(w0*w)). PyTorch's random state is restored afterwards.

    Args:
        config: what to train; None trains the digits with settings chosen for them.
        output_dir: directory for all files, created if missing.
        resume: continue the run in `output_dir` after its last complete epoch, in either stage,
            with the same result as if it had not stopped. A finished run returns its result at
            once; an empty directory starts a run.
        options: devices, progress bar, logs.

    Returns:
        Paths, accuracies, seconds and epochs of both stages.

    Raises:
        ValueError: unknown dataset or network; a network for images of another size; `resume` with
            a different config.
        FileExistsError: `output_dir` holds a run and `resume` is False.
        ImportError: the extra `train` is not installed.
        KeyboardInterrupt: Ctrl-C; finished epochs are kept for `resume`.
    """
    config = config or TrainingConfig()
    options = options or RunOptions()
    network = registry.architecture(config.architecture)
    _require_extra()
    dataset = data.load(config.dataset)
    _require_size(config, dataset.metadata.input_size, network.metadata.input_size)
    directory = Path(output_dir)
    _claim(directory, config, resume=resume)

    stages = []
    with torch.random.fork_rng():
        for number in (1, 2):
            done = _finished(directory, number)
            stages.append(done or _run_stage(number, dataset, directory, config, options))
    return TrainingResult(output_dir=directory, stage1=stages[0], stage2=stages[1])


def _require_extra() -> None:
    for name in ("lightning", "sklearn"):
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
                "momentum": config.momentum,
                "batch_size": config.batch_size,
                "tau": settings.tau,
                "seed": config.seed,
            },
        )
        paths.append(path)
    return paths[0], paths[1]


def _claim(directory: Path, config: TrainingConfig, *, resume: bool) -> None:
    """Store the config in the directory, or check that the run in it has the same one."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = read_json(directory / "config.json")
    if stored is None:
        write_json(directory / "config.json", config.to_dict())
        return
    if not resume and not _launched_by_lightning():
        raise FileExistsError(
            f"'{directory}' holds a training run. Pass resume=True to continue it, "
            "or another output_dir."
        )
    wanted = config.to_dict()
    different = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    if different:
        listing = "; ".join(
            f"{key} was {stored.get(key)}, now {wanted.get(key)}" for key in different
        )
        raise ValueError(
            f"'{directory}' holds a run with another config: {listing}. "
            "Resume with the same config, or train in another output_dir."
        )


def _launched_by_lightning() -> bool:
    """Whether this is a further process of a multi-device run, started after the first one."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 or int(os.environ.get("NODE_RANK", 0)) > 0


def _finished(directory: Path, number: int) -> StageResult | None:
    measured = (read_json(directory / "result.json") or {}).get(f"stage{number}")
    path = directory / f"stage{number}.pt"
    if measured is None or not path.exists():
        return None
    return StageResult.from_dict(measured, path)


def _run_stage(
    number: int, dataset: DataSet, directory: Path, config: TrainingConfig, options: RunOptions
) -> StageResult:
    from biper_engine.training.module import StageModule, stage_seed

    network = _start_network(number, dataset, directory, config)
    module = StageModule(network, config, number)
    held_out = dataset.validation() if config.hold_out else None
    train = dataset.without_validation() if config.hold_out else dataset.train
    seed = stage_seed(config.seed, number)
    latest = directory / "checkpoints" / f"stage{number}.ckpt"
    with _quiet_lightning():
        trainer = _trainer(number, directory, config, options)
        with _interruptible():
            trainer.fit(
                module,
                data.loader(train, batch_size=config.batch_size, shuffle_seed=seed),
                None if held_out is None else data.loader(held_out, batch_size=_EVALUATION_BATCH),
                ckpt_path=latest if latest.exists() else None,
            )
    result = StageResult(
        path=directory / f"stage{number}.pt",
        epochs=config.stage(number).epochs,
        seconds=round(module.seconds, 3),
        validation_accuracy=None if held_out is None else _accuracy(network, held_out),
        test_accuracy=None if held_out is not None else _accuracy(network, dataset.test),
    )
    if trainer.is_global_zero:
        _record(result, number, network, directory, config)
    trainer.strategy.barrier()
    return result


def _start_network(
    number: int, dataset: DataSet, directory: Path, config: TrainingConfig
) -> Network:
    """Build the stage's network: new in stage 1, with stage 1's latent weights in stage 2."""
    torch.manual_seed(config.seed)
    periodic = registry.architecture(config.architecture).frequency is not None
    network = models.build(
        config.architecture,
        num_classes=dataset.num_classes,
        frequency=config.frequency if periodic else None,
        stage=number,
    )
    network.metadata = dataset.metadata
    if number == 2:
        network.load_state_dict(models.load_checkpoint(directory / "stage1.pt").state_dict())
        for _, layer in binary_layers(network):  # some keep it in their state
            layer.stage = number
    # On CPU, a step in this layout takes 0.75 to 0.9 of the time.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _record(
    result: StageResult, number: int, network: Network, directory: Path, config: TrainingConfig
) -> None:
    models.save_checkpoint(result.path, network, config=config.to_dict(), metrics=result.to_dict())
    recorded = read_json(directory / "result.json") or {}
    write_json(directory / "result.json", {**recorded, f"stage{number}": result.to_dict()})


def _trainer(number: int, directory: Path, config: TrainingConfig, options: RunOptions) -> Trainer:
    from lightning import Trainer
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import Logger, TensorBoardLogger

    from biper_engine.training.lightning_files import AtomicCheckpoints, MetricsFile

    loggers: list[Logger] = [MetricsFile(directory / "logs" / f"stage{number}" / "metrics.csv")]
    if options.tensorboard:
        loggers.append(
            TensorBoardLogger(directory / "logs", name=f"stage{number}", version="tensorboard")
        )
    settings: dict[str, Any] = {
        "accelerator": options.accelerator,
        "devices": options.devices,
        "num_nodes": options.num_nodes,
        "strategy": options.strategy,
        "precision": config.precision,
        "enable_progress_bar": options.progress_bar,
    }
    latest = ModelCheckpoint(
        directory / "checkpoints",
        filename=f"stage{number}",
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    trainer = Trainer(
        **settings,
        max_epochs=config.stage(number).epochs,
        callbacks=[latest],
        logger=loggers,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    # Strategies with their own kind of files, such as those for TPUs, keep them.
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpoints()
    return trainer


@torch.no_grad()
def _accuracy(network: Network, part: Part) -> float:
    network.eval()
    correct = 0
    for images, labels in data.loader(part, batch_size=_EVALUATION_BATCH):
        correct += int((network(images).argmax(1) == labels).sum())
    return correct / len(part.labels)


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

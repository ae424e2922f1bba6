"""The demo, step by step: train, convert, verify, save, reload in a new process, time.

Every number in its result is measured in the run that reports it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine.bench import (
    RESNET18_LAYERS,
    Budget,
    Comparison,
    Samples,
    compare,
    interleave,
    network_work,
)
from biper_engine.bench.threads import torch_threads
from biper_engine.cli.console import status
from biper_engine.cli.train import fit_quietly
from biper_engine.files import write_atomically
from biper_engine.graph.choice import backends_of
from biper_engine.training import RunOptions, TrainingConfig, TrainingResult, data

__all__ = ["DemoResult", "LayerTimes", "run_demo", "short_recipe"]

_TIMED_BATCHES = (1, 64)
_BUDGET = Budget(seconds=2.0, most=200)
_COMPILED = True
_IMAGES_PER_CLASS = 2
_VERIFIED_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Wall-clock times of only ImageNet ResNet-18's binary convolutions, one image, in turn."""

    float_conv: Samples
    engine: Samples


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Measurements of the demo.

    Attributes:
        train_images, test_images: sizes of the fixed split.
        train_seconds: wall-clock time of both stages, including earlier runs that began them.
        float_accuracy, engine_accuracy: share of test images classified correctly.
        top1_equal: test images for which both networks give the same class.
        packed, layers: layers on bits, and all layers.
        verified: the verdict of `biper_engine.verify` on all test images.
        layers_equal, layers_compared: binary layers with only equal accumulators, and all of them.
        logit_error: largest difference of a logit between the two networks.
        reload_identical: whether a new process got the same bits from the saved file.
        float_bytes: bytes of the float network's parameters and buffers.
        file_bytes: bytes of the whole `.biper` file.
        comparison: times of the engine and the float network, at each batch size.
        resnet18: times of larger layers; None if only the reference backend runs.
        backends: the backends that ran the engine's operators.
    """

    architecture: str
    train_images: int
    test_images: int
    train_epochs: int
    train_seconds: float
    float_accuracy: float
    engine_accuracy: float
    top1_equal: int
    packed: int
    layers: int
    verified: bool
    layers_equal: int
    layers_compared: int
    logit_error: float
    reload_identical: bool
    float_bytes: int
    file_bytes: int
    comparison: Comparison
    resnet18: LayerTimes | None
    backends: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Return what went wrong; empty if the demo succeeded."""
        checks = {
            f"top-1 is equal on {self.top1_equal} of {self.test_images} images only": (
                self.top1_equal == self.test_images
            ),
            "the reloaded file gives different logits": self.reload_identical,
            f"verify: {self.layers_equal} of {self.layers_compared} layers are equal, or a "
            "float segment differs": self.verified,
        }
        return [text for text, passed in checks.items() if not passed]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        times = self.resnet18
        return {
            **values,
            "comparison": self.comparison.to_dict(),
            "resnet18": times
            and {"float_conv": times.float_conv.to_dict(), "engine": times.engine.to_dict()},
            "ok": not self.failures,
            "failures": self.failures,
        }


def short_recipe() -> TrainingConfig:
    """Return the recipe of the digits with a third of its epochs, in smaller batches.

    Seven epochs in batches of 16 are as many steps as twenty in batches of 48. Seeds 0 to 4
    classify 95.8, 97.0, 95.8, 95.0 and 96.4 % of the test images.
    """
    recipe = TrainingConfig()
    return replace(
        recipe,
        batch_size=16,
        stage1=replace(recipe.stage1, epochs=3),
        stage2=replace(recipe.stage2, epochs=4),
    )


def run_demo(directory: Path, say: Callable[[str], None], *, progress_bar: bool) -> DemoResult:
    """Run every step and write digits.biper, digits/*.png and training/ to `directory`.

    Args:
        directory: created if missing. A finished training in it is reused.
        say: called with a line about each step.
        progress_bar: show the trainer's progress bar.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = short_recipe()
    train, test = data.digits()
    images, labels = data.tensors(test, data.DIGITS_METADATA)

    trained = _train(config, directory / "training", say, progress_bar)
    model = biper_engine.load_checkpoint(trained.stage2.path)

    with status("Converting"):
        engine = biper_engine.convert(model)
    report = engine.report
    say(f"2. convert: {report.packed} of {len(report.layers)} layers packed into bits")

    with status(f"Verifying layer by layer on {len(labels)} images"):
        verified = biper_engine.verify(engine, model, _batches(images))
    say(
        f"3. verify: {verified.layers_equal} of {verified.layers} binary layers equal on "
        f"{verified.images} images; end to end {verified.end_to_end}"
    )

    file = directory / "digits.biper"
    with status("Saving, and loading again in a new process"):
        engine.save(file)
        logits, float_logits = _logits(engine, images), _logits(model, images)
        identical = _same_in_new_process(file, images, logits)
        _write_digits(directory / "digits", len(train))
    outcome = "the same logits, bit by bit" if identical else "OTHER LOGITS"
    say(f"4. save and reload in a new process: {outcome}")

    say("5. time: the engine, the float network, and that through torch.compile, in turn ...")
    backends = backends_of(engine.graph_module, engine.device)
    with status("Timing, which compiles the float network twice"):
        batches = [images[:batch] for batch in _TIMED_BATCHES]
        comparison = compare(engine, model, batches, compiled=_COMPILED, budget=_BUDGET)
        resnet18 = None if backends == ("reference",) else _resnet18()
    return DemoResult(
        architecture=config.architecture,
        train_images=len(train),
        test_images=len(labels),
        train_epochs=trained.epochs,
        train_seconds=trained.seconds,
        float_accuracy=_accuracy(float_logits, labels),
        engine_accuracy=_accuracy(logits, labels),
        top1_equal=int((logits.argmax(1) == float_logits.argmax(1)).sum()),
        packed=report.packed,
        layers=len(report.layers),
        verified=verified.ok,
        layers_equal=verified.layers_equal,
        layers_compared=verified.layers,
        logit_error=verified.logit_error,
        reload_identical=identical,
        float_bytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        file_bytes=file.stat().st_size,
        comparison=comparison,
        resnet18=resnet18,
        backends=backends,
    )


def _train(
    config: TrainingConfig, directory: Path, say: Callable[[str], None], progress_bar: bool
) -> TrainingResult:
    found = (directory / "config.json").exists()
    epochs = config.stage1.epochs + config.stage2.epochs
    say(f"1. train: {config.architecture} on {config.dataset}, two stages, {epochs} epochs ...")
    options = RunOptions(accelerator="cpu", devices=1, progress_bar=progress_bar)
    # Steps of 16 small images gain little from more threads. If other programs use the processors,
    # those wait for one another nearly all the time.
    with torch_threads(1):
        trained = fit_quietly(config, directory, resume=True, options=options)
    earlier = f", including earlier runs; delete {directory} to start again"
    say(f"   {trained.seconds:.0f} s of training{earlier if found else ''}")
    return trained


def _batches(images: Tensor) -> list[Tensor]:
    return [
        images[start : start + _VERIFIED_BATCH] for start in range(0, len(images), _VERIFIED_BATCH)
    ]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        result: Tensor = network(images)
    return result


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _same_in_new_process(file: Path, images: Tensor, wanted: Tensor) -> bool:
    """Run the file in a new interpreter; compare every bit of its logits with `wanted`."""
    root = str(Path(biper_engine.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as scratch:
        given, got = Path(scratch, "images.npy"), Path(scratch, "logits.npy")
        np.save(given, images.numpy())
        program = [
            sys.executable,
            "-m",
            "biper_engine.cli.demo_reload",
            *map(str, (file, given, got)),
        ]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(
                f"The new process that loads '{file}' ended with code {done.returncode}:\n"
                f"{done.stderr.strip()}"
            )
        logits = np.load(got)
    same_bytes: bool = logits.tobytes() == wanted.numpy().tobytes()
    return same_bytes and logits.shape == tuple(wanted.shape)


def _write_digits(directory: Path, first_test_image: int) -> None:
    """Write the first test images of each class as `<label>_<number>.png`, 8x8 pixels."""
    directory.mkdir(exist_ok=True)
    written: dict[int, int] = {}
    images, labels = data.digit_images()
    for image, label in zip(images[first_test_image:], labels[first_test_image:], strict=True):
        number = written.get(label, 0)
        if number < _IMAGES_PER_CLASS:
            write_atomically(directory / f"{label}_{number}.png", partial(image.save, format="png"))
            written[label] = number + 1


def _resnet18() -> LayerTimes:
    with torch.no_grad():
        in_float, on_bits = network_work(RESNET18_LAYERS)
        taken = interleave({"float": in_float, "engine": on_bits}, _BUDGET)
    return LayerTimes(float_conv=taken["float"], engine=taken["engine"])

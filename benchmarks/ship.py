"""Put a trained network into the package, with its card, and record its training.

    python benchmarks/ship.py RUN NAME --machine NAME

RUN is the folder of a finished `biper train`, NAME what `models.load` calls it, such as
"digits/resnet20_1w1a". Writes

    biper_engine/shipped/NAME.biper, NAME.json         the engine and its card
    biper_engine/shipped/NAME.safetensors, NAME.png    the network's weights, and sample images
    benchmarks/results/trained-NAME-MACHINE.json       card, machine, commit, and every epoch
    docs/networks.md                                   the tables of all cards

The engine is first compared with the reference, operator by operator, and its proof replayed. The
network that is built from the shipped weights must give the logits of the trained one, bit for bit,
on all test images, and be the network that the engine was made of.

Add the record to the table of benchmarks/results/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from recording import RESULTS, ROOT, commit, record
from torch import Tensor

import biper_engine
from biper_engine.bench.machine import machine_facts
from biper_engine.bench.threads import common_threads, torch_threads
from biper_engine.bench.timer import Budget, Samples, interleave
from biper_engine.files import sha256_of, write_atomically
from biper_engine.models import Network, registry
from biper_engine.models.signs_file import read_signs, write_signs
from biper_engine.serialization import check_backend, replay
from biper_engine.shipped import Latency, ModelCard
from biper_engine.training import data, to_yaml
from biper_engine.training.examples import Examples, as_image
from biper_engine.training.report import Run, read_run

LEAST_SAME = 0.999
SHIPPED = ROOT / "biper_engine" / "shipped"
PAGE = ROOT / "docs" / "networks.md"
# The tables of the cards in PAGE; `docs/tables.py` prints them.
CARDS = re.compile(r"(?<=<!-- cards -->\n).*?(?=\n<!-- end -->)", re.DOTALL)

# What a card says about a data set that can be trained on by its name.
DATA: dict[str, dict[str, str]] = {
    "digits": {
        "data": (
            "Handwritten digits of scikit-learn (UCI, 8x8 pixels of 17 grey levels, resized to "
            "32x32): the first 1,297 for training, the last 500 for the test."
        ),
        "data_licence": "CC BY 4.0",
        "intended_use": (
            "To try the engine. Digits of a few writers, centred and cut out; not a reader of "
            "documents."
        ),
    },
    "fashion-mnist": {
        "data": (
            "Fashion-MNIST (Zalando Research; 28x28 grey pixels, resized to 32x32): 60,000 images "
            "for training, 10,000 for the test."
        ),
        "data_licence": "MIT",
        "intended_use": (
            "To try the engine. Articles of one shop, white on black, centred and cut out; not "
            "for photos."
        ),
    },
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that `biper train` wrote")
    parser.add_argument("name", help='such as "digits/resnet20_1w1a"')
    parser.add_argument("--machine", required=True, help="name of the machine, for the file")
    parser.add_argument("--threads", type=int, default=1, help="of the engine while it is timed")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long it is timed")
    parser.add_argument("--package", type=Path, default=SHIPPED, help="folder of the networks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    given = parser.parse_args(arguments)
    run, made_at = read_run(given.run), commit()
    target = given.package / f"{given.name}.biper"
    try:
        file = checked(run, given.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        written, same = write_network(run, file, target)
    except ValueError as error:
        parser.error(str(error))
    samples = timed(file, given.threads, given.seconds)
    card = model_card(run, given.name, file, written, same, latency(samples, given.threads))
    write_atomically(target, lambda out: out.write(file.read_bytes()))
    text = json.dumps(card.to_dict(), indent=2) + "\n"
    write_atomically(target.with_suffix(".json"), lambda out: out.write(text.encode()))
    told = given.results / f"trained-{given.name.replace('/', '-')}-{given.machine}.json"
    record({"commit": made_at, **history(run, card, samples)}, told)
    print(card)
    print(target, target.with_suffix(".json"), *written, told, sep="\n")
    if given.package == SHIPPED:
        print(write_page())
    return 0


def checked(run: Run, name: str) -> Path:
    """Return the run's file, if it may be shipped; else say why not."""
    group, _, network = name.partition("/")
    if not (group and network.isidentifier() and group.isidentifier()):
        raise ValueError(f"`name` (={name!r}) must be data/network, as digits/resnet20_1w1a.")
    if not run.is_finished or run.file is None or not run.file_is_verified:
        raise ValueError(
            f"'{run.path}' has no verified model.biper ({run.state}). Finish it with biper train "
            "--resume."
        )
    if data_name(run) not in DATA:
        raise ValueError(f"Describe the data set '{run.config.dataset}' in DATA of this script.")
    if run.stages[1].result is None or run.stages[1].result.test_accuracy is None:
        raise ValueError(f"'{run.path}' was not measured on test images. Train without hold_out.")
    engine = biper_engine.load(run.file)
    operators, proof = check_backend(engine.network, None), replay(engine.network, backend=None)
    if not (operators.ok and proof.ok):
        raise ValueError(f"'{run.file}' is not right on this machine: {operators} {proof}")
    return run.file


def data_name(run: Run) -> str:
    return run.config.dataset.replace("_", "-")


def write_network(run: Run, file: Path, target: Path) -> tuple[list[Path], int]:
    """Write weights and sample images beside the engine's file, after a comparison with the run.

    Returns:
        The files, and the number of test images of which engine and network say the same class.
        A bit that flips within rounding may change one that is undecided.

    Raises:
        ValueError: the network that is read gives other logits than the trained one, or is not
            the one that the engine was made of.
    """
    trained, engine = run.stages[1].network, biper_engine.load(file)
    assert trained is not None
    found = data.load(run.config, registry.architecture(run.config.architecture).metadata)
    assert isinstance(found.test, Examples)
    assert trained.metadata is not None
    images, labels = data.tensors(found.test, trained.metadata)
    weights, strip = target.with_suffix(".safetensors"), target.with_suffix(".png")
    with TemporaryDirectory() as folder:
        write_signs(Path(folder, "signs"), trained)
        contents = Path(folder, "signs").read_bytes()
        rebuilt = read_signs(Path(folder, "signs"))
    wanted = logits(trained, images)
    if not torch.equal(logits(rebuilt, images), wanted):
        raise ValueError(f"The signs of '{run.path}' give other logits than it.")
    same = int((logits(engine, images).argmax(1) == wanted.argmax(1)).sum())
    if same < LEAST_SAME * len(images):
        raise ValueError(f"'{file}' gives other classes than '{run.path}'.")
    if not made_of(engine, rebuilt, images[:2]):
        raise ValueError(f"'{file}' was not made of '{run.path}'.")
    picture = sample_strip(found.test, labels, found.num_classes)
    write_atomically(weights, lambda out: out.write(contents))
    write_atomically(strip, lambda out: picture.save(out, "PNG", optimize=True))
    return [weights, strip], same


def logits(network: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(part) for part in images.split(256)])


def made_of(engine: biper_engine.Engine, network: Network, example: Tensor) -> bool:
    """Whether converting a network, verified, gives the numbers of an engine, all of them."""
    ours = biper_engine.convert(network, example).state_dict()
    theirs = engine.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def sample_strip(test: Examples, labels: Tensor, classes: int) -> Image.Image:
    """Return the first test image of each class, side by side."""
    firsts = [int((labels == label).nonzero()[0]) for label in range(classes)]
    found = [test.read(index)[0] for index in firsts]
    images = [as_image(one) if isinstance(one, Tensor) else one for one in found]
    width, height = images[0].size
    if any(one.size != (width, height) for one in images):
        raise ValueError("The test images differ in size, so that none can be put in a strip.")
    strip = Image.new(images[0].mode, (width * classes, height))
    for label, one in enumerate(images):
        strip.paste(one, (label * width, 0))
    return strip


def write_page() -> Path:
    """Put the tables of the cards into the page of the networks."""
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))["cards"]()
    page = CARDS.sub(lambda _: tables, PAGE.read_text("utf-8"))
    write_atomically(PAGE, lambda out: out.write(page.encode()))
    return PAGE


def timed(file: Path, threads: int, seconds: float) -> Samples:
    """Time calls of one image."""
    engine = biper_engine.load(file)
    assert engine.metadata is not None
    image = torch.randn(1, *(engine.metadata.input_size or ()))
    with torch.inference_mode(), torch_threads(common_threads(threads)):
        budget = Budget(seconds=seconds, most=20_000, warmup=20)
        return interleave({"engine": lambda: engine(image)}, budget)["engine"]


def latency(samples: Samples, threads: int) -> Latency:
    first, third = samples.quartiles_ms
    return Latency(
        median_ms=samples.median_ms,
        quartile_1_ms=first,
        quartile_3_ms=third,
        batch=1,
        threads=threads,
        processor=machine_facts()["processor"],
    )


def model_card(
    run: Run, name: str, file: Path, written: list[Path], same: int, time: Latency
) -> ModelCard:
    assert run.verified is not None
    predictions = run.stages[1].predictions
    assert predictions is not None
    metadata = biper_engine.load(file).metadata
    assert metadata is not None
    return ModelCard(
        name=name,
        architecture=run.config.architecture,
        **DATA[data_name(run)],
        accuracy=run.verified["accuracy"],
        test_images=predictions.images,
        classes=tuple(metadata.class_names or ()),
        bytes=file.stat().st_size,
        float_bytes=run.verified["bytes_before"],
        sha256=sha256_of(file),
        weights_sha256=sha256_of(written[0]),
        samples_sha256=sha256_of(written[1]),
        packed=run.verified["packed"],
        layers=run.verified["layers"],
        verified=(
            f"{_verdict(run.verified)}; the network's class on {same:,} of "
            f"{predictions.images:,} test images"
        ),
        latency=time,
        recipe=to_yaml(run.config),
        versions=run.versions,
        seconds=sum(stage.result.seconds for stage in run.stages if stage.result is not None),
    )


def _verdict(verified: Mapping[str, Any]) -> str:
    """Return the last line of the comparison, on the whole network."""
    end = str(verified["summary"]).splitlines()[-1]
    return f"on {verified['verified_images']} images: {end}"


def history(run: Run, card: ModelCard, samples: Samples) -> dict[str, Any]:
    """Return all that is recorded."""
    stages = {
        f"stage{stage.number}": {
            "result": None if stage.result is None else stage.result.to_dict(),
            "epochs": [stage.metrics[epoch] for epoch in sorted(stage.metrics)],
            "quantization": {name: asdict(error) for name, error in stage.errors.items()},
            "flips_per_weight": stage.flips_per_weight,
            "confusion": None
            if stage.predictions is None
            else stage.predictions.to_dict()["confusion"],
        }
        for stage in run.stages
    }
    times = {"median_ms": samples.median_ms, "samples": len(samples.ms)}
    return {"card": card.to_dict(), "machine": machine_facts(), "time": times, **stages,
            "verify": run.verified}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

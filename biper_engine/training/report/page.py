"""Make the page of a run: what was recorded, and a sentence for what was not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biper_engine.files import write_atomically
from biper_engine.nn import binary_layers
from biper_engine.training.recipe import to_yaml
from biper_engine.training.report.compare import Comparison, runs_in
from biper_engine.training.report.run import Run, Stage, is_run, read_run

__all__ = ["write_report"]

_FILE = "report.html"
# Up to so many classes, all pairs are shown.
_MATRIX_CLASSES = 20
_CONFUSIONS = 20
_FLOAT = "Left out: this network has no binary layers."


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A heading, and either what it has to show or why it has nothing.

    Attributes:
        anchor: its name in links.
        title: heading.
        note: a sentence under the heading.
        svg: a plot.
        columns, rows: a table, folded away.
        kind: which block of the template shows `data`.
        data: for that block.
    """

    anchor: str
    title: str
    note: str = ""
    svg: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    kind: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def write_report(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write a page about a training run, finished or not, or about all runs in a folder.

    The page is one file of HTML, with its plots and images inside; it loads nothing.

    Args:
        folder: what `fit` or `biper train` wrote; or a folder of such folders, as `--sweep` makes.
        output: file; None writes `report.html` into the folder.

    Returns:
        The file.

    Raises:
        CheckpointError: there is no run in the folder, or a file of it is damaged.
        ImportError: the extra `train` is not installed.
    """
    folder = Path(folder)
    target = folder / _FILE if output is None else Path(output)
    if not is_run(folder) and (found := runs_in(folder)):
        page = _compared(folder, found, target)
    else:
        page = _page(read_run(folder))
    write_atomically(target, lambda file: file.write(page.encode()))
    return target


def _page(run: Run) -> str:
    return _rendered(
        "run.html",
        title=f"{run.config.architecture} on {run.config.dataset}",
        subtitle=f"Training run in the folder {run.path.absolute().name}, {run.state}",
        facts=_facts(run),
        sections=[
            _curves(run),
            _quantization(run),
            _flips(run),
            _histograms(run),
            _confusion(run),
            _wrong(run),
            _engine(run),
            _recipe(run),
        ],
    )


def _compared(folder: Path, runs: Sequence[Path], target: Path) -> str:
    compared = Comparison([read_run(path) for path in runs])
    links = {
        path: Path(os.path.relpath(path / _FILE, target.absolute().parent)).as_posix()
        for path in runs
        if (path / _FILE).exists()
    }
    return _rendered(
        "comparison.html",
        title=f"{len(runs)} training run{'s' * (len(runs) != 1)} compared",
        subtitle=f"Folder {folder.absolute().name}; settings that differ: "
        + (", ".join(compared.keys) or "none"),
        svg=compared.plot(),
        columns=compared.columns,
        rows=compared.rows,
        links=[links.get(run.path) for run in compared.runs],
        averages=compared.averages(),
        recipe=to_yaml(compared.runs[0].config),
        keys=compared.keys,
    )


def _rendered(template: str, **values: Any) -> str:
    try:
        import matplotlib  # noqa: F401  # the plots say so, too, but not before the work is done
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            f"A report needs jinja2 and matplotlib, of which one cannot be imported: {error}. "
            'Run: pip install "biper-engine[train]"'
        ) from error
    environment = Environment(
        loader=PackageLoader("biper_engine.training.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


# -- the parts of a run's page ---------------------------------------------------------------------


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what a reader looks for first."""
    facts = [("state", run.state)]
    for stage in run.stages:
        if stage.result is not None:
            facts.append((f"stage {stage.number}, accuracy", _measured(stage)))
    verified = run.verified or {}
    if run.file is not None:
        facts.append(("engine file", f"{run.file.name}, {run.file.stat().st_size:,} bytes"))
    if run.file_is_verified and verified.get("accuracy") is not None:
        facts.append(("engine, accuracy", f"{verified['accuracy']:.2%}"))
    if run.file is not None:
        facts.append(("engine, verified", _verdict(run)))
    seconds = sum(stage.result.seconds for stage in run.stages if stage.result is not None)
    if seconds:
        facts.append(("training time", f"{seconds:,.0f} s"))
    facts.append(("seed", str(run.config.seed)))
    return facts


def _measured(stage: Stage) -> str:
    assert stage.result is not None
    parts = ("test", stage.result.test_accuracy), ("held-out", stage.result.validation_accuracy)
    told = [f"{value:.2%} of {part} images" for part, value in parts if value is not None]
    return ", ".join(told) or "not measured: there were no images to measure on"


def _verdict(run: Run) -> str:
    if run.verified is None:
        return "not by this training; run: biper verify"
    if not run.file_is_verified:
        return "the file was replaced since it was verified; run: biper verify"
    verified = run.verified
    return "yes" if verified["verified"] else "NO: the engine differs from the network"


def _curves(run: Run) -> _Section:
    from biper_engine.training.report import figures

    base: dict[str, Any] = {"anchor": "curves", "title": "Loss, accuracy and learning rate"}
    names = ("train_loss", "train_accuracy", "val_accuracy", "lr")
    if not any(stage.metrics for stage in run.stages):
        return _Section(**base, note="No epoch is finished yet.")
    rows = [
        [
            str(stage.number),
            str(epoch + 1),
            *(f"{row[name]:.4g}" if name in row else "" for name in names),
        ]
        for stage in run.stages
        for epoch, row in sorted(stage.metrics.items())
    ]
    return _Section(
        **base,
        svg=figures.curves(run),
        columns=("stage", "epoch", "loss", "training accuracy", "validation accuracy", "rate"),
        rows=rows,
        note=""
        if any("train_accuracy" in row for stage in run.stages for row in stage.metrics.values())
        else "Accuracy and learning rate were not recorded: an older version trained this run.",
    )


def _without_waves(run: Run) -> str:
    """Return why there is nothing about the waves of BiPer's layers, or nothing."""
    if run.network is None:
        return "There are no weights yet: the first epoch is not finished."
    if next(iter(binary_layers(run.network)), None) is None:
        return _FLOAT
    if not any(stage.errors for stage in run.stages):
        return (
            "Left out: it is defined for BiPer's layers, whose weights pass through a wave. The "
            f"binary layers of {run.config.architecture} have signs of their own."
        )
    return ""


def _quantization(run: Run) -> _Section:
    from biper_engine.training.report import figures

    base: dict[str, Any] = {"anchor": "quantization", "title": "Quantization error"}
    if reason := _without_waves(run):
        return _Section(**base, note=reason)
    binarizer = run.config.weight_binarizer
    note = (
        "With s the wave of the weights and q its sign, the paper's measure is the least mean "
        "square of s - c·q over all scales c; the official code's is the mean of |s - q|. "
    )
    note += (
        "The closed form is the paper's measure of Laplace weights of scale b = mean |w|; it is "
        "largest, 0.1028, at b·w0 = 0.955."
        if binarizer == "periodic"
        else f"The closed form is for the sine, and left out for this run's {binarizer}."
    )
    if binarizer == "sign":
        note += " The measures depend on the size of the weights, so that they cannot be compared."
    rows = [
        [
            str(stage.number),
            name,
            f"{one.error:.5f}",
            "" if one.closed_form is None else f"{one.closed_form:.5f}",
            f"{one.official:.5f}",
            f"{one.spread:.5f}",
        ]
        for stage in run.stages
        for name, one in stage.errors.items()
    ]
    columns = ("stage", "layer", "paper's measure", "closed form", "official code's", "mean |w|")
    return _Section(**base, note=note, svg=figures.quantization(run), columns=columns, rows=rows)


def _flips(run: Run) -> _Section:
    from biper_engine.training.report import figures

    base: dict[str, Any] = {"anchor": "flips", "title": "Sign flips"}
    if not any(stage.layers for stage in run.stages):
        is_float = run.network is not None and not list(binary_layers(run.network))
        reason = (
            _FLOAT
            if is_float
            else "Not recorded: no epoch is finished, or an older version trained this run."
        )
        return _Section(**base, note=reason)
    rows = [
        [
            str(stage.number),
            name,
            f"{layer[-1].weights:,}",
            f"{sum(one.flips for one in layer):,}",
            f"{layer[-1].flips / layer[-1].weights:.3%}",
        ]
        for stage in run.stages
        for name, layer in stage.layers.items()
    ]
    columns = ("stage", "layer", "weights", "flips in the stage", "flips in the last epoch")
    return _Section(
        **base,
        note="A flip is a weight whose sign differs from that at the end of the epoch before.",
        svg=figures.flips(run),
        columns=columns,
        rows=rows,
    )


def _histograms(run: Run) -> _Section:
    from biper_engine.training.report import figures

    base: dict[str, Any] = {"anchor": "histograms", "title": "What the signs are taken of"}
    if reason := _without_waves(run):
        return _Section(**base, note=reason)
    wave = {"periodic": "sin(w0*w)", "sign": "w, clamped to [-1, 1]"}
    name = run.config.weight_binarizer
    note = (
        f"Histograms of {wave.get(name, f'the {name} wave of w0*w')} in each layer"
        f"{', each on its own scale' if name == 'sign' else ', from -1 to 1'}. "
        "Where a stage is not finished, they are of its latest epoch."
    )
    return _Section(**base, note=note, svg=figures.histograms(run))


def _latest(run: Run) -> Stage | None:
    """Return the latest stage with predictions."""
    return next((stage for stage in reversed(run.stages) if stage.predictions), None)


def _without_predictions(run: Run) -> str:
    if not any(stage.result for stage in run.stages):
        return "Measured at the end of a stage; none is finished yet."
    return "Not recorded: there were no images to measure on, or an older version trained this run."


def _confusion(run: Run) -> _Section:
    base: dict[str, Any] = {"anchor": "confusion", "title": "Confusion matrix"}
    stage = _latest(run)
    if stage is None or stage.predictions is None:
        return _Section(**base, note=_without_predictions(run))
    found = stage.predictions
    note = (
        f"{found.images:,} images, after stage {stage.number}: {found.accuracy:.2%} right. "
        "Rows are the classes, columns what the network says."
    )
    labels = sorted({one for pair in found.confusion for one in pair})
    if len(labels) > _MATRIX_CLASSES:
        return _Section(
            **base, note=note, kind="confusions", data=_confusions(run, found.confusion)
        )
    rows = []
    for label in labels:
        total = sum(found.confusion[label, other] for other in labels)
        cells = [
            {"count": found.confusion[label, other], "right": label == other,
             "share": found.confusion[label, other] / max(1, total)}
            for other in labels
        ]  # fmt: skip
        rows.append({"name": run.class_name(label), "cells": cells, "total": total})
    names = [run.class_name(label) for label in labels]
    return _Section(**base, note=note, kind="matrix", data={"names": names, "rows": rows})


def _confusions(run: Run, counts: Any) -> dict[str, Any]:
    """Return the most frequent confusions of many classes."""
    wrong = [(count, pair) for pair, count in counts.items() if pair[0] != pair[1]]
    most = sorted(wrong, key=lambda one: (-one[0], one[1]))[:_CONFUSIONS]
    rows = [
        (run.class_name(label), run.class_name(other), f"{count:,}")
        for count, (label, other) in most
    ]
    return {"rows": rows, "pairs": f"{len(wrong):,}"}


def _wrong(run: Run) -> _Section:
    base: dict[str, Any] = {"anchor": "wrong", "title": "Wrong images"}
    stage = _latest(run)
    if stage is None or stage.predictions is None:
        return _Section(**base, note=_without_predictions(run))
    wrong = stage.predictions.wrong
    if not wrong:
        return _Section(**base, note="There are none: every measured image is right.")
    right = sum(n for (label, other), n in stage.predictions.confusion.items() if label == other)
    total = stage.predictions.images - right
    images = [
        {
            "source": f"data:{one.media_type};base64,{one.picture}",
            "label": run.class_name(one.label),
            "predicted": run.class_name(one.predicted),
            "probability": f"{one.probability:.0%}",
            "index": one.index,
        }
        for one in wrong
    ]
    shown = f"All {total}" if total == len(wrong) else f"{len(wrong)} of {total:,}"
    note = f"{shown}, those first of which the network is surest. Numbers count from 0."
    return _Section(**base, note=note, kind="images", data={"images": images})


def _engine(run: Run) -> _Section:
    base: dict[str, Any] = {"anchor": "engine", "title": "Engine"}
    if run.network is not None and next(iter(binary_layers(run.network)), None) is None:
        return _Section(**base, note=_FLOAT)
    if run.file is None:
        return _Section(
            **base, note="There is no model.biper: the run is not finished, or was not converted."
        )
    verified = run.verified
    if verified is None or not run.file_is_verified:
        return _Section(**base, note=f"Verified: {_verdict(run)}.")
    note = (
        f"{verified['packed']} of {verified['layers']} layers on bits; "
        f"{verified['bytes_before']:,} bytes before, {verified['bytes']:,} in {verified['path']}. "
        f"Compared with the network on {verified['verified_images']} images:"
    )
    return _Section(**base, note=note, kind="text", data={"text": verified["summary"]})


def _recipe(run: Run) -> _Section:
    versions = "\n".join(f"{name} {version}" for name, version in run.versions.items())
    return _Section(
        anchor="recipe",
        title="Recipe and versions",
        kind="recipe",
        data={"recipe": to_yaml(run.config), "versions": versions},
    )

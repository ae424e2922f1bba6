"""The page about a run: what it says, and what it does with a run that is not whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from biper_engine import models
from biper_engine.errors import CheckpointError
from biper_engine.models import Network
from biper_engine.nn import set_binarizers, weight_errors
from biper_engine.training import RunOptions, TrainingConfig, fit, write_report
from biper_engine.training.predictions import Predictions, WrongImage
from biper_engine.training.report import page
from biper_engine.training.report.compare import Comparison, runs_in
from biper_engine.training.report.run import _SETTINGS as SETTINGS
from biper_engine.training.report.run import LayerEpoch, Run, Stage, read_run
from tests.training.few_images import few_images
from tests.training.small_run import SMALL_CONFIG, SMALL_STAGE

MOST_BYTES = 1_000_000
TITLES = [
    *("Loss, accuracy and learning rate", "Quantization error", "Sign flips"),
    *("What the signs are taken of", "Confusion matrix", "Wrong images", "Engine"),
    "Recipe and versions",
]


class Page(HTMLParser):
    """Headings, links and images of a page, and whether its elements are closed."""

    EMPTY = ("meta", "img", "use", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: Counter[str] = Counter()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.EMPTY else [tag]
        values = dict(attrs)
        self.ids.update([values["id"] or ""] if "id" in values else [])
        names = ("src", "href", "xlink:href")
        self.targets += [values[name] or "" for name in names if name in values]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def with_file(run: Path, to: Path) -> Path:
    """Copy a run, and put a file and what was found about it there."""
    shutil.copytree(run, to)
    (to / "model.biper").write_bytes(b"the engine")
    found = {
        "path": "model.biper",
        "bytes": 10,
        "bytes_before": 100,
        "packed": 18,
        "layers": 20,
        "verified": True,
        "verified_images": 16,
        "accuracy": 0.5,
        "summary": "equal: 18 of 18 <binary> layers",
        "sha256": hashlib.sha256(b"the engine").hexdigest(),
    }
    (to / "verify.json").write_text(json.dumps(found))
    return to


def test_the_page_of_a_finished_run(small_run: Path, tmp_path: Path) -> None:
    path = write_report(with_file(small_run, tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    text = path.read_text("utf-8")
    assert len(text.encode()) <= MOST_BYTES
    found = Page(text)
    assert found.open == []
    assert found.headings == TITLES
    assert [name for name, count in found.ids.items() if count > 1] == []
    assert {target for target in found.targets if not target.startswith(("#", "data:"))} == set()
    assert all(target[1:] in found.ids for target in found.targets if target.startswith("#"))
    assert text.count('<svg role="img" aria-label=') == 4
    assert "Left out" not in text
    assert "equal: 18 of 18 &lt;binary&gt; layers" in text
    assert "batch_size: 16" in text
    assert re.search(r"engine, accuracy</dt><dd>50.00%", text)
    assert re.search(r"engine, verified</dt><dd>yes", text)
    told = read_run(small_run).stages[1].predictions
    assert told is not None
    assert text.count("<li><img src=") == len(told.wrong)


def test_a_file_that_was_replaced_is_not_called_verified(small_run: Path, tmp_path: Path) -> None:
    folder = with_file(small_run, tmp_path / "run")
    (folder / "model.biper").write_bytes(b"another one")
    run = read_run(folder)
    assert not run.file_is_verified
    assert "was replaced" in dict(page._facts(run))["engine, verified"]
    assert "was replaced" in page._engine(run).note
    (folder / "verify.json").unlink()
    assert "not by this training" in page._engine(read_run(folder)).note


def unfinished(run: Path, to: Path, *, epochs: bool) -> Path:
    """Copy a run as it is within stage 1."""
    shutil.copytree(run, to)
    for name in ("stage1.pt", "stage2.pt", "result.json"):
        (to / name).unlink()
    shutil.rmtree(to / "logs" / "stage2")
    (to / "checkpoints" / "stage2.ckpt").unlink()
    if not epochs:
        shutil.rmtree(to / "logs")
        shutil.rmtree(to / "checkpoints")
    return to


def test_a_run_that_is_not_finished(small_run: Path, tmp_path: Path) -> None:
    text = write_report(unfinished(small_run, tmp_path / "run", epochs=True)).read_text("utf-8")
    assert Page(text).headings == TITLES
    assert "not finished: stage 1, 2 of 2 epochs" in text
    assert text.count('<svg role="img" aria-label=') == 4
    assert "none is finished yet" in text
    assert "There is no model.biper" in text


def test_a_run_within_stage_2_has_the_names_of_its_classes(small_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_run, tmp_path / "run")
    results = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({"stage1": results["stage1"]}))
    (folder / "stage2.pt").unlink()
    run = read_run(folder)
    assert run.state == "not finished: stage 2, 2 of 2 epochs"
    assert run.stages[1].network is not None
    assert run.stages[1].network.metadata is None
    state = models.load_checkpoint(small_run / "stage2.pt").state_dict()
    for name, value in run.stages[1].network.state_dict().items():
        assert value.equal(state[name])
    assert run.class_name(3) == "3"
    network = run.stages[0].network
    assert network is not None
    assert network.metadata is not None
    network.metadata = dataclasses.replace(network.metadata, class_names=("cat", "dog"))
    assert (run.class_name(1), run.class_name(2)) == ("dog", "2")


def test_a_run_without_an_epoch(small_run: Path, tmp_path: Path) -> None:
    text = write_report(unfinished(small_run, tmp_path / "run", epochs=False)).read_text("utf-8")
    assert Page(text).headings == TITLES
    assert "No epoch is finished yet" in text
    assert "<svg" not in text


def changed(run: Run, network: Network, **config: str) -> Run:
    """Return a run as if it were one of another network."""
    stages = [
        dataclasses.replace(stage, network=network, errors={}, layers={}) for stage in run.stages
    ]
    return dataclasses.replace(
        run,
        stages=(stages[0], stages[1]),
        config=dataclasses.replace(run.config, **config),
    )


def test_a_float_network_has_no_word_about_bits(tmp_path: Path) -> None:
    stage = dataclasses.replace(SMALL_STAGE, epochs=1)
    config = dataclasses.replace(SMALL_CONFIG, architecture="cifar10/resnet20", stage1=stage)
    with few_images():
        options = RunOptions(progress_bar=False, accelerator="cpu")
        fit(config=dataclasses.replace(config, stage2=stage), output_dir=tmp_path, options=options)
    run = read_run(tmp_path)
    for part in (page._quantization, page._flips, page._histograms, page._engine):
        section = part(run)
        assert section.note == "Left out: this network has no binary layers."
        assert not section.svg
    assert page._curves(run).svg
    assert page._confusion(run).kind == "matrix"
    assert Comparison([run]).rows[0][4:] == ["", "", "finished"]


def test_a_network_of_another_paper_has_no_waves(small_run: Path) -> None:
    network = models.build("cifar10/birealnet18")
    run = changed(read_run(small_run), network, architecture="cifar10/birealnet18")
    for part in (page._quantization, page._histograms):
        assert "signs of their own" in part(run).note
    assert "Not recorded" in page._flips(run).note


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "scale"), [("triangle", "the triangle wave"), ("sign", "each on its own scale")]
)
def test_another_wave_is_named(small_run: Path, name: str, scale: str) -> None:
    run = read_run(small_run)
    stages = []
    for stage in run.stages:
        assert stage.network is not None
        set_binarizers(stage.network, weight=name)
        errors = weight_errors(stage.network)
        stages.append(dataclasses.replace(stage, errors=errors))
    config = dataclasses.replace(run.config, weight_binarizer=name)
    run = dataclasses.replace(run, config=config, stages=(stages[0], stages[1]))
    section = page._quantization(run)
    assert f"left out for this run's {name}" in section.note
    assert "Over the frequency" not in section.svg
    assert {row[3] for row in section.rows} == {""}
    assert scale in page._histograms(run).note
    assert page._histograms(run).svg


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "There is no folder"),
        ("empty", r"is not the folder of a training run: it has no config\.json"),
        ("run/stage1.pt", "is a file, not the folder of a training run. It lies in the run"),
        ("other.txt", "is a file, not the folder of a training run. Pass the folder"),
        ("bad", "is not JSON"),
        ("foreign", "has no settings of this version"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path: Path, name: str, message: str) -> None:
    for folder in ("empty", "run", "bad", "foreign"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "stage1.pt").write_text("")
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "foreign" / "config.json").write_text('{"hidden_layers": 3}')
    with pytest.raises(CheckpointError, match=message):
        write_report(tmp_path / name)
    assert not list(tmp_path.rglob("*.html"))


_LAYER = "epoch,layer,weights,flips,quantization_error\n"


def _wrong_image(**values: object) -> str:
    """Return predictions of one wrong image, with other values than training writes."""
    image = {"index": 0, "label": 0, "predicted": 1, "probability": 0.5, "picture": "", **values}
    return json.dumps({"confusion": [[0, 1, 1]], "wrong": [{"media_type": "image/png", **image}]})


@pytest.mark.parametrize("kept", [0, 1, 3, 8])
def test_settings_that_are_not_there_are_not_assumed(tmp_path: Path, kept: int) -> None:
    values = TrainingConfig().to_dict()
    few = dict.fromkeys(SETTINGS[:kept])
    config = {name: value for name, value in values.items() if name in few}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = f"does not say how the run was trained: it has no {SETTINGS[kept]}"
    with pytest.raises(CheckpointError, match=wanted):
        write_report(tmp_path)
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.csv", "epoch,step,lr\n0,1,fast\n", "could not convert string to float"),
        ("metrics.csv", "epoch,step,lr\n2,1,0.1\n", "epoch 2 is none of the 2 of the recipe"),
        ("layers.csv", "epoch,layer\n0,conv1\n", "KeyError"),
        ("predictions.json", "{}", "KeyError"),
        ("predictions.json", "[]", "has a list, wanted a JSON object"),
        ("predictions.json", '{"a": ' + "[" * 5000, "predictions.json' is not JSON"),
        ("predictions.json", '{"confusion": [], "wrong": []}', "`confusion` must have rows"),
        ("predictions.json", '{"confusion": [["a", 0, 1]], "wrong": []}', "`confusion` must have"),
        ("predictions.json", '{"confusion": [[0, 0, -1]], "wrong": []}', "`confusion` must have"),
        ("predictions.json", _wrong_image(label="x"), "an entry of `wrong` has values of other"),
        ("predictions.json", _wrong_image(probability="x"), "an entry of `wrong` has values"),
        ("predictions.json", _wrong_image(picture=None), "an entry of `wrong` has values"),
        ("metrics.csv", "epoch,step,lr\ninf,1,0.1\n", "epoch inf is none of the 2"),
        ("layers.csv", _LAYER + "0,conv1,0,0,0.1\n", "0 of 0 weights changed"),
        ("layers.csv", _LAYER + "0,conv1,4,5,0.1\n", "5 of 4 weights changed"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    small_run: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = shutil.copytree(small_run, tmp_path / "run")
    (folder / "logs" / "stage1" / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        write_report(folder)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [({}, "sha256"), ({"bytes": "x"}, "bytes"), ({"accuracy": []}, "accuracy"),
     ({"verified": None}, "verified")],
)  # fmt: skip
def test_a_damaged_verification_is_named(
    tmp_path: Path, values: dict[str, object], wrong: str
) -> None:
    whole = {
        **dict.fromkeys(("sha256", "path", "summary"), ""),
        **dict.fromkeys(("bytes", "bytes_before", "packed", "layers", "verified_images"), 1),
        "verified": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(TrainingConfig().to_dict()))
    (tmp_path / "verify.json").write_text(json.dumps({**whole, **values} if values else {}))
    with pytest.raises(CheckpointError, match=f"verify.json' has no {wrong} as this version"):
        read_run(tmp_path)
    (tmp_path / "verify.json").write_text(json.dumps(whole))
    assert read_run(tmp_path).verified == whole


def test_many_classes_are_told_by_their_confusions(small_run: Path) -> None:
    run = read_run(small_run)
    counts = Counter({(n, n): 40 for n in range(100)} | {(n, 5): n for n in range(6, 100)})
    stage = dataclasses.replace(run.stages[1], predictions=Predictions(confusion=counts))
    section = page._confusion(dataclasses.replace(run, stages=(run.stages[0], stage)))
    assert section.kind == "confusions"
    assert section.data["pairs"] == "94"
    assert len(section.data["rows"]) == 20
    assert section.data["rows"][0] == ("99", "5", "99")


@pytest.mark.deep
def test_the_largest_page_is_not_too_large(small_run: Path, tmp_path: Path) -> None:
    run = read_run(small_run)
    network = models.build("imagenet/mobilenet_1w1a")
    names = [f"a_long_name_of_a_block.{n}.conv" for n in range(120)]
    errors = dict.fromkeys(names, next(iter(run.stages[0].errors.values())))
    rows = [LayerEpoch(epoch=n, weights=10**6, flips=n, error=0.1) for n in range(600)]
    values = {"train_loss": 1 / 3, "train_accuracy": 2 / 3, "val_accuracy": 0.5, "lr": 1 / 7}
    wrong = WrongImage(index=0, label=1, predicted=2, probability=0.5, picture="A" * 8000,
                       media_type="image/jpeg")  # fmt: skip
    found = Predictions(
        confusion=Counter({(n, m): 1 for n in range(1000) for m in range(20)}), wrong=[wrong] * 24
    )

    def long(stage: Stage) -> Stage:
        return dataclasses.replace(
            stage,
            wanted=600,
            metrics={n: {**values, "sign_flips": 0.1} for n in range(600)},
            layers=dict.fromkeys(names, rows),
            predictions=found,
            network=network,
            errors=errors,
        )

    config = dataclasses.replace(
        run.config, stage1=dataclasses.replace(run.config.stage1, epochs=600)
    )
    long_run = dataclasses.replace(
        run, config=config, stages=(long(run.stages[0]), long(run.stages[1]))
    )
    assert len(page._page(long_run).encode()) <= MOST_BYTES


def test_runs_are_compared(small_run: Path, tmp_path: Path) -> None:
    for frequency in (20.0, 5.0):
        for seed in (0, 1):
            folder = shutil.copytree(small_run, tmp_path / f"frequency={frequency:g},seed={seed}")
            config = json.loads((folder / "config.json").read_text())
            config |= {"frequency": frequency, "seed": seed}
            (folder / "config.json").write_text(json.dumps(config))
    paths = runs_in(tmp_path)
    assert [path.name for path in paths][::2] == ["frequency=5,seed=0", "frequency=20,seed=0"]
    (paths[0] / "report.html").write_text("")
    compared = Comparison([read_run(path) for path in paths])
    assert compared.keys == ["frequency", "seed"]
    assert [row[:2] for row in compared.rows] == [["5", "0"], ["5", "1"], ["20", "0"], ["20", "1"]]
    averages = compared.averages()
    assert averages is not None
    assert [row[:2] for row in averages[1]] == [["5", "2"], ["20", "2"]]
    path = write_report(tmp_path)
    found = Page(path.read_text("utf-8"))
    assert found.open == []
    assert [target for target in found.targets if not target.startswith("#")] == [
        "frequency=5,seed=0/report.html"
    ]
    assert {"Over frequency", "Runs", "Means over the seeds", "Recipe"} <= set(found.headings)


# -- in a browser ----------------------------------------------------------------------------------


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


def browsed(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium, with a window as high as a long page."""
    command = (
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--hide-scrollbars", "--virtual-time-budget=2000", "--window-size=1200,6000"),
        *(f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def boxes(page: Path) -> list[tuple[int, int, int, int]]:
    """Return where the plots are, which a script in a copy of the page finds out."""
    script = """<script>
        const plots = [...document.querySelectorAll('figure > svg')];
        const places = plots.map(one => one.getBoundingClientRect());
        document.title = JSON.stringify(places.map(r => [r.left, r.top, r.right, r.bottom]));
    </script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text("utf-8"))
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</main>", f"</main>{script}"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browsed(copy, "--dump-dom").stdout)
    assert title is not None
    return [tuple(map(round, box)) for box in json.loads(title[1])]


@pytest.mark.deep
def test_a_planted_error_is_in_the_console(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<html><script>console.error('planted')</script></html>")
    (line,) = console(browsed(page, f"--screenshot={tmp_path / 'page.png'}"))
    assert "planted" in line


@pytest.mark.deep
@pytest.mark.parametrize("kind", ["run", "unfinished", "several"])
def test_chromium_shows_the_page(small_run: Path, tmp_path: Path, kind: str) -> None:
    browser()
    folder = tmp_path / "run"
    if kind == "run":
        with_file(small_run, folder)
    elif kind == "unfinished":
        unfinished(small_run, folder, epochs=True)
    else:
        for frequency in (10.0, 20.0):
            one = with_file(small_run, folder / str(frequency))
            config = {**json.loads((one / "config.json").read_text()), "frequency": frequency}
            (one / "config.json").write_text(json.dumps(config))
    page = write_report(folder)
    assert page.stat().st_size <= MOST_BYTES
    done = browsed(page, f"--screenshot={tmp_path / 'page.png'}")
    assert console(done) == []
    picture = Image.open(tmp_path / "page.png").convert("L")
    places = boxes(page)
    assert len(places) == (1 if kind == "several" else 4)
    for left, top, right, bottom in places:
        assert right - left > 600
        assert bottom - top > 100
        plot = picture.crop((left, top, right, bottom))
        marks = sum(count for shade, count in enumerate(plot.histogram()) if shade < 200)
        assert marks > 0.004 * plot.width * plot.height

"""Parquet and WebDataset through the library `datasets`, from local files."""

import io
import sys
import tarfile

import pytest
import torch
from PIL import Image

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.models import load_checkpoint
from biper_engine.training import (
    AugmentConfig,
    RunOptions,
    StageConfig,
    TrainingConfig,
    data,
    fit,
)
from biper_engine.training.loader import Preparation, loader
from biper_engine.training.module import StageModule
from biper_engine.training.tables import Stream

datasets = pytest.importorskip("datasets")
TASK = Metadata(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (10, 9), (value, 0, 255 - value)).save(file, "png")
    return file.getvalue()


def parquet(path, count, *, named=True, broken=()):
    label = datasets.ClassLabel(names=["cat", "dog"]) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    cells = [{"bytes": b"bad" if n in broken else png(n), "path": f"{n}.png"} for n in range(count)]
    rows = {"image": cells, "label": [n % 2 for n in range(count)]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(path))


def webdataset(path, first, count):
    with tarfile.open(path, "w") as file:
        for number in range(first, first + count):
            for end, raw in (("png", png(number)), ("cls", str(number % 2).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{end}")
                entry.size = len(raw)
                file.addfile(entry, io.BytesIO(raw))


def load(dataset, **settings):
    return data.load(TrainingConfig(dataset=str(dataset), **settings), TASK)


def test_a_parquet_file_is_split_and_kept_in_memory(tmp_path):
    parquet(tmp_path / "all.parquet", 20)
    found = load(tmp_path / "all.parquet")
    assert found.metadata.class_names == ("cat", "dog")
    assert found.train.labels().bincount().tolist() == [8, 8]
    images, labels = data.tensors(found.test, TASK)
    assert images.shape == (4, 3, 8, 8)
    assert labels.bincount().tolist() == [2, 2]


def test_a_folder_has_its_own_test(tmp_path):
    for name, count in (("train", 12), ("test", 5)):
        parquet(tmp_path / f"{name}.parquet", count)
    found = load(tmp_path)
    assert (len(found.train), len(found.test)) == (12, 5)
    images, _ = data.tensors(found.test, TASK)
    wanted = torch.tensor([(n / 255 - 0.5) / 0.25 for n in range(5)])
    torch.testing.assert_close(images[:, 0, 0, 0], wanted)


def test_an_unreadable_cell_is_named(tmp_path):
    parquet(tmp_path / "train.parquet", 12, broken=(3,))
    parquet(tmp_path / "test.parquet", 4)
    found = load(tmp_path)
    assert len(found.train) == 11
    assert "3.png" in found.skipped[0]


def test_other_columns_are_named(tmp_path):
    parquet(tmp_path / "all.parquet", 12)
    with pytest.raises(DataError, match=r"`label_column` \(='kind'\) is not in .*image, label"):
        load(tmp_path / "all.parquet", label_column="kind")


def test_a_table_without_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"a": [1], "label": [0]}).to_parquet(str(tmp_path / "t.parquet"))
    with pytest.raises(DataError, match=r"unclear which column .* has the image"):
        load(tmp_path / "t.parquet")


def labelled(path, labels, kind="int64"):
    """Write a table with these labels."""
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(len(labels))]
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    rows = {"image": cells, "label": labels}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(str(path))


@pytest.mark.parametrize(
    ("train", "test", "kind", "message"),
    [
        (["x", "y"] * 5, ["x", "z"], "string", r"1\.png' has the label 'z', which is no class"),
        ([0, 1] * 5, [0, None], "int64", r"1\.png' has the label None, wanted a whole number"),
        ([0, 10**9] * 5, [0, 1], "int64", "10 labels, of which one is 1000000000"),
    ],
)
def test_other_labels_than_those_of_classes_are_refused(tmp_path, train, test, kind, message):
    labelled(tmp_path / "train.parquet", train, kind)
    labelled(tmp_path / "test.parquet", test, kind)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_number_the_classes_otherwise_are_refused(tmp_path, streaming):
    for name, classes in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
        rows = {"image": [{"bytes": png(n), "path": None} for n in range(8)], "label": [0, 1] * 4}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
    with pytest.raises(DataError, match=r"test\.parquet' numbers the classes otherwise, dog, cat"):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize(("label", "kind"), [(0.5, "float64"), ("x", "string"), (None, "int64")])
def test_a_label_of_a_stream_that_is_no_number_is_named(tmp_path, label, kind):
    labelled(tmp_path / "train.parquet", [label] * 10, kind)
    labelled(tmp_path / "test.parquet", [label] * 2, kind)
    found = load(tmp_path, streaming=True, num_classes=2)
    with pytest.raises(DataError, match=f"has the label {label!r}, wanted a whole number"):
        next(iter(found.test.rows(None, 0, 0, 1)))


@pytest.mark.parametrize("raw", [b"", b"no tar" * 999])
def test_a_damaged_webdataset_is_named(tmp_path, raw):
    (tmp_path / "train.tar").write_bytes(raw)
    with pytest.raises(DataError, match=r"Cannot load '.*train\.tar'"):
        load(tmp_path / "train.tar")


def test_a_webdataset_that_breaks_off_is_named(tmp_path):
    webdataset(tmp_path / "test-0.tar", 0, 4)
    webdataset(tmp_path / "train-0.tar", 0, 40)
    raw = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(raw[: len(raw) // 2 + 700])
    found = load(tmp_path, streaming=True, num_classes=2)
    with pytest.raises(DataError, match=rf"'{tmp_path}"):
        list(found.train.rows(None, 0, 0, 1))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"Cannot load '.*t\.parquet'"):
        load(tmp_path / "t.parquet")


def test_a_missing_name_on_the_hub_is_an_error():
    with pytest.raises(DataError, match="nobody/nothing"):
        load("hub:nobody/nothing")


def streamed(tmp_path, **settings):
    for number in range(4):
        webdataset(tmp_path / f"train-{number}.tar", 10 * number, 10)
    webdataset(tmp_path / "test-0.tar", 90, 6)
    return load(tmp_path, streaming=True, num_classes=2, **settings)


def first_column(batches, count):
    found = []
    for images, _, _ in batches:
        found += ((images[:, 0, 0, 0] * 0.25 + 0.5) * 255).round().int().tolist()
        if len(found) >= count:
            break
    return found


def test_a_stream_is_shuffled_by_epoch_and_repeats(tmp_path):
    found = streamed(tmp_path)
    assert isinstance(found.train, Stream)
    prepared = Preparation(metadata=TASK, num_classes=2, augment=AugmentConfig(), seed=5)

    def values(epoch, workers):
        batches = loader(found.train, prepared, 5, epoch=epoch, workers=workers)
        return first_column(batches, 40)

    first = values(0, 0)
    assert sorted(first) == list(range(40))
    assert values(0, 0) == first != values(1, 0)
    assert sorted(values(0, 2)) == list(range(40))


def test_processes_have_parts_of_a_stream(tmp_path):
    found = streamed(tmp_path)
    prepared = Preparation(metadata=TASK, num_classes=2, augment=AugmentConfig(), seed=5)
    parts = [first_column(loader(found.train, prepared, 5, rank=r, world=2), 20) for r in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(40))


def test_the_test_images_of_a_stream_come_once(tmp_path):
    found = streamed(tmp_path)
    prepared = Preparation(metadata=TASK, num_classes=2)
    assert first_column(loader(found.test, prepared, 4), 1000) == list(range(90, 96))


def test_a_stream_needs_its_classes_and_a_test(tmp_path):
    webdataset(tmp_path / "train-0.tar", 0, 4)
    with pytest.raises(DataError, match="a stream cannot be split"):
        load(tmp_path, streaming=True, num_classes=2)
    webdataset(tmp_path / "test-0.tar", 0, 4)
    with pytest.raises(DataError, match="Set num_classes"):
        load(tmp_path, streaming=True)


def test_webdataset_without_streaming_has_an_index(tmp_path):
    webdataset(tmp_path / "all.tar", 0, 20)
    found = load(tmp_path / "all.tar")
    assert (len(found.train), len(found.test)) == (16, 4)
    assert found.num_classes == 2


@pytest.mark.deep
def test_a_stream_is_trained_on_and_resumed(tmp_path, monkeypatch, one_thread):
    for number in range(4):
        webdataset(tmp_path / f"train-{number}.tar", 10 * number, 10)
    webdataset(tmp_path / "test-0.tar", 90, 6)
    stage = StageConfig(epochs=2, lr=0.05, weight_decay=0.0, tau=0.02)
    config = TrainingConfig(
        dataset=str(tmp_path),
        streaming=True,
        num_classes=2,
        steps_per_epoch=2,
        batch_size=4,
        stage1=stage,
        stage2=stage,
    )
    options = RunOptions(progress_bar=False, accelerator="cpu", devices=1, workers=0)
    whole = fit(config=config, output_dir=tmp_path / "whole", options=options)
    step = StageModule.training_step
    seen = []

    def interrupted(self, batch, index):
        seen.append((self.stage_number, self.current_epoch, index))
        if seen[-1] == (2, 1, 1):
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config=config, output_dir=tmp_path / "part", options=options)
    assert seen == [(s, e, n) for s in (1, 2) for e in (0, 1) for n in (0, 1)]
    part = fit(config=config, output_dir=tmp_path / "part", resume=True, options=options)
    for name, value in load_checkpoint(whole.stage2.path).state_dict().items():
        assert torch.equal(load_checkpoint(part.stage2.path).state_dict()[name], value)
    with pytest.raises(ValueError, match="`save_every_steps` is for data with an index"):
        fit(
            config=config,
            output_dir=tmp_path / "c",
            options=RunOptions(save_every_steps=1, progress_bar=False),
        )


def test_a_stream_of_unknown_length_needs_its_steps(tmp_path):
    streamed(tmp_path)
    config = TrainingConfig(dataset=str(tmp_path), streaming=True, num_classes=2)
    with pytest.raises(DataError, match="Set steps_per_epoch"):
        fit(config=config, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_library_says_how_to_install_it(tmp_path, monkeypatch):
    parquet(tmp_path / "all.parquet", 4)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "biper-engine\[train\]"'):
        load(tmp_path / "all.parquet")

"""Where data comes from, by name, folder, file or function, and what is refused."""

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor
from biper_engine.training import AugmentConfig, RunOptions, TrainingConfig, data
from biper_engine.training.examples import MemoryExamples
from biper_engine.training.fit import _feed
from biper_engine.training.loader import Preparation

TASK = Metadata(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)


def load(dataset, **settings):
    return data.load(TrainingConfig(dataset=str(dataset), **settings), TASK)


def fed(config, train=None, validation=None):
    return _feed(config, RunOptions(workers=0), TASK, train, validation)


def picture(path, value, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)


def pictures(folder, classes=("cat", "dog"), count=10):
    for number, name in enumerate(classes):
        for one in range(count):
            picture(folder / name / f"{one}.png", 20 * one + number)
    return folder


class TestDigits:
    def test_they_are_split_in_order(self):
        from sklearn.datasets import load_digits

        train, test = data.digits()
        assert (len(train), len(test)) == (1297, 500)
        assert torch.cat([train.labels(), test.labels()]).tolist() == load_digits().target.tolist()
        assert train.pixels.shape == (1297, 1, 32, 32)

    def test_the_validation_part_is_the_end_of_the_training_part(self):
        found = load("digits")
        train, held_out = found.held_out()
        assert (len(train), len(held_out)) == (1000, 297)
        assert torch.equal(held_out.pixels, found.train.pixels[1000:])

    def test_they_went_through_preprocessing(self):
        from sklearn.datasets import load_digits

        images, labels = data.digit_images()
        assert (images[0].mode, images[0].size) == ("L", (8, 8))
        assert np.array_equal(np.array(images[5]), np.rint(load_digits().images[5] * 255 / 16))
        tensors, numbers = data.tensors(data.digits()[1], data.DIGITS_METADATA)
        assert torch.equal(tensors[3], image_to_tensor(images[1300], data.DIGITS_METADATA))
        assert labels[1300] == numbers[3]


def idx(array, kind=8):
    head = bytes((0, 0, kind, array.ndim))
    return head + np.array(array.shape, ">u4").tobytes() + array.tobytes()


class TestIdx:
    @pytest.fixture
    def files(self, tmp_path):
        generator = np.random.default_rng(0)
        for part, count in (("train", 30), ("t10k", 10)):
            images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
                file.write(idx(images))
            (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        return tmp_path

    def test_files_are_read_packed_or_not(self, files):
        found = load("fashion-mnist", data_dir=str(files))
        assert (len(found.train), len(found.test), found.num_classes) == (30, 10, 10)
        assert found.train.labels().tolist() == [n % 10 for n in range(30)]
        assert found.metadata.class_names[9] == "Ankle boot"
        with gzip.open(files / "train-images-idx3-ubyte.gz") as file:
            first = np.frombuffer(file.read()[16 : 16 + 784], np.uint8).reshape(28, 28)
        wanted = image_to_tensor(Image.fromarray(first), found.metadata)
        assert torch.equal(data.tensors(found.train, found.metadata)[0][0], wanted)

    def test_each_class_keeps_a_tenth_for_validation(self, files):
        generator = np.random.default_rng(2)
        images = generator.integers(0, 256, (200, 28, 28), dtype=np.uint8)
        (files / "train-images-idx3-ubyte.gz").unlink()
        (files / "train-images-idx3-ubyte").write_bytes(idx(images))
        labels = (np.arange(200) % 10).astype(np.uint8)
        (files / "train-labels-idx1-ubyte").write_bytes(idx(labels))
        train, held_out = load("mnist", data_dir=str(files)).held_out()
        assert train.labels().bincount().tolist() == [18] * 10
        assert held_out.labels().bincount().tolist() == [2] * 10

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda raw: raw[:-1], "ends too early: 30 more bytes were wanted and 29 came"),
            (lambda raw: raw + b"1", "goes on after its 30 bytes"),
            (lambda raw: b"\x80\x04" + raw[2:], "starts with 80 04 08 01, wanted 00 00 08 01"),
            (lambda raw: idx(np.zeros(31, np.uint8)), "30 images, but .* 31 labels"),
            (lambda raw: b"", "ends too early"),
        ],
    )
    def test_damage_is_named(self, files, change, message):
        path = files / "train-labels-idx1-ubyte"
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError, match=rf"train-labels-idx1-ubyte'.*{message}|{message}"):
            load("mnist", data_dir=str(files))

    def test_damage_of_a_packed_file_is_named(self, files):
        path = files / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz' is damaged"):
            load("mnist", data_dir=str(files))

    def test_a_folder_of_them_says_to_name_the_data_set(self, files):
        with pytest.raises(DataError, match="dataset mnist or fashion-mnist"):
            load(files)

    @pytest.mark.parametrize("size", [2**32 - 1, 2**14])
    def test_a_header_of_a_huge_size_is_damage(self, files, size):
        head = bytes((0, 0, 8, 3)) + np.array([size] * 3, ">u4").tobytes()
        (files / "t10k-images-idx3-ubyte").write_bytes(head + b"1")
        (files / "t10k-images-idx3-ubyte.gz").unlink()
        with pytest.raises(DataError, match="ends too early"):
            load("mnist", data_dir=str(files))

    def test_a_file_without_an_image_is_named(self, files):
        (files / "t10k-images-idx3-ubyte.gz").unlink()
        (files / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
        (files / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte' has no image"):
            load("mnist", data_dir=str(files))

    @pytest.mark.parametrize(("part", "name"), [("train", "training"), ("t10k", "test")])
    def test_a_label_out_of_range_is_known_before_training(self, files, part, name):
        path = files / f"{part}-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + bytes((77,)))
        config = TrainingConfig(dataset="mnist", data_dir=str(files))
        with pytest.raises(DataError, match=f"Among the {name} images, a label is 77"):
            fed(config)

    def test_a_missing_file_is_named(self, files):
        (files / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(DataError, match="has no file t10k-labels-idx1-ubyte"):
            load("mnist", data_dir=str(files))


class TestCifar:
    @pytest.fixture
    def files(self, tmp_path):
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir()
        generator = np.random.default_rng(1)
        for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
            rows = generator.integers(0, 256, (20, 3073), dtype=np.uint8)
            rows[:, 0] = np.arange(20) % 10
            (folder / name).write_bytes(rows.tobytes())
        return folder

    def test_its_binary_version_is_read_in_order(self, files):
        for place in (files, files.parent):
            found = load("cifar10", data_dir=str(place))
            assert (len(found.train), len(found.test), found.num_classes) == (100, 20, 10)
        raw = np.frombuffer((files / "data_batch_2.bin").read_bytes(), np.uint8).reshape(20, 3073)
        assert np.array_equal(found.train.pixels[23].numpy().reshape(-1), raw[3, 1:])
        assert found.train.labels()[23] == raw[3, 0]

    def test_cifar100_has_fine_labels_and_its_own_names(self, tmp_path):
        for name in ("train.bin", "test.bin"):
            rows = np.zeros((100, 3074), np.uint8)
            rows[:, 0], rows[:, 1] = 3, np.arange(100)
            (tmp_path / name).write_bytes(rows.tobytes())
        names = "\n".join(f"kind{n}" for n in range(100))
        (tmp_path / "fine_label_names.txt").write_text(names)
        found = load("cifar100", data_dir=str(tmp_path))
        assert found.train.labels().tolist() == list(range(100))
        assert found.metadata.class_names[42] == "kind42"

    def test_a_truncated_batch_is_named(self, files):
        path = files / "data_batch_4.bin"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DataError, match=r"data_batch_4\.bin' has 61,455 bytes, wanted a mult"):
            load("cifar10", data_dir=str(files))

    def test_the_pickled_version_is_not_loaded(self, tmp_path):
        (tmp_path / "cifar-10-batches-py").mkdir()
        with pytest.raises(DataError, match="is a pickle, which is never loaded"):
            load("cifar10", data_dir=str(tmp_path))

    def test_missing_files_say_where_to_get_them(self, tmp_path):
        with pytest.raises(DataError, match=r"no data_batch_1\.bin in .* binary version"):
            load("cifar10", data_dir=str(tmp_path))


class TestFolders:
    def test_a_fifth_of_each_class_is_for_the_test(self, tmp_path):
        found = load(pictures(tmp_path, ("cat", "dog", "eel")))
        assert found.metadata.class_names == ("cat", "dog", "eel")
        assert found.train.labels().bincount().tolist() == [8, 8, 8]
        assert found.test.labels().bincount().tolist() == [2, 2, 2]
        again = load(tmp_path)
        assert torch.equal(found.test.pixels, again.test.pixels)

    def test_images_are_those_of_inference(self, tmp_path):
        pictures(tmp_path / "train")
        picture(tmp_path / "test" / "cat" / "deep" / "a.jpg", 3, (64, 40))
        picture(tmp_path / "test" / "dog" / "b.bmp", 90)
        found = load(tmp_path)
        assert (len(found.train), len(found.test)) == (20, 2)
        images, labels = data.tensors(found.test, found.metadata)
        assert labels.tolist() == [0, 1]
        for path, image in zip(("cat/deep/a.jpg", "dog/b.bmp"), images, strict=True):
            assert torch.equal(image, image_to_tensor(tmp_path / "test" / path, found.metadata))

    def test_a_class_may_be_called_train(self, tmp_path):
        found = load(pictures(tmp_path, ("bus", "test", "train")))
        assert found.metadata.class_names == ("bus", "test", "train")

    def test_parts_without_classes_are_no_classes(self, tmp_path):
        with pytest.raises(DataError, match="train' has no folder in it"):
            load(pictures(tmp_path, ("test", "train")))

    def test_parts_of_images_are_read_from_the_files(self, tmp_path):
        pictures(tmp_path)
        found = load(tmp_path, augment=AugmentConfig(crop_area=(0.1, 1)))
        assert not isinstance(found.train, MemoryExamples)
        assert found.train.read(0)[0].size == (20, 16)

    @pytest.mark.parametrize("kept", [True, False])
    def test_an_unreadable_image_is_named_and_left_out(self, tmp_path, kept):
        pictures(tmp_path / "train")
        pictures(tmp_path / "test")
        (tmp_path / "train" / "dog" / "3.png").write_bytes(b"no image")
        augment = AugmentConfig() if kept else AugmentConfig(crop_area=(0.1, 1))
        found = load(tmp_path, augment=augment)
        if kept:
            skipped, count = found.skipped, len(found.train)
        else:
            prepared = Preparation(metadata=found.metadata, num_classes=2, augment=augment)
            batch = prepared.batch(found.train, [(0, n) for n in range(20)])
            skipped, count = batch.skipped, len(batch.labels)
        assert count == 19
        assert [line for line in skipped if "dog/3.png'" in line] == list(skipped)
        assert len(skipped) == 1

    def test_an_unreadable_image_is_an_error_by_option(self, tmp_path):
        pictures(tmp_path / "train")
        pictures(tmp_path / "test")
        (tmp_path / "train" / "dog" / "3.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"dog/3\.png'"):
            load(tmp_path, corrupt="error")
        augment = AugmentConfig(crop_area=(0.1, 1))
        found = load(tmp_path, augment=augment, corrupt="error")
        prepared = Preparation(
            metadata=found.metadata, num_classes=2, augment=augment, corrupt="error"
        )
        every = [(0, n) for n in range(len(found.train))]
        with pytest.raises(DataError, match=r"dog/3\.png'"):
            prepared.batch(found.train, every)

    def test_no_readable_image_at_all_is_an_error(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for number in range(5):
                (tmp_path / name / f"{number}.png").write_bytes(b"x")
        with pytest.raises(DataError, match="No image can be read"):
            load(tmp_path)

    def test_a_class_without_a_readable_image_is_named(self, tmp_path):
        pictures(tmp_path)
        for path in (tmp_path / "dog").iterdir():
            path.write_bytes(b"x")
        with pytest.raises(DataError, match=r"class 'dog' can be read\. .*dog/0\.png'"):
            load(tmp_path)

    def test_an_image_of_16_bits_is_named(self, tmp_path):
        pictures(tmp_path)
        Image.new("I;16", (20, 16), 3000).save(tmp_path / "cat" / "deep.png")
        assert "cat/deep.png' has Pillow mode 'I;16'" in load(tmp_path).skipped[0]

    def test_an_empty_class_is_named(self, tmp_path):
        pictures(tmp_path)
        (tmp_path / "eel").mkdir()
        (tmp_path / "eel" / "notes.txt").write_text("none yet")
        with pytest.raises(DataError, match="The class 'eel' is empty"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("classes", "message"), [((), "has no folder in it"), (("a",), "only the folder 'a'")]
    )
    def test_two_classes_are_wanted(self, tmp_path, classes, message):
        pictures(tmp_path, classes)
        with pytest.raises(DataError, match=message):
            load(tmp_path)

    def test_both_parts_have_the_same_classes(self, tmp_path):
        pictures(tmp_path / "train", ("cat", "dog"))
        pictures(tmp_path / "val", ("cat", "eel"))
        with pytest.raises(DataError, match="missing dog; unknown eel"):
            load(tmp_path)

    def test_another_number_of_classes_is_refused(self, tmp_path):
        pictures(tmp_path)
        with pytest.raises(DataError, match=r"`num_classes` \(=3\) is not the 2 of"):
            load(tmp_path, num_classes=3)

    def test_one_image_of_a_class_is_too_few_for_a_test(self, tmp_path):
        pictures(tmp_path, count=1)
        with pytest.raises(DataError, match="too few to keep some for the test"):
            load(tmp_path)


class Noise(torch.utils.data.Dataset):
    """Twelve images of a kind, with labels 0, 1, 2, 0, ..."""

    classes = ("a", "b", "c")

    def __init__(self, kind="uint8"):
        self.kind = kind

    def __len__(self):
        return 12

    def __getitem__(self, index):
        pixels = torch.full((3, 32, 32), index, dtype=torch.uint8)
        if self.kind == "float":
            return pixels.float(), index % 3
        if self.kind == "pil":
            return Image.fromarray(pixels.permute(1, 2, 0).numpy()), index % 3
        return pixels, index % 3


class TestDatasets:
    @pytest.mark.parametrize("kind", ["uint8", "pil"])
    def test_images_are_prepared(self, kind):
        found = data.from_datasets(Noise(kind), Noise(kind), TrainingConfig(), TASK)
        assert (found.num_classes, found.metadata.class_names) == (3, ("a", "b", "c"))
        images, labels = data.tensors(found.train, TASK)
        assert labels.tolist() == [n % 3 for n in range(12)]
        wanted = [(n / 255 - 0.5) / 0.25 for n in range(12)]
        torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor(wanted))

    def test_float_tensors_are_taken_as_they_are(self):
        found = data.from_datasets(Noise("float"), Noise("float"), TrainingConfig(), TASK)
        prepared = Preparation(metadata=TASK, num_classes=3, augment=AugmentConfig(flip=True))
        batch = prepared.batch(found.train, [(0, 4), (0, 7)])
        assert batch.images[:, 0, 0, 0].tolist() == [4, 7]

    def test_float_tensors_of_another_size_are_refused(self):
        found = data.from_datasets(Noise("float"), Noise("float"), TrainingConfig(), TASK)
        with pytest.raises(DataError, match=r"shape \[3, 32, 32\], wanted \[3, 64, 64\]"):
            data.tensors(found.train, replace(TASK, input_size=(3, 64, 64)))

    def test_the_number_of_classes_is_needed(self):
        class Nameless(Noise):
            classes = None

        with pytest.raises(DataError, match="does not say how many classes"):
            data.from_datasets(Nameless(), Nameless(), TrainingConfig(), TASK)
        config = TrainingConfig(num_classes=5)
        assert data.from_datasets(Nameless(), Nameless(), config, TASK).num_classes == 5

    def test_a_label_out_of_range_is_refused(self):
        found = data.from_datasets(Noise(), Noise(), TrainingConfig(num_classes=2), TASK)
        prepared = Preparation(metadata=TASK, num_classes=found.num_classes)
        with pytest.raises(DataError, match="A label is 2, but there are 2 classes"):
            prepared.batch(found.train, [(0, 2)])

    def test_a_function_gives_them(self, tmp_path, monkeypatch):
        code = "from tests.training.test_training_data import Noise\n"
        code += "def pair():\n    return Noise(), Noise()\ndef other():\n    return 3\n"
        (tmp_path / "mydata.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
        for name in ("mydata:pair", f"{tmp_path}/mydata.py:pair"):
            assert len(load(name).train) == 12
        with pytest.raises(DataError, match="returned a int; wanted a pair"):
            load("mydata:other")
        with pytest.raises(DataError, match="module mydata has no 'nothing'"):
            load("mydata:nothing")
        with pytest.raises(DataError, match="No module 'nowhere'"):
            load("nowhere:pair")
        sys.modules.pop("mydata", None)

    @pytest.mark.parametrize("name", ["near:pair", "near.py:pair", "near.py:Kinds.pair"])
    def test_a_function_lies_here_and_imports_what_is_beside_it(self, tmp_path, monkeypatch, name):
        (tmp_path / "near_too.py").write_text(
            "from tests.training.test_training_data import Noise\n"
        )
        code = "from near_too import Noise\ndef pair():\n    return Noise(), Noise()\n"
        code += "class Kinds:\n    pair = staticmethod(pair)\n"
        (tmp_path / "near.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        assert len(load(name).train) == 12
        for module in ("near", "near_too"):
            sys.modules.pop(module)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("def pair(size):\n    return 1", "cannot be called without arguments: .*'size'"),
            ("pair = 3", "is a int, wanted a callable"),
            ("def pair(:\n", "odd.py' is not Python code: .*line 1"),
            ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
            ("from . import more", "imports from its own package"),
        ],
    )
    def test_odd_functions_are_refused(self, tmp_path, code, message):
        (tmp_path / "odd.py").write_text(code)
        with pytest.raises(DataError, match=message):
            load(f"{tmp_path}/odd.py:pair")


class Odd(Noise):
    """Noise whose item 7 has another image or label."""

    def __init__(self, kind="uint8", image=None, label=1):
        super().__init__(kind)
        self.image, self.label = image, label

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        if index != 7:
            return image, label
        return image if self.image is None else self.image, self.label


NAN = torch.zeros(3, 32, 32).index_fill(2, torch.tensor(5), torch.nan)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (Odd("float", NAN), "Item 7 of `Odd` has an image with NaN or infinite values"),
        (Odd("float", NAN.nan_to_num(torch.inf)), "image with NaN or infinite values"),
        (Odd(image=np.zeros((32, 32, 3), np.uint8)), "Item 7 of `Odd` has a ndarray for an image"),
        (Odd(image=torch.zeros(3, 32, 32)), "are float tensors, which are taken as they are"),
        (Odd(image=torch.zeros(3, 32, 32, dtype=torch.int64)), "torch.int64"),
        (Odd(label=0.7), "Item 7 of `Odd` has the label 0.7, wanted a whole number"),
        (Odd(label="1"), "has the label '1', wanted a whole number"),
        (Odd(label=None), "has the label None, wanted"),
        (Odd(label=torch.eye(3)[1]), "has the label tensor"),
        (Odd(label=3), "A label is 3, but there are 3 classes"),
        (Odd(label=-1), "A label is -1, but there are 3 classes"),
    ],
)
def test_an_item_that_cannot_be_measured_is_known_before_training(odd, message):
    for train, test in ((odd, Noise(odd.kind)), (Noise(odd.kind), odd)):
        with pytest.raises(DataError, match=message):
            fed(TrainingConfig(), train, test)


def test_float_tensors_of_another_type_become_float32():
    pixels = torch.rand(3, 32, 32, dtype=torch.float64)
    found = data.from_datasets(Odd("float", pixels), Noise("float"), TrainingConfig(), TASK)
    image = Preparation(metadata=TASK, num_classes=3).batch(found.train, [(0, 7)]).images[0]
    assert torch.equal(image, pixels.float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("a",)}, "has 1 class; wanted two or more"),
        ({"classes": None, "targets": ["a"] * 12}, "`targets` of `Noise` has the label 'a'"),
        ({"classes": None, "targets": torch.rand(12)}, "wanted a whole number"),
        ({"classes": None, "targets": torch.eye(3)[[0] * 12]}, "wanted a whole number"),
        ({"classes": None, "targets": [0, 1]}, "has 12 items, but its `targets` are 2"),
        ({"classes": None, "targets": [10**9] * 12}, "12 labels, of which one is 1000000000"),
        ({"__len__": lambda self: 0}, "has no training images"),
    ],
)
def test_data_sets_that_contradict_themselves_are_refused(changes, message):
    kind = type("Noise", (Noise,), changes)
    with pytest.raises(DataError, match=message):
        fed(TrainingConfig(), kind(), Noise())


def test_an_empty_test_is_known_before_training():
    empty = type("Empty", (Noise,), {"__len__": lambda self: 0})
    with pytest.raises(DataError, match="has no held-out images"):
        fed(TrainingConfig(), Noise(), empty())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", r"Did you mean 'digits'\? Known: digits"),
        ("cifar-10", "Did you mean 'cifar10'"),
        ("/no/such/folder", "no file or folder of this name"),
        (__file__, "file of an unknown kind"),
    ],
)
def test_unknown_data_lists_what_is_known(name, message):
    with pytest.raises(DataError, match=message):
        load(name)

"""Data sets by name, folder, file or function, for training.

`digits`: scikit-learn's 1,797 handwritten digits (UCI, 8x8 pixels of 17 grey levels), in the file's
own order, unshuffled: the first 1,297 are for training, the last 500 for the test. The last 297 of
the training images are the validation part, on which settings are chosen. The data is grouped by
writer, so both parts have writers that training has not seen; a random split would be easier.

Other data sets keep a tenth of each class's training images as the validation part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from biper_engine import references
from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_pixels
from biper_engine.training import folders, formats
from biper_engine.training.config import TrainingConfig
from biper_engine.training.examples import (
    Examples,
    FileExamples,
    ForeignExamples,
    MemoryExamples,
    counted_classes,
    in_memory,
    select,
)
from biper_engine.training.loader import Preparation
from biper_engine.training.tables import Stream, TableExamples, is_table, load_tables

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DIGITS_METADATA",
    "DataSet",
    "available",
    "digit_images",
    "digits",
    "from_datasets",
    "load",
    "tensors",
]

DIGITS_METADATA = Metadata(
    input_size=(3, 32, 32),
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    class_names=tuple("0123456789"),
)
_DIGITS_TRAIN = 1297
_DIGITS_VALIDATION = 297
_VALIDATION_SHARE = 0.1
# Images of files are kept in memory, as bytes in the network's size, if they take less than this.
_MEMORY_BYTES = 2**30
_HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set split for training.

    Attributes:
        train: all training images, the held-out ones included.
        test: images for the final measurement only.
        metadata: size and normalisation of the network's input, and the class names.
        num_classes: number of labels.
        validation: indices of the training images that are held out to choose settings.
        skipped: a line for each image that cannot be read, as far as that is known already.
    """

    train: Examples | Stream
    test: Examples | Stream
    metadata: Metadata
    num_classes: int
    validation: tuple[int, ...] = ()
    skipped: tuple[str, ...] = ()

    def held_out(self) -> tuple[Examples, Examples]:
        """Return the training images without the held-out ones, and these.

        Raises:
            DataError: there are none, as in a stream.
        """
        if isinstance(self.train, Stream) or not self.validation:
            raise DataError(
                "hold_out needs a validation part, which streams and very small data sets do not "
                "have. Leave hold_out out."
            )
        chosen = set(self.validation)
        others = [index for index in range(len(self.train)) if index not in chosen]
        return select(self.train, others), select(self.train, self.validation)


def available() -> tuple[str, ...]:
    """Return the names that `load` accepts."""
    return tuple(_DATASETS)


def load(config: TrainingConfig, task: Metadata) -> DataSet:
    """Load `config.dataset`: a name of `available()`, a folder, a file, or a function.

    - A name: its files lie in `config.data_dir`, or where they usually are.
    - A folder with a folder for each class; or with `train` and `val` (or `test`), which have them.
    - A Parquet or WebDataset file, a folder of them, or `hub:name`, through the library `datasets`.
    - `module:callable` or `file.py:callable`: a function without arguments that returns a
      `DataSet`, or training and test data as two of `torch.utils.data.Dataset`.

    Args:
        config: its `dataset` and the settings about data.
        task: preprocessing of the network.

    Raises:
        DataError: it is unknown (the message has the closest name), missing or damaged, or has
            another number of classes than `config.num_classes`.
    """
    found = _find(config, task)
    if config.num_classes not in (None, found.num_classes):
        raise DataError(
            f"`num_classes` (={config.num_classes}) is not the {found.num_classes} of "
            f"'{config.dataset}'. Leave it out, or check that this is the right data set."
        )
    return found


def _find(config: TrainingConfig, task: Metadata) -> DataSet:
    name = config.dataset
    if (known := name.replace("_", "-")) in _DATASETS:
        return _DATASETS[known](config, task)
    path = Path(name).expanduser()
    if path.exists() or name.startswith(_HUB):
        return _from_path(name, path, config, task)
    if named := references.parsed(name):
        return _from_function(*named, config, task)
    close = get_close_matches(name, _DATASETS, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise DataError(
        f"Unknown dataset {name!r}.{hint} Known: {', '.join(_DATASETS)}; or a folder with a folder "
        "for each class, a Parquet or WebDataset file, hub:name, or module:callable. There is no "
        "file or folder of this name."
    )


def from_datasets(
    train: Dataset[Any], test: Dataset[Any], config: TrainingConfig, task: Metadata
) -> DataSet:
    """Use two data sets of PyTorch, whose items are (image, label).

    An image is a PIL image or a uint8 tensor [C, H, W], which are resized, augmented and
    normalised, or a float tensor in the network's size, which is taken as it is.
    """
    parts = ForeignExamples(train), ForeignExamples(test)
    names = getattr(train, "classes", None)
    labels = parts[0].labels()
    count = config.num_classes or (len(names) if names else None)
    if count is None and labels is not None and len(labels):
        count = counted_classes(labels.tolist(), f"`targets` of `{type(train).__name__}`")
    if count is None:
        raise DataError(
            f"`{type(train).__name__}` does not say how many classes it has: it has neither "
            "`classes` nor `targets`. Set num_classes."
        )
    task = replace(task, class_names=tuple(map(str, names)) if names else None)
    return _split(*parts, count, task)


def tensors(examples: Examples, metadata: Metadata) -> tuple[Tensor, Tensor]:
    """Return all images [N, C, H, W] float32, as the network takes them, and labels [N]."""
    preparation = Preparation(metadata=metadata, num_classes=2**31)
    batch = preparation.batch(examples, [(0, index) for index in range(len(examples))])
    return batch.images.contiguous(), batch.labels


def digit_images() -> tuple[list[Image], list[int]]:
    """Return scikit-learn's digits as 8-bit grey PIL images of 8x8 pixels, and their labels.

    A pixel v in 0..16 becomes round(v * 255 / 16).
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image) for image in pixels], [int(label) for label in digits.target]


def digits() -> tuple[MemoryExamples, MemoryExamples]:
    """Return the digits' training and test images, resized to 32x32."""
    images, labels = digit_images()
    grey = replace(DIGITS_METADATA, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
    pixels = torch.stack([image_to_pixels(image, grey) for image in images])
    targets = torch.tensor(labels)
    return (
        MemoryExamples(pixels[:_DIGITS_TRAIN], targets[:_DIGITS_TRAIN]),
        MemoryExamples(pixels[_DIGITS_TRAIN:], targets[_DIGITS_TRAIN:]),
    )


def _load_digits(config: TrainingConfig, task: Metadata) -> DataSet:
    train, test = digits()
    return DataSet(
        train=train,
        test=test,
        metadata=DIGITS_METADATA,
        num_classes=10,
        validation=tuple(range(len(train) - _DIGITS_VALIDATION, len(train))),
    )


def _load_idx(name: str, names: tuple[str, ...], mean: float, std: float) -> Any:
    """Return the loader of a data set in the four files of MNIST."""

    def load_files(config: TrainingConfig, task: Metadata) -> DataSet:
        places = [Path("/usr/share/datasets") / name, Path("/usr/share/dataset-" + name)]
        folder = _place(config, name, places, "train-images-idx3-ubyte*")
        parts = [
            formats.read_idx_pair(_one(folder, f"{part}-images-idx3-ubyte"), labels)
            for part in ("train", "t10k")
            for labels in (_one(folder, f"{part}-labels-idx1-ubyte"),)
        ]
        metadata = Metadata(
            input_size=(3, 32, 32), mean=(mean,) * 3, std=(std,) * 3, class_names=names
        )
        grey = replace(metadata, input_size=(1, 32, 32), mean=(mean,), std=(std,))
        resized = [in_memory(part, grey, corrupt="error")[0] for part in parts]
        return _split(resized[0], resized[1], len(names), metadata)

    return load_files


def _load_cifar(count: int) -> Any:
    """Return the loader of CIFAR-10 or CIFAR-100."""

    def load_files(config: TrainingConfig, task: Metadata) -> DataSet:
        usual = {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[count]
        first = "data_batch_1.bin" if count == 10 else "train.bin"
        folder = _place(config, f"cifar{count}", [Path(usual)], first, usual)
        train = [f"data_batch_{number}.bin" for number in range(1, 6)]
        files = (train, ["test_batch.bin"]) if count == 10 else (["train.bin"], ["test.bin"])
        parts = [
            formats.read_cifar([folder / name for name in names], label_bytes=1 + (count == 100))
            for names in files
        ]
        listed = folder / ("batches.meta.txt" if count == 10 else "fine_label_names.txt")
        names = tuple(listed.read_text().split()) if listed.is_file() else None
        known = task.class_names if count == 10 else None
        metadata = replace(task, input_size=(3, 32, 32), class_names=names or known, crop_pct=1.0)
        return _split(parts[0], parts[1], count, metadata)

    return load_files


def _load_imagenet(config: TrainingConfig, task: Metadata) -> DataSet:
    return _load_folder(_place(config, "imagenet", [Path("imagenet")], "train"), config, task)


_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# Mean and standard deviation of the training pixels.
_DATASETS: dict[str, Callable[[TrainingConfig, Metadata], DataSet]] = {
    "digits": _load_digits,
    "mnist": _load_idx("mnist", tuple("0123456789"), 0.1307, 0.3081),
    "fashion-mnist": _load_idx("fashion-mnist", _FASHION, 0.2860, 0.3530),
    "cifar10": _load_cifar(10),
    "cifar100": _load_cifar(100),
    "imagenet": _load_imagenet,
}
_SOURCES = {
    "mnist": "the four .gz files of MNIST",
    "fashion-mnist": "Debian's package dataset-fashion-mnist, or the four .gz files of "
    "github.com/zalandoresearch/fashion-mnist",
    "cifar10": "the binary version of www.cs.toronto.edu/~kriz/cifar.html, unpacked",
    "cifar100": "the binary version of www.cs.toronto.edu/~kriz/cifar.html, unpacked",
    "imagenet": "the folders train and val of image-net.org, with a folder for each class",
}


def _place(
    config: TrainingConfig, name: str, usual: list[Path], file: str, below: str = ""
) -> Path:
    """Return the folder that has a data set's files."""
    given = None if config.data_dir is None else Path(config.data_dir).expanduser()
    roots = [*usual, Path(name), Path("data") / name] if given is None else [given]
    candidates = [place for root in roots for place in (root, root / (below or name))]
    for place in candidates:
        if next(place.glob(file), None) is not None:
            return place
    if any(next(place.glob("*batches-py*"), place / "data_batch_1").exists() for place in roots):
        raise DataError(
            f"The Python version of {name} is a pickle, which is never loaded. Get "
            f"{_SOURCES[name]}, and pass its folder as data_dir."
        )
    looked = ", ".join(f"'{place}'" for place in roots)
    raise DataError(
        f"The files of '{name}' are missing: there is no {file.rstrip('*')} in {looked}. Get "
        f"{_SOURCES[name]}, and pass its folder as data_dir (--data-dir)."
    )


def _one(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"'{folder}' has no file {name} or {name}.gz. Put all four files there.")


def _from_path(name: str, path: Path, config: TrainingConfig, task: Metadata) -> DataSet:
    if name.startswith(_HUB) or is_table(path):
        return _load_tables(name.removeprefix(_HUB), config, task)
    if path.is_dir():
        if next(path.glob("train-images-idx3-ubyte*"), None) is not None:
            raise DataError(
                f"'{name}' has the files of MNIST or a kin. Say which: dataset mnist or "
                f"fashion-mnist, with data_dir '{name}'."
            )
        return _load_folder(path, config, task)
    raise DataError(
        f"'{name}' is a file of an unknown kind; wanted .parquet, .tar, or a folder with a folder "
        "for each class."
    )


def _load_folder(folder: Path, config: TrainingConfig, task: Metadata) -> DataSet:
    train_folder, test_folder = folders.find_parts(folder)
    examples, names = folders.read_tree(train_folder)
    metadata = replace(task, class_names=tuple(names))
    if test_folder is None:
        train, test = _parted(examples, config.test_share, str(folder))
    else:
        train, test = examples, folders.read_tree(test_folder, names)[0]
    return _remembered(train, test, len(names), metadata, config)


def _load_tables(source: str, config: TrainingConfig, task: Metadata) -> DataSet:
    tables = load_tables(source, config)
    metadata = replace(task, class_names=tables.class_names)
    if isinstance(tables.train, Stream):
        assert tables.test is not None
        return DataSet(
            train=tables.train,
            test=tables.test,
            metadata=metadata,
            num_classes=tables.num_classes,
        )
    train: Examples = tables.train
    test: Examples | Stream | None = tables.test
    if test is None:
        train, test = _parted(tables.train, config.test_share, source)
    assert not isinstance(test, Stream)
    return _remembered(train, test, tables.num_classes, metadata, config)


def _from_function(module: str, name: str, config: TrainingConfig, task: Metadata) -> DataSet:
    text, wanted = f"{module}:{name}", "a pair of PyTorch data sets, for training and test"
    try:
        found = references.call(references.resolve(module, name), text, wanted)
    except (ImportError, ValueError) as error:
        raise DataError(f"Cannot load the data: {error}") from error
    if isinstance(found, DataSet):
        return found
    if isinstance(found, tuple) and len(found) == 2:
        return from_datasets(found[0], found[1], config, task)
    raise DataError(
        f"'{text}' returned a {type(found).__name__}; wanted {wanted}, or a training.data.DataSet."
    )


def _remembered(
    train: Examples, test: Examples, count: int, metadata: Metadata, config: TrainingConfig
) -> DataSet:
    """Keep small images in memory; those of a random part of the image are read each time."""
    assert metadata.input_size is not None
    channels, height, width = metadata.input_size
    images = len(train) + len(test)
    if config.augment.crop_area or images * channels * height * width > _MEMORY_BYTES:
        return _split(train, test, count, metadata)
    (kept, lost), (kept_test, lost_test) = (
        in_memory(part, metadata, corrupt=config.corrupt) for part in (train, test)
    )
    gone = _numbers(train) - _numbers(kept)
    if gone:
        number = min(gone)
        name = metadata.class_names[number] if metadata.class_names else number
        raise DataError(f"No training image of the class '{name}' can be read. {lost[0]}")
    return replace(_split(kept, kept_test, count, metadata), skipped=(*lost, *lost_test))


def _numbers(examples: Examples) -> set[int]:
    """Return the classes of which there are images."""
    labels = examples.labels()
    return set() if labels is None else set(labels.tolist())


def _split(train: Examples, test: Examples, count: int, metadata: Metadata) -> DataSet:
    """Choose the validation part."""
    return DataSet(
        train=train,
        test=test,
        metadata=metadata,
        num_classes=count,
        validation=tuple(_share(train, _VALIDATION_SHARE)),
    )


def _parted(
    examples: FileExamples | TableExamples, share: float, source: str
) -> tuple[Examples, Examples]:
    chosen = _share(examples, share)
    if not chosen:
        raise DataError(
            f"'{source}' has {len(examples)} images, too few to keep some for the test. Add "
            "images, or give it folders named train and test."
        )
    others = sorted(set(range(len(examples))) - set(chosen))
    return select(examples, others), select(examples, chosen)


def _share(examples: Examples, share: float) -> list[int]:
    """Choose a share of each class, the same every time; one of a class stays in any case."""
    labels = examples.labels()
    generator = torch.Generator().manual_seed(0)
    if labels is None:
        order = torch.randperm(len(examples), generator=generator)
        return sorted(order[: int(len(examples) * share)].tolist())
    chosen: list[int] = []
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        count = max(0, min(round(len(members) * share), len(members) - 1))
        order = torch.randperm(len(members), generator=generator)[:count]
        chosen += members[order].tolist()
    return sorted(chosen)

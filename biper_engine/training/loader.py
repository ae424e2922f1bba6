"""Batches in a repeatable order: read, augmented and normalised, in worker processes or here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import convert_mode, image_to_pixels, normalize, resampling
from biper_engine.training.augmentation import DRAWS, augment, random_resized_crop
from biper_engine.training.config import AugmentConfig
from biper_engine.training.draws import uniform
from biper_engine.training.examples import Examples, MemoryExamples, as_image
from biper_engine.training.tables import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Batch", "BatchOrder", "Preparation", "loader", "require_labels"]


class Batch(NamedTuple):
    """Images [N, C, H, W] float32, labels [N] int64, and a line for each image left out."""

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What happens to an image on its way into a batch.

    Attributes:
        metadata: size and normalisation.
        num_classes: labels are from 0 to this number, exclusive.
        augment: random changes, or None to measure.
        seed: of the changes.
        corrupt: "skip" or "error".
    """

    metadata: Metadata
    num_classes: int
    augment: AugmentConfig | None = None
    seed: int = 0
    corrupt: str = "skip"

    def batch(self, examples: Examples, keys: Sequence[tuple[int, int]]) -> Batch:
        """Read images by (epoch, index) and prepare them."""
        draws = self._draws(keys)
        indices = [index for _, index in keys]
        if isinstance(examples, MemoryExamples) and not self._takes_parts:
            return self._finished(examples.pixels[indices], examples.labels()[indices], draws)
        found: list[tuple[Image | Tensor | str, int]] = []
        for index in indices:
            try:
                found.append(examples.read(index))
            except DataError:
                raise
            except ValueError as error:
                found.append((str(error), -1))
        return self.collect(found, draws)

    def collect(self, found: Sequence[tuple[Image | Tensor | str, int]], draws: Tensor) -> Batch:
        """Prepare (image, label) pairs; a text in the place of an image says why there is none."""
        images, labels, rows, skipped = [], [], [], []
        for row, (image, label) in enumerate(found):
            try:
                if isinstance(image, str):
                    raise ValueError(image)
                images.append(self._pixels(image, draws[row]))
            except DataError:  # not unreadable, but of another kind
                raise
            except ValueError as error:
                if self.corrupt == "error":
                    raise DataError(str(error)) from error
                skipped.append(str(error))
                continue
            labels.append(label)
            rows.append(row)
        if len(images) < (1 if self.augment is None else 2):
            raise DataError(
                f"{len(skipped)} of the {len(found)} images of a batch cannot be read. The first "
                f"one: {skipped[0] if skipped else 'none'}"
            )
        if len({image.is_floating_point() for image in images}) == 2:
            raise DataError(
                "Some images of a batch are float tensors, which are taken as they are, and others "
                "are bytes, which are normalised. Give images of one kind."
            )
        return self._finished(torch.stack(images), torch.tensor(labels), draws[rows], skipped)

    def _draws(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        if self.augment is None:
            return torch.zeros(len(keys), DRAWS)
        # A batch has images of one epoch.
        return uniform(self.seed, keys[0][0], [index for _, index in keys], DRAWS)

    @property
    def _takes_parts(self) -> bool:
        """Whether a random part of the image is taken, which is read in its own size."""
        return self.augment is not None and self.augment.crop_area is not None

    @property
    def _size(self) -> tuple[int, int]:
        assert self.metadata.input_size is not None
        return self.metadata.input_size[1], self.metadata.input_size[2]

    def _pixels(self, image: Image | Tensor, draws: Tensor) -> Tensor:
        """Return an image in the size of the network: bytes, or a float tensor as it is."""
        channels = len(self.metadata.mean)
        if isinstance(image, Tensor):
            if image.is_floating_point():
                wanted = self.metadata.input_size
                if tuple(image.shape) != wanted:
                    raise DataError(
                        f"A float image has shape {list(image.shape)}, wanted "
                        f"{list(wanted or ())}: float tensors are taken as they are. Resize them "
                        "in the data set, or give uint8 tensors or PIL images."
                    )
                return image
            as_it_is = image.dtype == torch.uint8 and not self._takes_parts
            if as_it_is and tuple(image.shape) == (channels, *self._size):
                return image
            image = as_image(image)
        if self.augment is not None and self.augment.crop_area is not None:
            filter_number = resampling(self.metadata.interpolation)
            image = convert_mode(image, channels)
            return random_resized_crop(image, self._size, self.augment, draws, filter_number)
        return image_to_pixels(image, self.metadata)

    def _finished(
        self, pixels: Tensor, labels: Tensor, draws: Tensor, skipped: Sequence[str] = ()
    ) -> Batch:
        require_labels(labels, self.num_classes)
        if pixels.is_floating_point():  # prepared by the data set
            return Batch(pixels, labels, tuple(skipped))
        if self.augment is not None:
            pixels = augment(pixels, self.augment, draws)
        assert self.metadata.input_size is not None
        channels = self.metadata.input_size[0]
        if pixels.shape[1] == 1 and channels == 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        images = normalize(pixels, self.metadata)
        return Batch(images.contiguous(memory_format=torch.channels_last), labels, tuple(skipped))


def require_labels(labels: Tensor, num_classes: int, start: str = "A") -> None:
    """Require labels from 0 to `num_classes`, exclusive; `start` is how an error begins."""
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        raise DataError(
            f"{start} label is {int(labels[outside][0])}, but there are {num_classes} classes, so "
            f"that labels are from 0 to {num_classes - 1}. Correct the labels, or set num_classes."
        )


class _Prepared(Dataset[Batch | DataError]):
    """Index a whole batch at once: single images and one stack cost ten times as much."""

    def __init__(self, examples: Examples, preparation: Preparation) -> None:
        self._examples = examples
        self._preparation = preparation

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, key: tuple[int, int]) -> Batch | DataError:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | DataError:
        try:
            return self._preparation.batch(self._examples, keys)
        except DataError as error:
            return error  # for `_Loader`


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), in an order that depends on seed and epoch alone.

    The order is one for all processes: batch number b goes to process b % world. Workers learn the
    epoch from the keys, so that they can live on from one epoch to the next.

    Args:
        count: images.
        batch_size: images of a batch; less if there are fewer images for a process.
        seed: None keeps the order, and the last batch even if it is incomplete.
        rank, world: number of this process, and how many there are.
        multiple: a process's number of batches is a multiple of it.
        most: a process has no more batches than this.
        epoch, start: the first epoch, and how many of its batches are left out.

    Raises:
        DataError: there are too few images.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        multiple: int = 1,
        most: int | None = None,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        self._count, self._seed, self._rank, self._world = count, seed, rank, world
        self._epoch, self._start = epoch, start
        self._size = min(batch_size, count // (world * multiple))
        if self._size < (1 if seed is None else 2):
            raise DataError(
                f"There are {count} images, too few for {world * multiple} batches of two images "
                "or more. Add images, or take fewer processes or accumulated batches."
            )
        self._batches = -(-count // self._size)
        if seed is not None:
            per_process = count // (self._size * world) // multiple * multiple
            self._batches = min(per_process, per_process if most is None else most)
        self.sampler = self  # where Lightning looks for `set_epoch`

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration; Lightning calls it before each epoch."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, size = self._epoch, self._size
        order = list(range(self._count))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            order = torch.randperm(self._count, generator=generator).tolist()
        for number in range(self._start, self._batches):
            first = (number * self._world + self._rank) * size
            yield [(epoch, index) for index in order[first : first + size]]


class _StreamBatches(IterableDataset[Batch | DataError]):
    """Batches of a stream; with a seed shuffled, and without end: the loader counts the steps."""

    def __init__(
        self, stream: Stream, preparation: Preparation, size: int, *, rank: int, world: int
    ) -> None:
        self._stream, self._preparation, self._size = stream, preparation, size
        self._rank, self._world = rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch | DataError]:
        try:
            yield from self._batches()
        except DataError as error:
            yield error  # for `_Loader`

    def _batches(self) -> Iterator[Batch]:
        preparation, endless = self._preparation, self._preparation.augment is not None
        worker = get_worker_info()
        part = self._rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        seed = preparation.seed if endless else None
        done = 0
        for turn in range(1 << 20 if endless else 1):
            # Later turns of one epoch have orders of their own, too.
            order = self.epoch + (turn << 20)
            rows = self._stream.rows(seed, order, self._rank, self._world)
            before = done
            while len(group := list(islice(rows, self._size))) > (self._size - 1 if endless else 0):
                keys = [(self.epoch, (part << 40) + done + n) for n in range(len(group))]
                done += len(group)
                draws = preparation._draws(keys)
                yield preparation.collect([(image, label) for _, image, label in group], draws)
            if done == before and endless:
                raise DataError(
                    f"A worker's part of the stream has less than {self._size} images, one batch. "
                    "Take a smaller batch_size or fewer workers."
                )


class _Loader(DataLoader[Any]):
    """A loader whose data sets return a DataError, which is raised here, in the main process.

    If a worker raised it, DataLoader would make the worker's traceback the message.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def loader(
    examples: Examples | Stream,
    preparation: Preparation,
    batch_size: int,
    *,
    order: BatchOrder | None = None,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Iterate over batches.

    Args:
        examples: images and labels.
        preparation: what to do with them.
        batch_size: images of a batch.
        order: of the batches; None takes all images in their own order. Not for streams.
        epoch: the first one, for streams.
        rank: number of this process, for streams.
        world: how many processes there are, for streams.
        workers: processes that read and prepare; 0 does it in this one.
        pin_memory: as DataLoader's.
    """
    options: dict[str, Any] = {"collate_fn": _unchanged, "pin_memory": pin_memory}
    if isinstance(examples, Stream):
        batches = _StreamBatches(examples, preparation, batch_size, rank=rank, world=world)
        batches.set_epoch(epoch)
        workers = min(workers, max(1, examples.shards // world)) if workers else 0
        return _Loader(batches, batch_size=None, num_workers=workers, **options)
    order = order or BatchOrder(len(examples), batch_size)
    return _Loader(
        _Prepared(examples, preparation),
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )


def _unchanged(batch: Any) -> Any:
    return batch

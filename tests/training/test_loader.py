"""Batches: their order, and random changes that depend on seed, epoch and image alone."""

import pytest
import torch
from PIL import Image

from biper_engine.errors import DataError
from biper_engine.metadata import Metadata
from biper_engine.training import AugmentConfig
from biper_engine.training.augmentation import DRAWS, augment, random_resized_crop
from biper_engine.training.draws import uniform
from biper_engine.training.examples import MemoryExamples
from biper_engine.training.loader import BatchOrder, Preparation, loader

GREY = Metadata(input_size=(3, 6, 6), mean=(0.5,) * 3, std=(0.5,) * 3)
EVERYTHING = AugmentConfig(
    pad_px=2, flip=True, brightness=0.3, contrast=0.3, saturation=0.3, max_rotation_deg=20
)


def indices(order):
    return [[index for _, index in batch] for batch in order]


class TestOrder:
    def test_it_depends_on_seed_and_epoch_alone(self):
        order = BatchOrder(10, 4, seed=3, epoch=1)
        assert indices(order) == indices(BatchOrder(10, 4, seed=3, epoch=1))
        order.set_epoch(2)
        assert indices(order) != indices(BatchOrder(10, 4, seed=3, epoch=1))
        assert [len(batch) for batch in order] == [4, 4]
        assert all(epoch == 2 for batch in order for epoch, _ in batch)

    def test_without_a_seed_it_visits_everything(self):
        assert indices(BatchOrder(5, 4)) == [[0, 1, 2, 3], [4]]

    @pytest.mark.parametrize("world", [2, 3])
    def test_processes_share_the_batches_of_one(self, world):
        one = indices(BatchOrder(50, 4, seed=1, multiple=world))
        parts = [indices(BatchOrder(50, 4, seed=1, rank=r, world=world)) for r in range(world)]
        assert one == [batch for step in zip(*parts, strict=True) for batch in step]

    def test_it_goes_on_where_it_stopped(self):
        order = BatchOrder(40, 4, seed=1, epoch=2, start=6)
        assert indices(order) == indices(BatchOrder(40, 4, seed=1, epoch=2))[6:]
        assert len(order) == 10
        order.set_epoch(2)
        assert len(indices(order)) == 4
        order.set_epoch(3)
        assert len(indices(order)) == 10

    def test_few_images_make_smaller_batches(self):
        assert [len(batch) for batch in BatchOrder(7, 48, seed=0, world=2, rank=1)] == [3]

    def test_too_few_images_are_refused(self):
        with pytest.raises(DataError, match="There are 3 images, too few for 2 batches"):
            BatchOrder(3, 4, seed=0, world=2)

    def test_an_epoch_may_be_cut_short(self):
        assert len(BatchOrder(40, 4, seed=0, most=3)) == 3


class TestDraws:
    def test_a_row_does_not_depend_on_the_others(self):
        every = uniform(7, 3, range(100), 5)
        assert torch.equal(uniform(7, 3, [41, 2], 5), every[[41, 2]])
        assert torch.equal(uniform(7, 3, [41], 3)[0], every[41, :3])

    @pytest.mark.parametrize("other", [(8, 3), (7, 4), (3, 7)])
    def test_seed_and_epoch_change_every_number(self, other):
        assert (uniform(7, 3, range(100), 5) == uniform(*other, range(100), 5)).sum() == 0

    def test_they_are_uniform_and_independent(self):
        draws = uniform(0, 0, range(20000), 4).double()
        assert 0 <= draws.min() <= draws.max() < 1
        # Standard errors: 0.002 of the mean, 0.0005 of the variance, 0.007 of a correlation.
        assert (draws.mean(0) - 0.5).abs().max() < 0.01
        assert (draws.var(0) - 1 / 12).abs().max() < 0.0025
        table = torch.cat([draws, draws.roll(1, 0)], 1).T
        assert (torch.corrcoef(table) - torch.eye(8)).abs().max() < 0.035


class TestAugmentation:
    def test_left_out_it_changes_nothing(self):
        pixels = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
        assert augment(pixels, AugmentConfig(), torch.rand(2, DRAWS)) is pixels

    def test_crop_and_flip_are_those_of_indexing(self):
        pixels = torch.randint(0, 256, (40, 3, 6, 5), dtype=torch.uint8)
        draws = torch.rand(40, DRAWS)
        changed = augment(pixels, AugmentConfig(pad_px=2, flip=True), draws)
        for image, result, row in zip(pixels, changed, draws, strict=True):
            padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
            top, left = int(row[0] * 5), int(row[1] * 5)
            wanted = padded[:, top : top + 6, left : left + 5]
            assert torch.equal(result, wanted.flip(2) if row[2] < 0.5 else wanted)

    def test_whole_pixels_are_moved_as_by_indexing(self):
        image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
        draws = torch.full((1, DRAWS), 0.5)
        draws[:, 5:7] = 1.0  # the largest shifts
        moved = augment(image, AugmentConfig(max_shift_px=2), draws)
        torch.testing.assert_close(moved[..., :6, :6], image[..., 2:, 2:].float())

    def test_colours_in_the_middle_of_their_range_stay(self):
        pixels = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
        jitter = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5)
        same = augment(pixels, jitter, torch.full((2, DRAWS), 0.5))
        torch.testing.assert_close(same, pixels.float())
        brighter = augment(pixels, AugmentConfig(brightness=0.5), torch.full((2, DRAWS), 1.0))
        torch.testing.assert_close(brighter, (pixels * 1.5).clamp(max=255))

    def test_grey_images_take_every_change(self):
        pixels = torch.randint(0, 256, (3, 1, 6, 6), dtype=torch.uint8)
        assert augment(pixels, EVERYTHING, torch.rand(3, DRAWS)).shape == (3, 1, 6, 6)

    def test_a_part_of_the_image_is_inside_and_of_the_wanted_area(self):
        image = Image.linear_gradient("L").resize((60, 40))
        draws = uniform(0, 0, range(200), DRAWS)
        config = AugmentConfig(crop_area=(0.25, 0.25), crop_ratio=(1, 1))
        parts = [random_resized_crop(image, (8, 8), config, row, 2) for row in draws]
        assert {part.shape for part in parts} == {(1, 8, 8)}
        spans = torch.stack([part.float() for part in parts])
        # A quarter of 60x40 is 24 or 25 rows of 40: the grey values span that share of 0 to 255.
        heights = spans[:, 0, -1].mean(1) - spans[:, 0, 0].mean(1)
        assert 100 < heights.min() <= heights.max() < 165
        assert spans.std(0).max() > 5

    def test_a_narrow_image_gives_its_middle(self):
        image = Image.new("RGB", (400, 4), (1, 2, 3))
        config = AugmentConfig(crop_area=(0.9, 1), crop_ratio=(1, 1))
        part = random_resized_crop(image, (8, 8), config, torch.rand(DRAWS), 2)
        assert part[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (24, 3, 6, 6), generator=generator, dtype=torch.uint8)
    examples = MemoryExamples(pixels, torch.arange(24) % 10)
    prepared = Preparation(metadata=GREY, num_classes=10, augment=EVERYTHING, seed=5)

    def epochs(count, size):
        order = BatchOrder(24, size, seed=9)
        batches = loader(examples, prepared, size, order=order, workers=count)
        found = []
        for epoch in (0, 1):
            order.set_epoch(epoch)
            found += [images for images, _, _ in batches]
        return torch.cat(found)

    assert torch.equal(epochs(workers, 4), epochs(0, 4))
    assert torch.equal(epochs(0, 4), epochs(0, 12))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_about_the_data_comes_without_the_traceback_of_a_worker(workers):
    examples = MemoryExamples(
        torch.zeros(4, 3, 6, 6, dtype=torch.uint8), torch.tensor([0, 1, 9, 0])
    )
    batches = loader(examples, Preparation(metadata=GREY, num_classes=2), 2, workers=workers)
    with pytest.raises(DataError) as caught:
        list(batches)
    assert str(caught.value).startswith("A label is 9, but there are 2 classes")

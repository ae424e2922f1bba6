import numpy as np
import pytest
import torch

from biper_engine.preprocessing import image_to_tensor
from biper_engine.training import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_split_in_order(digits):
    assert [len(part.labels) for part in (digits.train, digits.test)] == [1297, 500]
    from sklearn.datasets import load_digits

    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert labels.tolist() == load_digits().target.tolist()
    assert digits.train.images.shape == (1297, 3, 32, 32)


def test_validation_part_is_the_end_of_the_training_part(digits):
    assert len(digits.without_validation().labels) == 1000
    assert torch.equal(digits.validation().images, digits.train.images[1000:])


def test_digits_went_through_preprocessing(digits):
    images, labels = data.digit_images()
    assert images[0].mode == "L"
    assert images[0].size == (8, 8)
    from sklearn.datasets import load_digits

    assert np.array_equal(np.array(images[5]), np.rint(load_digits().images[5] * 255 / 16))
    assert torch.equal(digits.test.images[3], image_to_tensor(images[1300], digits.metadata))
    assert labels[1300] == digits.test.labels[3]


def test_shuffled_order_depends_on_seed_and_epoch_alone():
    part = data.Part(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))

    def epoch(seed, number):
        batches = data.loader(part, batch_size=4, shuffle_seed=seed)
        batches.sampler.set_epoch(number)
        return [batch.labels.tolist() for batch in batches]

    assert epoch(3, 1) == epoch(3, 1)
    assert epoch(3, 1) != epoch(3, 2)
    assert [len(labels) for labels in epoch(3, 1)] == [4, 4]


def test_unshuffled_loader_visits_everything_in_order():
    part = data.Part(torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5))
    batches = list(data.loader(part, batch_size=4))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 2, 3, 4]


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Did you mean 'digits'\? Known: digits"):
        data.load("digit")

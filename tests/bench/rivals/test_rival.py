import pytest
import torch
from torch import Tensor

from biper_engine.bench.rivals import Rival, relative_difference
from biper_engine.bench.rivals.rival import check_images, checked, first_line, missing


def identity(images: Tensor) -> Tensor:
    return images


def rival(error: Tensor) -> Rival:
    """A rival that is off by a share of each image."""
    scale = (1 + error).view(-1, 1, 1, 1)
    return Rival(
        name="r", how="", call=lambda x: x * scale, wanted=identity, beside="the float twin"
    )


IMAGES = torch.arange(1.0, 13.0).reshape(4, 3, 1, 1)


def test_a_rival_without_a_form_of_its_own_binds_its_call() -> None:
    assert torch.equal(Rival(name="r", how="", call=lambda x: 2 * x).bound(IMAGES)(), 2 * IMAGES)
    bound = Rival(name="r", how="", call=identity, bind=lambda x: lambda: 3 * x).bound(IMAGES)
    assert torch.equal(bound(), 3 * IMAGES)
    with pytest.raises(ValueError, match="r does not run: no compiler"):
        Rival(name="r", how="", reason="no compiler").bound(IMAGES)


def test_images_that_agree_are_counted() -> None:
    found = checked(rival(torch.tensor([0.0, 1e-5, 1e-3, 0.0])), [IMAGES, IMAGES], share=0.5)
    assert found.agreed == (6, 8)
    assert found.call is not None
    assert found.reason == ""


@pytest.mark.parametrize("bad", [1e-3, float("nan")])
def test_a_rival_that_does_not_agree_is_not_run(bad: float) -> None:
    found = checked(rival(torch.tensor([0.0, bad, 0.0, 0.0])), [IMAGES])
    assert found.call is None
    assert found.agreed is None
    assert found.reason.startswith("it agrees with the float twin on 3 of 4 images only")


@pytest.mark.parametrize("batch", [1, 3, 8, 9])
def test_eight_images_or_more_are_checked_in_batches_of_one_size(batch: int) -> None:
    batches = check_images(torch.zeros(batch, 3, 2, 2))
    assert all(images.shape == (batch, 3, 2, 2) for images in batches)
    assert 8 <= sum(map(len, batches)) < 8 + batch
    assert torch.equal(batches[0], check_images(torch.zeros(batch, 3, 2, 2))[0])


def test_what_is_missing_is_reported_with_how_to_install_it() -> None:
    assert missing("torch") == ""
    assert missing("torch", "no_such_module") == (
        'no_such_module not installed; pip install "biper-engine[bench]"'
    )


def test_the_first_line_of_an_error() -> None:
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_the_difference_is_over_the_largest_value() -> None:
    assert relative_difference([IMAGES + 3, IMAGES], [IMAGES, IMAGES]) == 0.25
    assert relative_difference(torch.ones(2), torch.zeros(2)) == 1.0

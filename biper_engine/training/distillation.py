"""A teacher's logits as part of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.errors import DataError
from biper_engine.models import load_checkpoint
from biper_engine.training.config import DistillationConfig

if TYPE_CHECKING:
    from biper_engine.training.feed import Feed

__all__ = ["distilled", "find_teacher"]


def distilled(
    logits: Tensor, labels: Tensor, wanted: Tensor, settings: DistillationConfig
) -> Tensor:
    """Return the loss of a student.

    With T the temperature it is `(1 - weight) * cross_entropy(logits, labels) + weight * T^2 * KL`.
    KL is the divergence of softmax(logits / T) from softmax(wanted / T), a mean over the batch.

    Source: Hinton et al., arXiv:1503.02531; with weight 1 and T = 1 it has the gradient of the
    distributional loss of Liu et al., "ReActNet", ECCV 2020.
    """
    heat = settings.temperature
    divergence = F.kl_div(
        F.log_softmax(logits / heat, 1),
        F.log_softmax(wanted / heat, 1),
        reduction="batchmean",
        log_target=True,
    )
    soft = heat * heat * divergence
    if settings.weight == 1:
        return soft
    return torch.lerp(F.cross_entropy(logits, labels), soft, settings.weight)


@torch.no_grad()
def find_teacher(teacher: nn.Module | None, settings: DistillationConfig, feed: Feed) -> nn.Module:
    """Return the teacher in eval mode, given or from its checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: it has another number of classes than the data, or cannot take the images.
    """
    if teacher is None:
        assert settings.teacher is not None
        teacher = load_checkpoint(settings.teacher)
    teacher = teacher.eval()
    images = feed.sample(2).images
    try:
        logits = teacher(images)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"The teacher '{settings.teacher}' does not take images of {list(images.shape[1:])}, "
            f"as the network does: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), feed.num_classes):
        shape = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"The teacher '{settings.teacher}' returns {shape} for an image, but the data has "
            f"{feed.num_classes} classes, so that [{feed.num_classes}] logits are wanted."
        )
    return teacher

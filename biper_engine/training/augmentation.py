"""Random changes of training images, on whole batches; each image has its own draws.

The same row of draws gives the same image, whatever else is in the batch.
"""

from __future__ import annotations

from math import radians
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.preprocessing import raw_pixels
from biper_engine.training.config import AugmentConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DRAWS", "augment", "random_resized_crop"]

# Columns of the draws.
_TOP, _LEFT, _FLIP, _TURN, _ZOOM, _SHIFT_X, _SHIFT_Y = range(7)
_BRIGHTNESS, _CONTRAST, _SATURATION, _CROP = range(7, 11)
_ATTEMPTS = 10
DRAWS = _CROP + 2 * _ATTEMPTS + 2

# Luma of ITU-R BT.601, as in Pillow's conversion to grey.
_LUMA = (0.299, 0.587, 0.114)


def augment(pixels: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Crop, flip, recolour, then turn, scale and shift each image at random.

    `random_resized_crop` comes before this, where an image may have another size.

    Args:
        pixels: [N, C, H, W] uint8.
        config: what to do; all of it left out returns `pixels` as they are.
        draws: [N, DRAWS] in [0, 1).

    Returns:
        [N, C, H, W], uint8 or, if colours or angles change, float32 in [0, 255].
    """
    pixels = _crop_and_flip(pixels, config, draws)
    if config.brightness or config.contrast or config.saturation:
        pixels = _jitter(pixels.float(), config, draws)
    if config.max_shift_px or config.max_rotation_deg or config.max_zoom:
        pixels = _move(pixels.float(), config, draws)
    return pixels


def _crop_and_flip(pixels: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Take a window of the image with black borders of `pad_px`; mirror half of the images."""
    if not (config.pad_px or config.flip):
        return pixels
    count, _, height, width = pixels.shape
    places = 2 * config.pad_px + 1
    padded = F.pad(pixels, (config.pad_px,) * 4) if config.pad_px else pixels
    rows = (draws[:, _TOP] * places).long()[:, None] + torch.arange(height)
    columns = (draws[:, _LEFT] * places).long()[:, None] + torch.arange(width)
    if config.flip:
        columns = torch.where(draws[:, _FLIP, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(count)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _jitter(pixels: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation, by factors in [1 - x, 1 + x]."""

    def factor(column: int, most: float) -> Tensor:
        return (1 + most * (2 * draws[:, column] - 1)).view(-1, 1, 1, 1)

    pixels = (pixels * factor(_BRIGHTNESS, config.brightness)).clamp(0, 255)
    mean = _grey(pixels).mean((1, 2, 3), keepdim=True)
    pixels = torch.lerp(mean, pixels, factor(_CONTRAST, config.contrast)).clamp(0, 255)
    grey = _grey(pixels)
    return torch.lerp(grey, pixels, factor(_SATURATION, config.saturation)).clamp(0, 255)


def _grey(pixels: Tensor) -> Tensor:
    if pixels.shape[1] != 3:
        return pixels
    return (pixels * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _move(pixels: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Turn, scale and shift, bilinearly, with the border repeated outside."""
    count, _, height, width = pixels.shape
    signed = 2 * draws - 1
    angle = signed[:, _TURN] * radians(config.max_rotation_deg)
    zoom = 1 + signed[:, _ZOOM] * config.max_zoom
    # grid_sample's unit is half an image: a pixel is 2 / width.
    shift_x = signed[:, _SHIFT_X] * (2 * config.max_shift_px / width)
    shift_y = signed[:, _SHIFT_Y] * (2 * config.max_shift_px / height)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def random_resized_crop(
    image: Image, size: tuple[int, int], config: AugmentConfig, draws: Tensor, resampling: int
) -> Tensor:
    """Take a random part of an image and resize it, as torchvision's RandomResizedCrop does.

    The part's share of the area is uniform in `crop_area`, the logarithm of its width over its
    height in that of `crop_ratio`. If ten such parts are larger than the image, the middle of the
    image is taken, with the nearest ratio that is allowed.

    Args:
        image: grey or RGB.
        size: (height, width) of the result.
        config: its `crop_area`, which must be given, and `crop_ratio`.
        draws: the image's row.
        resampling: Pillow's number of the filter, which is antialiased.

    Returns:
        [C, *size] uint8.
    """
    left, top, width, height = _part(image.width, image.height, config, draws.tolist())
    box = (left, top, left + width, top + height)
    return raw_pixels(image.resize((size[1], size[0]), resampling, box))


def _part(
    width: int, height: int, config: AugmentConfig, draws: list[float]
) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random part."""
    assert config.crop_area is not None
    (least, most), (low, high) = config.crop_area, config.crop_ratio
    place_x, place_y = draws[_CROP + 2 * _ATTEMPTS :]
    for attempt in range(_ATTEMPTS):
        share, shape = draws[_CROP + 2 * attempt : _CROP + 2 * attempt + 2]
        area = width * height * (least + share * (most - least))
        ratio = low * (high / low) ** shape
        wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < wide <= width and 0 < tall <= height:
            return int(place_x * (width - wide + 1)), int(place_y * (height - tall + 1)), wide, tall
    wide, tall = min(width, round(height * high)), min(height, round(width / low))
    return (width - wide) // 2, (height - tall) // 2, max(1, wide), max(1, tall)

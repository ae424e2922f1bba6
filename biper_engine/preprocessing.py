"""Turn an image into the tensor that a network was trained on.

Training and inference share this function, so that an engine gets the same input as its network.
"""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biper_engine.metadata import Interpolation, Metadata

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "TooManyPixelsError",
    "convert_mode",
    "image_to_pixels",
    "image_to_tensor",
    "normalize",
    "open_image",
    "raw_pixels",
    "resampling",
]


class TooManyPixelsError(ValueError):
    """An image has more pixels than the caller of `open_image` accepts: `pixels` of them."""

    def __init__(self, message: str, pixels: int) -> None:
        super().__init__(message)
        self.pixels = pixels


# What Pillow raises for broken files. SyntaxError comes from its PNG reader.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError),
    *(TypeError, OverflowError, AttributeError, NotImplementedError),
)
# A line of pixels becomes a huge image if its short side is to be as long as the network's.
_MOST_RESIZED_PIXELS = 2**26

_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def image_to_tensor(image: Image | str | os.PathLike[str], metadata: Metadata) -> Tensor:
    """Convert, resize, crop and normalise one image, as timm and torchvision do.

    With `input_size` = (C, H, W), in this order and exactly:

    1. Convert to grey (C = 1) or RGB (C = 3). Transparency is dropped, not blended; EXIF
       orientation is ignored, as in timm.
    2. Resize with Pillow's antialiased filter. With (h, w) the size of the image and
       (H', W') = (floor(H / crop_pct), floor(W / crop_pct)): if H' = W', the shorter side becomes
       H' and the longer one floor(H' * longer / shorter); if not, both sides are divided by
       min(h / H', w / W') and rounded. An image that already has this size is not resampled.
    3. Crop H x W with top = round((h - H) / 2) and left = round((w - W) / 2), ties to even.
    4. In float32: (pixel / 255 - mean[c]) / std[c].

    Args:
        image: a PIL image of 8 bits per channel, or the path of a file that Pillow can read.
        metadata: its `input_size`, `interpolation`, `crop_pct`, `mean` and `std` are used.

    Returns:
        [C, H, W] float32 tensor, contiguous.

    Raises:
        ValueError: unreadable file (the message has its path), more than 8 bits per channel, a
            shape that resizing makes huge, or metadata without `input_size`, with channels other
            than 1 or 3, or with a `mean` of another number of channels.
    """
    return normalize(image_to_pixels(image, metadata), metadata).contiguous()


def image_to_pixels(image: Image | str | os.PathLike[str], metadata: Metadata) -> Tensor:
    """Do the first three steps of `image_to_tensor`: convert, resize and crop.

    Returns:
        [C, H, W] uint8 tensor, contiguous.

    Raises:
        ValueError: as `image_to_tensor`.
    """
    channels, height, width = _checked_input_size(metadata)
    pixels = open_image(image) if isinstance(image, str | os.PathLike) else image
    pixels = convert_mode(pixels, channels)
    pixels = _resize(pixels, height, width, metadata)
    left, top = round((pixels.width - width) / 2), round((pixels.height - height) / 2)
    return raw_pixels(pixels.crop((left, top, left + width, top + height)))


def raw_pixels(image: Image) -> Tensor:
    """Return a grey or RGB image as it is, as a contiguous [C, H, W] uint8 tensor."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor, metadata: Metadata) -> Tensor:
    """Do the last step of `image_to_tensor`: `(pixel / 255 - mean[c]) / std[c]` in float32.

    Args:
        pixels: [..., C, H, W], uint8, or float in [0, 255].
        metadata: its `mean` and `std` are used.
    """
    values = pixels.to(torch.float32).div(255)
    mean, std = torch.tensor(metadata.mean), torch.tensor(metadata.std)
    return (values - mean[:, None, None]) / std[:, None, None]


def _checked_input_size(metadata: Metadata) -> tuple[int, int, int]:
    if metadata.input_size is None:
        raise ValueError(
            "`metadata.input_size` is None, so the size to resize to is unknown. "
            "Pass Metadata(input_size=(channels, height, width), ...)."
        )
    if metadata.input_size[0] not in (1, 3):
        raise ValueError(
            f"`metadata.input_size` (={metadata.input_size}) must have 1 or 3 channels."
        )
    if len(metadata.mean) != metadata.input_size[0]:
        raise ValueError(
            f"`metadata.mean` (={metadata.mean}) must have one entry for each of the "
            f"{metadata.input_size[0]} channels of `input_size`."
        )
    return metadata.input_size


def open_image(
    source: str | os.PathLike[str] | bytes,
    name: str | None = None,
    *,
    formats: tuple[str, ...] | None = None,
    most_pixels: int | None = None,
) -> Image:
    """Read an image from a file or from the bytes of one.

    Args:
        source: path, or contents.
        name: what messages call the image; None takes the path.
        formats: Pillow's names of those to try; None tries all.
        most_pixels: of an image, which is not decoded if it has more; None leaves it to Pillow.

    Raises:
        TooManyPixelsError: it has more than `most_pixels`.
        ValueError: it cannot be read, or Pillow finds it too large; the message has its name.
    """
    from PIL import Image, UnidentifiedImageError

    named = name or ("<bytes>" if isinstance(source, bytes) else os.fspath(source))
    if not isinstance(source, bytes) and os.path.exists(source) and not os.path.isfile(source):
        # Opening a pipe would wait for a writer.
        kind = "a directory" if os.path.isdir(source) else "not a regular file"
        raise ValueError(f"Cannot read an image from '{named}': it is {kind}.")
    contents = BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(contents, formats=formats) as file:
            if most_pixels is not None and file.width * file.height > most_pixels:
                raise TooManyPixelsError(
                    f"Refusing the image '{named}': it has {file.width} x {file.height} pixels; "
                    f"{most_pixels:,} are accepted.",
                    file.width * file.height,
                )
            file.load()
            file.filename = named  # for `convert_mode`
            return file
    except UnidentifiedImageError as error:
        tried = f" It was tried as {', '.join(formats)}." if formats else ""
        raise ValueError(
            f"Cannot read an image from '{named}': it is no image of a known format.{tried}"
        ) from error
    except TooManyPixelsError:
        raise
    except _UNREADABLE as error:
        raise ValueError(f"Cannot read an image from '{named}': {error}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"Refusing the image '{named}': {error}") from error


def convert_mode(image: Image, channels: int) -> Image:
    """Convert to grey, for one channel, or RGB; transparency is dropped.

    Raises:
        ValueError: the image has more than 8 bits per channel.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode not in _EIGHT_BIT_MODES:
        file = getattr(image, "filename", None)  # as `open_image` calls it
        name = f"'{file}'" if file else "`image`"
        raise ValueError(
            f"{name} has Pillow mode '{image.mode}', which is not 8 bits per channel. "
            "Scale it to 8 bits first: converting here would clip it."
        )
    if image.mode in ("P", "PA"):
        # A palette may hold transparency; Pillow drops it without a warning only through RGBA.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _resize(image: Image, height: int, width: int, metadata: Metadata) -> Image:
    target_height = floor(height / metadata.crop_pct)
    target_width = floor(width / metadata.crop_pct)
    if target_height == target_width:
        shorter = min(image.height, image.width)
        size = (image.width * target_width // shorter, image.height * target_height // shorter)
    else:
        ratio = min(image.height / target_height, image.width / target_width)
        size = (round(image.width / ratio), round(image.height / ratio))
    if size == image.size:
        return image
    if size[0] * size[1] > _MOST_RESIZED_PIXELS:
        raise ValueError(
            f"`image` has {image.width} x {image.height} pixels and would be resized to "
            f"{size[0]} x {size[1]}, more than {_MOST_RESIZED_PIXELS:,}. Crop it first."
        )
    return image.resize(size, resampling(metadata.interpolation))


def resampling(interpolation: Interpolation) -> int:
    """Return Pillow's number of a filter."""
    from PIL.Image import Resampling

    return {
        "nearest": Resampling.NEAREST,
        "bilinear": Resampling.BILINEAR,
        "bicubic": Resampling.BICUBIC,
    }[interpolation]

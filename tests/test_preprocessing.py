import os

import numpy as np
import pytest
import torch
from PIL import Image

from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor

GREY = Metadata(input_size=(1, 4, 4), mean=(0.0,), std=(1.0,))


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_image_of_the_right_size_is_only_normalised():
    pixels = noise(5, 7, 3)
    metadata = Metadata(input_size=(3, 5, 7), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    tensor = image_to_tensor(Image.fromarray(pixels), metadata)
    values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    expected = (values - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]
    ).view(3, 1, 1)
    assert torch.equal(tensor, expected)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resize_is_pillows(interpolation):
    image = Image.fromarray(noise(8, 8))
    metadata = Metadata(
        input_size=(1, 32, 32), interpolation=interpolation, mean=(0.0,), std=(1.0,)
    )
    expected = image.resize((32, 32), Image.Resampling[interpolation.upper()])
    tensor = image_to_tensor(image, metadata)
    assert torch.equal(tensor, torch.from_numpy(np.array(expected))[None].float() / 255)


def test_shorter_side_is_resized_and_the_centre_cropped():
    # The shorter side becomes floor(8 / 0.8) = 10, the longer one floor(10 * 33 / 21) = 15.
    image = Image.fromarray(noise(21, 33))
    metadata = Metadata(input_size=(1, 8, 8), crop_pct=0.8, mean=(0.0,), std=(1.0,))
    resized = np.array(image.resize((15, 10), Image.Resampling.BILINEAR))
    # top = (10 - 8) / 2 = 1; left = round(3.5) = 4, ties to even.
    expected = torch.from_numpy(resized[1:9, 4:12])[None].float() / 255
    assert torch.equal(image_to_tensor(image, metadata), expected)


def test_unequal_sides_are_covered():
    image = Image.fromarray(noise(20, 20))
    metadata = Metadata(input_size=(1, 5, 10), mean=(0.0,), std=(1.0,))
    resized = np.array(image.resize((10, 10), Image.Resampling.BILINEAR))
    expected = torch.from_numpy(resized[2:7])[None].float() / 255
    assert torch.equal(image_to_tensor(image, metadata), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_eight_bit_mode_is_converted(mode, channels):
    metadata = Metadata(input_size=(channels, 4, 4), mean=(0.0,) * channels, std=(1.0,) * channels)
    tensor = image_to_tensor(Image.new("RGB", (4, 4), "white").convert(mode), metadata)
    torch.testing.assert_close(tensor, torch.ones(channels, 4, 4), rtol=0, atol=1 / 255)


def test_palette_transparency_is_dropped(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 100, 50])
    image.save(tmp_path / "a.png", transparency=b"\x00")
    metadata = Metadata(input_size=(3, 4, 4))
    tensor = image_to_tensor(tmp_path / "a.png", metadata)
    assert (tensor[:, 0, 0] * 255).round().tolist() == [200, 100, 50]


def test_path_and_image_give_the_same(tmp_path):
    image = Image.fromarray(noise(9, 6))
    image.save(tmp_path / "a.png")
    from_path = image_to_tensor(tmp_path / "a.png", GREY)
    assert torch.equal(from_path, image_to_tensor(image, GREY))
    assert torch.equal(from_path, image_to_tensor(str(tmp_path / "a.png"), GREY))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deeper_images_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode '{mode}', which is not 8 bits per channel"):
        image_to_tensor(Image.new(mode, (4, 4)), GREY)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"Cannot read an image from '.*a\.png'"):
        image_to_tensor(tmp_path / "a.png", GREY)


@pytest.mark.parametrize(
    ("make", "kind"), [(os.mkfifo, "not a regular file"), (os.mkdir, "a directory")]
)
def test_a_path_that_is_not_a_file_is_not_opened(tmp_path, make, kind):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"Cannot read an image from '.*a\.png': it is {kind}"):
        image_to_tensor(tmp_path / "a.png", GREY)


def test_truncated_file_is_named(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"Cannot read an image from '.*a\.png'"):
        image_to_tensor(tmp_path / "a.png", GREY)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png.*No such file"):
        image_to_tensor(tmp_path / "none.png", GREY)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (Metadata(), "`metadata.input_size` is None"),
        (Metadata(input_size=(2, 4, 4), mean=(0, 0), std=(1, 1)), "must have 1 or 3 channels"),
        (Metadata(input_size=(1, 4, 4)), "one entry for each of the 1 channels"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        image_to_tensor(Image.new("L", (4, 4)), metadata)

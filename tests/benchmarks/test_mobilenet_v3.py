"""MobileNetV3 compared with its paper: arXiv:1905.02244, tables 1 and 2."""

from collections.abc import Callable

import pytest
import torch
from mobilenet_v3 import (
    MobileNetV3,
    SqueezeExcite,
    mobilenet_v3_large,
    mobilenet_v3_small,
    multiple_of_8,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.images import images

# Parameters of the usual PyTorch model; multiply-accumulates as in the paper, which counts without
# saying how: ours, of convolutions and linear layers, padded taps included, are within 2 %.
COUNTS = (
    pytest.param(mobilenet_v3_small, 2_542_856, 56e6, id="small"),
    pytest.param(mobilenet_v3_large, 5_483_032, 219e6, id="large"),
)
# Channels and size of the map after each stride of 2, and before the pool.
MAPS = (
    pytest.param(
        mobilenet_v3_small, [(16, 112), (16, 56), (24, 28), (48, 14), (576, 7)], id="small"
    ),
    pytest.param(
        mobilenet_v3_large, [(16, 112), (24, 56), (40, 28), (112, 14), (960, 7)], id="large"
    ),
)

Build = Callable[[], MobileNetV3]


@pytest.mark.parametrize(("build", "parameters", "macs"), COUNTS)
def test_it_has_the_published_parameters_and_work(
    build: Build, parameters: int, macs: float
) -> None:
    network = build().eval()
    assert sum(values.numel() for values in network.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = network(images(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.02)
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("build", "wanted"), MAPS)
def test_maps_have_the_shapes_of_the_tables(build: Build, wanted: list[tuple[int, int]]) -> None:
    x, last = images(1, 3, 224, 224), {}
    with torch.no_grad():
        for block in build().eval().features:
            x = block(x)
            last[x.shape[2]] = (x.shape[1], x.shape[2])
            assert x.shape[2] == x.shape[3]
    assert list(last.values()) == wanted


@pytest.mark.parametrize("build", [mobilenet_v3_small, mobilenet_v3_large])
def test_in_eval_mode_an_image_gives_the_same_output_in_any_batch(build: Build) -> None:
    network, batch = build().eval(), images(3, 3, 64, 64)
    with torch.no_grad():
        together, again, alone = network(batch), network(batch), network(batch[1:2])
        trained = network.train()(batch)
    assert torch.equal(together, again)
    # Statistics of the batch, or dropout, change logits by their own size; another order of sums
    # in float32 by less than a thousandth of it.
    size = float(together.abs().max())
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=0.01 * size)
    assert float((trained - together).abs().max()) > 0.1 * size


def test_squeeze_and_excite_scales_channels_by_a_function_of_their_means() -> None:
    layer = SqueezeExcite(24)
    _, squeeze, _, expand, _ = layer.scale
    assert isinstance(squeeze, nn.Conv2d)
    assert isinstance(expand, nn.Conv2d)
    x = torch.randn(2, 24, 5, 4, generator=torch.Generator().manual_seed(2))
    hidden = F.relu(F.linear(x.mean((2, 3)), squeeze.weight.flatten(1), squeeze.bias))
    arguments = F.linear(hidden, expand.weight.flatten(1), expand.bias)
    scale = ((arguments + 3).clamp(0, 6) / 6)[:, :, None, None]
    torch.testing.assert_close(layer(x), x * scale)


def test_only_blocks_that_keep_the_shape_have_a_shortcut() -> None:
    blocks = list(mobilenet_v3_small().features)[1:-1]
    assert [block.has_shortcut for block in blocks] == [
        *(False, False, True, False, True, True),
        *(False, True, False, True, True),
    ]
    block = blocks[2].eval()
    x = torch.randn(1, 24, 6, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(block(x), x + block.layers(x))


@pytest.mark.parametrize(
    ("channels", "wanted"), [(4, 8), (18, 24), (24, 24), (30, 32), (36, 40), (60, 64), (168, 168)]
)
def test_squeezed_channels_are_multiples_of_8(channels: float, wanted: int) -> None:
    assert multiple_of_8(channels) == wanted

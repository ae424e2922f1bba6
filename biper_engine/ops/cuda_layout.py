"""Arguments of the `csrc/cuda` kernels besides maps: weights in their order, limits of bits."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.bits import WORD_BITS, words
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.reference import apply_epilogue

__all__ = ["Layout", "bit_limits", "layout_of", "plain_signs", "prepacked_stem", "prepacked_words"]

_FRAGMENT_WORDS = 256  # words of 32 channels in a step of 256 bits
_STEP_PAIRS = 4  # pairs of words in a step


def _masked(weight: Tensor, channels: int) -> Tensor:
    """Return packed weights without the unused bits of their last words."""
    if channels % WORD_BITS == 0:
        return weight
    masked = weight.clone()
    masked[..., -1] &= (1 << channels % WORD_BITS) - 1
    return masked


def _popcount(packed: Tensor) -> Tensor:
    """Return the set bits of every word, int32."""
    return contract.unpack_channels(packed.unsqueeze(-1), WORD_BITS).sum(-1, dtype=torch.int32)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of each layout of the weights in the prepacked words; see csrc/cuda.

    Attributes:
        fragments: words of the tensor-core fragments (bconv_mma.cuh); 0 with groups.
        sums: words of the prefix sums over the taps; 0 with groups.
        taps: words tap by tap (bconv_popcount.cuh).
        chunk_words: words of a pixel in one chunk.
        steps: steps of 256 bits in a chunk.
        chunks: chunks of a pixel.
        blocks: blocks of 32 output channels.
    """

    fragments: int
    sums: int
    taps: int
    chunk_words: int
    steps: int
    chunks: int
    blocks: int

    @property
    def total(self) -> int:
        return self.fragments + self.sums + self.taps


def layout_of(geometry: Conv2dGeometry, chunk_words: int) -> Layout:
    """Return the layouts of a convolution; csrc/cuda/bconv.h computes its `chunk_words`."""
    taps = geometry.taps * words(geometry.group_channels) * geometry.out_channels
    if geometry.groups > 1:
        return Layout(0, 0, taps, 0, 0, 0, 0)
    chunks = -(-words(geometry.in_channels) // chunk_words)
    steps = -(-geometry.taps * chunk_words // 2 // _STEP_PAIRS)
    blocks = words(geometry.out_channels)
    (kh, kw) = geometry.kernel_size
    return Layout(
        fragments=blocks * chunks * steps * _FRAGMENT_WORDS,
        sums=(kh + 1) * (kw + 1) * blocks * WORD_BITS,
        taps=taps,
        chunk_words=chunk_words,
        steps=steps,
        chunks=chunks,
        blocks=blocks,
    )


def _fragments(weight: Tensor, geometry: Conv2dGeometry, layout: Layout) -> Tensor:
    """Return the words in the order in which the lanes of a warp load them.

    `[blocks, chunks, steps, 2, lanes, 4]`: the pair of words of the lane's quarter, of two groups
    of 8 channels in turn. Column g of group j is channel `8 * (g // 2) + 2 * j + g % 2` of a block.
    """
    padded = weight.new_zeros(
        (layout.blocks * WORD_BITS, geometry.taps, layout.chunks * layout.chunk_words)
    )
    padded[: geometry.out_channels, :, : weight.shape[-1]] = weight.flatten(1, 2)
    pairs = layout.chunk_words // 2
    ordered = padded.view(layout.blocks, WORD_BITS, geometry.taps, layout.chunks, pairs, 2)
    ordered = ordered.permute(0, 3, 2, 4, 1, 5).flatten(2, 3)  # [blocks, chunks, pairs, 32, 2]
    whole = weight.new_zeros(
        (layout.blocks, layout.chunks, layout.steps * _STEP_PAIRS, WORD_BITS, 2)
    )
    whole[:, :, : ordered.shape[2]] = ordered
    column = torch.arange(8, device=weight.device)
    group = torch.arange(4, device=weight.device).view(2, 1, 2)
    channel = 8 * (column.view(1, 8, 1) // 2) + 2 * group + column.view(1, 8, 1) % 2
    taken = whole[:, :, :, channel.flatten()]
    taken = taken.view(layout.blocks, layout.chunks, layout.steps, _STEP_PAIRS, 2, 8, 2, 2)
    return taken.permute(0, 1, 2, 4, 5, 3, 6, 7).flatten()


def _prefix_sums(weight: Tensor, layout: Layout) -> Tensor:
    """Return the set bits of the taps above and left of every tap, `[KH + 1, KW + 1, channels]`."""
    counts = _popcount(weight).sum(-1, dtype=torch.int32).permute(1, 2, 0)
    kh, kw, out_channels = counts.shape
    sums = weight.new_zeros((kh + 1, kw + 1, layout.blocks * WORD_BITS))
    sums[1:, 1:, :out_channels] = counts.cumsum(0).cumsum(1).to(torch.int32)
    return sums.flatten()


def prepacked_words(weight: Tensor, geometry: Conv2dGeometry, layout: Layout) -> Tensor:
    """Return canonical weights in all layouts of a convolution, one after the other."""
    weight = _masked(weight, geometry.group_channels)
    parts = [weight.permute(1, 2, 3, 0).flatten()]
    if layout.fragments:
        parts = [_fragments(weight, geometry, layout), _prefix_sums(weight, layout), *parts]
    return torch.cat(parts)


def prepacked_stem(
    weight: Tensor, horizontal_stride: int, dtype: torch.dtype, *, tensor_cores: bool
) -> Tensor:
    """Return a stem's weights, rounded to `dtype`, in the order of csrc/cuda/stem.h.

    Args:
        weight: float32 [O, C, KH, KW].
        horizontal_stride: horizontal stride of the convolution.
        dtype: the dtype that it computes in.
        tensor_cores: whether the device has tensor cores for `dtype`.

    Returns:
        [groups, steps, 32, 4, 2, 2] of `dtype` with tensor cores, else float32
        [groups, KH, KW, C, 32].
    """
    out_channels, channels, height, width = weight.shape
    groups = words(out_channels)
    rounded = weight.to(dtype).permute(0, 2, 3, 1)  # [O, KH, KW, C]
    rounded = F.pad(rounded, (0, 0, 0, 0, 0, 0, 0, groups * WORD_BITS - out_channels))
    if not tensor_cores:
        lanes = rounded.reshape(groups, WORD_BITS, height, width, channels)
        return lanes.permute(0, 2, 3, 4, 1).to(torch.float32).contiguous()
    values = channels + channels * horizontal_stride % 2
    rows = F.pad(rounded, (0, values - channels)).flatten(2)
    runs = -(-width * values // 8)
    rows = F.pad(rows, (0, runs * 8 - width * values)).flatten(1)
    steps = -(-height * runs // 2)
    rows = F.pad(rows, (0, steps * 16 - height * runs * 8))
    # Channel 8 * (g // 2) + 2 * tile + g % 2 of a group; value 8 * run + 2 * t + e of a step.
    lanes = rows.reshape(groups, 4, 4, 2, steps, 2, 4, 2)
    return lanes.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(groups, steps, 32, 4, 2, 2).contiguous()


def bit_limits(epilogue: Epilogue, reduction: int) -> tuple[Tensor, Tensor] | None:
    """Return the accumulators for which the epilogue's bit is set, without a residual.

    Every step is monotonic in the accumulator, and so is its rounding. The bit is therefore set on
    one side of a limit, which is found by bisection over the float steps themselves.

    Args:
        epilogue: with threshold and sense.
        reduction: K; accumulators lie in [-K, K].

    Returns:
        `first` and `span`, int32 [O]: the bit is set for `first <= dot <= first + span`. None if a
        negative slope makes the steps non-monotonic.
    """
    if epilogue.slope is not None and bool((epilogue.slope < 0).any()):
        return None
    steps = dataclasses.replace(epilogue, pool=Pool2dGeometry(), pool_min=None)

    def bit(dot: Tensor) -> Tensor:
        v = apply_epilogue(dot.view(1, -1, 1, 1), steps, None).view(-1)
        return contract.binarize(v, epilogue.threshold, epilogue.sense)

    low = torch.full_like(epilogue.multiplier, -reduction, dtype=torch.int32)
    high = torch.full_like(low, reduction)
    at_low, at_high = bit(low), bit(high)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        same = bit(middle) == at_low
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    # The bit changes between `low` and `high`, if it changes at all.
    first = torch.where(at_low, -reduction, high)
    last = torch.where(at_high, reduction, low)
    none = ~at_low & ~at_high
    first = torch.where(none, reduction + 1, first)
    last = torch.where(none, reduction + 1, last)
    return first.to(torch.int32), (last - first).to(torch.int32)


def plain_signs(epilogue: Epilogue) -> Epilogue:
    """Return the epilogue without threshold and sense if its bits are those of `v >= 0`."""
    threshold, sense = epilogue.threshold, epilogue.sense
    if threshold is None or sense is None or bool(((threshold != 0) | sense).any()):
        return epilogue
    return dataclasses.replace(epilogue, threshold=None, sense=None)

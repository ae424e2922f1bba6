"""The meaning of a bit, its place in a word, and the packing of maps and weights.

A bit is 1 for +1 and 0 for -1. Channel c is bit `c % 32` of word `c // 32`; words are int32 (torch
has no shifts for uint32), and the unused high bits of a last word are 0. Two layouts follow:

- packed map: int32 `[N, H, W, ceil(C / 32)]`;
- packed weights, canonical: int32 `[O, KH, KW, ceil(C / groups / 32)]`, bits local to the group.

This module is plain PyTorch and works on every device. It defines the layout; kernels follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biper_engine.errors import GeometryError

__all__ = [
    "WORD_BITS",
    "binarize",
    "count_different",
    "pack_channels",
    "pack_weight",
    "unpack_channels",
    "unpack_weight",
    "words",
]

WORD_BITS = 32


def words(channels: int) -> int:
    """Return how many words hold `channels` bits."""
    return -(-channels // WORD_BITS)


def binarize(
    values: Tensor, threshold: Tensor | None = None, sense: Tensor | None = None
) -> Tensor:
    """Return the bit of every value, as bool.

    The bit is `value >= threshold`, or `value <= threshold` if `sense` is True, compared in the
    wider of the two dtypes. -0.0 compares equal to 0.0. NaN gives 0, since every comparison with it
    is false.

    Args:
        values: any shape, floating point.
        threshold: broadcastable to `values`; None means 0.
        sense: bool, broadcastable to `values`; None means False everywhere.
    """
    limit: Tensor | float = 0.0
    if threshold is not None:
        # By default, torch would round a scalar threshold to the dtype of the values.
        wider = torch.promote_types(values.dtype, threshold.dtype)
        values, limit = values.to(wider), threshold.to(wider)
    above = values >= limit
    return above if sense is None else torch.where(sense, values <= limit, above)


def pack_channels(bits: Tensor) -> Tensor:
    """Pack a bool tensor `[..., C]` along its last dimension into int32 `[..., ceil(C / 32)]`."""
    channels = bits.shape[-1]
    count = words(channels)
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, count * WORD_BITS - channels))
    lanes = padded.reshape(*bits.shape[:-1], count, WORD_BITS)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    # The lanes are disjoint, so the sum is a bitwise or; bit 31 wraps to the sign, as intended.
    return (lanes << shifts).sum(-1, dtype=torch.int32)


def unpack_channels(packed: Tensor, channels: int) -> Tensor:
    """Return the bool tensor `[..., channels]` of int32 words `[..., ceil(channels / 32)]`."""
    if packed.shape[-1] != words(channels):
        raise GeometryError(
            f"{channels} channels fill {words(channels)} words of {WORD_BITS} bits, but the last "
            f"dimension of the packed tensor has {packed.shape[-1]} (shape {tuple(packed.shape)})."
        )
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shifts) & 1
    flat = lanes.reshape(*packed.shape[:-1], packed.shape[-1] * WORD_BITS)
    return flat[..., :channels].to(torch.bool)


def pack_weight(positive: Tensor) -> Tensor:
    """Pack weight bits, bool `[O, C / groups, KH, KW]`, into the canonical int32 layout."""
    return pack_channels(positive.permute(0, 2, 3, 1))


def unpack_weight(packed: Tensor, group_channels: int) -> Tensor:
    """Return the bool weight bits `[O, C / groups, KH, KW]` of canonical packed weights."""
    return unpack_channels(packed, group_channels).permute(0, 3, 1, 2)


def count_different(a: Tensor, b: Tensor) -> int:
    """Return the number of bits in which two packed tensors of the same shape differ."""
    changed = torch.bitwise_xor(a, b).cpu().contiguous().numpy()
    return int.from_bytes(changed.tobytes(), "little").bit_count()

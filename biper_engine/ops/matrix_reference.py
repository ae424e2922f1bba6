"""Products of matrices on bits in plain PyTorch: the definition; see `biper_engine.ops.matrix`."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from biper_engine import bits as contract
from biper_engine.ops.matrix import CHAIN_INPUTS, TABLE_INPUTS, MatrixScale, MatrixShape
from biper_engine.ops.precision import without_tf32
from biper_engine.ops.rounding import fma

__all__ = ["multiply_matrices", "scale_sums", "unpack_weight", "weight_linear"]


def _elements(bits: Tensor, shape: MatrixShape, low: int) -> Tensor:
    """Return the elements of a packed map as float32 [N, H, groups, W, depth]."""
    positive = contract.unpack_channels(bits, shape.channels)
    n, h, w, _ = positive.shape
    values = positive.float() * (1 - low) + low
    return values.view(n, h, w, shape.groups, shape.depth).transpose(2, 3)


def multiply_matrices(a: Tensor, b: Tensor, shape: MatrixShape) -> Tensor:
    """Return the sums, int32 [N, H * groups, W, V]. Float32 is exact: sums stay below 2^24."""
    left, right = _elements(a, shape, shape.low_a), _elements(b, shape, shape.low_b)
    exact = without_tf32() if a.device.type == "cuda" else nullcontext()
    with torch.autocast(a.device.type, enabled=False), exact:
        sums = left @ right.transpose(-1, -2)
    return sums.flatten(1, 2).round().to(torch.int32)


def scale_sums(
    sums: Tensor, a: Tensor, b: Tensor, shape: MatrixShape, scale: MatrixScale
) -> Tensor:
    """Return v, float32 [N, H * groups, W, V]."""
    rows = _elements(a, shape, shape.low_a).sum(-1).flatten(1, 2).unsqueeze(-1)
    columns = _elements(b, shape, shape.low_b).sum(-1).flatten(1, 2).unsqueeze(-2)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=sums.device)

    base = fma(number(scale.column_multiplier), columns, number(scale.bias))
    base = fma(number(scale.row_multiplier), rows, base)
    return fma(number(scale.multiplier), sums.float(), base)


def unpack_weight(
    weight: Tensor, low: Tensor, high: Tensor, channels: int, dtype: torch.dtype
) -> Tensor:
    """Return [O, channels, KH, KW]: `high[o]` where a bit is 1, else `low[o]`."""
    positive = contract.unpack_weight(weight, channels)
    one, zero = (values.to(dtype).view(-1, 1, 1, 1) for values in (high, low))
    made: Tensor = weight.new_empty(positive.shape, dtype=dtype)
    return made.copy_(torch.where(positive, one, zero))


def weight_linear(
    x: Tensor, weight: Tensor, multiplier: Tensor, bias: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Return v of rows [..., K], in the dtype of `x`."""
    inputs = x.shape[-1]
    rows = x.float().reshape(-1, inputs)
    signs = _numbers(weight, inputs)
    if offset is not None:  # one more output, with all weights positive
        signs = torch.cat([signs, torch.full_like(signs[:1], 2**TABLE_INPUTS - 1)])
    total = _ordered_sums(rows, signs)
    base = torch.zeros_like(multiplier) if bias is None else bias
    if offset is not None:
        total, of_all = total[:, :-1], total[:, -1:]
        base = fma(offset, of_all, base)
    return fma(multiplier, total, base).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def _numbers(weight: Tensor, inputs: int) -> Tensor:
    """Return the signs of five inputs each as int64 [O, ceil(inputs / 5)], bits of others 0."""
    positive = contract.unpack_channels(weight[:, None, None], inputs)[:, 0, 0]
    places = 2 ** torch.arange(TABLE_INPUTS, device=weight.device)
    return (_fives(positive.long()) * places).sum(2)


def _ordered_sums(rows: Tensor, signs: Tensor) -> Tensor:
    """Return the totals [R, O] in the order of the contract."""
    tables = _tables(_fives(rows))
    total = rows.new_zeros(len(rows), len(signs))
    of_chain = CHAIN_INPUTS // TABLE_INPUTS
    for start in range(0, tables.shape[1], of_chain):
        chain = torch.zeros_like(total)
        for at in range(start, min(start + of_chain, tables.shape[1])):
            chain = chain + tables[:, at].index_select(1, signs[:, at])
        total = total + chain
    return total


def _fives(values: Tensor) -> Tensor:
    """Return rows of values as [rows, ceil(K / 5), 5], missing ones 0."""
    padded = F.pad(values, (0, -values.shape[1] % TABLE_INPUTS))
    return padded.view(len(values), padded.shape[1] // TABLE_INPUTS, TABLE_INPUTS)


def _tables(fives: Tensor) -> Tensor:
    """Return the 32 signed sums of five inputs each, [R, fives, 32]."""
    number = torch.arange(2**TABLE_INPUTS, device=fives.device)
    signed = [
        fives[..., i, None] * torch.where((number >> i & 1).bool(), 1.0, -1.0).to(fives)
        for i in range(TABLE_INPUTS)
    ]
    return ((signed[0] + signed[1]) + signed[2]) + (signed[3] + signed[4])

"""Calls of every declared operator, for any number of images, to compare with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biper_engine.bits import pack_weight
from biper_engine.graph import BATCH, ImagesSize, Size, Value

F32, I64, BOOL = torch.float32, torch.int64, torch.bool
N = BATCH


@dataclass(frozen=True)
class Flowing:
    """A tensor that flows, of some shape and dtype; `high` bounds integers."""

    shape: tuple[Size, ...]
    dtype: torch.dtype = F32
    high: int = 2
    channels: int | None = None

    def value(self) -> Value:
        return Value(self.dtype, self.shape, self.channels)

    def tensor(self, images: int) -> Tensor:
        shape = [concrete(size, images) for size in self.shape]
        random = torch.Generator().manual_seed(len(shape))
        if self.channels is not None:
            from biper_engine.bits import pack_channels

            return pack_channels(torch.rand((*shape[:3], self.channels), generator=random) > 0.5)
        if self.dtype.is_floating_point:
            return (torch.rand(shape, generator=random) + 0.1).to(self.dtype)
        return torch.randint(0, self.high, shape, generator=random).to(self.dtype)


def concrete(size: Any, images: int) -> Any:
    return size.images * images + size.more if isinstance(size, ImagesSize) else size


def x(*shape: Size, dtype: torch.dtype = F32, high: int = 2) -> Flowing:
    return Flowing(shape, dtype, high)


MAP, ROW, SEQUENCE, VOLUME = x(N, 4, 6, 8), x(N, 6), x(N, 4, 6), x(N, 4, 4, 5, 6)
HALF_MAP = x(N, 4, 6, 8, dtype=torch.bfloat16)
MASK, COUNTS = x(N, 4, 6, 8, dtype=BOOL), x(N, 3, dtype=I64, high=9)
BITS = Flowing((N, 6, 8, 2), torch.int32, channels=40)
OTHER_BITS = Flowing((N, 6, 5, 2), torch.int32, channels=40)
CHANNEL, SENSE = torch.rand(8), torch.rand(8) > 0.5
WORDS = pack_weight(torch.rand(8, 40, 3, 3) > 0.5)
VECTORS = ("multiplier", "bias", "offset")
SIGNS = pack_weight(torch.rand(8, 40, 1, 1) > 0.5)[:, 0, 0]
CONV: dict[str, Any] = {"bits": BITS, "weight": WORDS, "in_channels": 40, "padding": [1, 1, 1, 1]}
FUSED: dict[str, Any] = {**CONV, "multiplier": CHANNEL, "bias": CHANNEL}
OUTGOING: dict[str, Any] = {"threshold": CHANNEL, "sense": SENSE}
POOL: dict[str, Any] = {"self": MAP, "kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]}
POOL_3D: dict[str, Any] = {"self": VOLUME, "kernel_size": [2], "stride": [], "ceil_mode": True}
COLUMNS: dict[str, Any] = {"kernel_size": [3, 2], "dilation": [1, 2], "padding": [1, 0]}
PAIR: dict[str, Any] = {"self": MAP, "other": x(4, 1, 8)}
KEPT: dict[str, Any] = {"self": MAP, "dim": [2, 3], "keepdim": True}
AT: dict[str, Any] = {"self": MAP, "dim": 1}
PUT: dict[str, Any] = {**AT, "index": x(N, 1, 6, 8, dtype=I64, high=4), "src": x(N, 1, 6, 8)}
UNPOOLED = x(N, 4, 6, 8, dtype=I64, high=60)
POSITIONS = torch.tensor([3, 0, 2])

Calls = list[tuple[str, Mapping[str, Any]]]

UNARY = (
    "reciprocal rsqrt sqrt exp exp2 expm1 log log1p log2 log10 sin cos tan asin acos atan sinh "
    "cosh tanh asinh acosh atanh erf erfc sigmoid sinc frac lgamma digamma abs neg sign sgn round "
    "floor ceil trunc logical_not is_nan is_inf nan_to_num logit relu silu hardswish hardsigmoid "
    "mish leaky_relu elu celu gelu softplus hardtanh log_sigmoid clone mean_all sum_all max_all "
    "min_all any_all all_all zeros_like ones_like erfinv deg2rad rad2deg i0 special_entr "
    "special_log_ndtr signbit is_positive_inf is_negative_inf"
)
BINARY = (
    "maximum minimum atan2 hypot copysign logical_and logical_or logical_xor greater_equal_tensor "
    "greater_tensor less_equal_tensor less_tensor equal_tensor not_equal_tensor add sub mul div "
    "fmod remainder floor_divide logaddexp logaddexp2 xlogy fmax fmin nextafter ldexp "
    "reversed_sub_tensor"
)
NUMBER = (
    "add_number sub_number mul_number div_number fmod_number remainder_number greater_equal "
    "greater less_equal less equal not_equal"
)

CALLS: Calls = [
    *((name, {"self": MAP}) for name in UNARY.split()),
    *((name, PAIR) for name in BINARY.split()),
    *((name, {"self": MAP, "other": 2}) for name in NUMBER.split()),
    *((name, {"self": x(N, 3, dtype=torch.uint8), "other": 2}) for name in NUMBER.split()),
    *((f"{name}_number", {"self": MAP, "other": 0.5}) for name in ("add", "sub", "mul", "div")),
    *((name, {"self": x(N, 3, dtype=torch.int32), "other": 0.5}) for name in ("mul", "div")),
    *((name, {"self": MAP, "other": N}) for name in ("add", "div")),
    ("add", {"self": MAP, "other": MAP, "alpha": 2}),
    *((name, {"self": MAP, "other": 2}) for name in ("sub", "mul", "div", "floor_divide")),
    ("div_rounded", {"self": MAP, "other": 0.5, "rounding_mode": "trunc"}),
    ("mul", {"self": x(N, 3, dtype=BOOL), "other": x(3, dtype=torch.int16)}),
    ("reversed_sub", {"self": MAP, "other": 2}),
    ("bitwise_not", {"self": MASK}),
    *(
        (f"bitwise_{name}", {"self": MASK, "other": x(1, 4, 1, 8, dtype=BOOL)})
        for name in ("and", "or", "xor")
    ),
    *(
        (f"bitwise_{name}_number", {"self": x(N, 3, dtype=I64), "other": 3})
        for name in ("and", "or", "xor")
    ),
    ("div_rounded", {**PAIR, "rounding_mode": "floor"}),
    *(
        (f"shift_{to}_number", {"self": x(N, 3, dtype=I64), "other": 3}) for to in ("left", "right")
    ),
    ("floor_divide", {"self": COUNTS, "other": 3}),
    ("div_rounded", {"self": COUNTS, "other": 3, "rounding_mode": "floor"}),
    ("power", {"self": COUNTS, "exponent": 2}),
    ("round_decimals", {"self": MAP, "decimals": 1}),
    ("polygamma", {"n": 1, "self": MAP}),
    *(
        (name, {"self": MAP, "target": MAP, "reduction": reduction, **more})
        for name, more in (("mse_loss", {}), ("smooth_l1_loss", {}), ("huber_loss", {"delta": 0.5}))
        for reduction in (0, 1, 2)
    ),
    ("heaviside", {"self": MAP, "values": x()}),
    ("power", {"self": MAP, "exponent": 3}),
    ("power", {"self": MAP, "exponent": 0.5}),
    ("power_tensor", {"self": MAP, "exponent": MAP}),
    ("number_power", {"self": 2, "exponent": MAP}),
    ("where", {"condition": MASK, "self": MAP, "other": x()}),
    ("masked_fill", {"self": MAP, "mask": MASK, "value": float("-inf")}),
    ("masked_fill_tensor", {"self": MAP, "mask": MASK, "value": x()}),
    ("addcmul", {"self": MAP, "tensor1": MAP, "tensor2": MAP, "value": 2.0}),
    ("addcdiv", {"self": MAP, "tensor1": MAP, "tensor2": MAP}),
    ("lerp", {"self": MAP, "end": MAP, "weight": MAP}),
    ("lerp_number", {"self": MAP, "end": MAP, "weight": 0.5}),
    ("clamp", {"self": MAP, "min": -1, "max": 0.5}),
    ("clamp_tensor", {"self": MAP, "min": x(), "max": x(4, 1, 1)}),
    ("clamp_min", {"self": MAP, "min": 0}),
    ("clamp_max", {"self": MAP, "max": 0.5}),
    ("clamp_min_tensor", {"self": MAP, "min": x()}),
    ("clamp_max_tensor", {"self": MAP, "max": x()}),
    ("hardtanh", {"self": MAP, "min_val": 0, "max_val": 6}),
    *(("to_dtype", {"self": MAP, "dtype": dtype}) for dtype in (I64, torch.float16, BOOL)),
    ("clone", {"self": MAP, "memory_format": torch.contiguous_format}),
    # activations
    ("prelu", {"self": MAP, "weight": x(1, 4, 1, 1)}),
    ("threshold", {"self": MAP, "threshold": 0.2, "value": 1}),
    ("glu", {**AT}),
    ("softmax", {**AT, "half_to_float": False}),
    ("log_softmax", {**AT, "half_to_float": False}),
    ("safe_softmax", AT),
    # reductions
    *((name, KEPT) for name in ("mean", "sum", "amax", "amin", "variance", "deviation")),
    *((name, {**KEPT, "keepdim": False}) for name in ("mean", "sum", "logsumexp")),
    ("sum", {"self": x(N, 3, dtype=BOOL), "dim": [1]}),
    ("sum", {"self": MAP, "dim": [0]}),
    ("mean", {"self": MAP, "dim": None}),
    ("variance_mean", {**KEPT, "correction": 0}),
    *(("norm", {"ord": order, **KEPT}) for order in (1, 2, 2.0, float("inf"))),
    *((name, {**AT, "keepdim": True}) for name in ("argmax", "argmin", "max", "min", "any", "all")),
    *((name, AT) for name in ("median", "prod", "cumsum", "cumprod", "sort")),
    ("argmax", {"self": MAP}),
    *((name, KEPT) for name in ("deviation_mean", "nan_sum", "any_over", "all_over")),
    ("sum", {**KEPT, "dtype": torch.float64}),
    *((name, {**KEPT, "p": 2}) for name in ("norm_of_order",)),
    ("count_nonzero", {"self": MASK, "dim": [2, 3]}),
    ("distance", {"self": MAP, "other": x(4, 1, 8), "p": 1}),
    *((name, {**AT, "keepdim": True}) for name in ("nanmedian", "mode", "aminmax")),
    *((name, AT) for name in ("cummax", "cummin", "logcumsumexp")),
    *((name, {"self": MASK, "dim": 1}) for name in ("cumsum", "prod")),
    ("cumsum", {**AT, "dtype": torch.float64}),
    ("aminmax", {"self": MAP}),
    ("kth_value", {**AT, "k": 2}),
    ("sort_stable", {**AT, "stable": True, "descending": True}),
    ("renorm", {"self": MAP, "p": 2, "dim": 1, "maxnorm": 1.0}),
    ("cross", {"self": x(N, 3, 5), "other": x(N, 3, 5), "dim": 1}),
    ("bucketize", {"self": MAP, "boundaries": torch.tensor([0.1, 0.5])}),
    ("searchsorted", {"sorted_sequence": torch.tensor([0.1, 0.5]), "self": MAP, "right": True}),
    ("searchsorted", {"sorted_sequence": x(N, 1), "self": ROW, "out_int32": True}),
    *(
        (
            "lstm",
            {
                **{"input": x(5, N, 6), "hx": [x(2 * layers, N, 4)] * 2, "has_biases": biases},
                "params": [
                    *[torch.rand(16, 6), torch.rand(16, 4), *[torch.rand(16)] * (2 * biases)] * 2,
                    *[torch.rand(16, 8), torch.rand(16, 4), *[torch.rand(16)] * (2 * biases)]
                    * (2 * layers - 2),
                ],
                **{"num_layers": layers, "dropout": 0.0, "train": False, "bidirectional": True},
                "batch_first": False,
            },
        )
        for layers, biases in ((1, True), (2, False))
    ),
    ("topk", {**AT, "k": 2}),
    *(
        (
            "batch_norm",
            {
                **{"input": map_, "weight": torch.rand(4), "bias": None},
                **{"running_mean": torch.rand(4), "running_var": torch.rand(4)},
                **{"training": False, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True},
            },
        )
        for map_ in (MAP, HALF_MAP)
    ),
    (
        "batch_statistics_norm",
        {
            **{"input": MAP, "weight": None, "bias": None, "training": True, "momentum": 0.1},
            "eps": 1e-5,
        },
    ),
    *(
        ("layer_norm", {"input": map_, "normalized_shape": [6, 8], "weight": torch.rand(6, 8)})
        for map_ in (MAP, HALF_MAP)
    ),
    *(
        (
            "group_norm",
            {
                **{"input": map_, "weight": torch.rand(4), "bias": None, "N": N, "C": 4},
                **{"HxW": 48, "group": 2, "eps": 1e-5},
            },
        )
        for map_ in (MAP, HALF_MAP)
    ),
    # moves
    ("reshape", {"self": MAP, "shape": [-1, 4, 48]}),
    ("reshape", {"self": MAP, "shape": [4, -1]}),
    ("reshape", {"self": MAP, "shape": [N * 2, 2, 48]}),
    ("permute", {"self": MAP, "dims": [0, 2, 3, 1]}),
    ("expand", {"self": x(N, 1, 6), "size": [-1, 4, -1]}),
    ("expand", {"self": x(1, 6), "size": [N, -1]}),
    ("squeeze", {"self": x(N, 1, 6), "dim": [1, 2]}),
    ("unsqueeze", {"self": ROW, "dim": -1}),
    ("pixel_shuffle", {"self": MAP, "upscale_factor": 2}),
    ("pixel_unshuffle", {"self": MAP, "downscale_factor": 2}),
    ("channel_shuffle", {"self": MAP, "groups": 2}),
    *(
        ("slice", {"self": MAP, "dim": 2, "start": start, "end": end, "step": step})
        for start, end, step in (
            *((0, 1 << 62, 1), (1, 5, 2), (-3, None, 1)),
            *((None, -1, 3), (9, 2, 1)),
        )
    ),
    ("slice", {"self": MAP, "dim": 0, "start": 0, "end": 1 << 62}),
    ("slice", {"self": MAP, "dim": 0, "start": 0, "end": 1}),
    ("slice", {"self": x(N + N, 3), "dim": 0, "start": -1, "end": 1 << 62}),
    ("select", {**AT, "index": -1}),
    ("select", {"self": MAP, "dim": 0, "index": 0}),
    ("split", {**AT, "split_size": 3}),
    ("unsafe_split", {**AT, "split_size": 2}),
    ("split_sizes", {**AT, "split_sizes": [1, 0, 3]}),
    ("unbind", AT),
    ("diagonal", {"self": MAP, "offset": -2, "dim1": 2, "dim2": 3}),
    ("diagonal", {"self": MAP, "offset": 3, "dim1": 2, "dim2": 3}),
    ("diagonal_matrices", {"self": SEQUENCE, "offset": -1, "dim1": -1, "dim2": 1}),
    *(("rot90", {"self": MAP, "k": k, "dims": [2, 3]}) for k in (1, -2)),
    *(
        ("slice", {"self": x(N * 2, 3), "dim": 0, "start": start, "end": end})
        for start, end in ((0, N), (N, 1 << 62))
    ),
    ("split", {"self": x(N * 2, 3), "split_size": N, "dim": 0}),
    ("split_sizes", {"self": x(N * 3, 3), "split_sizes": [N, N * 2], "dim": 0}),
    ("tril", {"self": MAP}),
    ("triu", {"self": MAP, "diagonal": 1}),
    ("unfold", {"self": MAP, "dimension": 3, "size": 3, "step": 2}),
    ("cat", {"tensors": [MAP, MAP], "dim": 1}),
    ("cat", {"tensors": [MAP, MAP, x(1, 4, 6, 8)], "dim": 0}),
    ("cat", {"tensors": [x(N, 3, dtype=I64), ROW], "dim": -1}),
    ("stack", {"tensors": [MAP, MAP], "dim": -1}),
    ("flip", {"self": MAP, "dims": [-1, 1]}),
    ("roll", {"self": MAP, "shifts": [1, -2], "dims": [2, 3]}),
    ("roll", {"self": MAP, "shifts": [3], "dims": []}),
    ("repeat", {"self": MAP, "repeats": [1, 2, 1, 3]}),
    ("repeat", {"self": x(1, 6), "repeats": [N, 1, 2]}),
    (
        "slice_scatter",
        {"self": MAP, "src": x(N, 4, 6, 2), "dim": 3, "start": 1, "end": 5, "step": 2},
    ),
    ("select_scatter", {"self": MAP, "src": x(N, 4, 8), "dim": 2, "index": -1}),
    ("pad", {"self": MAP, "pad": [1, 2, -1, 0], "value": 0.0}),
    ("pad", {"self": x(N, 3, dtype=BOOL), "pad": [1, 2], "value": 0}),
    *(
        (f"{name}_pad{count}d", {"self": operand, "padding": [1, 2] * count})
        for name in ("reflection", "replication")
        for count, operand in ((1, SEQUENCE), (2, MAP), (3, VOLUME))
    ),
    # positions
    ("embedding", {"weight": torch.rand(7, 5), "indices": x(N, 3, dtype=I64, high=7)}),
    ("index_select", {**AT, "index": POSITIONS}),
    ("gather", {**AT, "index": x(N, 2, 6, 8, dtype=I64, high=4)}),
    ("scatter", PUT),
    ("scatter_value", {**AT, "index": x(N, 1, 6, 8, dtype=I64, high=4), "value": 1.0}),
    *(
        (name, {"self": MAP, "indices": indices})
        for name in ("index", "take_positions")
        for indices in (
            [None, POSITIONS],
            [None, None, POSITIONS[:, None], POSITIONS],
            [None, POSITIONS, None, POSITIONS],
        )
    ),
    ("take", {"self": MAP, "index": x(N, 2, dtype=I64, high=9)}),
    *(("scatter_reduce", {**PUT, "reduce": name}) for name in ("sum", "prod", "mean", "amax")),
    ("scatter_add", PUT),
    ("index_copy", {**AT, "index": POSITIONS, "source": x(N, 3, 6, 8)}),
    ("index_fill", {**AT, "index": POSITIONS, "value": 2}),
    ("index_fill_tensor", {**AT, "index": POSITIONS, "value": x()}),
    *(
        ("index_put", {"self": MAP, "indices": [None, POSITIONS], "values": values, **more})
        for values, more in ((x(), {}), (x(N, 3, 6, 8), {"accumulate": True}))
    ),
    ("masked_scatter", {"self": MAP, "mask": MASK, "source": MAP}),
    ("max_unpool2d", {"self": MAP, "indices": UNPOOLED, "output_size": [8, 9]}),
    (
        "max_unpool3d",
        {
            **{"self": VOLUME, "indices": x(N, 4, 4, 5, 6, dtype=I64), "output_size": [8, 9, 9]},
            **{"stride": [2, 2, 2], "padding": [0, 0, 0]},
        },
    ),
    ("index_add", {**AT, "index": POSITIONS, "source": x(N, 3, 6, 8)}),
    (
        "grid_sample",
        {
            **{"input": MAP, "grid": x(N, 3, 5, 2), "interpolation_mode": 0, "padding_mode": 0},
            "align_corners": False,
        },
    ),
    (
        "grid_sample_3d",
        {
            **{"input": VOLUME, "grid": x(N, 2, 3, 5, 3), "interpolation_mode": 1},
            **{"padding_mode": 1, "align_corners": True},
        },
    ),
    ("affine_grid", {"theta": x(N, 3, 4), "size": [N, 3, 4, 5, 2], "align_corners": True}),
    ("affine_grid", {"theta": x(N, 2, 3), "size": [N, 3, 4, 5], "align_corners": True}),
    # products
    ("linear", {"input": SEQUENCE, "weight": torch.rand(5, 6), "bias": torch.rand(5)}),
    ("matmul", {"self": ROW, "mat2": torch.rand(6, 5)}),
    ("matmul", {"self": x(6, N), "mat2": ROW}),
    ("batch_matmul", {"self": SEQUENCE, "mat2": x(N, 6, 3)}),
    ("vector_matmul", {"self": ROW, "vec": torch.rand(6)}),
    ("add_matmul", {"self": torch.rand(5), "mat1": ROW, "mat2": torch.rand(6, 5), "beta": 0.5}),
    ("add_batch_matmul", {"self": x(N, 4, 3), "batch1": SEQUENCE, "batch2": x(N, 6, 3)}),
    ("add_sum_of_matmuls", {"self": x(4, 3), "batch1": SEQUENCE, "batch2": x(N, 6, 3)}),
    (
        "bilinear",
        {
            **{"i1": ROW, "i2": torch.rand(5, 6, 4), "i3": x(N, 4), "expand1": [1, 3]},
            **{"expand2": [0], "expand3": [1, 2], "sumdim": [2, 3], "unroll_dim": 1},
        },
    ),
    *(
        ("distances", {"x1": SEQUENCE, "x2": x(N, 3, 6), "p": p, "compute_mode": mode})
        for p, mode in ((1.0, None), (2.0, 1), (float("inf"), None))
    ),
    ("euclidean_distances", {"x1": SEQUENCE, "x2": x(N, 3, 6)}),
    ("attention", {"query": x(N, 4, 5, 8), "key": x(N, 2, 5, 8), "value": x(N, 2, 5, 8)}),
    ("attention", {name: x(N, 2, 5, 8) for name in ("query", "key", "value")}),
    (
        "attention",
        {
            **{"query": x(N, 2, 5, 8), "key": x(N, 2, 7, 8), "value": x(N, 2, 7, 8)},
            "attn_mask": x(5, 7),
        },
    ),
    # convolutions
    (
        "conv2d",
        {
            **{"input": MAP, "weight": torch.rand(6, 2, 3, 2), "bias": torch.rand(6)},
            **{"stride": [2, 1], "padding": [1, 0], "dilation": [1, 2], "groups": 2},
        },
    ),
    *(
        (
            "convolution",
            {
                **{"input": operand, "weight": torch.rand(4, 2, *[2] * count), "bias": None},
                **{"stride": [2] * count, "padding": [1] * count, "dilation": [1] * count},
                **{"transposed": transposed, "output_padding": [0] * count, "groups": 2},
            },
        )
        for count, operand in ((1, SEQUENCE), (2, MAP), (3, VOLUME))
        for transposed in (False, True)
    ),
    # pools
    ("max_pool2d", POOL),
    ("max_pool2d", {**POOL, "dilation": [2, 1], "ceil_mode": True}),
    ("max_pool2d_positions", POOL),
    ("max_pool3d_positions", POOL_3D),
    ("avg_pool2d", {**POOL, "divisor_override": 5}),
    ("avg_pool3d", POOL_3D),
    *((f"adaptive_{name}", {"self": MAP, "output_size": [3, 9]})
      for name in ("avg_pool2d", "max_pool2d_positions")),
    *((f"adaptive_{name}", {"self": VOLUME, "output_size": [3, 2, 9]})
      for name in ("avg_pool3d", "max_pool3d_positions")),
    *((f"upsample_nearest{count}d", {"input": operand, "output_size": None,
                                     "scale_factors": [1.5] * count})
      for count, operand in ((1, SEQUENCE), (2, MAP), (3, VOLUME))),
    *((f"upsample_{name}", {"input": operand, "output_size": size, "align_corners": False,
                             "scale_factors": None})
      for name, operand, size in (("linear1d", SEQUENCE, [9]), ("bilinear2d", MAP, [3, 9]),
                                  ("bicubic2d", MAP, [9, 3]), ("trilinear3d", VOLUME, [2, 3, 4]))),
    *(
        (f"upsample_{name}_smooth", {"self": MAP, "output_size": [3, 16], "align_corners": False,
                                     "scales_h": 0.5, "scales_w": None})
        for name in ("bilinear2d", "bicubic2d")
    ),
    ("unfold_columns", {"self": MAP, **COLUMNS, "stride": [1, 2]}),
    ("fold_columns", {"self": x(N, 12, 18), "output_size": [6, 8], **COLUMNS, "stride": [1, 2]}),
    # values from sizes
    ("zeros", {"size": [N, 3]}),
    ("ones", {"size": [2, 3], "dtype": I64}),
    ("full", {"size": [N, 3], "fill_value": 2}),
    ("full", {"size": [N, 3], "fill_value": 2.0}),
    ("full", {"size": [3], "fill_value": True}),
    ("full_like", {"self": MAP, "fill_value": 3}),
    ("zeros_like", {"self": MAP, "dtype": BOOL}),
    ("new_zeros", {"self": MAP, "size": [N, 2]}),
    ("new_ones", {"self": MAP, "size": [N, 2], "dtype": I64}),
    ("new_full", {"self": MAP, "size": [N, 2], "fill_value": 2}),
    ("fill", {"self": MAP, "value": 2}),
    ("fill_tensor", {"self": MAP, "value": x()}),
    ("eye", {"n": N}),
    ("eye_of", {"n": 3, "m": N, "dtype": I64}),
    ("arange", {"end": N}),
    ("arange_from", {"start": 2, "end": 9, "dtype": F32}),
    ("arange_step", {"start": 0, "end": N * 5, "step": 5}),
    ("size", {"self": MAP, "dim": 0}),
    ("size", {"self": MAP, "dim": -1}),
    ("size_sum", {"a": N, "b": 3}),
    ("size_difference", {"a": N * 2, "b": N}),
    ("size_product", {"a": N, "b": 3}),
    *(("size_quotient", {"a": N * 4 + more, "b": 2}) for more in (0, 3)),
    ("size_remainder", {"a": N * 4 + 3, "b": 2}),
    # bits
    ("biper.binarize", {"x": x(N, 8, 6, 5), "threshold": CHANNEL, "sense": SENSE}),
    ("biper.binarize", {"x": x(N, 40, 6, 5)}),
    ("biper.unbinarize", {"bits": BITS, "channels": 40, "dtype": torch.float16}),
    ("biper.bmaxpool2d", {"bits": BITS, "channels": 40, "kernel_size": [2, 2], "stride": [2, 2]}),
    ("biper.bconv2d", CONV),
    ("biper.bmatmul", {"a": BITS, "b": OTHER_BITS, "channels": 40, "groups": 4}),
    ("biper.bmatmul_float", {"a": BITS, "b": OTHER_BITS, "channels": 40, "low_a": 0}),
    (
        "biper.bmatmul_float",
        {
            **{"a": BITS, "b": BITS, "channels": 40, "low_b": 0, "dtype": torch.float16},
            **{"multiplier": 0.5, "row_multiplier": 2, "column_multiplier": -1.0, "bias": 3.0},
        },
    ),
    ("biper.weight_linear", {"x": x(N, 3, 40), "weight": SIGNS, "multiplier": CHANNEL}),
    (
        "biper.weight_linear",
        {"x": x(N, 40), "weight": SIGNS, **dict.fromkeys(VECTORS, CHANNEL)},
    ),
    (
        "biper.unpack_weight",
        {"weight": WORDS, "low": CHANNEL, "high": CHANNEL, "channels": 40, "dtype": torch.bfloat16},
    ),
    ("biper.bconv2d_float", {**FUSED, "residual": x(N, 8, 6, 8), "clamp_min": -1.0}),
    ("biper.bconv2d_float", {**FUSED, "dtype": torch.bfloat16, "stride": [2, 1]}),
    ("biper.bconv2d_bits", {**FUSED, **OUTGOING, "pool_kernel_size": [2, 2]}),
    ("biper.bconv2d_float_bits", {**FUSED, **OUTGOING, "slope": CHANNEL, "shift": CHANNEL}),
    ("biper.bconv2d_float_bits", {**FUSED, **OUTGOING, "gain": CHANNEL, "clamp_min": -1.0}),
    ("biper.bconv2d_float", {**FUSED, "gate": x(N, 8, 1, 1), "offset": CHANNEL}),
    ("biper.bconv2d_bits", {**FUSED, **OUTGOING, "gate": x(N, 1), "residual": x(N, 8, 6, 8)}),
]  # fmt: skip


def calls_of(name: str) -> list[dict[str, Any]]:
    """Return the arguments of every call of an operator."""
    return [given for called, given in CALLS if called == name]


@contextmanager
def told(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Add the arguments of a call to an error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The arguments are {dict(arguments)}.")
        raise

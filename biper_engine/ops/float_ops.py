"""The closed list of float operators that a converted network may use beside `torch.ops.biper`.

Files name operators and arguments by this table, never by ATen overload, so that they outlive
changes in PyTorch. A graph with an operator outside it still runs; it cannot be saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FLOAT_OPS", "FloatOp"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class FloatOp:
    """An operator of the closed list.

    Attributes:
        target: the ATen overload that runs it.
        arguments: the argument names that files may hold; equal to the overload's own names.
    """

    target: torch._ops.OpOverload
    arguments: tuple[str, ...]


def _unary(target: torch._ops.OpOverload) -> FloatOp:
    return FloatOp(target, ("self",))


def _binary(target: torch._ops.OpOverload) -> FloatOp:
    return FloatOp(target, ("self", "other"))


_POOL = ("self", "kernel_size", "stride", "padding")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation")

FLOAT_OPS: dict[str, FloatOp] = {
    "conv2d": FloatOp(_aten.conv2d.default, (*_CONV, "groups")),
    "convolution": FloatOp(
        _aten.convolution.default, (*_CONV, "transposed", "output_padding", "groups")
    ),
    "linear": FloatOp(_aten.linear.default, ("input", "weight", "bias")),
    "matmul": FloatOp(_aten.mm.default, ("self", "mat2")),
    "batch_matmul": FloatOp(_aten.bmm.default, ("self", "mat2")),
    "max_pool2d": FloatOp(_aten.max_pool2d.default, (*_POOL, "dilation", "ceil_mode")),
    "avg_pool2d": FloatOp(
        _aten.avg_pool2d.default, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
    ),
    "adaptive_avg_pool2d": FloatOp(_aten._adaptive_avg_pool2d.default, ("self", "output_size")),
    "mean": FloatOp(_aten.mean.dim, ("self", "dim", "keepdim")),
    "sum": FloatOp(_aten.sum.dim_IntList, ("self", "dim", "keepdim")),
    "amax": FloatOp(_aten.amax.default, ("self", "dim", "keepdim")),
    "variance": FloatOp(_aten.var.correction, ("self", "dim", "correction", "keepdim")),
    "add": FloatOp(_aten.add.Tensor, ("self", "other", "alpha")),
    "sub": FloatOp(_aten.sub.Tensor, ("self", "other", "alpha")),
    "mul": _binary(_aten.mul.Tensor),
    "div": _binary(_aten.div.Tensor),
    "maximum": _binary(_aten.maximum.default),
    "minimum": _binary(_aten.minimum.default),
    "reciprocal": _unary(_aten.reciprocal.default),
    "rsqrt": _unary(_aten.rsqrt.default),
    "sqrt": _unary(_aten.sqrt.default),
    "exp": _unary(_aten.exp.default),
    "log": _unary(_aten.log.default),
    "abs": _unary(_aten.abs.default),
    "neg": _unary(_aten.neg.default),
    "sign": _unary(_aten.sign.default),
    "sin": _unary(_aten.sin.default),
    "cos": _unary(_aten.cos.default),
    "round": _unary(_aten.round.default),
    "floor": _unary(_aten.floor.default),
    "power": FloatOp(_aten.pow.Tensor_Scalar, ("self", "exponent")),
    "hardtanh": FloatOp(_aten.hardtanh.default, ("self", "min_val", "max_val")),
    "clamp": FloatOp(_aten.clamp.default, ("self", "min", "max")),
    "relu": _unary(_aten.relu.default),
    "prelu": FloatOp(_aten._prelu_kernel.default, ("self", "weight")),
    "leaky_relu": FloatOp(_aten.leaky_relu.default, ("self", "negative_slope")),
    "elu": FloatOp(_aten.elu.default, ("self", "alpha", "scale", "input_scale")),
    "gelu": FloatOp(_aten.gelu.default, ("self", "approximate")),
    "silu": _unary(_aten.silu.default),
    "hardswish": _unary(_aten.hardswish.default),
    "hardsigmoid": _unary(_aten.hardsigmoid.default),
    "sigmoid": _unary(_aten.sigmoid.default),
    "tanh": _unary(_aten.tanh.default),
    "softmax": FloatOp(_aten._softmax.default, ("self", "dim", "half_to_float")),
    "log_softmax": FloatOp(_aten._log_softmax.default, ("self", "dim", "half_to_float")),
    "where": FloatOp(_aten.where.self, ("condition", "self", "other")),
    "greater_equal": FloatOp(_aten.ge.Scalar, ("self", "other")),
    "greater": FloatOp(_aten.gt.Scalar, ("self", "other")),
    "less_equal": FloatOp(_aten.le.Scalar, ("self", "other")),
    "less": FloatOp(_aten.lt.Scalar, ("self", "other")),
    "equal": FloatOp(_aten.eq.Scalar, ("self", "other")),
    "reshape": FloatOp(_aten.reshape.default, ("self", "shape")),
    "permute": FloatOp(_aten.permute.default, ("self", "dims")),
    "expand": FloatOp(_aten.expand.default, ("self", "size")),
    "squeeze": FloatOp(_aten.squeeze.dims, ("self", "dim")),
    "unsqueeze": FloatOp(_aten.unsqueeze.default, ("self", "dim")),
    "cat": FloatOp(_aten.cat.default, ("tensors", "dim")),
    "slice": FloatOp(_aten.slice.Tensor, ("self", "dim", "start", "end", "step")),
    "select": FloatOp(_aten.select.int, ("self", "dim", "index")),
    "pad": FloatOp(_aten.constant_pad_nd.default, ("self", "pad", "value")),
    "upsample_nearest2d": FloatOp(
        _aten.upsample_nearest2d.vec, ("input", "output_size", "scale_factors")
    ),
    "upsample_bilinear2d": FloatOp(
        _aten.upsample_bilinear2d.vec, ("input", "output_size", "align_corners", "scale_factors")
    ),
    "batch_norm": FloatOp(
        _aten.batch_norm.default,
        (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "training",
            "momentum",
            "eps",
            "cudnn_enabled",
        ),
    ),
    "layer_norm": FloatOp(
        _aten.layer_norm.default,
        ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
    ),
    "to_dtype": FloatOp(_aten._to_copy.default, ("self", "dtype")),
    "clone": _unary(_aten.clone.default),
}

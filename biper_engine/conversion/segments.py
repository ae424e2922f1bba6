"""Segments: run an engine's graph node by node on the model's own values, and compare.

The rules of the comparison are in `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from biper_engine import bits as contract
from biper_engine import ops
from biper_engine.conversion.activation_products import ActivationProduct
from biper_engine.conversion.cancellation import Cancellation
from biper_engine.conversion.ir import BinaryConv
from biper_engine.conversion.pipeline import Built
from biper_engine.conversion.product_check import expected_sums
from biper_engine.conversion.truth import Truth
from biper_engine.conversion.verify_report import FLOAT_TOLERANCE, ROUNDING, SegmentReport
from biper_engine.errors import ConversionError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.reading import is_call, parent
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.matrix_operators import matrix_shape
from biper_engine.ops.reference import ReferenceBackend, apply_epilogue, sums_of
from biper_engine.ops.registration import split_options

__all__ = ["NanInputError", "Segments", "segment_row"]

_STEPS = 8
"""Most roundings, of 2^-24 of the largest term each, in the value before a sign."""

_HALF = (torch.float16, torch.bfloat16)


class NanInputError(ConversionError):
    """The model computes NaN from its inputs and takes its sign, so nothing is compared."""

    def __init__(self, layer: str) -> None:
        super().__init__(
            f"With these inputs the model takes the sign of NaN before {layer}, and NaN has no "
            "sign, so there is nothing to compare. Pass inputs from which the model computes "
            "numbers."
        )


def _as_map(value: Tensor, conv: BinaryConv) -> Tensor:
    """Return [N, C, H, W]; features in the last dimension become channels of 1x1 maps."""
    return value.reshape(-1, value.shape[-1], 1, 1) if conv.rows else value


def segment_row(segments: dict[str, SegmentReport], n: fx.Node) -> SegmentReport:
    """Return the row of a node's layer, a new one if there is none yet."""
    name = str(n.meta.get("layer", n.name))
    return segments.setdefault(name, SegmentReport(name))


def _sources(n: fx.Node) -> set[str]:
    """Return the names of the model's values that a node gets, also by nodes that move them."""
    found: set[str] = set()
    for node in n.all_input_nodes:
        source = node.meta.get("source")
        found |= _sources(node) if source is None else {str(source)}
    return found


class Segments(fx.Interpreter):
    """Runs the lowered graph on true values and compares each node.

    Args:
        built: a conversion.
        truth: the model's values for the inputs of `run`.
        segments: rows by name; counts are added to them.

    Attributes:
        layer_inputs: the true packed map that enters each binary convolution, by node name.
    """

    def __init__(self, built: Built, truth: Truth, segments: dict[str, SegmentReport]) -> None:
        super().__init__(built.lowered)
        self.extra_traceback = False  # errors keep their own messages
        self.layer_inputs: dict[str, Tensor] = {}
        self._truth = truth
        self._segments = segments
        self._cancellation = Cancellation(built.float_graph, truth.values)
        self._exact: dict[fx.Node, Tensor] = {}  # float32 values of nodes in half precision
        self._affected: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node on true values; return the true value in its place."""
        if "conv" in n.meta:
            return self._conv(n)
        if "product" in n.meta:
            return self._product(n)
        value = super().run_node(n)
        affected = self._inherited(n, value)
        if "rule" in n.meta:
            return self._binarize(n, value)
        source = n.meta.get("source")
        if n.op != "call_function" or source is None or not isinstance(value, Tensor):
            if affected is not None:
                self._affected[n] = affected
            self._keep_exact(n, value)
            return value
        wanted = self._truth.values[source].reshape(value.shape)
        if "getitem" not in str(n.target):
            bound = partial(self._bound_of_sums, n, value)
            self._compare_floats(segment_row(self._segments, n), value, wanted, affected, bound)
        return self._rounded(n, wanted, value.dtype)

    # -- values -----------------------------------------------------------------------------------

    def _inherited(self, n: fx.Node, value: Any) -> Tensor | None:
        """Return what exact zeros reached before `n`, if there is no float node in between."""
        reached = [self._affected[node] for node in n.all_input_nodes if node in self._affected]
        if not reached or not isinstance(value, Tensor):
            return None
        if is_call(n, torch.ops.aten.reshape.default):
            return reached[0].reshape(value.shape)
        return torch.stack([mask.expand(value.shape) for mask in reached]).any(0)

    def _rounded(self, n: fx.Node, wanted: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a true value in the engine's dtype; its float32 value is kept."""
        if dtype in _HALF:
            self._exact[n] = wanted.float()
        return wanted.to(dtype)

    def _keep_exact(self, n: fx.Node, value: Any) -> None:
        """Keep the float32 value of a node that only moves values of half precision."""
        if not isinstance(value, Tensor) or value.dtype not in _HALF or n.op != "call_function":
            return
        if is_call(n, torch.ops.aten._to_copy.default):
            self._exact[n] = self._float32(parent(n))
        elif all(node in self._exact for node in n.all_input_nodes):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._exact.__getitem__)
            self._exact[n] = n.target(*args, **kwargs)  # type: ignore[operator]

    def _float32(self, n: fx.Node) -> Tensor:
        exact = self._exact.get(n)
        return self.env[n].float() if exact is None else exact

    # -- comparisons ------------------------------------------------------------------------------

    def _binarize(self, n: fx.Node, got: Tensor) -> Tensor:
        """Compare bits of a float map, which rounding to half precision may have changed."""
        source, rule = parent(n), n.meta["rule"]
        x = self._float32(source)
        threshold = rule.threshold.to(x.device).view(1, -1, 1, 1)
        wanted = ops.binarize(x, rule.threshold.to(x.device), rule.sense.to(x.device))
        largest = x.abs().amax((0, 2, 3), keepdim=True) if x.numel() else threshold.abs()
        near = _STEPS * ROUNDING[torch.float32] * (largest + threshold.abs())
        near = near + _half_rounding(self.env[source]) * x.abs()
        close = (x - threshold).abs() <= near
        unequal = _unpacked(got ^ wanted, x.shape[1])
        zeros = int((x == threshold).sum()) if rule.tie else 0
        undecided = int((close & (x != threshold)).sum())
        if zeros or undecided or bool(unequal.any()):
            segment = segment_row(self._segments, n)
            segment.bits += x.numel()
            segment.exact_zeros += zeros
            segment.undecided += undecided
            segment.flips += int((unequal & close).sum())
            segment.bits_wrong += int((unequal & ~close).sum())
        return wanted

    def _bound_of_sums(self, n: fx.Node, value: Tensor) -> Tensor | None:
        """Return how much the rounding of its terms may change each element of a float map."""
        bound = self._cancellation.bound(n.meta["source"], _sources(n), value.dtype)
        return None if bound is None else bound.reshape(value.shape)

    def _compare_floats(
        self,
        segment: SegmentReport,
        got: Tensor,
        wanted: Tensor,
        affected: Tensor | None,
        bound: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """Record how a float map differs.

        Args:
            segment: its row.
            got: the engine's map.
            wanted: the model's.
            affected: elements that exact zeros reach, which are left out; or None.
            bound: gives how much rounding may change each element, where that is known.
        """
        segment.float_limit = FLOAT_TOLERANCE.get(got.dtype, FLOAT_TOLERANCE[torch.float32])
        dtype = wanted.dtype if wanted.is_floating_point() else torch.float64
        a, b = got.to(dtype), wanted.to(dtype)
        error = (a - b).abs()
        if affected is not None:
            error = error.masked_fill(affected, 0.0)
        largest, worst = _largest(b), _largest(error)
        if not math.isfinite(largest + worst):  # for example after the log of a random number
            same = (a == b) | (a.isnan() & b.isnan())
            largest = _largest(torch.where(b.isfinite(), b, 0.0))
            worst = _largest(error.masked_fill(same, 0.0).nan_to_num(nan=math.inf))
        elif worst > segment.float_limit * largest:  # perhaps the terms are larger than their sum
            allowed = bound()
            if allowed is not None:
                near = error <= allowed.to(error.device)
                segment.cancelled += int((near & (error > segment.float_limit * largest)).sum())
                worst = _largest(error.masked_fill(near, 0.0))
        segment.float_error = max(segment.float_error, worst / largest if largest else worst)

    def _conv(self, n: fx.Node) -> Any:
        conv: BinaryConv = n.meta["conv"]
        segment = segment_row(self._segments, n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        op = str(n.target).split(".")[-2]
        options = dict(kwargs)
        if op != "bconv2d_float":
            options |= {"threshold": args[4], "sense": args[5]}
        geometry, epilogue, residual, _ = split_options(args[1], args[2], args[3], options)
        self.layer_inputs[n.name] = args[0]
        dot = ops.bconv2d(args[0], args[1], geometry)
        self._require_signs(n, conv)
        wanted_dot, affected = self._accumulators(conv, dot)
        segment.accumulators += dot.numel()
        segment.accumulators_wrong += int((dot != wanted_dot).sum())
        if affected is not None:
            segment.zero_outputs += int(affected.expand(dot.shape).sum())
            affected = _pooled(affected, epilogue)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        source = n.meta.get("source")
        if source is None:
            if affected is not None:
                self._affected[n] = affected
            return result
        size = epilogue.pool.output_size(*dot.shape[2:])
        truth = self._truth.values[source].reshape(*dot.shape[:2], *size)
        floats = (
            None if op == "bconv2d_bits" else result[0] if op == "bconv2d_float_bits" else result
        )
        if floats is not None:
            terms = replace(epilogue, threshold=None, sense=None)
            rounding = partial(_bound, conv, terms, residual, options.get("gate"))
            self._compare_floats(segment, floats, truth, affected, rounding)
            floats = self._rounded(n, truth, floats.dtype)
        if op == "bconv2d_float":
            return floats
        bits = result if op == "bconv2d_bits" else result[1]
        wanted_bits = ops.binarize(truth.float(), epilogue.threshold, epilogue.sense)
        threshold = epilogue.threshold
        assert threshold is not None, "bits need a threshold"
        bound = _bound(conv, epilogue, residual, options.get("gate"))
        at = threshold.view(1, -1, 1, 1)
        distance = (truth - at).abs()
        exact = distance == 0
        undecided = (distance <= bound) & ~exact
        segment.bits += truth.numel()
        segment.undecided += int((undecided if affected is None else undecided & ~affected).sum())
        if n.meta.get("tie"):
            segment.exact_zeros += int(exact.sum())
        if not torch.equal(bits, wanted_bits):
            unequal = _unpacked(bits ^ wanted_bits, truth.shape[1])
            unequal = unequal if affected is None else unequal & ~affected
            sums = _sums(args[0], args[1], geometry)
            v = apply_epilogue(dot, epilogue, residual, sums, options.get("gate"))
            close = (v - at).abs() <= bound
            segment.flips += int((unequal & close).sum())
            segment.bits_wrong += int((unequal & ~close).sum())
        return wanted_bits if op == "bconv2d_bits" else (floats, wanted_bits)

    def _product(self, n: fx.Node) -> Tensor:
        """Compare a product of two activations; return the model's own."""
        product: ActivationProduct = n.meta["product"]
        segment = segment_row(self._segments, n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        values = self._truth.values
        for factor in (product.left, product.right):
            if any(bool(values[name].isnan().any()) for name in factor.names):
                raise NanInputError(str(n.meta["layer"]))
        self.layer_inputs[n.name] = args[0]
        shape = matrix_shape(kwargs)
        sums = ops.bmatmul(args[0], args[1], shape)
        wanted, affected, result = expected_sums(product, values, sums.shape[2])
        segment.accumulators += sums.numel()
        segment.accumulators_wrong += int((sums != wanted).sum())
        if affected is not None:
            segment.zero_outputs += int(affected.sum())
        self._compare_floats(segment, n.target(*args, **kwargs), result, affected)  # type: ignore[operator]
        return self._rounded(n, result, kwargs["dtype"])

    def _require_signs(self, n: fx.Node, conv: BinaryConv) -> None:
        """Require that every input of a layer has a sign."""
        names = (conv.value,) if conv.source is None else (conv.value, conv.source)
        if any(bool(self._truth.values[name].isnan().any()) for name in names):
            raise NanInputError(str(n.meta.get("layer", n.name)))

    def _accumulators(self, conv: BinaryConv, dot: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's accumulators, zeros counted as +1, and what zeros reach."""
        value = _as_map(self._truth.values[conv.value].float(), conv)
        middle = (conv.rule.high + conv.rule.low) / 2
        level = (conv.rule.high - conv.rule.low) / 2
        zero = torch.zeros_like(value, dtype=torch.bool)
        if conv.rule.tie:
            zero = (value - middle).abs() < 0.5 * level
        if conv.rule.tie and conv.source is not None:
            threshold = conv.rule.threshold.view(1, -1, 1, 1).to(value.device)
            zero = zero | (_as_map(self._truth.values[conv.source], conv) == threshold)
        high = value >= middle if level > 0 else value <= middle
        unit = torch.where(zero | high, 1.0, -1.0)
        geometry = conv.geometry
        top, bottom, left, right = geometry.padding
        shared = (None, geometry.stride, 0, geometry.dilation, geometry.groups)
        weight = torch.where(conv.positive, 1.0, -1.0).to(value.device)
        padded = F.pad(unit, (left, right, top, bottom)).float()
        wanted = F.conv2d(padded, weight, *shared).round().to(torch.int32)
        if not bool(zero.any()):
            return wanted, None
        reached = F.conv2d(F.pad(zero.float(), (left, right, top, bottom)), weight.abs(), *shared)
        return wanted, reached > 0


def _bound(
    conv: BinaryConv, epilogue: Epilogue, residual: Tensor | None, gate: Tensor | None
) -> Tensor:
    """Return how much rounding may change the value before a sign; see `verify`."""

    def of_channels(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1)

    factor = of_channels(epilogue.largest_factor())
    bound = of_channels(epilogue.magnitude(conv.geometry.reduction)) * factor
    half = torch.zeros(())
    if gate is not None:
        bound = bound * gate.float().abs().view(*gate.shape[:2], 1, 1)
        half = _half_rounding(gate) * bound
    if epilogue.offset is not None:
        bound = bound + of_channels(epilogue.offset.abs()) * factor
    for term in (epilogue.threshold, epilogue.shift):
        if term is not None:
            bound = bound + of_channels(term.abs())
    if residual is not None:
        magnitude = residual.float().abs() * factor
        bound = bound + magnitude
        half = half + _half_rounding(residual) * magnitude
    return _STEPS * ROUNDING[torch.float32] * bound + half


def _sums(bits: Tensor, weight: Tensor, geometry: Conv2dGeometry) -> dict[str, Tensor]:
    reference = ReferenceBackend()
    signs = reference.unbinarize(bits, geometry.in_channels, torch.float32)
    return sums_of(signs, reference.prepack(weight, geometry), geometry)


def _half_rounding(x: Tensor) -> float:
    """Return the relative error of a value rounded to half precision once; 0 in float32.

    A map of a float16 or bfloat16 stream is the true one, rounded. The factor of two is there
    because the magnitude is that of the rounded value.
    """
    return 2 * ROUNDING[x.dtype] if x.dtype in _HALF else 0.0


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _pooled(affected: Tensor, epilogue: Epilogue) -> Tensor:
    pool = epilogue.pool
    if pool.is_identity:
        return affected
    return F.max_pool2d(affected.float(), pool.kernel_size, pool.stride, pool.padding) > 0


def _unpacked(bits: Tensor, channels: int) -> Tensor:
    """Return packed bits as bool [N, C, H, W]."""
    return contract.unpack_channels(bits, channels).permute(0, 3, 1, 2)

"""Segments: run an engine's graph node by node on the float graph's own values, and compare.

The rules of the comparison stand in `verify`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from biper_engine import bits as contract
from biper_engine import ops
from biper_engine.conversion.graphs import is_call, parent
from biper_engine.conversion.ir import BinaryConv
from biper_engine.conversion.pipeline import Built
from biper_engine.conversion.verify_report import FLOAT_TOLERANCE, SegmentReport, VerifyReport
from biper_engine.engine import Engine
from biper_engine.ops.reference import apply_epilogue
from biper_engine.ops.registration import split_options

__all__ = ["check_segments"]


def check_segments(
    engine: Engine, built: Built, batches: Iterable[tuple[Tensor, ...]]
) -> VerifyReport:
    """Run the comparison on flat inputs, with the float graph of `built` as the truth."""
    report = VerifyReport()
    segments: dict[str, SegmentReport] = {}
    agreed = 0
    for batch in batches:
        with torch.no_grad():
            truth = _Values(built.float_graph, batch)
            _Segments(built, truth, segments).run(*batch)
            outputs = truth.outputs
            args, kwargs = pytree.tree_unflatten(list(batch), engine.signature.in_spec)
            results = pytree.tree_leaves(engine(*args, **kwargs))
        agreed += _compare_outputs(report, outputs, results)
        report.images += batch[0].shape[0]
    report.segments = list(segments.values())
    if report.top1_agreement is not None:
        report.top1_agreement = agreed / report.images
    return report


def _compare_outputs(report: VerifyReport, wanted: list[Tensor], got: list[Tensor]) -> int:
    for a, b in zip(wanted, got, strict=True):
        difference = (a.double() - b.double()).flatten(1)
        norms = a.double().flatten(1).norm(dim=1)
        relative = difference.norm(dim=1) / norms.clamp(min=torch.finfo(torch.float32).tiny)
        report.logit_error = max(report.logit_error, float(difference.abs().max()))
        report.relative_error = max(report.relative_error, float(relative.max()))
    if len(wanted) != 1 or wanted[0].dim() != 2 or wanted[0].shape[1] < 2:
        return 0
    report.top1_agreement = 0.0
    return int((wanted[0].argmax(1) == got[0].argmax(1)).sum())


class _Values(fx.Interpreter):
    """Runs the float graph once and keeps every node's value by name."""

    def __init__(self, graph_module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}
        self.outputs: list[Tensor] = list(self.run(*inputs))

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = value = super().run_node(n)
        return value


def _as_map(value: Tensor) -> Tensor:
    """Return [N, C, H, W]; features in the last dimension become channels of 1x1 maps."""
    return value if value.dim() == 4 else value.reshape(-1, value.shape[-1], 1, 1)


class _Segments(fx.Interpreter):
    """Runs the engine's graph node by node, on the float graph's values, and compares."""

    def __init__(self, built: Built, truth: _Values, segments: dict[str, SegmentReport]) -> None:
        super().__init__(built.lowered, garbage_collect_values=False)
        self._truth = truth
        self._graph = built.float_graph
        self._segments = segments
        self._affected: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if "conv" in n.meta:
            return self._conv(n)
        value = super().run_node(n)
        affected = self._inherited(n, value)
        if "rule" in n.meta:
            self._count_zeros(n)
        source = n.meta.get("source")
        if n.op != "call_function" or source is None or not isinstance(value, Tensor):
            if affected is not None:
                self._affected[n] = affected
            return value
        wanted = self._truth.values[source].reshape(value.shape).to(value.dtype)
        if "getitem" not in str(n.target):
            self._compare_floats(self._segment(n), value, wanted, affected)
        return wanted

    def _inherited(self, n: fx.Node, value: Any) -> Tensor | None:
        """Return what exact zeros reached before `n`, where no float node stood in between."""
        reached = [self._affected[node] for node in n.all_input_nodes if node in self._affected]
        if not reached or not isinstance(value, Tensor):
            return None
        if is_call(n, torch.ops.aten.reshape.default):
            return reached[0].reshape(value.shape)
        return torch.stack([mask.expand(value.shape) for mask in reached]).any(0)

    def _segment(self, n: fx.Node) -> SegmentReport:
        name = str(n.meta.get("layer", n.name))
        return self._segments.setdefault(name, SegmentReport(name))

    def _count_zeros(self, n: fx.Node) -> None:
        rule = n.meta["rule"]
        if rule.tie:
            x = self.env[parent(n)].float()
            zeros = int((x == rule.threshold.to(x.device).view(1, -1, 1, 1)).sum())
            if zeros:
                segment = self._segments.setdefault(n.name, SegmentReport(n.name))
                segment.exact_zeros += zeros

    def _compare_floats(
        self, segment: SegmentReport, got: Tensor, wanted: Tensor, affected: Tensor | None
    ) -> None:
        segment.float_limit = FLOAT_TOLERANCE.get(got.dtype, 1e-4)
        error = (got.double() - wanted.double()).abs()
        if affected is not None:
            error = error.masked_fill(affected, 0.0)
        largest = float(wanted.double().abs().max()) if wanted.numel() else 0.0
        worst = float(error.max()) if error.numel() else 0.0
        segment.float_error = max(segment.float_error, worst / largest if largest else worst)

    def _conv(self, n: fx.Node) -> Any:
        conv: BinaryConv = n.meta["conv"]
        segment = self._segment(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        op = str(n.target).split(".")[-2]
        options = dict(kwargs)
        if op != "bconv2d_float":
            options |= {"threshold": args[4], "sense": args[5]}
        geometry, epilogue, residual, _ = split_options(args[1], args[2], args[3], options)
        dot = ops.bconv2d(args[0], args[1], geometry)
        wanted_dot, affected = self._accumulators(conv, dot)
        segment.accumulators += dot.numel()
        segment.accumulators_wrong += int((dot != wanted_dot).sum())
        if affected is not None and not epilogue.pool.is_identity:
            pool = epilogue.pool
            pooled = F.max_pool2d(affected.float(), pool.kernel_size, pool.stride, pool.padding)
            affected = pooled > 0
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        source = n.meta.get("source")
        if source is None:
            if affected is not None:
                self._affected[n] = affected
            return result
        v = apply_epilogue(dot, epilogue, residual)
        truth = self._truth.values[source].reshape(v.shape)
        floats = (
            None if op == "bconv2d_bits" else result[0] if op == "bconv2d_float_bits" else result
        )
        if floats is not None:
            self._compare_floats(segment, floats, truth.to(floats.dtype), affected)
            floats = truth.to(floats.dtype)
        if op == "bconv2d_float":
            return floats
        bits = result if op == "bconv2d_bits" else result[1]
        wanted_bits = ops.binarize(truth.float(), epilogue.threshold, epilogue.sense)
        self._compare_bits(segment, conv, epilogue, residual, v, bits, wanted_bits, affected)
        self._count_truth_zeros(segment, n, truth, epilogue)
        return wanted_bits if op == "bconv2d_bits" else (floats, wanted_bits)

    def _count_truth_zeros(
        self, segment: SegmentReport, n: fx.Node, truth: Tensor, epilogue: Any
    ) -> None:
        if n.meta.get("tie"):
            at_step = truth.float() == epilogue.threshold.view(1, -1, 1, 1)
            segment.exact_zeros += int(at_step.sum())

    def _accumulators(self, conv: BinaryConv, dot: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the float graph's accumulators, zeros counted as +1, and what zeros reach."""
        value = _as_map(self._truth.values[conv.value].double())
        middle = (conv.rule.high + conv.rule.low) / 2
        level = (conv.rule.high - conv.rule.low) / 2
        zero = torch.zeros_like(value, dtype=torch.bool)
        if conv.rule.tie:
            zero = (value - middle).abs() < 0.5 * level
        if conv.rule.tie and conv.source is not None:
            threshold = conv.rule.threshold.view(1, -1, 1, 1).to(value.device)
            zero = zero | (_as_map(self._truth.values[conv.source]) == threshold)
        unit = torch.where(zero | (value >= middle), 1.0, -1.0)
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

    def _compare_bits(
        self,
        segment: SegmentReport,
        conv: BinaryConv,
        epilogue: Any,
        residual: Tensor | None,
        v: Tensor,
        got: Tensor,
        wanted: Tensor,
        affected: Tensor | None,
    ) -> None:
        channels = conv.geometry.out_channels
        unequal = contract.unpack_channels(got ^ wanted, channels).permute(0, 3, 1, 2)
        if affected is not None:
            unequal = unequal & ~affected
        segment.bits += v.numel()
        if not bool(unequal.any()):
            return
        per_channel = epilogue.multiplier.abs() * conv.geometry.reduction + epilogue.bias.abs()
        per_channel = per_channel + epilogue.threshold.abs()
        if epilogue.shift is not None:
            per_channel = per_channel + epilogue.shift.abs()
        bound = per_channel.view(1, -1, 1, 1) + (0 if residual is None else residual.float().abs())
        near = (v - epilogue.threshold.view(1, -1, 1, 1)).abs() <= 8 * 2.0**-24 * bound
        segment.flips += int((unequal & near).sum())
        segment.bits_wrong += int((unequal & ~near).sum())

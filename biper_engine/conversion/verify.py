"""Verify: prove segment by segment that an engine computes what its model computes.

Every node of the engine gets the float graph's own bits and residual, so that no difference
cascades. Accumulators must be equal, as integers. A bit may differ only where the value is within
rounding of its threshold,

    |v - threshold| <= 8 * 2^-24 * (|multiplier| * K + |bias| + |residual| + |shift| + |threshold|),

and each one is counted. A float map must agree within the rounding of its dtype. Where the model's
own sign met an exact 0, which no bit can hold, the contract says +1: such inputs are counted, and
the outputs they reach are left out of the comparison of bits and floats, as are output channels
whose zero weights the caller chose to count as positive. Logit error and top-1
agreement of the whole network are reported, not judged: one legitimate flip moves logits.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from biper_engine import bits as contract
from biper_engine import ops
from biper_engine.conversion.graphs import arguments, is_call, parent
from biper_engine.conversion.ir import BinaryConv
from biper_engine.conversion.pipeline import Built, build
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError
from biper_engine.ops.reference import apply_epilogue
from biper_engine.ops.registration import _split
from biper_engine.runtime import isolate_outputs

__all__ = ["SegmentReport", "VerifyReport", "check_segments", "verify"]

_FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest error of a float map over its largest magnitude: rounding of sums of up to 2^16 terms."""


_CHUNK = 64


@dataclass
class SegmentReport:
    """One node of the engine against the float graph, over all images.

    Attributes:
        name: layer or node.
        accumulators: integers compared; 0 for a float segment.
        accumulators_wrong: of them, unequal.
        bits: bits compared.
        flips: bits that differ where the value is within rounding of the threshold.
        bits_wrong: bits that differ elsewhere.
        exact_zeros: inputs at which the model's sign is exactly 0.
        float_error: largest error of the float map, over its largest magnitude.
        float_limit: what `float_error` may be.
    """

    name: str
    accumulators: int = 0
    accumulators_wrong: int = 0
    bits: int = 0
    flips: int = 0
    bits_wrong: int = 0
    exact_zeros: int = 0
    float_error: float = 0.0
    float_limit: float = _FLOAT_TOLERANCE[torch.float32]

    @property
    def ok(self) -> bool:
        """Whether accumulators are equal, no bit differs without cause and floats agree."""
        wrong = self.accumulators_wrong or self.bits_wrong
        return not wrong and self.float_error <= self.float_limit


@dataclass
class VerifyReport:
    """The result of `verify`.

    Attributes:
        segments: one entry per node of the engine that was compared.
        images: images compared.
        mismatch: how the engine differs from a fresh conversion of the model, or empty.
        logit_error: largest |engine - model| over the images, of the whole network.
        relative_error: largest norm of that difference over that of the model's outputs, per image.
        top1_agreement: share of images with the same argmax; None where outputs are no logits.
    """

    segments: list[SegmentReport] = field(default_factory=list)
    images: int = 0
    mismatch: str = ""
    logit_error: float = 0.0
    relative_error: float = 0.0
    top1_agreement: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every segment agrees; see the module for what that means."""
        return not self.mismatch and bool(self.images) and all(s.ok for s in self.segments)

    @property
    def layers_equal(self) -> int:
        """Number of binary layers whose accumulators are all equal."""
        return sum(s.accumulators > 0 and not s.accumulators_wrong for s in self.segments)

    @property
    def layers(self) -> int:
        """Number of binary layers compared."""
        return sum(s.accumulators > 0 for s in self.segments)

    @property
    def flips(self) -> int:
        """Bits that differ within rounding."""
        return sum(s.flips for s in self.segments)

    @property
    def exact_zeros(self) -> int:
        """Inputs at which the model's sign is exactly 0, over all layers."""
        return sum(s.exact_zeros for s in self.segments)

    def table(self) -> str:
        """Return the report as aligned text of at most 80 columns where names allow."""
        if self.mismatch:
            return f"not verified: {self.mismatch}"
        width = max([len("segment"), *(len(s.name) for s in self.segments)])
        lines = [
            f"{'segment':{width}}  {'accumulators':>14}  {'bits':>12}  {'flips':>5}  {'zeros':>5}"
            "  float error"
        ]
        for s in self.segments:
            sums = (
                f"{s.accumulators:,} {'=' if not s.accumulators_wrong else '!'}"
                if s.accumulators
                else "-"
            )
            bits = f"{s.bits:,} {'=' if not s.bits_wrong else '!'}" if s.bits else "-"
            mark = "" if s.ok else "  WRONG"
            lines.append(
                f"{s.name:{width}}  {sums:>14}  {bits:>12}  {s.flips:5}  {s.exact_zeros:5}  "
                f"{s.float_error:.1e}{mark}"
            )
        agreement = (
            "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.2%}"
        )
        lines.append(
            f"{'equal' if self.ok else 'NOT EQUAL'}: {self.layers_equal} of {self.layers} binary "
            f"layers on {self.images} images; {self.flips} bits flipped within rounding, "
            f"{self.exact_zeros} exact zeros"
        )
        lines.append(
            f"whole network: largest output error {self.logit_error:.2e}, relative "
            f"{self.relative_error:.2e}{agreement}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Return every field, and `ok`, as a JSON object."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


def verify(
    engine: Engine,
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    limit: int | None = None,
) -> VerifyReport:
    """Compare an engine with the model it was converted from.

    Args:
        engine: an engine, converted or loaded.
        model: the model; it is captured again and is not changed.
        data: a batch of inputs [N, ...], or an iterable of batches; of a batch that is a tuple or
            list, as data loaders give, the first entries are the inputs and a label is ignored.
        limit: compare at most this many images.

    Returns:
        A report; `report.ok` is the verdict, `report.table()` the evidence.

    Raises:
        ConversionError: the model cannot be captured with the engine's input size.
        ValueError: `data` holds no image.
    """
    batches = _batches(data, len(engine.signature.inputs), limit)
    first = next(batches, None)
    if first is None:
        raise ValueError("`data` holds no image; pass a tensor [N, ...] or an iterable of batches.")
    built = _rebuild(engine, model, first)
    mismatch = _mismatch(engine.graph_module, built.lowered)
    if mismatch:
        return VerifyReport(mismatch=mismatch)
    return check_segments(engine, built, chain([first], batches))


def _batches(
    data: Tensor | Iterable[Any], inputs: int, limit: int | None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat inputs of at most `_CHUNK` images, since every map of a batch is kept."""
    left = limit if limit is not None else sys.maxsize
    for batch in [data] if isinstance(data, Tensor) else data:
        leaves = pytree.tree_leaves(batch)[:inputs]
        count = min(left, leaves[0].shape[0])
        for start in range(0, count, _CHUNK):
            yield tuple(leaf[start : min(start + _CHUNK, count)] for leaf in leaves)
        left -= count
        if left < 1:
            return


def _rebuild(engine: Engine, model: nn.Module, batch: tuple[Tensor, ...]) -> Built:
    args, kwargs = pytree.tree_unflatten(list(batch), engine.signature.in_spec)
    if kwargs:
        raise ConversionError("Models with keyword inputs cannot be captured again.")
    options = engine.options
    return build(
        model,
        tuple(args),
        keep_float=tuple(options.get("keep_float", ())),
        zero_weights=options.get("zero_weights", "float"),
        compute_dtype=getattr(torch, options.get("compute_dtype", "float32")),
    )


def _mismatch(own: fx.GraphModule, fresh: fx.GraphModule) -> str:
    """Return how an engine differs from a fresh conversion of the model, or an empty string."""
    mine, theirs = dict(own.named_buffers()), dict(fresh.named_buffers())
    for name in sorted(mine.keys() ^ theirs.keys()):
        return f"the engine and the model do not have the same layers (first difference: {name})"
    for name, value in mine.items():
        other = theirs[name]
        same = value.shape == other.shape and value.dtype == other.dtype
        if not same or not torch.equal(value.cpu(), other.cpu()):
            return f"the engine was not made from this model: {name} differs"
    isolated = fx.GraphModule(fresh, copy.deepcopy(fresh.graph))
    isolate_outputs(isolated)
    return _graph_difference(_operators(own), _operators(isolated))


def _operators(graph_module: fx.GraphModule) -> list[tuple[str, Any]]:
    """Return every node's operator and arguments, with positions in place of names."""
    positions: dict[fx.Node, str] = {}
    listed = []
    for index, node in enumerate(graph_module.graph.nodes):
        positions[node] = f"%{index}"
        values: dict[str, Any] = {str(place): value for place, value in enumerate(node.args)}
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            values = arguments(node)
        values = {name: _plain(value, positions) for name, value in values.items()}
        listed.append(
            (node.op if node.op in ("placeholder", "output") else str(node.target), values)
        )
    return listed


def _plain(value: Any, positions: dict[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return positions[value]
    if isinstance(value, list | tuple):
        return [_plain(item, positions) for item in value]
    return value


def _graph_difference(own: list[tuple[str, Any]], fresh: list[tuple[str, Any]]) -> str:
    if len(own) != len(fresh):
        return f"the engine has {len(own)} operators and tensors, the model {len(fresh)}"
    for (mine, my_arguments), (theirs, their_arguments) in zip(own, fresh, strict=True):
        if mine != theirs:
            return f"the engine has {mine} where the model has {theirs}"
        for name, value in my_arguments.items():
            if _scalar_lists(value) != _scalar_lists(their_arguments.get(name)):
                return (
                    f"`{name}` of {mine} is {value} in the engine and "
                    f"{their_arguments.get(name)} in the model"
                )
    return ""


def _scalar_lists(value: Any) -> Any:
    """A list that repeats one number and the number itself are one argument to PyTorch."""
    repeated = isinstance(value, list) and len(value) > 0 and all(v == value[0] for v in value)
    return value[0] if repeated and not isinstance(value[0], str) else value


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
        segment.float_limit = _FLOAT_TOLERANCE.get(got.dtype, 1e-4)
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
        geometry, epilogue, residual, _ = _split(args[1], args[2], args[3], options)
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
        if not bool(zero.any()) and not bool(conv.filled.any()):
            return wanted, None
        reached = F.conv2d(F.pad(zero.float(), (left, right, top, bottom)), weight.abs(), *shared)
        return wanted, (reached > 0) | conv.filled.view(1, -1, 1, 1).to(value.device)

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

"""Truth: the values that the model computes, and the proof that they are the model's.

The captured graph must give the model's outputs. Its operators are the model's own, on the same
machine, so the outputs are equal bit for bit, except for modules that PyTorch runs with a fused
kernel and captures as several operators, such as `nn.LSTM` and attention: their sums have another
order. Each node of the simplified graph, on the captured graph's values, must give its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.conversion.modes import plain_modes
from biper_engine.conversion.observe import Observation, Observed, first_difference
from biper_engine.conversion.pipeline import Built
from biper_engine.conversion.verify_report import FLOAT_TOLERANCE, ModelReport

__all__ = ["Truth", "largest_error"]

_ANOTHER_ORDER = 1e-5
"""Largest change by another order of float32 sums, over the largest magnitude: the root of 2^16
terms times 2^-24."""


class Truth:
    """The values of a batch.

    Args:
        built: a conversion.
        inputs: flat inputs.

    Attributes:
        values: values by the name of the captured node; values that only the simplified graph has,
            by the name of its node.
        outputs: outputs of the captured graph.
    """

    def __init__(self, built: Built, inputs: Sequence[Tensor]) -> None:
        self._built = built
        self._inputs = inputs
        with plain_modes():
            captured = _Values(built.captured)
            self.outputs: tuple[Any, ...] = tuple(captured.run(*_private(inputs)))
        self.values: dict[str, Any] = captured.values

    def compare_with_model(
        self, observation: Observation, observed: Observed, report: ModelReport
    ) -> None:
        """Record in `report` whether the captured graph gives the model's outputs."""
        report.batches.append(int(self._inputs[0].shape[0]) if self._inputs else 0)
        if observation.out_spec != self._built.out_spec:  # also holds constants
            report.bit_equal, report.error = False, float("inf")
            return
        if not first_difference(observation.outputs, self.outputs):
            return
        report.bit_equal = False
        with plain_modes():
            followed = _Following(self._built.captured, observed.values_of(self._inputs))
            outputs = tuple(followed.run(*_private(self._inputs)))
        report.error = max(report.error, largest_error(observation.outputs, outputs))

    def add_simplified(self, report: ModelReport | None) -> None:
        """Add values that only the simplified graph has; record in `report` how others differ."""
        with plain_modes():
            _Simplified(self.values, self._built.float_graph, report).run(*_private(self._inputs))


def largest_error(wanted: Sequence[Any], got: Sequence[Any]) -> float:
    """Return the largest difference over the largest magnitude; infinite if forms differ."""
    if len(wanted) != len(got):
        return float("inf")
    return max((_error(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)


def _error(wanted: Any, got: Any) -> float:
    if not isinstance(wanted, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(wanted) is type(got) and wanted == got else float("inf")
    if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
        return float("inf")
    if torch.equal(wanted, got):
        return 0.0
    if not wanted.is_floating_point():
        return float("inf")
    a, b = wanted.double(), got.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    error = float(difference.max()) / _largest(a)
    return error if error == error else float("inf")


def _largest(values: Tensor) -> float:
    """Return the largest finite magnitude of float64 values, or the smallest normal float32."""
    tiny = torch.finfo(torch.float32).tiny
    if not values.numel():
        return tiny
    return max(float(torch.where(values.isfinite(), values.abs(), 0.0).max()), tiny)


def _private(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copy inputs, since a captured graph may write to them."""
    return [x.clone() for x in inputs]


class _Values(fx.Interpreter):
    """Runs a graph and keeps every node's value by name."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = value = super().run_node(n)
        return value


class _Following(fx.Interpreter):
    """Runs the captured graph on the model's own values, if they are equal up to rounding.

    Otherwise a bit that rounding flips after a fused kernel would change everything after it.
    """

    def __init__(
        self, graph_module: fx.GraphModule, recorded: dict[tuple[Any, ...], list[Tensor]]
    ) -> None:
        super().__init__(graph_module)
        self._recorded = recorded
        self._sampled: dict[tuple[Any, ...], _Sampled] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, Tensor):
            return value
        key = (value.dtype, tuple(value.shape))
        if key not in self._recorded:
            return value
        if key not in self._sampled:
            self._sampled[key] = _Sampled(self._recorded[key])
        errors = [(_error(own, value), own) for own in self._sampled[key].possibly_near(value)]
        error, nearest = min(errors, key=lambda found: found[0], default=(float("inf"), value))
        return nearest if error <= _ANOTHER_ORDER else value


class _Sampled:
    """Tensors of one dtype and shape, with some elements of each.

    A network of a thousand operators has hundreds of tensors of one shape; a look at some elements
    tells most of them apart.
    """

    _COUNT = 64

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._samples = torch.stack([self._sample(tensor) for tensor in tensors])
        largest = [_largest(tensor.double()) for tensor in tensors]
        self._limits = _ANOTHER_ORDER * torch.tensor(largest, dtype=torch.float64)[:, None]

    def possibly_near(self, value: Tensor) -> list[Tensor]:
        """Return the tensors whose samples are equal to those of `value` up to rounding."""
        wanted, got = self._samples, self._sample(value)
        near = ((wanted - got).abs() <= self._limits) | (wanted == got)
        near |= wanted.isnan() & got.isnan()
        return [self._tensors[i] for i in near.all(1).nonzero().flatten().tolist()]

    def _sample(self, tensor: Tensor) -> Tensor:
        step = max(1, tensor.numel() // self._COUNT)
        return tensor.reshape(-1)[::step].double()


class _Simplified(fx.Interpreter):
    """Runs the simplified graph, each node on the captured graph's values.

    With a report, the values of both are compared. Without one, only values that the captured graph
    lacks are computed.
    """

    def __init__(
        self, values: dict[str, Any], graph_module: fx.GraphModule, report: ModelReport | None
    ) -> None:
        super().__init__(graph_module)
        self._values = values
        self._captured = frozenset(values)
        self._report = report

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        source = n.meta["source"]
        if source not in self._captured:
            self._values[source] = value = super().run_node(n)
            return value
        wanted = self._values[source]
        if self._report is not None:
            self._compare(self._report, n, wanted, super().run_node(n))
        return wanted

    def _compare(self, report: ModelReport, n: fx.Node, wanted: Any, value: Any) -> None:
        error = largest_error(_leaves(wanted), _leaves(value))
        report.pass_error = max(report.pass_error, error)
        limit = FLOAT_TOLERANCE[torch.float32]  # as for a segment: the same rewriting of float sums
        if error > limit and not report.pass_wrong:
            report.pass_wrong = n.name


def _leaves(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)

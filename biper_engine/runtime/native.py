"""The native plan: runs of a network's operators as programs, the other operators one by one.

Every operator that has a native step is in a run; the others run one by one in between, and the
plan gives the reason for each. The number of runs is minimal: an operator joins the earliest run
after all its inputs, so that a network whose operators all have steps is a single program, and
parallel branches share one. If there are other operators, a run of a single operator that is not
a convolution is not worth its own call, and the operator runs in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from biper_engine.graph.choice import node_backend
from biper_engine.graph.reading import biper_op, get_constant, is_bconv2d, is_call, output_values
from biper_engine.graph.shapes import input_without_data, result_without_data, without_data
from biper_engine.graph.signature import InputSpec
from biper_engine.ops.backends import select
from biper_engine.ops.cpu_program import CpuProgram
from biper_engine.runtime.runs import NativeRun, NativeStep, Unsupported
from biper_engine.runtime.steps import RunBuilder

__all__ = ["NativePlan", "elsewhere", "native_plan"]

_NAMED_REASONS = 2


@dataclass(frozen=True)
class NativePlan:
    """A network as native programs, and operators between them.

    Attributes:
        parts: programs and call_function nodes, in order of execution.
        reasons: reasons why each operator among them is not in a program.
        is_whole: whether a single program has the inputs and outputs of the graph.
    """

    parts: tuple[NativeRun | fx.Node, ...]
    reasons: dict[fx.Node, str]
    is_whole: bool

    @property
    def runs(self) -> tuple[NativeRun, ...]:
        """All programs."""
        return tuple(part for part in self.parts if isinstance(part, NativeRun))

    @property
    def steps(self) -> tuple[NativeStep, ...]:
        """The steps of all programs."""
        return tuple(step for run in self.runs for step in run.steps)

    def __str__(self) -> str:
        runs, left = len(self.runs), len(self.reasons)
        programs = "one native program" if runs == 1 else f"{runs} native programs"
        text = f"{programs} of {len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        if not left:
            return text
        reasons = "; ".join(list(self.reasons.values())[:_NAMED_REASONS])
        more = f"; and {left - _NAMED_REASONS} more" if left > _NAMED_REASONS else ""
        return f"{text}, {left} operator{'s' * (left != 1)} outside: {reasons}{more}"


def native_plan(
    module: fx.GraphModule,
    device: torch.device | None,
    inputs: Sequence[InputSpec] | None,
    make_program: Callable[[], CpuProgram] = CpuProgram,
) -> NativePlan | str:
    """Build the programs of a network.

    Args:
        module: a converted network.
        device: device of its tensors.
        inputs: its inputs; None if they are not known.
        make_program: returns an empty program.

    Returns:
        The plan, or the reason why there is no program at all.

    Raises:
        BackendUnavailableError: a forced backend cannot run the network.
    """
    if device is None or device.type != "cpu":
        return elsewhere(device)
    if inputs is None:
        return "the shapes of its inputs are not known"
    others = {node_backend(module, node, device) for node in module.graph.nodes} - {None, "cpu"}
    if others:
        return f"operators run on backend {', '.join(sorted(map(str, others)))}"
    if select("binarize", None, device).name != "cpu":
        return "the cpu backend is not available here"
    # A plan outlives the mode of the call that makes it, so it must not hold inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        return _Partition(module, inputs, make_program).plan()


def elsewhere(device: torch.device | None) -> str:
    """Return, as a clause, why a network has no native program on a device that is not the CPU."""
    return f"the network is on {device}" if device else "the network has no weights, so no device"


class _Partition:
    """Assigns every operator to a run, or leaves it outside.

    Run k takes values of earlier runs and of outside operators that need runs up to k - 1; outside
    operators of level k take values of the runs up to k. So run 0 comes first, then the operators
    of level 0, then run 1, and so on.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[InputSpec],
        make_program: Callable[[], CpuProgram],
    ) -> None:
        self._module = module
        self._make_program = make_program
        self._specs = inputs
        self._runs: dict[int, RunBuilder] = {}
        self._levels: dict[fx.Node, int] = {}
        self._owners: dict[fx.Node, RunBuilder] = {}
        self._outside: dict[fx.Node, Any] = {}  # their values as tensors without data, or None
        self._reasons: dict[fx.Node, str] = {}
        self._alone: set[fx.Node] = set()
        self._sizes: dict[fx.Node, Any] = {}  # sizes that programs know from their batch

    def plan(self) -> NativePlan | str:
        self._place_all()
        self._dissolve_short_runs()
        self._drop_unused_sizes()
        if not self._runs:
            return next(iter(self._reasons.values()), "it has no operators")
        finished = self._finish_runs()
        keyed: list[tuple[tuple[int, int, int], NativeRun | fx.Node]] = [
            ((level, 0, -1), run) for level, run in finished.items()
        ]
        for position, node in enumerate(self._module.graph.nodes):
            if node in self._outside and node.op == "call_function":
                keyed.append(((self._levels[node], int(node not in self._alone), position), node))
        parts = tuple(part for _, part in sorted(keyed, key=lambda pair: pair[0]))
        reasons = {
            part: self._reasons[part]
            for part in parts
            if isinstance(part, fx.Node) and part in self._reasons
        }
        return NativePlan(parts, reasons, len(parts) == 1 and self._is_whole(parts[0]))

    def _is_whole(self, part: NativeRun | fx.Node) -> bool:
        assert isinstance(part, NativeRun)
        placeholders = tuple(self._module.graph.find_nodes(op="placeholder"))
        outputs = [(node, at) for at, node in enumerate(output_values(self._module.graph))]
        return part.inputs == placeholders and list(part.outputs.items()) == outputs

    # -- nodes ------------------------------------------------------------------------------------

    def _place_all(self) -> None:
        specs = iter(self._specs)
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                self._outside[node] = input_without_data(next(specs))
                self._levels[node] = 0
            elif node.op == "call_function" and node not in self._owners:
                self._place(node)

    def _place(self, node: fx.Node) -> None:
        level = max((self._level_after(x) for x in node.all_input_nodes), default=0)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if node.target is operator.getitem and source not in self._owners:
            self._leave(node)
            return
        if level not in self._runs:
            self._runs[level] = RunBuilder(self._module, self._value, self._make_program())
        try:
            added = self._runs[level].add(node)
        except Unsupported as reason:
            self._leave(node)
            self._reasons[node] = f"{node.name} ({node.target}) {reason}"
            return
        for taken in added:
            self._owners[taken] = self._runs[level]
            self._levels[taken] = level

    def _drop_unused_sizes(self) -> None:
        """Drop the sizes that only programs use, which know them from their batch."""
        for node in reversed(list(self._outside)):
            if _is_size(self._outside[node]) and not any(
                user in self._outside or user.op == "output" for user in node.users
            ):
                self._sizes[node] = self._outside.pop(node)
                self._reasons.pop(node, None)

    def _level_after(self, source: fx.Node) -> int:
        """Return the first run that can take the value of `source`."""
        if _is_size(self._outside.get(source)):
            return 0  # programs know it from their batch
        made_outside = source in self._outside and source.op == "call_function"
        return self._levels.get(source, 0) + made_outside

    def _leave(self, node: fx.Node) -> None:
        """Leave a node outside the runs, at the level of its inputs."""
        self._levels[node] = max((self._levels.get(x, 0) for x in node.all_input_nodes), default=0)
        self._outside[node] = result_without_data(node, self._value)

    def _value(self, node: fx.Node) -> Any:
        owner = self._owners.get(node)
        if owner is not None:
            return owner.value(node)
        if node.op == "get_attr":
            return without_data(get_constant(self._module, str(node.target)))
        return self._outside[node]

    # -- runs -------------------------------------------------------------------------------------

    def _dissolve_short_runs(self) -> None:
        self._runs = {level: run for level, run in self._runs.items() if run.nodes}
        whole = len(self._runs) == 1 and not self._reasons
        for level, run in list(self._runs.items()):
            operators = list(dict.fromkeys(node for step in run.steps for node in step.nodes))
            if not run.inputs:
                operators = []  # nothing tells it the batch
            if len(operators) > 1 or (operators and (whole or _is_convolution(operators[0]))):
                continue
            del self._runs[level]
            self._alone.update(run.nodes)
            for node in run.nodes:
                self._move_out(node, "is not worth a program alone")
                self._alone.update(filter(self._is_size_outside, node.all_input_nodes))

    def _is_size_outside(self, node: fx.Node) -> bool:
        return _is_size(self._outside.get(node))

    def _move_out(self, node: fx.Node, reason: str) -> None:
        """Take a node out of its run after all values are known; it keeps its level."""
        del self._owners[node]
        self._outside[node] = None
        self._reasons[node] = f"{node.name} ({node.target}) {reason}"
        needed = [x for x in node.all_input_nodes if x in self._sizes]
        while needed:
            size = needed.pop()
            self._outside[size] = self._sizes.pop(size)
            needed.extend(x for x in size.all_input_nodes if x in self._sizes)

    def _finish_runs(self) -> dict[int, NativeRun]:
        finished: dict[int, NativeRun] = {}
        for level in sorted(self._runs, reverse=True):
            run = self._runs[level]
            for left in run.left_out(self._owned(run, self._wanted())):
                self._move_out(left, "leaves its program, which cannot return such a value")
            finished[level] = run.finish(self._owned(run, self._wanted()))
        return finished

    def _wanted(self) -> list[fx.Node]:
        """Return the values that leave the network, or that operators and programs take."""
        wanted = [x for x in output_values(self._module.graph) if isinstance(x, fx.Node)]
        for node in self._outside:
            wanted.extend(node.all_input_nodes)
        for run in self._runs.values():
            wanted.extend(run.inputs)
        return wanted

    def _owned(self, run: RunBuilder, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return [node for node in dict.fromkeys(nodes) if self._owners.get(node) is run]


def _is_size(value: Any) -> bool:
    return type(value) is int


def _is_convolution(node: fx.Node) -> bool:
    own = biper_op(node) in ("bmatmul_float", "weight_linear")
    return own or is_call(node, torch.ops.aten.conv2d.default) or is_bconv2d(node)

"""Results of checks of an engine: plain data, printed as tables or as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BackendReport", "NodeReport", "ProofReport"]


@dataclass(frozen=True, kw_only=True)
class ProofReport:
    """The result of replaying a proof.

    Attributes:
        backend: the requested backend, or "automatic".
        seed: seed of the inputs.
        maps: number of packed maps in the proof.
        maps_identical: whether every packed map has the recorded bytes.
        outputs_identical: whether every output has the recorded bytes.
        outputs_close: whether every output equals the record within the rounding of float layers.
        max_output_difference: largest absolute difference of a recorded value, or None.
        node: the first node whose packed map differs, or None.
        bits_differ: number of bits in which that map differs from the reference on this machine.
        reference_agrees: whether the reference on this machine gives the recorded map there; if
            not, float layers before it round differently here than on the machine that saved it.
    """

    backend: str
    seed: int
    maps: int
    maps_identical: bool
    outputs_identical: bool
    outputs_close: bool
    max_output_difference: float | None
    node: str | None = None
    bits_differ: int | None = None
    reference_agrees: bool | None = None

    @property
    def bit_identical(self) -> bool:
        """Whether all bytes of packed maps and outputs are as recorded."""
        return self.maps_identical and self.outputs_identical

    @property
    def ok(self) -> bool:
        """Whether all packed maps are as recorded, and outputs up to the rounding of floats."""
        return self.maps_identical and self.outputs_close

    def table(self) -> str:
        """Return the result as a few lines of text."""
        lines = [f"proof (seed {self.seed}) on backend {self.backend}: {self.maps} packed maps"]
        if self.bit_identical:
            return "\n".join([*lines, "bit-identical, outputs included"])
        if self.maps_identical:
            lines.append("every packed map is bit-identical; outputs differ in rounding")
        else:
            bits = "an unknown number of" if self.bits_differ is None else f"{self.bits_differ:,}"
            lines.append(f"first different map: {self.node}, {bits} bits from the reference here")
        if self.reference_agrees is False:
            lines.append(
                "the reference differs there, too: float layers round differently on this machine"
            )
        if self.max_output_difference is not None:
            lines.append(f"largest difference of an output: {self.max_output_difference:.3g}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {**asdict(self), "bit_identical": self.bit_identical, "ok": self.ok}


@dataclass(frozen=True)
class NodeReport:
    """One operator on a backend and on the reference, with the same inputs.

    Attributes:
        node: its name in the graph.
        op: its name in `torch.ops.biper`.
        backend: the backend that ran.
        different: number of elements (words of packed maps, values of float maps) that differ.
        total: number of elements.
        max_difference: largest absolute difference of an element; it has no meaning for words.
    """

    node: str
    op: str
    backend: str
    different: int
    total: int
    max_difference: float

    @property
    def equal(self) -> bool:
        """Whether all bytes are equal."""
        return self.different == 0


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """Every `torch.ops.biper` node of an engine, on a backend and on the reference.

    Attributes:
        backend: the requested backend, or "automatic".
        nodes: one row per node, in order of execution.
    """

    backend: str
    nodes: tuple[NodeReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every node gives the reference's bytes."""
        return all(node.equal for node in self.nodes)

    @property
    def first_different(self) -> NodeReport | None:
        """The first node that differs, or None."""
        return next((node for node in self.nodes if not node.equal), None)

    def table(self) -> str:
        """Return aligned text, one line per node."""
        width = max([len("node"), *(len(node.node) for node in self.nodes)])
        lines = [f"{'node':{width}}  {'operator':18}  {'ran on':9}  result"]
        for node in self.nodes:
            result = "equal" if node.equal else f"{node.different:,} of {node.total:,} differ"
            lines.append(f"{node.node:{width}}  {node.op:18}  {node.backend:9}  {result}")
        equal = sum(node.equal for node in self.nodes)
        lines.append(f"{equal} of {len(self.nodes)} nodes equal the reference, byte for byte")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        rows = [{**asdict(node), "equal": node.equal} for node in self.nodes]
        return {"backend": self.backend, "ok": self.ok, "nodes": rows}

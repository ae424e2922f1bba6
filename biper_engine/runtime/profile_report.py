"""What a profile found: the rows of a network's operators, and how they are printed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

__all__ = ["NodeProfile", "ProfileReport"]


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """One operator of the network, or one step of a native program.

    Attributes:
        name: of its node, which is made from the layer's; of the first one of a step.
        op: "bconv2d_bits" and the like, or a float operator; those of a step joined by " + ".
        backend: what ran it; "torch" for operators that torch ran.
        ms: median wall-clock time, a call from Python included where there was one.
        macs: multiply-accumulates on bits, of the whole batch, padded taps counted; None for an
            operator without any.
        program: which of the network's native programs it is a step of, from 0 on; None for an
            operator outside of them.
        reason: why the operator is in none of them, where there are any; else None.
    """

    name: str
    op: str
    backend: str
    ms: float
    macs: int | None = None
    program: int | None = None
    reason: str | None = None

    @property
    def macs_per_second(self) -> float | None:
        """Rate of multiply-accumulates on bits, None without any."""
        return None if self.macs is None else self.macs / (self.ms * 1e-3)


@dataclass(frozen=True, kw_only=True)
class ProfileReport:
    """Every operator of one call, in order.

    Attributes:
        batch: images of the call.
        rounds: calls that the medians are of.
        threads: of the cpu backend where it ran something, else torch's.
        nodes: one row per operator.
        call_ms: median of whole calls from Python, made in turn with those that the rows are of.
        outside_ms: `call_ms` less the median of the sums of the rows of a call: the checks of a
            call, its outputs, and what lies between operators. A difference of two medians, it can
            be negative where calls differ by more than that.
        peak_macs_per_second: what popcounts on registers alone reach on that many cores, measured
            with the report; None where the cpu backend ran no binary convolution.
        isa: instruction set of that peak, or None.
    """

    batch: int
    rounds: int
    threads: int
    nodes: tuple[NodeProfile, ...]
    call_ms: float
    outside_ms: float
    peak_macs_per_second: float | None = None
    isa: str | None = None

    @property
    def total_ms(self) -> float:
        """Sum of the rows."""
        return sum(node.ms for node in self.nodes)

    def share(self, node: NodeProfile) -> float:
        """Return the time of one of the rows over that of all."""
        return node.ms / self.total_ms if self.total_ms else 0.0

    def share_of_peak(self, node: NodeProfile) -> float | None:
        """Return the rate of one of the rows over the peak, None where either is unknown."""
        rate = node.macs_per_second
        if rate is None or self.peak_macs_per_second is None or node.backend != "cpu":
            return None
        return rate / self.peak_macs_per_second

    def table(self) -> str:
        """Return the report as aligned text, 80 columns where names allow."""
        width = max([len("operator"), *(len(node.name) for node in self.nodes)])
        heading = f"{'operator':{width}}  {'runs on':9}  {'us':>9}  {'share':>6}  {'GMAC/s':>7}"
        peak = self.peak_macs_per_second
        lines = [heading + ("   peak" if peak is not None else "")]
        lines += [self._line(node, width) for node in self.nodes]
        lines.append(
            f"{'total':{width}}  {'':9}  {1e3 * self.total_ms:9.1f}  medians of {self.rounds} "
            f"calls, batch {self.batch}"
        )
        lines.append(
            f"{'a whole call':{width}}  {'':9}  {1e3 * self.call_ms:9.1f}  "
            f"{1e3 * self.outside_ms:.1f} outside of the above"
        )
        if peak is not None:
            threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
            lines.append(
                f"peak: {peak * 1e-9:,.0f} GMAC/s, popcounts on registers, measured now "
                f"({self.isa}, {threads})"
            )
        return "\n".join([*lines, *self._programs()])

    def _programs(self) -> list[str]:
        """Return how many programs there are, and why operators are outside of them."""
        steps = Counter(node.program for node in self.nodes if node.program is not None)
        if not steps:
            return []
        counts = ", ".join(map(str, steps.values()))
        lines = [f"native programs: {len(steps)}, steps: {counts}"]
        return lines + [f"outside: {node.reason}" for node in self.nodes if node.reason]

    def _line(self, node: NodeProfile, width: int) -> str:
        line = f"{node.name:{width}}  {node.backend:9}  {1e3 * node.ms:9.1f}"
        line += f"  {self.share(node):6.1%}"
        rate, of_peak = node.macs_per_second, self.share_of_peak(node)
        if rate is not None:
            line += f"  {rate * 1e-9:7,.0f}"
        return line + (f"  {of_peak:5.0%}" if of_peak is not None else "")

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {
            "batch": self.batch,
            "rounds": self.rounds,
            "threads": self.threads,
            "total_ms": self.total_ms,
            "call_ms": self.call_ms,
            "outside_ms": self.outside_ms,
            "peak_macs_per_second": self.peak_macs_per_second,
            "isa": self.isa,
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "backend": node.backend,
                    "ms": node.ms,
                    "share": self.share(node),
                    "macs": node.macs,
                    "macs_per_second": node.macs_per_second,
                    "share_of_peak": self.share_of_peak(node),
                    "program": node.program,
                    "reason": node.reason,
                }
                for node in self.nodes
            ],
        }

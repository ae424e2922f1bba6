"""The output of `biper bench`: tables of contestants, and notes on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from biper_engine.bench import Checked, Comparison, Contest, StreamContest, Throughput

__all__ = ["bench_notes", "bench_table", "check_notes", "stream_notes", "stream_table"]

_DISTURBED = 1.05


def bench_table(comparison: Comparison, ran: Sequence[str]) -> Table:
    """Return one row per contestant and batch size.

    Args:
        comparison: the measurements.
        ran: the backends that ran the engine's operators.
    """
    threads = comparison.threads
    title = f"{threads} thread{'s' * (threads != 1)} each, all in turn"
    table = _table(f"{title}; {_engine_on(comparison, ran)}", comparison.settings)
    for heading in ("ms", "quartiles", "images/s", "engine is"):
        table.add_column(heading, justify="right")
    for contest in comparison.contests:
        _add_rows(table, _contest_rows(contest))
    return table


def stream_table(found: Throughput, ran: Sequence[str]) -> Table:
    """Return one row per contestant and batch size: images per second, several calls at once.

    Args:
        found: the measurements.
        ran: the backends that ran the engine's operators.
    """
    callers = found.callers
    title = f"{callers} thread{'s' * (callers != 1)} each, calls at once"
    table = _table(f"{title}; {_engine_on(found, ran)}", found.settings)
    for heading in ("images/s", "quartiles", "engine"):
        table.add_column(heading, justify="right")
    for contest in found.contests:
        _add_rows(table, _stream_rows(contest))
    return table


def _table(title: str, settings: Mapping[str, str]) -> Table:
    table = Table(
        title=title,
        caption="\n".join(f"{name}: {how}" for name, how in settings.items()),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("")
    return table


def _engine_on(found: Comparison | Throughput, ran: Sequence[str]) -> str:
    native = f" ({found.machine.get('cpu_backend')})" if "cpu" in ran else ""
    return f"engine on: {', '.join(ran) or 'torch'}{native}"


def _add_rows(table: Table, rows: Iterable[Sequence[str]]) -> None:
    for cells in rows:
        table.add_row(*cells)
    table.add_section()


def _contest_rows(contest: Contest) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, taken in contest.samples.items():
        low, high = taken.quartiles_ms
        rows.append(
            (
                str(contest.batch),
                name,
                _ms(taken.median_ms),
                f"{_ms(low)} - {_ms(high)}",
                f"{1e3 * contest.batch / taken.median_ms:,.0f}",
                "" if name == "engine" else f"{contest.times_as_fast(name):.1f}x as fast",
            )
        )
    rows += [(str(contest.batch), name, "", "did not run", "", "") for name in contest.reasons]
    return rows


def _stream_rows(contest: StreamContest) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    batch = str(contest.batch)
    for name, rates in contest.rates.items():
        low, high = rates.quartiles
        ratio = "" if name == "engine" else f"{contest.times_as_fast(name):.1f}x"
        rows.append((batch, name, f"{rates.median:,.0f}", f"{low:,.0f}-{high:,.0f}", ratio))
    rows += [(batch, name, "", "did not run", "") for name in contest.reasons]
    return rows


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def bench_notes(comparison: Comparison) -> list[str]:
    """Return what the table does not say: `check_notes`, and who runs slower in turn than alone."""
    lines = check_notes(comparison.contests)
    for contest in comparison.contests:
        lines += _disturbed(contest)
    return lines


def stream_notes(found: Throughput) -> list[str]:
    """Return what the table does not say: `check_notes`, and whether processors were busy."""
    lines = check_notes(found.contests)
    for contest in found.contests:
        used = contest.rates["engine"].processors_used
        if used < found.callers / _DISTURBED:
            lines.append(
                f"engine, batch {contest.batch}: {found.callers} callers had only {used:.2f} "
                "processors; stop other work on the machine and count again"
            )
    return lines


def check_notes(contests: Sequence[Checked]) -> list[str]:
    """Return which rivals did not run and why, and how far outputs are from the wanted ones.

    Each note appears once, with its worst value over all batch sizes.
    """
    lines: dict[str, None] = {}
    largest: dict[str, tuple[float, str]] = {}
    for contest in contests:
        lines |= {f"{name} did not run: {why}": None for name, why in contest.reasons.items()}
        for name, difference in contest.differences.items():
            beside = contest.beside.get(name, "eager")
            largest[name] = max((difference, beside), largest.get(name, (0.0, beside)))
    for name, (difference, beside) in largest.items():
        lines[f"{name}: outputs within {difference:.1e} of {beside}'s, over the largest one"] = None
    return list(lines)


def _disturbed(contest: Contest) -> list[str]:
    """Return a line for each contestant that is over 5 % slower in turn than alone."""
    lines = []
    for name, alone_ms in contest.alone_ms.items():
        in_turn_ms = contest.samples[name].median_ms
        if in_turn_ms > _DISTURBED * alone_ms:
            lines.append(
                f"{name}, batch {contest.batch}: {_ms(in_turn_ms)} ms in turn, {_ms(alone_ms)} ms "
                f"alone ({in_turn_ms / alone_ms - 1:+.0%})"
            )
    return lines

"""Run engines for an hour from several threads, with varying disturbances; compare every byte.

    python -m tests.soak                                  an hour, five networks
    python -m tests.soak --minutes 0.25 --phase-seconds 0.4 --networks cifar10/resnet20_1w1a

Engines are called with random batches of known images: by one thread and by too many, with more
threads than cores, while other processes use the cores, on OpenMP's threads and on our own, while
engines are loaded, saved, changed and dropped, in forked children, and while engines are sent to a
spawned process, moved to shared memory, traced and loaded. After each phase, while idle, the
memory, the threads and the open files of the process are counted. The first round warms up.

Exits with 1 at the first result whose bytes differ from the start, at a call that raises or never
returns, and if memory, threads or files have grown at the end. Times are printed, never judged.
Needs Linux: it reads /proc.
"""

import argparse
import faulthandler
import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from biper_engine import backends
from tests.soak import watch
from tests.soak.phases import CALLERS, KINDS, THREADS, Caller, Phase, Tally, rounds_of, run_phase
from tests.soak.subjects import IMAGES, Batch, DifferenceError, Subject

NETWORKS = (
    "cifar10/resnet20_1w1a",
    "cifar10/resnet18A_1w1a",
    "cifar10/vgg_small_1w1a",
    "imagenet/resnet18_1w1a",
    "cifar10/resnet20_1w1a@float16",  # runs operator by operator
)
LEAST_ROUNDS = 4  # one to warm up, three to see growth
HANG_SECONDS = 300


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument(
        "--phase-seconds", type=float, default=15.0, help="length of a phase (default 15)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--first-phase", type=int, default=0, help="phase to begin with, to repeat")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME[@DTYPE]")
    options = parser.parse_args(arguments)
    if rounds_of(options.minutes, options.phase_seconds) < LEAST_ROUNDS:
        least = LEAST_ROUNDS * len(KINDS) * options.phase_seconds / 60
        parser.error(
            f"growth is seen in {LEAST_ROUNDS} rounds of {len(KINDS)} phases: pass --minutes "
            f"{least:.2g} or more, or shorter phases by --phase-seconds"
        )
    return options


def soak(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run all phases and print a line for each; return what is wrong in the end."""
    start = time.monotonic()
    subjects = [Subject(name, folder, THREADS) for name in options.networks]
    for subject in subjects:
        print(f"{subject.name}: {subject.engine.execution}", flush=True)
    callers = [Caller(number, subjects, folder) for number in range(CALLERS)]
    for caller in callers:
        caller.warm_up().result()
    gc.collect()
    gc.freeze()  # what is there now stays: at rest after each phase, only what is new is searched
    rounds = rounds_of(options.minutes, options.phase_seconds)
    total, held = Tally(), []
    for number in range(rounds * len(KINDS)):
        phase = Phase(
            index=options.first_phase + number,
            seed=options.seed,
            seconds=options.phase_seconds,
            first_round=number < len(KINDS),
        )
        faulthandler.dump_traceback_later(phase.seconds + HANG_SECONDS, exit=True)
        try:
            tally = run_phase(phase, callers, subjects)
        except DifferenceError as error:
            return [f"In phase {phase.index} ({phase.kind.name}): {error}"]
        finally:
            faulthandler.cancel_dump_traceback_later()
        settle(subjects)
        held.append(watch.holding())
        print(line(phase, tally, held[-1]), flush=True)
        total.add(Tally(images=tally.images, renewals=tally.renewals, children=tally.children))
        total.seconds.append(len(tally.seconds))
    for caller in callers:
        caller.close()
    parts = [held[i : i + len(KINDS)] for i in range(0, len(held), len(KINDS))]
    grown = watch.growths([watch.least(part) for part in parts[1:]])
    print(
        f"{time.monotonic() - start:.0f} s, {len(held)} phases: {sum(total.seconds):,.0f} calls "
        f"with {total.images:,} images, {total.renewals:,} engines renewed, {total.children:,} "
        f"children; every byte as at the start.\n"
        f"Growth after the first round: {grown.resident_mb:+.1f} MB resident, "
        f"{grown.allocated_mb:+.2f} MB allocated, {grown.threads:+d} threads, "
        f"{grown.files:+d} files."
    )
    return watch.complaints(grown)


def settle(subjects: Sequence[Subject]) -> None:
    """Leave every engine with what it keeps after the same calls, one more than it keeps arenas."""
    for subject in subjects:
        for size in range(1, 10):
            subject.engine(
                subject.input(Batch(tuple(i % IMAGES for i in range(size)), "contiguous"))
            )


def line(phase: Phase, tally: Tally, held: watch.Holding) -> str:
    kind = phase.kind
    threads = f"{phase.threads}" if kind.forced is None else f"{kind.forced}"
    return (
        f"{phase.index:4d}  {kind.name:17s} {kind.callers} x {threads:2s} {len(tally.seconds):7,d} "
        f"calls, {tally.latency()};  {held.resident_mb:6.1f} MB ({held.allocated_mb:.1f}), "
        f"{held.threads:2d} threads, {held.files:2d} files"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    reasons = {info.name: info.reason for info in backends()}
    if reasons["cpu"] is not None:
        print(f"The cpu backend is what is soaked, but {reasons['cpu']}.", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        wrong = soak(options, Path(folder))
    for problem in wrong:
        print(f"FAILED: {problem}.", file=sys.stderr)
    if wrong:
        print(
            f"To repeat: python -m tests.soak --seed {options.seed} --networks "
            f"{' '.join(options.networks)}, or from a phase on by --first-phase.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Mutates files of networks, loads them and runs those that load; see `tests/fuzz/judge.py`.

    python -m tests.fuzz [--seconds N | --seeds N] [--seed S] [--extension PATH]

Runs seeds from S on, in processes that may crash. Prints a summary, and each finding with its seed;
`python -m tests.fuzz --seed S --seeds 1` repeats it. Exits with 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.runner import fuzz


def main() -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, help="how long to go on")
    parser.add_argument("--seeds", type=int, help="how many seeds to run")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--extension", help="a build of biper_engine._cpu to use")
    options = parser.parse_args()
    seconds = options.seconds
    if seconds is None and options.seeds is None:
        seconds = 60.0
    summary = fuzz(options.seed, options.seeds, seconds, extension=options.extension)
    print(summary)
    return 1 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())

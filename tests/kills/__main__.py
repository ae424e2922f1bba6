"""Kill processes while they save and while they train, and check the files that are left.

    python -m tests.kills                              200 kills while saving, 50 while training
    python -m tests.kills --saves 12 --trains 2 --folders /tmp
    python -m tests.kills --folders /tmp /dev/shm      half of the kills in each

After each kill, the old or the new file must be complete, and a resumed training run must end with
the bits of one that was never killed. The next write must remove the temporary files of a killed
writer. By default the folders are the system's temporary one and, if there is one, a file system in
memory: writing to a file system other than the temporary folder's must be equally safe.

Exits with 1 at the first loss. Needs a system with fork.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.kills.children import FailedError
from tests.kills.saves import kill_saves
from tests.kills.trains import kill_trains


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--saves", type=int, default=200, help="kills while saving (default 200)")
    parser.add_argument("--trains", type=int, default=50, help="kills while training (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folders", nargs="+", type=Path, default=folders(), metavar="FOLDER")
    return parser.parse_args(arguments)


def folders() -> list[Path]:
    temporary, memory = Path(tempfile.gettempdir()), Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != temporary.stat().st_dev:
        return [temporary, memory]
    return [temporary]


def shares(count: int, parts: int) -> list[int]:
    """Split a number into parts that differ by one at most."""
    return [count // parts + (number < count % parts) for number in range(parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not hasattr(os, "fork"):
        print("Children are forked, and this system cannot.", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # a forked child has no other threads
    warnings.filterwarnings("ignore")
    kinds = ((kill_saves, options.saves), (kill_trains, options.trains))
    for kill, count in kinds:
        for place, share in zip(options.folders, shares(count, len(options.folders)), strict=True):
            if share == 0:
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory(dir=place) as folder:
                try:
                    tally = kill(share, Path(folder), options.seed)
                except FailedError as error:
                    print(f"FAILED in {place}, seed {options.seed}: {error}", file=sys.stderr)
                    return 1
            print(f"{place}: {tally}; {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

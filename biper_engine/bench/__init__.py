"""Speed beside rivals: everything that is compared runs in turn, in one process, on one input.

Answers are checked before anything is timed. A figure is a median with its quartiles, a claim a
ratio of two medians of one run.
"""

from biper_engine.bench.comparison import Comparison, Contest, compare, torch_threads
from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import Rival, compiled_rival, eager_rival
from biper_engine.bench.timer import Budget, Samples, interleave

__all__ = [
    "Budget",
    "Comparison",
    "Contest",
    "Rival",
    "Samples",
    "compare",
    "compiled_rival",
    "eager_rival",
    "interleave",
    "machine_facts",
    "torch_threads",
]

"""Compare speed with rivals: all contestants run in turn, in one process, on one input.

Answers are checked before anything is timed. Each figure is a median with its quartiles, and each
claim is a ratio of two medians of one run.
"""

from biper_engine.bench.comparison import (
    ENGINE,
    TURNS,
    Checked,
    Comparison,
    Contest,
    compare,
    in_turn_and_alone,
)
from biper_engine.bench.layers import RESNET18_LAYERS, ConvShape, LayerWork, network_work
from biper_engine.bench.machine import machine_facts
from biper_engine.bench.rivals import COMPILED, EAGER, Rival, compiled_rival, eager_rival
from biper_engine.bench.streams import SLICES, Rates, StreamContest, Throughput, throughput
from biper_engine.bench.threads import common_threads, torch_threads
from biper_engine.bench.timer import Budget, Samples, interleave

__all__ = [
    "COMPILED",
    "EAGER",
    "ENGINE",
    "RESNET18_LAYERS",
    "SLICES",
    "TURNS",
    "Budget",
    "Checked",
    "Comparison",
    "Contest",
    "ConvShape",
    "LayerWork",
    "Rates",
    "Rival",
    "Samples",
    "StreamContest",
    "Throughput",
    "common_threads",
    "compare",
    "compiled_rival",
    "eager_rival",
    "in_turn_and_alone",
    "interleave",
    "machine_facts",
    "network_work",
    "throughput",
    "torch_threads",
]

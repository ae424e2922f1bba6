"""Other programs that run the same network, or its float twin."""

from biper_engine.bench.rivals.deployed import (
    deployed_rivals,
    openvino_float_rivals,
    stream_rivals,
)
from biper_engine.bench.rivals.pytorch import (
    COMPILED,
    COMPILED_BF16,
    EAGER,
    compiled_bf16_rival,
    compiled_rival,
    eager_rival,
)
from biper_engine.bench.rivals.recipe import FloatNetworks
from biper_engine.bench.rivals.rival import Rival, relative_difference

__all__ = [
    "COMPILED",
    "COMPILED_BF16",
    "EAGER",
    "FloatNetworks",
    "Rival",
    "compiled_bf16_rival",
    "compiled_rival",
    "deployed_rivals",
    "eager_rival",
    "openvino_float_rivals",
    "relative_difference",
    "stream_rivals",
]

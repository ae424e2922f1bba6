"""BiPer training layers: periodic binary weights, Bi-Real binary activations.

Source: Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024.
"""

from biper_engine.nn.functional import binarize_activation, binarize_weight
from biper_engine.nn.layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryWeightConv2d,
    binary_layers,
    regularizer,
    set_tau,
)

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryWeightConv2d",
    "binarize_activation",
    "binarize_weight",
    "binary_layers",
    "regularizer",
    "set_tau",
]

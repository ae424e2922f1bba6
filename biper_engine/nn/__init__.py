"""Training layers: binary weights and activations with surrogate gradients.

BiPer's have periodic weights (Vargas et al., "BiPer: Binary Neural Networks using a Periodic
Function", CVPR 2024). Those of other networks have a scale times a sign.
"""

from biper_engine.nn.binary_layer import BinaryLayer, binary_layers
from biper_engine.nn.functional import binarize_activation, binarize_weight, straight_through
from biper_engine.nn.layers import (
    BinaryConv2d,
    BinaryLinear,
    BinaryWeightConv2d,
    regularizer,
    set_binarizers,
    set_tau,
)
from biper_engine.nn.quantization import WeightError, laplace_error, weight_errors
from biper_engine.nn.sign_layers import (
    FlatSignConv2d,
    RPReLU,
    RSign,
    Shift,
    SignConv2d,
    SignLinear,
)

__all__ = [
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "BinaryWeightConv2d",
    "FlatSignConv2d",
    "RPReLU",
    "RSign",
    "Shift",
    "SignConv2d",
    "SignLinear",
    "WeightError",
    "binarize_activation",
    "binarize_weight",
    "binary_layers",
    "laplace_error",
    "regularizer",
    "set_binarizers",
    "set_tau",
    "straight_through",
    "weight_errors",
]

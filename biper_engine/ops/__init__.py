"""The `torch.ops.biper` vocabulary: schemas, shape functions, the reference and the backends.

Importing this package registers the operators. `functional` has the typed functions, `reference`
the definitions, and `backends` chooses the backend of a call.
"""

from biper_engine.ops import matrix_operators as _matrix_operators  # noqa: F401  (registers these)
from biper_engine.ops import plan_operators as _plan_operators  # noqa: F401  (registers these)
from biper_engine.ops import registration as _registration  # noqa: F401  (registers the operators)
from biper_engine.ops.backends import BackendInfo, use_backend
from biper_engine.ops.epilogue import Epilogue
from biper_engine.ops.functional import (
    bconv2d,
    bconv2d_bits,
    bconv2d_float,
    bconv2d_float_bits,
    binarize,
    bmaxpool2d,
    prepack,
    unbinarize,
)
from biper_engine.ops.matrix import MatrixScale, MatrixShape
from biper_engine.ops.matrix_functional import (
    bmatmul,
    bmatmul_float,
    unpack_weight,
    weight_linear,
)
from biper_engine.ops.stem import Stem

__all__ = [
    "BackendInfo",
    "Epilogue",
    "MatrixScale",
    "MatrixShape",
    "Stem",
    "bconv2d",
    "bconv2d_bits",
    "bconv2d_float",
    "bconv2d_float_bits",
    "binarize",
    "bmatmul",
    "bmatmul_float",
    "bmaxpool2d",
    "prepack",
    "unbinarize",
    "unpack_weight",
    "use_backend",
    "weight_linear",
]

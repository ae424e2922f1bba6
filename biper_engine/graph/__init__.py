"""The converted network as a graph: its operators, and how it is read, edited and called.

Every operator that a graph may call is declared once, in the file of its kind: its name in files,
what runs it, the type and range of its arguments, the shape, dtype and channels of its result,
whether it mixes rows of a batch, and how numbers pass it. To add an operator, add a declaration.
"""

from biper_engine.graph.inference import input_value, network_values
from biper_engine.graph.operator import Operator, Result
from biper_engine.graph.operators import OPERATORS, operator_for, operator_of
from biper_engine.graph.sizes import BATCH, ImagesSize, MisfitError, Size
from biper_engine.graph.values import DTYPES, Value

__all__ = [
    "BATCH",
    "DTYPES",
    "OPERATORS",
    "ImagesSize",
    "MisfitError",
    "Operator",
    "Result",
    "Size",
    "Value",
    "input_value",
    "network_values",
    "operator_for",
    "operator_of",
]

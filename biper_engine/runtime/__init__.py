"""How a converted network runs: its graph, and the plan made from it for one device."""

from biper_engine.runtime.graph import (
    Call,
    PortableGraph,
    biper_op,
    conv_geometry,
    from_portable,
    get_constant,
    interpret,
    isolate_outputs,
    named_arguments,
    output_values,
    packed_map,
    to_portable,
)
from biper_engine.runtime.plan import PlanSlot, prepack_node
from biper_engine.runtime.signature import InputSpec, Signature

__all__ = [
    "Call",
    "InputSpec",
    "PlanSlot",
    "PortableGraph",
    "Signature",
    "biper_op",
    "conv_geometry",
    "from_portable",
    "get_constant",
    "interpret",
    "isolate_outputs",
    "named_arguments",
    "output_values",
    "packed_map",
    "prepack_node",
    "to_portable",
]

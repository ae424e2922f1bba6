"""How a converted network runs: its graph, and the plan made from it for one device."""

from biper_engine.runtime.binding import prepack_node
from biper_engine.runtime.choice import backends_of, node_backend
from biper_engine.runtime.graph import (
    Call,
    PortableGraph,
    align_weights,
    biper_op,
    conv_geometry,
    from_portable,
    get_constant,
    interpret,
    isolate_outputs,
    named_arguments,
    output_values,
    packed_map,
    release_source,
    to_portable,
    with_defaults,
)
from biper_engine.runtime.native import NativePlan
from biper_engine.runtime.plan import Plan, PlanSlot, is_watched
from biper_engine.runtime.profile import NodeProfile, ProfileReport, profile
from biper_engine.runtime.runs import NativeRun, NativeStep
from biper_engine.runtime.shapes import call_without_data
from biper_engine.runtime.signature import InputSpec, Signature
from biper_engine.runtime.structure import CONSTANT_TYPES, Leaf
from biper_engine.runtime.structure import flatten as flatten_structure
from biper_engine.runtime.structure import marked as marked_structure
from biper_engine.runtime.structure import structure as structure_of

__all__ = [
    "CONSTANT_TYPES",
    "Call",
    "InputSpec",
    "Leaf",
    "NativePlan",
    "NativeRun",
    "NativeStep",
    "NodeProfile",
    "Plan",
    "PlanSlot",
    "PortableGraph",
    "ProfileReport",
    "Signature",
    "align_weights",
    "backends_of",
    "biper_op",
    "call_without_data",
    "conv_geometry",
    "flatten_structure",
    "from_portable",
    "get_constant",
    "interpret",
    "is_watched",
    "isolate_outputs",
    "marked_structure",
    "named_arguments",
    "node_backend",
    "output_values",
    "packed_map",
    "prepack_node",
    "profile",
    "release_source",
    "structure_of",
    "to_portable",
    "with_defaults",
]

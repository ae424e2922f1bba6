"""How a converted network runs: the plan made from its graph for one device."""

from biper_engine.runtime.native import NativePlan
from biper_engine.runtime.plan import Plan, PlanSlot, is_watched
from biper_engine.runtime.profile import profile
from biper_engine.runtime.profile_report import NodeProfile, ProfileReport
from biper_engine.runtime.program_section import program_section
from biper_engine.runtime.runs import NativeRun, NativeStep

__all__ = [
    "NativePlan",
    "NativeRun",
    "NativeStep",
    "NodeProfile",
    "Plan",
    "PlanSlot",
    "ProfileReport",
    "is_watched",
    "profile",
    "program_section",
]

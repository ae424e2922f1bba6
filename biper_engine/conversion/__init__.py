"""Conversion: from a PyTorch BNN to an engine, and the proof that the two agree."""

from biper_engine.conversion.convert import convert
from biper_engine.conversion.verify import SegmentReport, VerifyReport, verify

__all__ = ["SegmentReport", "VerifyReport", "convert", "verify"]

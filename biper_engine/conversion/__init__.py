"""Conversion of a PyTorch BNN to an engine, and the proof that the two agree."""

from biper_engine.conversion.convert import convert, convert_and_verify
from biper_engine.conversion.verify import SegmentReport, VerifyReport, verify

__all__ = ["SegmentReport", "VerifyReport", "convert", "convert_and_verify", "verify"]

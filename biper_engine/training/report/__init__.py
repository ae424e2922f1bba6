"""A training run, or several, as one HTML page that needs no network."""

from biper_engine.training.report.compare import Comparison
from biper_engine.training.report.page import write_report
from biper_engine.training.report.run import Run, Stage, is_run, read_run

__all__ = ["Comparison", "Run", "Stage", "is_run", "read_run", "write_report"]

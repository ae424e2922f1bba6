"""A training run, or several, as one HTML page that needs no network."""

from biper_engine.training.report.page import write_report

__all__ = ["write_report"]

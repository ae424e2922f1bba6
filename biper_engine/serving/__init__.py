"""Classify many images with a `.biper` file: a folder of them at once, or over HTTP as they come.

`predict` is what `biper predict` runs, `create_app` and `serve` are what `biper serve` runs.
"""

from biper_engine.serving.predict import Predictions, predict

__all__ = ["Predictions", "predict"]

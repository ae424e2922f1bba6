"""Classify many images with a `.biper` file: a folder of them at once, or over HTTP as they come.

`predict` is what `biper predict` runs. `serve` and `serve_on_ray` are what `biper serve` runs, and
`create_app` is their application, for any server of ASGI.
"""

from biper_engine.serving.app import create_app
from biper_engine.serving.classifier import Classifier, open_classifier
from biper_engine.serving.predict import Predictions, predict
from biper_engine.serving.requests import Limits
from biper_engine.serving.server import Served, serve, serve_on_ray

__all__ = [
    "Classifier",
    "Limits",
    "Predictions",
    "Served",
    "create_app",
    "open_classifier",
    "predict",
    "serve",
    "serve_on_ray",
]

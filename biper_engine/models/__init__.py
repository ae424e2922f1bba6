"""Networks by name, the checkpoints that hold their weights, and trained ones."""

from biper_engine.models.checkpoints import load_checkpoint, save_checkpoint
from biper_engine.models.network import Network
from biper_engine.models.official import export_official
from biper_engine.models.pretrained import pretrained, samples
from biper_engine.models.registry import available, build
from biper_engine.shipped import ModelCard, card, shipped
from biper_engine.shipped import load_shipped as load

__all__ = [
    "ModelCard",
    "Network",
    "available",
    "build",
    "card",
    "export_official",
    "load",
    "load_checkpoint",
    "pretrained",
    "samples",
    "save_checkpoint",
    "shipped",
]

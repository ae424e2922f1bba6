"""Networks by name, and the checkpoints that hold their weights."""

from biper_engine.models.checkpoints import load_checkpoint, save_checkpoint
from biper_engine.models.network import Network
from biper_engine.models.official import export_official
from biper_engine.models.registry import available, build

__all__ = [
    "Network",
    "available",
    "build",
    "export_official",
    "load_checkpoint",
    "save_checkpoint",
]

"""BiPer Engine: packed-bit inference and training of binary neural networks in PyTorch.

The names in `__all__` are the public interface; everything else is private and may change.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_package = Path(__file__).resolve().parent
if not (_package / "kernels").exists() and (_package.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_package.parent))  # a checkout: biper_engine.kernels is ../kernels

from biper_engine import models, nn, ops  # noqa: E402  (after __path__ is complete)
from biper_engine.engine import Engine, load  # noqa: E402
from biper_engine.errors import (  # noqa: E402
    BackendUnavailableError,
    BiperError,
    CheckpointError,
    ConversionError,
    DataError,
    ExportError,
    FileFormatError,
    GeometryError,
    NotFiniteError,
    UnconvertedWarning,
)
from biper_engine.metadata import Metadata, Provenance  # noqa: E402
from biper_engine.models import load_checkpoint  # noqa: E402
from biper_engine.ops.backends import BackendInfo, backends, use_backend  # noqa: E402
from biper_engine.report import ConversionReport, LayerReport  # noqa: E402

if TYPE_CHECKING:
    from biper_engine.conversion.convert import convert
    from biper_engine.conversion.verify import VerifyReport, verify

_LAZY = ("VerifyReport", "convert", "verify")
"""Names from `biper_engine.conversion`, whose tracing modules take a second to import."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from biper_engine import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackendInfo",
    "BackendUnavailableError",
    "BiperError",
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "DataError",
    "Engine",
    "ExportError",
    "FileFormatError",
    "GeometryError",
    "LayerReport",
    "Metadata",
    "NotFiniteError",
    "Provenance",
    "UnconvertedWarning",
    "VerifyReport",
    "backends",
    "convert",
    "load",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "use_backend",
    "verify",
]

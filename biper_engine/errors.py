"""Exceptions of biper_engine: one class per kind of failure a caller may want to handle.

Every message says what was given, what was wanted and what to do next. Invalid arguments raise
`ValueError` or `TypeError`; the classes here derive from the closest built-in one.
"""

__all__ = [
    "BackendUnavailableError",
    "BiperError",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "ExportError",
    "FileFormatError",
    "GeometryError",
    "NotFiniteError",
    "UnconvertedWarning",
]


class BiperError(Exception):
    """Base class of every error that biper_engine defines."""


class GeometryError(BiperError, ValueError):
    """Tensor shapes disagree with each other or with a convolution's geometry."""


class BackendUnavailableError(BiperError, RuntimeError):
    """The requested backend is unknown, not installed, or cannot run this call."""


class ConversionError(BiperError, ValueError):
    """A model cannot be converted; the message names the layer and the reason."""


class CheckpointError(BiperError, ValueError):
    """A training checkpoint is unreadable, incomplete or contradicts the caller's arguments."""


class DataError(BiperError, ValueError):
    """Data is missing, damaged, or not what the settings say: for training, or for a batch run."""


class ExportError(BiperError, ValueError):
    """A network cannot be written in a format; the message names the operator and the reason."""


class NotFiniteError(BiperError, ArithmeticError):
    """The loss of a training became infinite or NaN; the message names the layer."""


class FileFormatError(BiperError, ValueError):
    """A `.biper` file is truncated, edited, foreign or of an unknown version.

    So may be a file of a trained network that comes with this package.
    """


class UnconvertedWarning(UserWarning):
    """A layer with binary weights or binary inputs stays in floating point."""

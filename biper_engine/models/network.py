"""The base class of every network in this package."""

from __future__ import annotations

from torch import nn

from biper_engine.metadata import Metadata, Provenance

__all__ = ["Network"]


class Network(nn.Module):
    """A module that knows its input shape, its origin and its preprocessing.

    Attributes:
        input_shape: (channels, height, width) of one image.
        provenance: architecture, frequency and stage; filled in by `models.build`.
        metadata: preprocessing and class names, or None if the task is the caller's own.
    """

    input_shape: tuple[int, int, int] = (3, 32, 32)
    provenance: Provenance = Provenance()
    metadata: Metadata | None = None

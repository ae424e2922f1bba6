"""An engine together with what turns images into its input, and its logits into classes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biper_engine.engine import Engine, load
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "open_classifier", "require_logits", "top_classes"]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """An engine of one float32 input whose result is logits.

    Attributes:
        engine: the engine.
        metadata: names of classes, and how images become its input, as far as that is known.
        classes: how many there are.
        name: by which people call it.
        bytes: size of its file.
        sha256: of its file, in hexadecimal.
    """

    engine: Engine
    metadata: Metadata | None
    classes: int
    name: str
    bytes: int
    sha256: str

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, if they are known: one for each."""
        names = self.metadata.class_names if self.metadata else None
        return names if names is not None and len(names) == self.classes else None

    def tensor(self, image: Image | str | os.PathLike[str]) -> Tensor:
        """Prepare one image, as `preprocessing.image_to_tensor` does.

        Raises:
            ValueError: the image cannot be read, or is not like those that the network takes.
        """
        return image_to_tensor(image, self.require_metadata())

    def require_metadata(self) -> Metadata:
        """Return how images are prepared.

        Raises:
            ValueError: neither the file nor the caller says it.
        """
        if self.metadata is None or self.metadata.input_size is None:
            raise ValueError(
                f"'{self.name}' does not say how its images are prepared: pass "
                "metadata=biper_engine.Metadata(input_size=..., mean=..., std=...)."
            )
        return self.metadata

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the logits [N, classes] of prepared images [N, ...].

        Raises:
            ValueError: the network returns something else.
        """
        with torch.inference_mode():
            logits = self.engine(inputs)
        require_logits(logits)
        return logits  # type: ignore[no-any-return]


def open_classifier(
    file: str | os.PathLike[str],
    *,
    metadata: Metadata | None = None,
    name: str | None = None,
) -> Classifier:
    """Load a classifier from a `.biper` file, and try it on an input of zeros.

    Args:
        file: that `Engine.save` wrote.
        metadata: how images are prepared; None takes what the file says.
        name: None takes the file's name, without the suffix.

    Raises:
        FileFormatError, OSError: as `biper_engine.load`.
        ValueError: the network takes several inputs or no float32, or does not return logits.
    """
    path = Path(file)
    engine = load(path)
    contents = path.read_bytes()
    inputs = engine.signature.inputs
    if len(inputs) != 1:
        raise ValueError(
            f"'{path}' takes {len(inputs)} inputs ({engine.signature}); wanted a classifier of "
            "one. Call networks of several inputs from Python: biper_engine.load."
        )
    if inputs[0].dtype != torch.float32:
        raise ValueError(
            f"'{path}' takes {inputs[0].dtype}; wanted float32, which images become. Call it from "
            "Python: biper_engine.load."
        )
    with torch.inference_mode():
        logits = engine(torch.zeros(1, *engine.input_shape))
    require_logits(logits)
    classifier = Classifier(
        engine=engine,
        metadata=metadata or engine.metadata,
        classes=logits.shape[1],
        name=name or path.name.removesuffix(".biper"),
        bytes=len(contents),
        sha256=hashlib.sha256(contents).hexdigest(),
    )
    _require_fit(classifier)
    return classifier


def _require_fit(classifier: Classifier) -> None:
    names, own = (m and m.class_names for m in (classifier.metadata, classifier.engine.metadata))
    if names and names != own and len(names) != classifier.classes:
        raise ValueError(
            f"There are {len(names)} names of classes, but '{classifier.name}' has "
            f"{classifier.classes} classes. Pass one name for each, in their order."
        )
    size = classifier.metadata.input_size if classifier.metadata else None
    if size is not None and tuple(size) != classifier.engine.input_shape:
        raise ValueError(
            f"Images of '{classifier.name}' would become {list(size)}, but the network takes "
            f"{list(classifier.engine.input_shape)}. Set `input_size` of its metadata to that."
        )


def require_logits(outputs: Any) -> None:
    """Refuse what is not logits [N, classes].

    Raises:
        ValueError: `outputs` is something else.
    """
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 0:
        return
    got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ValueError(
        f"The network returns {got}, wanted logits [N, classes]. Only classifiers can be asked for "
        "classes; load other networks with biper_engine.load."
    )


def top_classes(logits: Tensor, count: int, names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """Return the likeliest classes of one image as JSON values, the likeliest first.

    Args:
        logits: [classes].
        count: how many to return, at most.
        names: of the classes; a class without a name is its index.
    """
    shares = logits.softmax(0)
    order = logits.argsort(descending=True, stable=True)[:count].tolist()
    known = names if names is not None and len(names) == len(logits) else None
    return [
        {
            "class": known[index] if known else index,
            "index": index,
            "probability": float(shares[index]),
            "logit": float(logits[index]),
        }
        for index in order
    ]

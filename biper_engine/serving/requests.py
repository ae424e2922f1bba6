"""Turn the body of a request into the network's input, within limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biper_engine.metadata import Metadata
from biper_engine.preprocessing import (
    TooManyPixelsError,
    image_to_tensor,
    normalize,
    open_image,
)
from biper_engine.serving.classifier import Classifier

if TYPE_CHECKING:
    from PIL.Image import Image
    from starlette.requests import Request

__all__ = ["Limits", "Refused", "drop_body", "parse_body", "read_body", "read_form"]

# Formats whose decoders are part of Pillow and start no other program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
_WANTED = (
    "Send an image (PNG, JPEG, WebP, GIF or BMP) as the body or as multipart/form-data, or "
    "application/json."
)
# curl --data-binary says that its data are a form.
_RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_RAW_TYPES = {"float32": torch.float32, "uint8": torch.uint8}
_JSON_KEYS = ("inputs", "raw", "images")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts.

    Attributes:
        body_bytes: of a request.
        body_seconds: in which a request's body must have come.
        image_pixels: of an image, before it is decoded.
        request_pixels: of all images of a request together.
        images: of a request.
        waiting: requests that are read or wait for their answers; more get 503.
        batch: images of a call of the engine.
    """

    body_bytes: int = 20 * 2**20
    body_seconds: float = 30.0
    image_pixels: int = 50_000_000
    request_pixels: int = 100_000_000
    images: int = 64
    waiting: int = 256
    batch: int = 32


class Refused(Exception):
    """A request that gets no classes: a status of HTTP, and the reason in words."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def media_type(request: Request) -> str:
    """Return the type of the body, without parameters."""
    header: str = request.headers.get("content-type", "")
    return header.partition(";")[0].strip().lower()


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read a body of a known type.

    Raises:
        Refused: it is of another type, too large, too slow, empty or incomplete.
    """
    kind = media_type(request)
    known = kind.startswith("image/") or kind in _RAW
    if not known and kind not in ("multipart/form-data", "application/json"):
        await drop_body(request, limits)
        raise Refused(415, f"The body is {kind!r}, which is no image. {_WANTED}")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        await drop_body(request, limits)
        raise _too_large(limits)
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise Refused(
            408,
            f"The body did not come within {limits.body_seconds:g} seconds: {len(body):,} bytes "
            "are here.",
            {"Connection": "close"},
        ) from None
    except ClientDisconnect:
        raise _gone() from None
    if not body:
        raise Refused(400, f"The body is empty. {_WANTED}")
    return bytes(body)


def _too_large(limits: Limits) -> Refused:
    message = f"The body is larger than {limits.body_bytes:,} bytes, which are accepted."
    return Refused(413, message, {"Connection": "close"})


async def drop_body(request: Request, limits: Limits) -> None:
    """Read a body that nobody wants, so that its sender gets to read the answer."""
    from starlette.requests import ClientDisconnect

    dropped = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                dropped += len(chunk)
                if dropped > 4 * limits.body_bytes:
                    return
    except TimeoutError:
        return
    except ClientDisconnect:
        raise _gone() from None


def _gone() -> Refused:
    return Refused(400, "The client went away before its body was here.")


async def read_form(request: Request, body: bytes, limits: Limits) -> list[tuple[str, bytes]]:
    """Return name and contents of each file of a form.

    Raises:
        Refused: it is no form, has no file, or too many.
    """
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException
    from starlette.requests import Request as FormRequest

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    files: list[tuple[str, bytes]] = []
    try:
        form = FormRequest(request.scope, receive).form(
            max_files=limits.images, max_fields=16, max_part_size=limits.body_bytes
        )
        async with form as fields:
            for _, value in fields.multi_items():
                if not isinstance(value, str):
                    files.append((_as_utf8(value.filename or "file"), await value.read()))
    except (HTTPException, MultiPartException) as error:
        reason = error.detail if isinstance(error, HTTPException) else error.message
        raise Refused(400, f"The form cannot be read: {reason}") from error
    except (KeyError, ValueError) as error:
        raise Refused(400, f"The form cannot be read: {error}") from error
    if not files:
        raise Refused(400, "The form has no file. Send each image as a file, as curl -F does.")
    return files


def _as_utf8(name: str) -> str:
    """Escape what an answer cannot hold: a form may say that its names are in a strange code."""
    return name.encode("utf-8", "backslashreplace").decode()


def parse_body(
    classifier: Classifier, kind: str, body: bytes, files: list[tuple[str, bytes]], limits: Limits
) -> tuple[Tensor, list[str | None]]:
    """Return the network's input [N, ...], and the name of each image that has one.

    Raises:
        Refused: it is not what the network takes; the message says what is.
    """
    try:
        if kind == "application/json":
            inputs = _from_json(classifier, body, limits)
            return inputs, [None] * len(inputs)
        images = files or [("the request's body", body)]
        return _from_images(classifier, images, limits), [name for name, _ in files] or [None]
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _from_images(
    classifier: Classifier, images: Sequence[tuple[str, bytes]], limits: Limits
) -> Tensor:
    metadata, left = _preparation(classifier), limits.request_pixels
    tensors = []
    for name, contents in images:
        image = _opened(contents, name, left, limits)
        left -= image.width * image.height
        try:
            tensors.append(image_to_tensor(image, metadata))
        except ValueError as error:
            raise ValueError(f"Cannot take '{name}': {error}") from error
    return torch.stack(tensors)


def _opened(contents: bytes, name: str, left: int, limits: Limits) -> Image:
    """Open an image of a request that may have `left` more pixels; it is not decoded if it has."""
    most = min(limits.image_pixels, left)
    try:
        return open_image(contents, name, formats=_FORMATS, most_pixels=most)
    except TooManyPixelsError as error:
        if most == limits.image_pixels:
            raise
        raise Refused(
            413,
            f"With '{name}', the images of the request have more than the "
            f"{limits.request_pixels:,} pixels that are accepted. Send them in several requests.",
        ) from error


def _preparation(classifier: Classifier) -> Metadata:
    metadata = classifier.metadata
    if metadata is None or metadata.input_size is None:
        raise ValueError(
            f"'{classifier.name}' does not say how its images are prepared. Send what it takes as "
            'JSON, with "inputs" or float32 "raw", or start the server with --mean and --std.'
        )
    return metadata


def _from_json(classifier: Classifier, body: bytes, limits: Limits) -> Tensor:
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is no JSON: {error}") from error
    given = [key for key in _JSON_KEYS if isinstance(values, dict) and key in values]
    if len(given) != 1 or len(values) != 1:
        raise ValueError(
            'The JSON must have one of "inputs" (nested lists), "raw" (shape, dtype and base64 '
            'data) and "images" (files in base64), and nothing else.'
        )
    value = values[given[0]]
    if given[0] == "images":
        return _from_files(classifier, value, limits)
    inputs = _from_lists(value) if given[0] == "inputs" else _from_raw(classifier, value)
    shape = list(classifier.engine.input_shape)
    if inputs.dim() == len(shape):
        inputs = inputs[None]
    if list(inputs.shape[1:]) != shape or not len(inputs):
        raise ValueError(
            f"The input is {list(inputs.shape)}; '{classifier.name}' takes [N, "
            f"{', '.join(map(str, shape))}] or one of [{', '.join(map(str, shape))}]."
        )
    _require_few(len(inputs), limits)
    if not bool(inputs.isfinite().all()):
        raise ValueError("The input has values that are not finite numbers of float32.")
    return inputs


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON.")


def _require_few(images: int, limits: Limits) -> None:
    if not 0 < images <= limits.images:
        raise ValueError(f"The request has {images} images; 1 to {limits.images} are accepted.")


def _from_lists(value: Any) -> Tensor:
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f'"inputs" must be nested lists of numbers: {error}') from error


def _from_raw(classifier: Classifier, value: Any) -> Tensor:
    keys = {"shape", "dtype", "data"}
    if not isinstance(value, dict) or set(value) != keys:
        raise ValueError('"raw" must have "shape", "dtype" and "data", and nothing else.')
    shape, name = value["shape"], value["dtype"]
    sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    if not sizes or len(shape) > 8:
        raise ValueError('"shape" must be a list of sizes, such as [1, 3, 32, 32].')
    if not isinstance(name, str) or name not in _RAW_TYPES:
        raise ValueError(
            f'"dtype" (={name!r}) must be "float32", what the network takes, little-endian, or '
            '"uint8", pixels that are still to be normalised.'
        )
    data = _decoded(value["data"], '"data"')
    dtype = _RAW_TYPES[name]
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise ValueError(f'"data" has {len(data):,} bytes; {name} {shape} has {wanted:,}.')
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    if dtype == torch.float32:
        return tensor
    metadata = _preparation(classifier)
    if len(shape) < 3 or shape[-3] != len(metadata.mean):
        raise ValueError(f'"shape" (={shape}) must end with channels, height and width.')
    return normalize(tensor, metadata)


def _from_files(classifier: Classifier, value: Any, limits: Limits) -> Tensor:
    if not isinstance(value, list):
        raise ValueError('"images" must be a list of image files in base64.')
    _require_few(len(value), limits)
    contents = [_decoded(text, f'"images"[{n}]') for n, text in enumerate(value)]
    named = [(f"images[{n}]", one) for n, one in enumerate(contents)]
    return _from_images(classifier, named, limits)


def _decoded(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text in base64, not {type(text).__name__}.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is no base64: {error}.") from error

"""The application that answers requests, for any server of ASGI: uvicorn, and Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from biper_engine.serving.batching import Answer, Batcher
from biper_engine.serving.classifier import Classifier, top_classes
from biper_engine.serving.metrics import Metrics
from biper_engine.serving.packages import require_package
from biper_engine.serving.page import page_response
from biper_engine.serving.requests import (
    Limits,
    Refused,
    drop_body,
    media_type,
    parse_body,
    read_body,
    read_form,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["create_app"]

LOG = logging.getLogger("biper_engine.serving")
_RETRY_SECONDS = "1"
# What programs ask all the time; the log has them only if something is wrong.
_POLLED = ("/health", "/health/live", "/health/ready", "/metrics")


def create_app(classifiers: Sequence[Classifier], limits: Limits | None = None) -> Starlette:
    """Return an application of ASGI that serves classifiers.

    `POST /predict` classifies images; `GET /models` says what there is, `/health/live` and
    `/health/ready` whether it runs, `/metrics` how much, for Prometheus; `/` is a page to try it.

    Args:
        classifiers: each with a name of its own.
        limits: of requests; None takes the usual ones.

    Raises:
        ImportError: a package of the extra `serve` is missing.
        ValueError: there is no classifier, or two have one name.
    """
    require_package("starlette", "Serving")
    from PIL import Image
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    Image.preinit()  # the usual formats, so that the first request need not
    service = _Service(classifiers, limits or Limits())
    return Starlette(
        routes=[
            Route("/", page_response),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/models", service.models),
            Route("/health", service.health),
            Route("/health/live", service.live),
            Route("/health/ready", service.health),
            Route("/metrics", service.measured),
        ],
        middleware=[Middleware(_Watch, metrics=service.metrics)],
        exception_handlers={Refused: _refused, HTTPException: _http_error, Exception: _failed},
    )


class _Service:
    def __init__(self, classifiers: Sequence[Classifier], limits: Limits) -> None:
        names = [classifier.name for classifier in classifiers]
        if not names or len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"Two files are called '{twice[0]}': rename one, so that requests can name it."
                if twice
                else "There is nothing to serve: name a .biper file."
            )
        self._limits = limits
        self._classifiers = {classifier.name: classifier for classifier in classifiers}
        self.metrics = Metrics(classifiers)
        self._batchers = {
            name: Batcher(classifier, limits.batch, self.metrics.batch_of(name))
            for name, classifier in self._classifiers.items()
        }
        threads = max(classifier.engine.num_threads for classifier in classifiers)
        self._preparing = ThreadPoolExecutor(max(2, threads), "prepare")
        self._inside = 0

    async def predict(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        start = time.perf_counter()
        if self._inside >= self._limits.waiting:
            await drop_body(request, self._limits)
            raise Refused(
                503,
                f"The server is busy: {self._limits.waiting} requests wait. Try again soon.",
                {"Retry-After": _RETRY_SECONDS},
            )
        with self._entered():
            classifier = self._chosen(request)
            top = _count(request)
            inputs, names, answer = await self._classified(request, classifier)
        rows = [
            {
                **({"image": name} if name is not None else {}),
                "top": top_classes(logits, top, classifier.class_names),
            }
            for name, logits in zip(names, answer.logits, strict=True)
        ]
        if not bool(answer.logits.isfinite().all()):
            raise Refused(400, "The network's logits are not finite for this input.")
        request.state.said = f"{classifier.name}, {_images(len(inputs))}, batch {answer.batch}"
        return JSONResponse(
            {
                "model": classifier.name,
                "images": rows,
                "batch": answer.batch,
                "engine_ms": 1e3 * answer.seconds,
                "total_ms": 1e3 * (time.perf_counter() - start),
            }
        )

    async def _classified(
        self, request: Request, classifier: Classifier
    ) -> tuple[Any, list[str | None], Answer]:
        kind = media_type(request)
        body = await read_body(request, self._limits)
        files = []
        if kind == "multipart/form-data":
            files = await read_form(request, body, self._limits)
        inputs, names = await asyncio.get_running_loop().run_in_executor(
            self._preparing, parse_body, classifier, kind, body, files, self._limits
        )
        return inputs, names, await self._batchers[classifier.name].classify(inputs)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        self._inside += 1
        self.metrics.waiting(self._inside)
        try:
            yield
        finally:
            self._inside -= 1
            self.metrics.waiting(self._inside)

    def _chosen(self, request: Request) -> Classifier:
        name = request.query_params.get("model")
        known = ", ".join(self._classifiers)
        if name is None:
            if len(self._classifiers) > 1:
                raise Refused(400, f"Say which network: /predict?model=NAME, one of {known}.")
            return next(iter(self._classifiers.values()))
        if name not in self._classifiers:
            raise Refused(404, f"There is no network {name[:80]!r} here. There are: {known}.")
        return self._classifiers[name]

    async def models(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        limits = self._limits
        accepted = {
            "body_bytes": limits.body_bytes,
            "image_pixels": limits.image_pixels,
            "request_pixels": limits.request_pixels,
            "images": limits.images,
        }
        return JSONResponse(
            {
                "models": [_told(one) for one in self._classifiers.values()],
                "limits": accepted,
            }
        )

    async def live(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"live": True})

    async def health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        ready = self._inside < self._limits.waiting
        values = {"live": True, "ready": ready, "waiting": self._inside}
        return JSONResponse(values, 200 if ready else 503)

    async def measured(self, request: Request) -> Response:
        from starlette.responses import Response

        text, kind = self.metrics.text()
        return Response(text, media_type=kind)


def _told(classifier: Classifier) -> dict[str, Any]:
    metadata = classifier.metadata
    return {
        "name": classifier.name,
        "input": list(classifier.engine.input_shape),
        "takes_images": metadata is not None and metadata.input_size is not None,
        "classes": classifier.classes,
        "class_names": classifier.class_names,
        "bytes": classifier.bytes,
        "sha256": classifier.sha256,
        "runs": classifier.engine.execution,
    }


def _count(request: Request) -> int:
    text = request.query_params.get("top", "5")
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise Refused(400, f"`top` (={text[:20]!r}) must be a number of classes, 1 or more.")
    return int(text)


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


async def _refused(request: Request, error: Exception) -> Response:
    from starlette.responses import JSONResponse

    assert isinstance(error, Refused)
    request.state.said = str(error)
    return JSONResponse({"error": str(error)}, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    assert isinstance(error, HTTPException)
    said = {
        404: "There is nothing here. POST an image to /predict, or open / in a browser.",
        405: f"{request.method} is not for this address; POST an image to /predict.",
    }
    text = said.get(error.status_code, str(error.detail))
    return JSONResponse({"error": text}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(
        {"error": "The server failed. Its log has the reason; other requests go on."}, 500
    )


class _Watch:
    """Count and log each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - start
            if scope["path"] == "/predict":
                self._metrics.request(status, seconds)
            self._log(scope, status, seconds)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        if not LOG.isEnabledFor(logging.INFO) or (status == 200 and scope["path"] in _POLLED):
            return
        client = (scope.get("client") or ("-",))[0]
        said = scope["state"].get("said", "")
        fields = {
            "client": client,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1e3 * seconds, 2),
            "said": said,
        }
        path, said = _one_line(scope["path"]), _one_line(said)
        text = f"{client} {scope['method']} {path} {status} {1e3 * seconds:.1f} ms"
        LOG.info(f"{text} {said}".rstrip(), extra={"fields": fields})


def _one_line(text: str) -> str:
    """Return a text without characters that could pass for another line of the log."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

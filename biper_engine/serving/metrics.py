"""Numbers of a server, as text for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from biper_engine.serving.classifier import Classifier
from biper_engine.serving.packages import require_package

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one application, apart from those of others in the process."""

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        client = require_package("prometheus_client", "Serving")
        self._client = client
        own = {"registry": client.CollectorRegistry()}
        self._registry = own["registry"]
        requests = "Answered requests to /predict, by status of HTTP."
        self._requests = client.Counter("biper_requests", requests, ["status"], **own)
        self._request_seconds = client.Histogram(
            "biper_request_seconds",
            "Time of a request to /predict, its body's included.",
            buckets=_SECONDS,
            **own,
        )
        self._engine_seconds = client.Histogram(
            "biper_engine_seconds", "Time of a batch.", ["model"], buckets=_SECONDS, **own
        )
        self._batch_images = client.Histogram(
            "biper_batch_images", "Images of a batch.", ["model"], buckets=_IMAGES, **own
        )
        waiting = "Requests that are read or wait for their answers."
        self._waiting = client.Gauge("biper_waiting_requests", waiting, **own)
        size = client.Gauge("biper_model_bytes", "Size of a file.", ["model", "sha256"], **own)
        for one in classifiers:
            size.labels(one.name, one.sha256).set(one.bytes)

    def request(self, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(str(status)).inc()
        self._request_seconds.observe(seconds)

    def waiting(self, requests: int) -> None:
        """Set the requests that are inside."""
        self._waiting.set(requests)

    def batch_of(self, model: str) -> Callable[[int, float], None]:
        """Return what counts a batch of a model: its images and seconds."""
        seconds, images = self._engine_seconds.labels(model), self._batch_images.labels(model)

        def count(batch: int, time: float) -> None:
            images.observe(batch)
            seconds.observe(time)

        return count

    def text(self) -> tuple[bytes, str]:
        """Return all numbers, and the type of that text."""
        text: bytes = self._client.generate_latest(self._registry)
        return text, self._client.CONTENT_TYPE_LATEST

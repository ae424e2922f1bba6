"""Serve classifiers over HTTP: in this process with uvicorn, or in replicas of Ray Serve."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biper_engine.files import os_error
from biper_engine.metadata import Metadata
from biper_engine.serving.app import create_app
from biper_engine.serving.classifier import Classifier, open_classifier
from biper_engine.serving.packages import require_package
from biper_engine.serving.ray_predict import connected
from biper_engine.serving.requests import Limits

__all__ = ["Served", "serve", "serve_on_ray"]

_STOP_SECONDS = 30
_NAME = "biper"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A network to serve, as a node of a cluster can open it.

    Attributes:
        file: its `.biper` file.
        name: by which requests call it; None takes the file's.
        metadata: how images are prepared; None takes what the file says.
    """

    file: Path
    name: str | None = None
    metadata: Metadata | None = None

    def open(self) -> Classifier:
        """Load it; raises as `open_classifier`."""
        return open_classifier(self.file, metadata=self.metadata, name=self.name)


def serve(
    classifiers: Sequence[Classifier],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, and then answer the requests that are inside.

    Args:
        classifiers: each with a name of its own.
        host: address to listen on; "0.0.0.0" is every address of this machine.
        port: 0 takes a free one.
        limits: of requests.
        on_start: called with the URL once clients can connect.

    Raises:
        OSError: nothing can listen there; the message says why.
        ImportError: a package of the extra `serve` is missing.
        ValueError: as `create_app`.
    """
    uvicorn = require_package("uvicorn", "Serving")
    require_package("python_multipart", "Serving")
    app = create_app(classifiers, limits)
    listening = _listen(host, port)
    with listening:
        config = uvicorn.Config(
            app,
            access_log=False,
            h11_max_incomplete_event_size=2**15,
            http="h11",  # httptools, which uvicorn prefers, has no limit for the size of headers
            lifespan="off",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
            ws="none",
        )
        server = _server(uvicorn, config)
        listening.listen(config.backlog)  # clients that come before the server is ready wait
        if on_start is not None:
            on_start(_url(host, listening.getsockname()[1]))
        server.run(sockets=[listening])


def _server(uvicorn: Any, config: Any) -> Any:
    """Return a server that ends normally after a signal, where uvicorn's raises it again."""

    class Server(uvicorn.Server):  # type: ignore[misc]
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return Server(config)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, not yet listening.

    Raises:
        OSError: it cannot be bound; the message says why.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(
            f"There is no address '{host}' to listen on: {error}. Take 127.0.0.1 for this machine "
            "only, or 0.0.0.0 for every network it is in."
        ) from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere, it would allow two servers on one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: "another program has this port. Pass another, or 0 for a free one",
            errno.EACCES: "ports below 1024 are for the administrator. Pass one above",
            errno.EADDRNOTAVAIL: "this machine does not have that address",
        }
        reason = reasons.get(error.errno or 0, str(error.strerror))
        raise os_error(
            error.errno or errno.EIO, f"Cannot listen on {host} port {port}: {reason}."
        ) from error
    return listening


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve_on_ray(
    served: Sequence[Served],
    *,
    replicas: int,
    address: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve the same application from replicas of Ray Serve, until SIGINT or SIGTERM.

    Each replica has its engines, one processor and a queue of its own.

    Args:
        served: the networks; every node must see the files under the same paths.
        replicas: how many.
        address: of a Ray cluster, such as "auto"; None starts one here.
        host: where each node listens.
        port: where each node listens.
        limits: of requests, for each replica.
        on_start: called with the URL once clients can connect.

    Raises:
        ImportError: Ray or a package of the extra `serve` is missing.
        OSError: nothing can listen there, or there is no cluster at the address.
        ValueError: as `create_app`.
    """
    ray = require_package("ray", "Serving on Ray")
    ray_serve = require_package("ray.serve", "Serving on Ray")
    accepted = limits or Limits()
    create_app([one.open() for one in served], accepted)  # so that errors come before Ray starts
    if address is None:
        _listen(host, port).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with connected(ray, replicas + 1, address), _stopped() as stop:
        ray_serve.start(http_options={"host": host, "port": port})
        ingress = ray_serve.ingress(_builder(served, accepted))
        deployment = ray_serve.deployment(ingress()).options(
            num_replicas=replicas,
            ray_actor_options={"num_cpus": 1},
            # Each replica's own queue refuses what is too much, in words.
            max_ongoing_requests=2 * accepted.waiting,
            graceful_shutdown_timeout_s=_STOP_SECONDS,
        )
        ray_serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        try:
            if on_start is not None:
                on_start(_url(host, port))
            stop.wait()
        finally:
            ray_serve.delete(_NAME)  # waits for the requests inside; proxies still run
            ray_serve.shutdown()


def _builder(served: Sequence[Served], limits: Limits) -> Callable[[], Any]:
    """Return what makes the application in a replica."""
    named = [(str(one.file.absolute()), one.name, one.metadata) for one in served]

    def build() -> Any:
        import torch

        torch.set_num_threads(1)  # a replica has one processor
        classifiers = [Served(file=Path(f), name=n, metadata=m).open() for f, n, m in named]
        return create_app(classifiers, limits)

    return build


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set; a second signal acts as usual."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def set_once(number: int, _frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in _SIGNALS:
        signal.signal(number, set_once)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

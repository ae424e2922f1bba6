"""`biper serve`: classify images over HTTP."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biper_engine.cli.console import show_note, status
from biper_engine.cli.engines import ENGINE_HELP, RayCluster, engine_file
from biper_engine.cli.images import Labels, Mean, Preparation, Size, Std, preprocessing_of

if TYPE_CHECKING:
    from biper_engine.serving import Served

__all__ = ["serve"]

_LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=ENGINE_HELP)],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Listen here; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")
    ] = 8000,
    max_body: Annotated[int, typer.Option(min=1, metavar="MB", help="Of a request.")] = 20,
    max_pixels: Annotated[
        int, typer.Option(min=1, metavar="MILLIONS", help="Of an image, before decoding.")
    ] = 50,
    max_total_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MILLIONS",
            help="Of a request; if not given, twice --max-pixels.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests at once; more are told to wait.")
    ] = 256,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images per call, at most.")] = 32,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Run N copies in Ray Serve, one processor each.",
            show_default=False,
        ),
    ] = None,
    ray: RayCluster = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    labels: Labels = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line per request.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Log as JSON to stdout.")] = False,
) -> None:
    """Serve networks over HTTP, with a page to try them on.

    POST an image to /predict, or JSON. With several files, /predict?model=NAME
    says which. Ctrl-C answers what was accepted, and ends.

    [bold]Examples[/bold]
    biper serve digits/resnet20_1w1a
    curl --data-binary @7.png http://127.0.0.1:8000/predict
    biper serve one.biper two.biper --host 0.0.0.0 --port 80
    biper serve net.biper --replicas 4
    """
    from biper_engine.serving import Limits, serve_on_ray
    from biper_engine.serving import serve as serve_here

    limits = Limits(
        body_bytes=max_body * 2**20,
        image_pixels=max_pixels * 10**6,
        request_pixels=(max_total_pixels or 2 * max_pixels) * 10**6,
        waiting=queue,
        batch=batch,
    )
    said = Preparation(mean=mean, std=std, size=size, labels=labels)
    with ExitStack() as stack:
        with status("Loading"):
            served = [_served(stack.enter_context(engine_file(file)), file, said) for file in files]
            classifiers = [one.open() for one in served]
        _log_requests(quiet, json_output)

        def tell(url: str) -> None:
            for one in classifiers:
                show_note(f"{one.name}: {one.bytes:,} bytes, {one.engine.execution}")
            if host not in _LOCAL:
                show_note(
                    f"Listening on {host}: whoever reaches this machine may use it, without a "
                    "password, and unencrypted."
                )
            show_note(f"{url} (Ctrl-C to stop)")

        where = {"host": host, "port": port}
        if replicas is None and ray is None:
            serve_here(classifiers, limits=limits, on_start=tell, host=host, port=port)
        else:
            serve_on_ray(
                served,
                **where,  # type: ignore[arg-type]
                replicas=replicas or 1,
                address=ray,
                limits=limits,
                on_start=tell,
            )
    show_note("Stopped.")


def _served(path: Path, file: Path, said: Preparation) -> Served:
    import biper_engine
    from biper_engine.serving import Served

    engine = biper_engine.load(path)
    known = engine.metadata is not None and engine.metadata.input_size is not None
    asked = said.is_given or said.labels is not None
    metadata = preprocessing_of(engine, file, said) if known or asked else None
    name = file.as_posix() if not file.exists() else None  # of a network in the package
    return Served(file=path, name=name, metadata=metadata)


class _Line(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        if not self._as_json or fields is None:
            return super().format(record)
        return json.dumps({"time": self.formatTime(record, self.datefmt), **fields})


def _log_requests(quiet: bool, as_json: bool) -> None:
    log = logging.getLogger("biper_engine.serving")
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(_Line(as_json))
    log.handlers = [handler]

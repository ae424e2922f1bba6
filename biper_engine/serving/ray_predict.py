"""The parts of a batch run in actors of Ray Data, each with an engine of its own.

Ray starts an actor that dies again, and repeats its part. A part that was half done has no file;
one that was done just before is taken as it is.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biper_engine.errors import BiperError, DataError
from biper_engine.metadata import Metadata
from biper_engine.serving.classifier import Classifier, open_classifier
from biper_engine.serving.inputs import Part
from biper_engine.serving.packages import require_package
from biper_engine.serving.parts import (
    PartOptions,
    PartResult,
    part_file,
    predict_part,
    whole_part,
)

__all__ = ["connected", "run_on_ray"]

# The object store of a Ray that is started here: only numbers of rows are in it.
_STORE_BYTES = 200 * 2**20


def run_on_ray(
    job: dict[str, str],
    metadata: Metadata,
    parts: dict[int, Part],
    options: PartOptions,
    workers: int | None,
    address: str | None,
) -> Iterator[PartResult]:
    """Compute parts in actors, and yield each result when it is there.

    Args:
        job: `file` and its `sha256`, and the folder `out`.
        metadata: how images are prepared.
        parts: to compute, by number.
        options: of the run.
        workers: actors; None takes one for each processor.
        address: of a cluster; None starts one here.

    Raises:
        ImportError: Ray is not installed.
        DataError, OSError: an actor could not do its work; also if there is no cluster there.
    """
    if not parts:
        return
    ray = require_package("ray", "Running on several workers")
    data = require_package("ray.data", "Running on several workers")
    with connected(ray, workers, address):
        most = workers or int(ray.cluster_resources().get("CPU", 1))
        items = [{"part": json.dumps({"number": n, **p.to_dict()})} for n, p in parts.items()]
        data.DataContext.get_current().enable_progress_bars = False
        for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
            logging.getLogger(name).setLevel(logging.ERROR)
        done = data.from_items(items, override_num_blocks=min(len(items), 2000)).map_batches(
            PartWorker,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(most, len(items))),
            num_cpus=1,
            fn_constructor_args=(job, metadata.to_dict(), asdict(options)),
        )
        for row in done.iter_rows():
            if row["problem"]:
                raise (OSError if row["is_os_error"] else DataError)(row["problem"])
            yield PartResult(int(row["rows"]), int(row["failed"]))


class PartWorker:
    """One engine in an actor, with one thread.

    Errors that have a message for people are results: Ray would print its own stack with them.
    """

    def __init__(
        self, job: dict[str, str], metadata: dict[str, Any], options: dict[str, Any]
    ) -> None:
        import torch

        # The actor has one processor. Images are opened in its thread, too.
        torch.set_num_threads(1)
        self._job = job
        self._out = Path(job["out"])
        self._metadata = Metadata.from_dict(metadata)
        self._options = PartOptions(**options)
        self._pool = ThreadPoolExecutor(1)
        self._opened: Classifier | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Compute parts, or take those that another actor wrote before it died."""
        rows = [self._told(json.loads(str(text))) for text in batch["part"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _told(self, values: dict[str, Any]) -> dict[str, Any]:
        row = {"rows": 0, "failed": 0, "problem": "", "is_os_error": False}
        try:
            return {**row, **self._compute(values)._asdict()}
        except (BiperError, ValueError, OSError) as error:
            return {**row, "problem": str(error), "is_os_error": isinstance(error, OSError)}

    def _compute(self, values: dict[str, Any]) -> PartResult:
        path = part_file(self._out, values.pop("number"))
        part = Part.from_dict(values)
        found = whole_part(path, part, self._options.run)
        return found or predict_part(self._classifier(), part, path, self._options, self._pool)

    def _classifier(self) -> Classifier:
        if self._opened is None:
            if not self._out.is_dir():
                raise OSError(
                    f"There is no folder '{self._out}' on the node {platform.node()}: all nodes "
                    "must see the folder of the results under the same path."
                )
            opened = open_classifier(self._job["file"], metadata=self._metadata)
            if opened.sha256 != self._job["sha256"]:
                raise ValueError(
                    f"'{self._job['file']}' is another file on the node {platform.node()} than "
                    "where the run was started. Put the same file everywhere."
                )
            self._opened = opened
        return self._opened


def _require_reachable(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes.

    Raises:
        OSError: nobody does, or there is no such machine.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # a name of Ray's, such as "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise OSError(
            f"Cannot join the Ray cluster at '{address}': {error}. Is its head node running, and "
            "is this its port?"
        ) from error


@contextmanager
def connected(ray: Any, workers: int | None, address: str | None) -> Iterator[None]:
    """Be in a Ray cluster: the one that this process is in, that of the address, or a new one here.

    Raises:
        OSError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None:
        _require_reachable(address)
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"include_dashboard": False, "num_cpus": workers, "object_store_memory": _STORE_BYTES}
    settings = own if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="error", **settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OSError(
            f"Cannot join the Ray cluster at '{address}': {error}"
            if address
            else f"Cannot start Ray here: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()

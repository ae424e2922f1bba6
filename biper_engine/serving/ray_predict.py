"""The parts of a batch run in actors of Ray Data, each with an engine of its own.

Ray starts an actor that dies again, and repeats its part. A part that was half done has no file;
one that was done just before is taken as it is.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from biper_engine.errors import BiperError
from biper_engine.metadata import Metadata
from biper_engine.serving.classifier import open_classifier
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
        OSError: there is no cluster at the address; other errors as an actor raises them.
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
        try:
            for row in done.iter_rows():
                yield PartResult(int(row["rows"]), int(row["failed"]))
        except ray.exceptions.RayError as error:
            raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """Return the error of ours, or of the system, that an actor raised, if there is one."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "cause", None)
        if isinstance(seen, BiperError | ValueError | OSError):
            return type(seen)(str(seen)) if inner is not None else seen
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return error


class PartWorker:
    """One engine in an actor, with one thread."""

    def __init__(
        self, job: dict[str, str], metadata: dict[str, Any], options: dict[str, Any]
    ) -> None:
        import torch

        # The actor has one processor. Images are opened in its thread, too.
        torch.set_num_threads(1)
        self._out = Path(job["out"])
        if not self._out.is_dir():
            raise OSError(
                f"There is no folder '{self._out}' on the node {platform.node()}: all nodes "
                "must see the folder of the results under the same path."
            )
        self._options = PartOptions(**options)
        self._classifier = open_classifier(job["file"], metadata=Metadata.from_dict(metadata))
        if self._classifier.sha256 != job["sha256"]:
            raise ValueError(
                f"'{job['file']}' is another file on the node {platform.node()} than where the "
                "run was started. Put the same file everywhere."
            )
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Compute parts, or take those that another actor wrote before it died."""
        results = [self._compute(json.loads(str(text))) for text in batch["part"]]
        return {
            "rows": [result.rows for result in results],
            "failed": [result.failed for result in results],
        }

    def _compute(self, values: dict[str, Any]) -> PartResult:
        path = part_file(self._out, values.pop("number"))
        part = Part.from_dict(values)
        found = whole_part(path, part, self._options.run)
        return found or predict_part(self._classifier, part, path, self._options, self._pool)


@contextmanager
def connected(ray: Any, workers: int | None, address: str | None) -> Iterator[None]:
    """Be in a Ray cluster: the one that this process is in, that of the address, or a new one here.

    Raises:
        OSError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
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

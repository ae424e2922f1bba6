"""A device that captures graphs, on the CPU: replaying a graph runs its function again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from biper_engine.runtime.cuda_driver import Capture

GRAPH_BYTES = 1000  # of every graph, apart from its inputs


class FakeEvent:
    """Notes what is done to it."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record(self) -> None:
        self._log.append("record")

    def wait(self) -> None:
        self._log.append("wait")

    def synchronize(self) -> None:
        self._log.append("synchronize")


class FakeGraph:
    """Runs a function again, its results in place of the first ones."""

    def __init__(self, driver: "FakeDriver", run: Callable[[], Any], outputs: Any) -> None:
        self._driver, self._run, self._outputs = driver, run, outputs

    def replay(self) -> None:
        self._driver.log.append("replay")
        self._driver.pause.wait(0.0005)  # others may run now
        for output, result in zip(self._outputs, self._run(), strict=True):
            if isinstance(output, Tensor):
                output.copy_(result)


class FakeDriver:
    """A device on the CPU; its streams are numbers that a test chooses."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captured = 0
        self.error: BaseException | None = None
        self.errors_left = 10**9
        self.free = 10**9
        self.captures_itself = False
        self.inside = 0
        self.pause = threading.Event()
        self._streams = threading.local()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def is_capturing(self) -> bool:
        return self.captures_itself

    def synchronize(self) -> None:
        self.log.append("synchronize device")

    def use_stream(self, number: int) -> None:
        self._streams.number = number

    def stream(self) -> int:
        return int(getattr(self._streams, "number", 0))

    def to_device(self, x: Tensor) -> Tensor:
        self.log.append("to_device")
        return x

    def empty_like(self, x: Tensor) -> Tensor:
        return torch.empty_like(x, device="cpu").fill_(float("nan") if x.is_floating_point() else 7)

    def event(self) -> FakeEvent:
        return FakeEvent(self.log)

    def capture(self, run: Callable[[], Any]) -> Capture:
        assert self.inside > 0
        assert not torch.backends.cudnn.allow_tf32
        run()
        if self.error is not None and self.errors_left > 0:
            self.errors_left -= 1
            raise self.error
        outputs = run()
        self.captured += 1
        return Capture(FakeGraph(self, run, outputs), outputs, GRAPH_BYTES)

    def free_bytes(self) -> int:
        return self.free

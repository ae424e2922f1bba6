"""Run the images of several requests together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from biper_engine.serving.classifier import Classifier

__all__ = ["Answer", "Batcher"]


class Answer(NamedTuple):
    """What a request gets back.

    Attributes:
        logits: [N, classes], of its own images.
        batch: images of the call that they were in.
        seconds: of that call.
    """

    logits: Tensor
    batch: int
    seconds: float


class _Waiting(NamedTuple):
    inputs: Tensor
    answer: asyncio.Future[Answer]


class Batcher:
    """Give an engine what has come while it was busy, as one batch.

    An idle engine starts at once, so a single request never waits for others to come. Requests are
    never split. All methods are for the thread of one event loop.

    Args:
        classifier: the network.
        most_images: of a batch; a larger request is a batch of its own.
        on_batch: called with each batch's number of images and seconds.
    """

    def __init__(
        self, classifier: Classifier, most_images: int, on_batch: Callable[[int, float], None]
    ) -> None:
        self._classifier = classifier
        self._most_images = most_images
        self._on_batch = on_batch
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._work: asyncio.Task[None] | None = None

    async def classify(self, inputs: Tensor) -> Answer:
        """Return the logits of prepared images [N, ...], together with others that wait.

        Raises:
            What the engine raises.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(inputs, answer))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run_all())
        return await answer

    async def _run_all(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            try:
                start = time.perf_counter()
                inputs = [each.inputs for each in batch]
                logits = await loop.run_in_executor(self._thread, self._compute, inputs)
                seconds = time.perf_counter() - start
            except Exception as error:  # goes to every request that waits for it
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            self._on_batch(len(logits), seconds)
            sizes = [len(each.inputs) for each in batch]
            for each, own in zip(batch, torch.split(logits, sizes), strict=True):
                if not each.answer.done():
                    each.answer.set_result(Answer(own, len(logits), seconds))

    def _take(self) -> list[_Waiting]:
        """Remove the requests of the next batch from the queue, without those given up."""
        batch: list[_Waiting] = []
        images = 0
        while self._waiting:
            first = self._waiting[0]
            if batch and images + len(first.inputs) > self._most_images:
                break
            self._waiting.popleft()
            if not first.answer.done():
                batch.append(first)
                images += len(first.inputs)
        return batch

    def _compute(self, inputs: list[Tensor]) -> Tensor:
        return self._classifier(torch.cat(inputs) if len(inputs) > 1 else inputs[0])

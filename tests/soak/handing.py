"""Passes an engine in use to other processes, shared memory and recorders."""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import biper_engine
from biper_engine import Engine
from biper_engine.graph.portable import release_source
from tests.soak.subjects import Batch, DifferenceError, Subject, difference

_BATCH = Batch((0, 1), "contiguous")


def hand_over(
    subjects: Sequence[Subject],
    rng: random.Random,
    seconds: float,
    child_seconds: float,
    *,
    trace: bool,
) -> int:
    """Hand engines on until the time is over, at least one to a process; return how many were.

    PyTorch keeps some of the memory of every trace, so that `torch.jit.trace` has a switch.

    Raises:
        DifferenceError: an answer differed, in this process or in the other.
    """
    end = time.monotonic() + seconds
    sent = 0
    with torch.no_grad():
        if trace:
            for subject in subjects:
                _trace(subject, subject.input(_BATCH))
        while sent == 0 or time.monotonic() < end:
            subject = rng.choice(subjects)
            images = subject.input(_BATCH)
            for share in (_record, _move, _load):
                share(subject, images)
                subject.check(_BATCH, subject.engine(images))
            _send(subject, images, child_seconds)
            subject.check(_BATCH, subject.engine(images))
            sent += 1
    return sent


def run_child(child: Any, what: str, seconds: float) -> None:
    """Start a process and wait for its end.

    Raises:
        DifferenceError: it ended with an error, or had to be killed.
    """
    child.start()
    child.join(seconds)
    status = child.exitcode
    if status is None:
        child.kill()
        child.join()
    child.close()
    if status != 0:
        how = f"hung for {seconds} s" if status is None else f"ended with {status}"
        raise DifferenceError(f"{what} {how}")


def _send(subject: Subject, images: Tensor, child_seconds: float) -> None:
    """Let a spawned process run the engine; each gets its tensors in shared memory."""
    context: Any = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_answer, args=(subject.engine, images, queue))
    run_child(child, f"a spawned child that ran {subject.name}", child_seconds)
    dtype, shape, values = queue.get()
    queue.close()
    logits = torch.frombuffer(bytearray(values), dtype=dtype).view(shape)
    subject.check(_BATCH, logits, threads=1)
    _take_back(subject)


def _answer(engine: Engine, images: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = engine(images)
    queue.put((logits.dtype, tuple(logits.shape), logits.view(torch.uint8).numpy().tobytes()))


def _move(subject: Subject, images: Tensor) -> None:
    subject.engine.share_memory()  # type: ignore[no-untyped-call]
    subject.check(_BATCH, subject.engine(images))
    _take_back(subject)


def _take_back(subject: Subject) -> None:
    """Give the engine memory of its own again: shared memory is an open file for each tensor."""
    for tensor in subject.engine.buffers():
        tensor.data = tensor.data.clone()


def _trace(subject: Subject, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(subject.engine, images, check_trace=False)
    assert_close(traced(images), subject.engine.graph_module(images)[0])


def _record(subject: Subject, images: Tensor) -> None:
    recorded = release_source(make_fx(subject.engine)(images))
    # Float layers are PyTorch's in what is recorded.
    assert_close(recorded(images), subject.engine.graph_module(images)[0])


def _load(subject: Subject, images: Tensor) -> None:
    found = difference(biper_engine.load(subject.path)(images), subject.engine(images))
    if found is not None:
        raise DifferenceError(f"{subject.name}, loaded meanwhile: {found}")

"""The memory of CUDA graphs, which graphs are dropped, and failed captures."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.runtime import cuda_graphs
from biper_engine.runtime.cuda_graphs import CudaGraphs, uncapturable_reason
from tests.networks_by_hand import GraphBuilder, classifier
from tests.runtime.fake_driver import GRAPH_BYTES, FakeDriver
from tests.runtime.plans import batches

_aten = torch.ops.aten


def runner(driver: FakeDriver, **options: Any) -> CudaGraphs:
    return CudaGraphs(lambda x: (x * 2,), driver, operators=1, **options)


def test_the_least_recently_used_graphs_are_dropped_by_bytes() -> None:
    driver = FakeDriver()
    one = 10 * 4 + GRAPH_BYTES  # ten floats
    graphs = runner(driver, limit_bytes=3 * one + 2 * 4)

    def call(size: int) -> None:
        x = torch.arange(float(size))
        assert torch.equal(graphs(x)[0], x * 2)

    for size in (10, 11, 10, 11, 9, 9):
        call(size)
    assert batches(graphs) == [10, 11, 9]
    assert graphs.memory_bytes == 3 * one
    call(10)
    for _ in range(2):
        call(8)
    assert batches(graphs) == [9, 10, 8]
    assert driver.log.count("synchronize") == 1  # the dropped one waited for its last launch
    for _ in range(2):
        call(400)  # 2,600 bytes leave room for nothing else
    assert batches(graphs) == [400]
    assert str(graphs) == "one CUDA graph of 1 operator per input shape (1 captured)"


def test_a_graph_beyond_the_limit_is_not_kept_nor_captured_again() -> None:
    driver = FakeDriver()
    graphs = runner(driver, limit_bytes=2000)
    small, large = torch.ones(10), torch.ones(1000)
    for _ in range(4):
        assert torch.equal(graphs(large)[0], large * 2)
        graphs(small)
    graphs.warm_up(small)
    assert driver.captured == 2
    assert batches(graphs) == [10]
    assert str(graphs) == (
        "one CUDA graph of 1 operator per input shape (1 captured), operator by operator for "
        "1 shape, since memory is short"
    )


def test_the_limit_is_a_share_of_the_memory_that_is_free() -> None:
    driver = FakeDriver()
    driver.free = 4 * (2 * GRAPH_BYTES + 100)
    graphs = runner(driver)
    for size in (10, 10, 11, 11):
        graphs(torch.ones(size))
    driver.free = 0  # asked for once
    for size in (12, 12):
        graphs(torch.ones(size))
    assert batches(graphs) == [11, 12]


def test_other_graphs_make_room_where_memory_is_short() -> None:
    driver = FakeDriver()
    graphs = runner(driver)
    for size in (10, 10, 11, 11):
        graphs(torch.ones(size))
    driver.error, driver.errors_left = torch.OutOfMemoryError("CUDA out of memory."), 1
    x = torch.ones(12)
    for _ in range(2):
        assert torch.equal(graphs(x)[0], x * 2)
    assert batches(graphs) == [12]
    driver.errors_left = 10
    for _ in range(3):
        graphs(torch.ones(13))
    assert driver.errors_left == 8
    assert "for 1 shape, since memory is short" in str(graphs)
    driver.error = None
    for _ in range(2):
        graphs(torch.ones(12))
    assert batches(graphs) == [12]


def test_shapes_that_come_once_are_not_remembered_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_REMEMBERED_SHAPES", 3)
    graphs = runner(FakeDriver())
    for size in range(1, 20):
        graphs(torch.ones(size))
    assert len(graphs._seen) == 3
    graphs(torch.ones(19))
    assert batches(graphs) == [19]
    graphs(torch.ones(1))
    assert batches(graphs) == [19]


def test_a_dropped_graph_waits_unless_the_caller_captures() -> None:
    driver = FakeDriver()
    graphs = runner(driver)
    graphs.warm_up(torch.ones(3))
    driver.captures_itself = True
    del graphs
    gc.collect()
    assert "synchronize" not in driver.log


# -- failures -------------------------------------------------------------------------------------


def test_a_capture_that_fails_leaves_the_operators_and_says_why(driver: FakeDriver) -> None:
    engine = classifier()
    cause = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    driver.error = RuntimeError("operation failed due to a previous error during capture")
    driver.error.__context__ = cause
    x = torch.ones(4, 3, 8, 8)
    for _ in range(4):
        assert torch.equal(engine(x), engine.graph_module(x)[0])
    assert driver.errors_left == 10**9 - 1  # it was tried once
    assert engine.execution == (
        "operator by operator, since capturing a CUDA graph failed: operation not permitted when "
        "stream is capturing"
    )
    engine.warmup([(2, 3, 8, 8)])
    assert driver.errors_left == 10**9 - 1


def test_an_error_that_the_caller_handles_is_not_the_cause_of_a_failure() -> None:
    driver = FakeDriver()
    graphs = runner(driver)
    driver.error = RuntimeError("the capture was invalidated")
    graphs(torch.ones(3))
    try:
        raise KeyError("of the caller")
    except KeyError:
        graphs(torch.ones(3))
    assert str(graphs).endswith("failed: the capture was invalidated")


def test_a_failure_after_memory_was_short_is_told_as_what_it_is() -> None:
    driver = FakeDriver()
    errors = iter([torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("no such thing")])
    capture = driver.capture

    def failing(run: Any) -> Any:
        driver.error = next(errors)
        return capture(run)

    driver.capture = failing  # type: ignore[method-assign]
    graphs = runner(driver)
    for _ in range(3):
        graphs(torch.ones(3))
    assert str(graphs) == (
        "operator by operator, since capturing a CUDA graph failed: no such thing"
    )


def test_an_error_of_the_network_itself_is_not_hidden() -> None:
    def broken(x: Tensor) -> Any:
        raise ValueError("no such thing")

    graphs = CudaGraphs(broken, FakeDriver(), operators=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such thing"):
            graphs(torch.ones(3))
    assert torch.backends.cudnn.allow_tf32


def test_an_operator_that_no_graph_can_hold_is_named(driver: FakeDriver) -> None:
    g = GraphBuilder()
    x = g.input("image")
    found = g.call("found", _aten.nonzero.default, x)
    module = g.module(found)
    assert uncapturable_reason(module) == "no CUDA graph can hold found (aten.nonzero.default)"
    assert uncapturable_reason(classifier().graph_module) is None
    engine, x = classifier(graph=module), torch.ones(2, 3, 8, 8)
    for _ in range(3):
        assert torch.equal(engine(x), x.nonzero())
    assert driver.captured == 0
    assert engine.execution == (
        "operator by operator, since no CUDA graph can hold found (aten.nonzero.default)"
    )

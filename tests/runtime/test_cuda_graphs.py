"""CUDA graphs: when they are captured and replayed, and their guarantees for calls.

A stand-in for the device captures a function with the memory of its call, and replays it by running
it again, so that everything except the GPU itself is tested without one. Tests marked `gpu` run the
same on a GPU.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.engine import Engine
from biper_engine.errors import BiperError
from biper_engine.ops.backends import use_backend
from biper_engine.runtime import cuda_graphs
from biper_engine.runtime.cuda_driver import CudaDriver, graph_driver
from tests.concurrency import wrong_results
from tests.images import images
from tests.networks_by_hand import GraphBuilder, classifier, signature, two_inputs
from tests.runtime.fake_driver import FakeDriver
from tests.runtime.plans import batches, graphs_of

_aten = torch.ops.aten


def expected(engine: Engine, x: Tensor) -> Tensor:
    result: Tensor = engine.graph_module(x)[0]
    return result


# -- when a graph is captured ---------------------------------------------------------------------


def test_the_first_call_runs_the_second_captures_and_others_replay(driver: FakeDriver) -> None:
    engine = classifier()
    counts = []
    for seed in range(4):
        x = images(4, seed=seed)
        assert torch.equal(engine(x), expected(engine, x))
        counts.append((driver.captured, driver.log.count("replay")))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert driver.inside == 0


def test_every_shape_dtype_and_layout_has_its_own_graph(driver: FakeDriver) -> None:
    engine = classifier()
    forms = (
        images(4),
        images(9),
        images(4).contiguous(memory_format=torch.channels_last),
        images(4).transpose(2, 3),
    )
    for x in forms:
        for _ in range(2):
            assert torch.equal(engine(x), expected(engine, x))
    # The last one has no layout of its own: it is laid out as the first.
    assert batches(graphs_of(engine)) == [9, 4, 4]
    assert driver.captured == 3


def test_the_number_of_inputs_and_their_structure_do_not_matter(driver: FakeDriver) -> None:
    net = two_inputs()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(4, 3, 6, 6, generator=generator)
        mask = torch.randn(4, 1, 6, 6, generator=generator)
        result = net(image, extra={"mask": mask})
        a, b, same = net.graph_module(image, mask)
        assert torch.equal(result["maps"][0], a)
        assert torch.equal(result["maps"][1], b)
        assert torch.equal(result["image"], same)
    assert driver.captured == 1


def test_warming_up_captures_at_once(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8), (3, 3, 8, 8), (4, 3, 8, 8)])
    assert driver.captured == 2
    assert batches(graphs_of(engine)) == [4, 3]  # the smaller one too, though the larger holds it
    x = images(4)
    assert torch.equal(engine(x), expected(engine, x))
    assert driver.captured == 2
    assert "to_device" not in driver.log


def test_warmed_up_graphs_take_another_layout_before_it_has_its_own(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    x = images(4).contiguous(memory_format=torch.channels_last)
    assert torch.equal(engine(x), expected(engine, x))
    assert (driver.captured, driver.log.count("to_device")) == (1, 0)
    assert torch.equal(engine(x), expected(engine, x))
    assert driver.captured == 2


def test_empty_batches_run_without_a_graph(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(0, 3, 8, 8)])
    for _ in range(3):
        assert engine(images(0)).shape == (0, 10)
    assert driver.captured == 0


def test_nothing_is_captured_while_the_caller_captures(driver: FakeDriver) -> None:
    engine = classifier()
    x = images(4)
    engine(x)
    driver.captures_itself = True
    for _ in range(3):
        assert torch.equal(engine(x), expected(engine, x))
    engine.warmup([x.shape])
    assert (driver.captured, driver.log.count("replay")) == (0, 0)
    driver.captures_itself = False
    engine(x)
    assert driver.captured == 1
    driver.captures_itself = True
    engine(x)  # no replay inside of a capture, either
    assert driver.log.count("replay") == 1


def test_a_plan_cannot_be_made_while_the_caller_captures(driver: FakeDriver) -> None:
    driver.captures_itself = True
    engine = classifier()
    with pytest.raises(RuntimeError, match="call the engine, or its `warmup`, before the capture"):
        engine(images(2))
    assert engine._plan.is_empty


def test_compilers_see_the_operators(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(2, 3, 8, 8)])
    before = list(driver.log)
    x = images(2)
    recorded = torch.fx.experimental.proxy_tensor.make_fx(engine)(x)
    assert any(str(node.target).startswith("biper.") for node in recorded.graph.nodes)
    compiled = torch.compile(engine, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected(engine, x))
    assert driver.log == before
    torch._dynamo.reset()


# -- batches that fit into another's graph --------------------------------------------------------


def test_a_batch_of_half_the_size_or_more_runs_on_a_larger_ones_graph(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(8, 3, 8, 8)])
    graphs = graphs_of(engine)
    for size in (8, 7, 4, 5, 8, 4):
        x = images(size, seed=size)
        result = engine(x)
        assert result.shape == (size, 10)
        assert torch.equal(result, expected(engine, x))
    assert batches(graphs) == [8]
    assert "to_device" not in driver.log
    for _ in range(2):
        x = images(3)
        assert torch.equal(engine(x), expected(engine, x))
    assert batches(graphs) == [8, 3]
    x = images(9)
    assert torch.equal(engine(x), expected(engine, x))
    assert batches(graphs) == [8, 3]


def test_the_smallest_graph_that_holds_a_batch_runs_it(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(n, 3, 8, 8) for n in (6, 8, 7)])
    engine(images(5))
    assert batches(graphs_of(engine)) == [8, 7, 6]  # the last one is the one just used


def test_rows_left_from_an_earlier_call_change_no_result(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(8, 3, 8, 8)])
    engine(torch.full((8, 3, 8, 8), float("nan")))
    x = images(5)
    assert torch.equal(engine(x), expected(engine, x))


def test_images_that_meet_get_no_added_rows(driver: FakeDriver) -> None:
    g = GraphBuilder()
    x = g.input("image")
    centred = g.call("y", _aten.sub.Tensor, x, g.call("m", _aten.mean.dim, x, [0], True))

    engine = classifier(
        graph=g.module(centred), signature=signature({"image": (3, 8, 8)}, (0,), {}, 0)
    )
    engine.warmup([(8, 3, 8, 8)])
    for size in (8, 7):
        x_value = images(size)
        assert torch.allclose(engine(x_value), x_value - x_value.mean(0, keepdim=True))
    assert driver.log.count("to_device") == 1


# -- results --------------------------------------------------------------------------------------


def test_a_returned_tensor_is_never_written_to_again(driver: FakeDriver) -> None:
    engine = classifier()
    kept = [(engine(images(4, seed=seed)), images(4, seed=seed)) for seed in range(6)]
    kept += [(engine(images(3, seed=seed)), images(3, seed=seed)) for seed in range(6)]
    assert len({result.data_ptr() for result, _ in kept}) == 12
    for result, x in kept:
        assert torch.equal(result, expected(engine, x))
    kept[5][0].zero_()
    x = images(4, seed=5)
    assert torch.equal(engine(x), expected(engine, x))


def test_results_hold_no_more_than_their_rows(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(8, 3, 8, 8)])
    assert engine(images(5)).untyped_storage().nbytes() == 5 * 10 * 4


def test_results_belong_to_the_mode_of_their_own_call(driver: FakeDriver) -> None:
    engine = classifier()
    x = images(4)
    with torch.inference_mode():
        for _ in range(3):
            assert engine(x).is_inference()
    result = engine(x)
    assert not result.is_inference()
    (result.requires_grad_() * 2).sum().backward()
    with torch.no_grad():
        assert not engine(x.clone().requires_grad_()).requires_grad
    assert driver.captured == 1


def test_autocast_changes_nothing(driver: FakeDriver) -> None:
    engine = classifier()
    for seed in range(3):
        x = images(4, seed=seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = engine(x)
        assert torch.equal(result, expected(engine, x))


# -- streams and threads --------------------------------------------------------------------------


def test_a_call_waits_for_the_last_one_only_on_another_stream(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    driver.log.clear()
    for number in (1, 1, 2, 2, 1):
        driver.use_stream(number)
        engine(images(4))
    one = ["replay", "record"]
    assert driver.log == [*one, *one, "wait", *one, *one, "wait", *one]


def test_a_call_whose_results_cannot_be_copied_is_waited_for_like_any_other(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    driver.log.clear()

    def fail(value: Any, rows: int | None) -> Any:
        raise torch.OutOfMemoryError("no memory for the copy")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "_copied", fail)
        with pytest.raises(torch.OutOfMemoryError):
            engine(images(4))
    assert driver.log == ["replay", "record"]


def test_a_new_plan_is_ready_for_every_stream(driver: FakeDriver) -> None:
    engine = classifier()
    engine(images(4))
    assert driver.log == ["synchronize device", "to_device"]


def test_calls_from_several_threads_do_not_mix(driver: FakeDriver) -> None:
    engine = classifier()
    inputs = [images(size, seed=seed) for seed, size in enumerate((8, 8, 5, 8, 3, 7, 8))]
    wanted = [expected(engine, x) for x in inputs]
    assert wrong_results(engine, inputs, threads=6, calls=12) == []
    assert all(torch.equal(engine(x), y) for x, y in zip(inputs, wanted, strict=True))
    assert driver.inside == 0


def test_threads_that_call_for_the_first_time_capture_one_graph(driver: FakeDriver) -> None:
    engine = classifier()
    x = images(4)
    wanted = expected(engine, x)
    results: list[Tensor] = []
    barrier = threading.Barrier(6)

    def call() -> None:
        barrier.wait()
        for _ in range(6):
            results.append(engine(x))

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.captured == 1
    assert len(results) == 36
    assert all(torch.equal(result, wanted) for result in results)


def test_while_another_thread_captures_a_call_runs_without_a_graph(driver: FakeDriver) -> None:
    engine = classifier()
    x = images(4)
    engine(x)
    with cuda_graphs._capturing:
        assert torch.equal(engine(x), expected(engine, x))
        assert driver.captured == 0
    engine(x)
    assert driver.captured == 1


# -- the engine -----------------------------------------------------------------------------------


def test_the_engine_says_how_it_runs(driver: FakeDriver) -> None:
    engine = classifier()
    text = "one CUDA graph of 11 operators per input shape ({} captured)"
    assert engine.execution == text.format(0)
    engine.warmup([(2, 3, 8, 8), (9, 3, 8, 8)])
    assert engine.execution == text.format(2)


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.to("cpu"),
        lambda e: e.load_state_dict(classifier(1).state_dict()),
        lambda e: e._plan.drop(),
    ],
)
def test_graphs_are_dropped_with_the_plan(
    driver: FakeDriver, change: Callable[[Engine], object]
) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    kept = weakref.ref(graphs_of(engine))
    change(engine)
    gc.collect()
    assert kept() is None
    assert driver.log.count("synchronize") == 1
    x = images(4)
    for _ in range(3):
        assert torch.equal(engine(x), expected(engine, x))
    assert driver.captured == 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_have_no_graphs(driver: FakeDriver, way: Callable[[Engine], Engine]) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    copied = way(engine)
    assert copied._plan.is_empty
    assert "(0 captured)" in copied.execution
    assert "(1 captured)" in engine.execution


def test_a_forced_backend_gets_graphs_of_its_own(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    with use_backend("reference"):
        assert "(0 captured)" in engine.execution


def test_profiles_run_the_operators_and_whole_calls(driver: FakeDriver) -> None:
    engine = classifier()
    report = engine.profile(images(4), rounds=2)
    assert [node.name for node in report.nodes][-1] == "logits"
    assert driver.log.count("replay") > 0


# -- where tensors may be -------------------------------------------------------------------------


class Pinned(Tensor):
    """A CPU tensor that says that its memory is pinned."""

    def is_pinned(self, *_: Any) -> bool:
        return True


CUDA = torch.device("cuda", 0)


def test_a_cuda_engine_takes_pinned_cpu_tensors_and_no_others() -> None:
    check = classifier().signature.check
    check([images(2).as_subclass(Pinned)], CUDA)
    with pytest.raises(ValueError, match=r"is on cpu, .* on cuda:0; move .*`.pin_memory\(\)`"):
        check([images(2)], CUDA)
    with pytest.raises(
        ValueError, match=r"is on meta, .* on cuda:0; move one of them with .*\)`\."
    ):
        check([images(2).to("meta")], CUDA)
    with pytest.raises(ValueError, match="is on cpu, but the engine is on meta"):
        check([images(2).as_subclass(Pinned)], torch.device("meta"))


def test_other_devices_have_no_driver() -> None:
    assert graph_driver(torch.device("cpu")) is None
    assert graph_driver(torch.device("meta")) is None
    assert graph_driver(None) is None
    assert isinstance(graph_driver(CUDA), CudaDriver)


def test_errors_of_a_refused_input_reach_the_caller(driver: FakeDriver) -> None:
    engine = classifier()
    engine.warmup([(4, 3, 8, 8)])
    with pytest.raises(BiperError):
        engine(images(4)[..., :7])

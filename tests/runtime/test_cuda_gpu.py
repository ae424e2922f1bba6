"""The CUDA plan on a GPU; `test_cuda_graphs` tests the same behaviour without one."""

import copy
import operator
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import biper_engine
from biper_engine import models
from biper_engine.engine import Engine
from biper_engine.ops.backends import select
from biper_engine.runtime import cuda_graphs
from biper_engine.runtime.cuda_driver import CudaDriver
from biper_engine.runtime.cuda_graphs import CudaGraphs
from tests.concurrency import wrong_results
from tests.images import images
from tests.networks_by_hand import GraphBuilder, classifier, signature

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

_biper = torch.ops.biper


@pytest.fixture
def device() -> torch.device:
    """Return the current GPU; skip where only the reference runs on it, which no graph holds."""
    device = torch.device("cuda", torch.cuda.current_device())
    if select("binarize", None, device).name == "reference":
        pytest.skip("no backend has kernels for this GPU")
    return device


def exact_network() -> Engine:
    """A network without a float sum: its results have one value on every device."""
    g = GraphBuilder(4)
    x = g.input("image")
    bits = g.call("bits", _biper.binarize.default, x)
    pair = g.call(
        "pair",
        _biper.bconv2d_float_bits.default,
        bits,
        *g.operands("a", 3, 70, bits=True),
        clamp_min=-1.0,
        clamp_max=1.0,
        in_channels=3,
        padding=[1, 1, 1, 1],
    )
    floats = g.call("floats", operator.getitem, pair, 0)
    packed = g.call("packed", operator.getitem, pair, 1)
    second = g.call(
        "second",
        _biper.bconv2d_float.default,
        packed,
        *g.operands("b", 70, 70, bits=False),
        residual=floats,
        in_channels=70,
        padding=[1, 1, 1, 1],
    )
    rebinarized = g.call("again", _biper.binarize.default, second)
    pooled = g.call("pool", _biper.bmaxpool2d.default, rebinarized, 70, [2, 2], stride=[2, 2])
    form = signature({"image": (3, 8, 8)}, (0,), {}, (0, 0))
    return classifier(graph=g.module(second, pooled), signature=form)


def test_a_network_without_float_sums_gives_the_bytes_of_the_cpu(device: torch.device) -> None:
    on_cpu = exact_network()
    on_gpu = exact_network().to(device)
    for seed in range(4):
        x = images(5, seed=seed)
        for came, wanted in zip(on_gpu(x.to(device)), on_cpu(x), strict=True):
            assert torch.equal(came.cpu(), wanted)
    assert "(1 captured)" in on_gpu.execution


@pytest.mark.parametrize(
    "name", ["cifar10/resnet20_1w1a", "cifar10/vgg_small_1w1a", "cifar10/resnet18_1w1a"]
)
def test_networks_are_verified_in_the_exact_mode(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model = models.build(name).eval().to(device)
    engine = biper_engine.convert(model, check=False)
    assert engine.device == device
    x = torch.randn(4, 3, 32, 32, device=device)
    report = biper_engine.verify(engine, model, x)
    assert report.ok, report.table()
    # The whole plan. A bit that lies within rounding of its threshold may flip and move the logits
    # of its image, which happens in one of some ten images here.
    wanted = copy.deepcopy(engine).cpu()(x.cpu())
    for _ in range(3):
        result = engine(x).cpu()
    near = (result - wanted).abs().amax(1) <= 1e-3 * wanted.abs().max()
    assert int(near.sum()) >= 3, result - wanted


def test_a_graph_gives_the_bytes_of_the_operators(device: torch.device) -> None:
    engine = classifier().to(device)
    x = images(16).to(device)
    results = [engine(x) for _ in range(4)]
    assert "(1 captured)" in engine.execution
    assert all(torch.equal(result, results[0]) for result in results)


def test_results_stay_as_they_were_returned(device: torch.device) -> None:
    engine = classifier().to(device)
    inputs = [images(8, seed=seed).to(device) for seed in range(6)]
    first = [engine(x) for x in inputs]
    again = [engine(x) for x in inputs]
    assert len({result.data_ptr() for result in first + again}) == 12
    assert all(map(torch.equal, first, again))


def test_smaller_batches_run_on_a_larger_graph(device: torch.device) -> None:
    engine = classifier().to(device)
    engine.warmup([(16, 3, 8, 8)])
    x = images(16).to(device)
    whole = engine(x)
    for size in (8, 11, 15, 16):
        assert torch.equal(engine(x[:size]), whole[:size])
    assert "(1 captured)" in engine.execution


def test_pinned_images_are_copied_and_others_refused(device: torch.device) -> None:
    engine = classifier().to(device)
    x = images(8)
    for _ in range(3):
        assert torch.equal(engine(x.pin_memory()), engine(x.to(device)))
    assert torch.equal(engine(x[:5].pin_memory()), engine(x[:5].to(device)))
    with pytest.raises(ValueError, match="pin its memory"):
        engine(x)


def test_threads_on_streams_of_their_own_do_not_mix(device: torch.device) -> None:
    engine = classifier().to(device)
    inputs = [images(size, seed=seed).to(device) for seed, size in enumerate((8, 8, 5, 8, 3, 16))]
    engine.warmup([(8, 3, 8, 8), (16, 3, 8, 8), (3, 3, 8, 8)])
    wanted = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def call(start: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(200):
                at = (start + i) % len(inputs)
                if not torch.equal(engine(inputs[at]), wanted[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=call, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert wrong_results(engine, inputs, threads=4, calls=50) == []


def test_streams_wait_for_each_other_without_the_host(device: torch.device) -> None:
    engine = classifier().to(device)
    engine.warmup([(64, 3, 8, 8)])
    inputs = [images(64, seed=seed).to(device) for seed in range(2)]
    wanted = [engine(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[tuple[int, Tensor]] = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            results.append((i % 2, engine(inputs[i % 2])))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted[at]) for at, result in results)


def test_several_engines_share_a_device(device: torch.device) -> None:
    engines = [classifier(seed).to(device) for seed in range(3)]
    inputs = [images(8, seed=seed).to(device) for seed in range(3)]
    wanted = [engine(x) for engine, x in zip(engines, inputs, strict=True)]
    for _ in range(3):
        for engine, x, result in zip(engines, inputs, wanted, strict=True):
            assert torch.equal(engine(x), result)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA GPU only")
def test_an_engine_runs_on_its_own_device_for_any_current_one() -> None:
    engine = classifier().to("cuda:1")
    x = images(8).to("cuda:1")
    with torch.cuda.device(0):
        results = [engine(x) for _ in range(3)]
        assert torch.cuda.current_device() == 0
    assert {str(result.device) for result in results} == {"cuda:1"}
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.mark.usefixtures("_tf32")
def test_tf32_is_in_no_call_and_as_before_afterwards(device: torch.device) -> None:
    g = GraphBuilder()
    weight = g.constant("w", g.normal(64, 64, 3, 3))
    conv = g.call("conv", torch.ops.aten.conv2d.default, g.input("image"), weight)
    flat = g.call("flat", torch.ops.aten.reshape.default, conv, [-1, 64 * 36])
    logits = g.call(
        "fc", torch.ops.aten.linear.default, flat, g.constant("fc", g.normal(10, 64 * 36))
    )
    form = signature({"image": (64, 8, 8)}, (0,), {}, 0)
    engine = classifier(graph=g.module(logits), signature=form)
    x = torch.randn(8, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(engine.graph_module).double()(x.double())[0]
    size = exact.abs().max()
    engine = engine.to(device)
    for _ in range(3):
        error = (engine(x.to(device)).double().cpu() - exact).abs().max() / size
        assert float(error) < 1e-5  # TF32 keeps 11 bits of an operand: 5e-4 a product
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"


def test_graphs_are_dropped_by_bytes(device: torch.device) -> None:
    driver = CudaDriver(device)
    graphs = CudaGraphs(lambda x: ((x * 2).relu(),), driver, operators=2, limit_bytes=64 << 20)
    for power in range(12, 20):
        x = torch.randn(2**power, device=device)
        for _ in range(3):
            assert torch.equal(graphs(x)[0], (x * 2).relu())
    assert graphs.memory_bytes <= 64 << 20
    large = torch.randn(32 << 20, device=device)
    for _ in range(3):
        assert torch.equal(graphs(large)[0], (large * 2).relu())
    assert "since memory is short" in str(graphs)


def test_a_dropped_graph_gives_its_memory_back(device: torch.device) -> None:
    def held() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device)

    before = held()
    graphs = CudaGraphs(lambda x: (x + 1,), CudaDriver(device), operators=1)
    graphs.warm_up(torch.zeros(32 << 20, device=device))
    assert held() > before + (64 << 20)
    del graphs
    assert held() <= before + (32 << 20)


def test_a_capture_that_fails_leaves_a_device_that_works(device: torch.device) -> None:
    def waits(x: Tensor) -> Any:
        return (x * float(x.sum()),)

    graphs = CudaGraphs(waits, CudaDriver(device), operators=2)
    x = torch.ones(8, device=device)
    for _ in range(4):
        assert torch.equal(graphs(x)[0], x * 8)
    assert "operator by operator, since capturing a CUDA graph failed: " in str(graphs)
    assert torch.rand(3, device=device).shape == (3,)
    engine = classifier().to(device)
    for _ in range(3):
        result = engine(images(4).to(device))
    assert "(1 captured)" in engine.execution
    assert bool(result.isfinite().all())


def test_a_caller_may_capture_the_engine(device: torch.device) -> None:
    engine = classifier().to(device)
    x = images(8).to(device)
    wanted = engine(x)
    engine(x)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine.graph_module(x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        captured = engine(x)
    other = images(8, seed=9).to(device)
    x.copy_(other)
    graph.replay()
    assert torch.equal(captured, engine(other))
    assert not torch.equal(captured, wanted)


def test_an_engine_cannot_be_prepared_inside_of_a_capture(device: torch.device) -> None:
    engine = classifier().to(device)
    x = images(8).to(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x * 2
        with pytest.raises(RuntimeError, match="before the capture"):
            engine(x)
    graph.replay()
    assert torch.equal(doubled, x * 2)
    assert engine(x).shape == (8, 10)


def test_one_capture_at_a_time(device: torch.device) -> None:
    engine = classifier().to(device)
    x = images(8).to(device)
    wanted = engine(x)
    with cuda_graphs._capturing:
        assert torch.equal(engine(x), wanted)
        assert "(0 captured)" in engine.execution

"""Native programs: the whole network in one call, with the same bytes for any form of call."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.engine import Engine, load
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops.backends import use_backend
from biper_engine.ops.cpu_program import CpuProgram, Map
from biper_engine.runtime import NativePlan
from tests.concurrency import wrong_results
from tests.golden import weights
from tests.images import noise
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature
from tests.runtime.plans import one_by_one
from tests.shared import USABLE_ISAS

pytestmark = pytest.mark.usefixtures("cpu_backend")

_aten = torch.ops.aten


@pytest.fixture
def isas() -> Iterator[Callable[[str], None]]:
    """Return a function that selects an instruction set until the test ends."""
    from biper_engine import _cpu

    before = _cpu.isa()
    yield _cpu.select_isa
    _cpu.select_isa(before)


def native(engine: Engine) -> NativePlan:
    plan = engine._get_plan().native
    assert isinstance(plan, NativePlan), plan
    return plan


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


NETWORKS = {
    "cifar10/resnet20_1w1a": 23,
    "cifar10/resnet18A_1w1a": 22,
    "cifar10/resnet20_1w32a": 41,
    "cifar10/vgg_small_1w1a": 7,
    "imagenet/resnet18_1w1a": 22,
    "imagenet/mobilenet_1w1a": 46,
}


QUICK = ("cifar10/resnet20_1w1a", "cifar10/vgg_small_1w1a")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.deep] * (n not in QUICK)) for n in NETWORKS]
)
def test_a_network_is_one_program_and_gives_what_its_operators_give(
    name: str, golden_file: Callable[..., Path]
) -> None:
    engine = load(golden_file(name))
    assert engine.execution == f"one native program of {NETWORKS[name]} steps"
    images = torch.from_numpy(weights.images(name, 4, engine.input_shape[1]))[:1]
    # A bit within rounding of its threshold may flip: these images have none.
    assert relative(engine(images), one_by_one(engine, images)[0]) < 2e-6
    covered = [node.name for step in native(engine).steps for node in step.nodes]
    assert len(covered) == len(set(covered))


@pytest.mark.parametrize(
    "name",
    ["cifar10/resnet20_1w1a", pytest.param("cifar10/vgg_small_1w1a", marks=pytest.mark.deep)],
)
def test_one_file_gives_the_same_bytes_on_every_instruction_set_thread_count_and_batch(
    name: str,
    isas: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    golden_file: Callable[..., Path],
) -> None:
    images = torch.from_numpy(weights.images(name, 5, 32))
    results = []
    for isa in USABLE_ISAS:
        isas(isa)
        engine = load(golden_file(name))
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("BIPER_NUM_THREADS", threads)
            results.append(engine(images))
            results.append(torch.cat([engine(part) for part in images.split(2)]))
            results.append(engine(images.contiguous(memory_format=torch.channels_last)))
            results.append(engine(images.flip(0)).flip(0))
    for result in results[1:]:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


def test_a_large_batch_that_runs_in_parts_gives_what_its_images_give(
    golden_file: Callable[..., Path],
) -> None:
    engine = load(golden_file("cifar10/resnet20_1w1a"))
    images = torch.from_numpy(weights.images("parts", 45, 32))
    (run,) = native(engine).runs
    program = run.program
    assert program.arena_bytes(45) > 4 << 20  # parts take 2 MB
    wanted = torch.cat([engine(image) for image in images.split(1)])
    assert torch.equal(engine(images), wanted)
    assert len(program.timed(images)[1]) == NETWORKS["cifar10/resnet20_1w1a"]


def test_an_image_with_holes_in_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = classifier()
    wide = noise(4, 3, 8, 16)
    assert torch.equal(engine(wide[..., ::2]), engine(wide[..., ::2].contiguous()))
    assert engine(wide[:0, :, :, :8]).shape == (0, 10)


def test_concurrent_calls_of_several_batch_sizes_do_not_disturb_each_other() -> None:
    engine = classifier()
    batches = [torch.randn(n, 3, 8, 8) for n in (1, 2, 3, 5, 8, 13)]
    assert wrong_results(engine, batches, threads=4, calls=60) == []


@pytest.fixture
def unhurried() -> Iterator[None]:
    """Let a thread keep Python's lock for as long as it does not give it up by itself."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600.0)
    yield
    sys.setswitchinterval(before)


def test_other_threads_go_on_while_a_program_runs(unhurried: None) -> None:
    program = CpuProgram()
    source = program.add_map(64, 32, 32)
    program.finish([source], program.add("sum", a=source, b=source))
    images = torch.ones(256, 64, 32, 32)

    def turns() -> int:
        """Return how often another thread gets Python's lock in a call of some 10 ms."""
        ended, counts = threading.Event(), itertools.count()

        def other() -> None:
            while not ended.wait(1e-4):
                next(counts)

        thread = threading.Thread(target=other)
        thread.start()
        before = next(counts)
        program(images)
        after = next(counts)
        ended.set()
        thread.join()
        return after - before - 1

    # torch gives the lock up, too, when it makes the output: that lets the other run once.
    assert any(turns() >= 10 for _ in range(10))


def test_a_backend_without_programs_runs_operator_by_operator_and_says_so() -> None:
    with use_backend("reference"):
        assert classifier().execution == (
            "operator by operator, since operators run on backend reference"
        )


def test_the_profile_has_a_row_for_every_step() -> None:
    engine, images = classifier(), torch.randn(2, 3, 8, 8)
    report = engine.profile(images, rounds=2)
    assert [(node.name, node.op, node.backend) for node in report.nodes][:3] == [
        ("stem", "aten.conv2d + binarize", "cpu"),
        ("layer1_0", "bconv2d_float_bits", "cpu"),
        ("layer1_1", "bconv2d_bits", "cpu"),
    ]
    assert report.nodes[1].macs == 2 * 8 * 8 * 33 * 33 * 9
    assert all(node.ms >= 0 for node in report.nodes)


# -- steps ----------------------------------------------------------------------------------------


def run_one(x: Tensor, step: Callable[[CpuProgram, Any], Any], *, planar: bool = False) -> Tensor:
    """Run a program of one step on `x`."""
    program = CpuProgram()
    source = program.add_map(*x.shape[1:])
    out = step(program, source)
    program.finish([source], [out], planar=[source] if planar else [])
    return program(x)[0]


def add_float_conv(
    program: CpuProgram,
    x: Map,
    weight: Tensor,
    bias: Tensor,
    geometry: Conv2dGeometry,
    **options: Any,
) -> tuple[Map, ...]:
    """Add a float convolution with weights [O, C, KH, KW]; its map leaves."""
    options = {"pool": Pool2dGeometry(), "want_float": True, "want_bits": False, **options}
    named = {"x": x, "weight": weight.permute(0, 2, 3, 1), "bias": bias, "geometry": geometry}
    return program.add("float_conv", **named, **options)


CONVS = {
    "7x7, stride 2": ((3, 64, 7), {"stride": 2, "padding": 3}),
    "3x3 on one channel": ((1, 5, 3), {"padding": 1}),
    "1x1, stride 2": ((33, 70, 1), {"stride": 2}),
    "1x1": ((40, 130, 1), {}),
    "3x2, dilated": ((5, 17, (3, 2)), {"dilation": (2, 1), "stride": (1, 2), "padding": (2, 0)}),
}


def conv_case(name: str) -> tuple[Tensor, Tensor, Tensor, Conv2dGeometry, dict[str, Any]]:
    (channels, outputs, kernel), options = CONVS[name]
    random = torch.Generator().manual_seed(0)
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    x = torch.randn(3, channels, 19, 14, generator=random)
    weight = torch.randn(outputs, channels, height, width, generator=random)
    weight = weight / (channels * height * width) ** 0.5

    def pair(value: Any) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    vertical, horizontal = pair(options.get("padding", 0))
    geometry = Conv2dGeometry(
        in_channels=channels,
        out_channels=outputs,
        kernel_size=(height, width),
        stride=pair(options.get("stride", 1)),
        padding=(vertical, vertical, horizontal, horizontal),
        dilation=pair(options.get("dilation", 1)),
    )
    return x, weight, torch.randn(outputs, generator=random), geometry, options


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_a_float_convolution_is_torchs_with_what_follows(
    isas: Callable[[str], None], isa: str, name: str, pooled: bool, planar: bool
) -> None:
    isas(isa)
    x, weight, bias, geometry, options = conv_case(name)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), **options)
    pool = Pool2dGeometry()
    if pooled:
        pool = Pool2dGeometry(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0))
        wanted = F.max_pool2d(wanted, (3, 2), (2, 1), (1, 0))
    wanted = wanted.clamp(-2.0, 4.0)
    threshold = torch.linspace(-1, 1, len(bias))
    sense = torch.arange(len(bias)) % 3 == 0

    def step(program: CpuProgram, source: Any) -> Any:
        limits = {"clamp_min": -2.0, "clamp_max": 4.0, "threshold": threshold, "sense": sense}
        options = {"pool": pool, "want_bits": True, **limits}
        return add_float_conv(program, source, weight, bias, geometry, **options)[0]

    got = run_one(x, step, planar=planar)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_float_convolution_is_one_chain_of_fused_multiply_adds(
    exact_fma: Callable[[float, float, float], float],
) -> None:
    """The order (ky, kx, c) from the bias on is what makes bytes equal everywhere."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 5, 4, generator=random)
    weight, bias = torch.randn(2, 3, 3, 3, generator=random), torch.randn(2, generator=random)
    geometry = Conv2dGeometry(
        in_channels=3, out_channels=2, kernel_size=(3, 3), padding=(1, 1, 1, 1)
    )
    got = run_one(x, lambda p, s: add_float_conv(p, s, weight, bias, geometry)[0])
    padded = F.pad(x, (1, 1, 1, 1))
    for o in range(2):
        for y in range(5):
            for left in range(4):
                total = float(bias[o])
                for ky in range(3):
                    for kx in range(3):
                        for c in range(3):
                            value = float(padded[0, c, y + ky, left + kx])
                            total = exact_fma(value, float(weight[o, c, ky, kx]), total)
                assert float(got[0, o, y, left]) == total


def test_bits_of_a_float_convolution_are_those_of_its_map() -> None:
    x, weight, bias, geometry, _ = conv_case("7x7, stride 2")
    threshold, sense = torch.linspace(-1, 1, 64), torch.arange(64) % 3 == 0
    program = CpuProgram()
    source = program.add_map(*x.shape[1:])
    options = {"want_bits": True, "threshold": threshold, "sense": sense}
    floats, _ = add_float_conv(program, source, weight, bias, geometry, **options)
    # Bits come out as counts, once those of `binarize` and once the convolution's own.
    both = program.add("binarize", x=floats, threshold=threshold, sense=sense)
    options["want_float"] = False
    both += add_float_conv(program, source, weight, bias, geometry, **options)
    outs = [counted(program, bits) for bits in both]
    program.finish([source], outs, planar=[source])
    first, second = program(x)
    assert torch.equal(first, second)
    assert first.unique().numel() > 10


def counted(program: CpuProgram, bits: Any) -> Any:
    """Add a binary 1x1 convolution whose output o tells the channels below o from the others."""
    from biper_engine.bits import pack_weight
    from biper_engine.ops.epilogue import Epilogue

    channels = bits.channels
    geometry = Conv2dGeometry(in_channels=channels, out_channels=channels, kernel_size=(1, 1))
    signs = torch.ones(channels, channels).tril()[:, :, None, None] > 0
    epilogue = Epilogue(multiplier=torch.ones(channels), bias=torch.zeros(channels))
    (counts,) = program.add(
        "conv",
        bits=bits,
        geometry=geometry,
        weight=pack_weight(signs),
        want_float=True,
        want_bits=False,
        **epilogue.values(),
    )
    return counts


AVERAGES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "ceil_mode": True, "padding": (1, 1)},
    {"kernel_size": 2, "divisor_override": 3},
]


@pytest.mark.parametrize("channels", [5, 75])  # 75: several vectors at once, one, and a rest
@pytest.mark.parametrize("options", AVERAGES)
def test_an_average_pool_in_a_graph_is_torchs(
    options: dict[str, Any], channels: int, isas: Callable[[str], None]
) -> None:
    g = GraphBuilder()
    x = g.input("x")

    def two(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value, value]

    args = [
        two(options["kernel_size"]),
        two(options["stride"]) if "stride" in options else [],
        two(options.get("padding", 0)),
        options.get("ceil_mode", False),
        options.get("count_include_pad", True),
        options.get("divisor_override"),
    ]
    pool = g.call("pool", _aten.avg_pool2d.default, x, *args)
    pad = g.call("pad", _aten.constant_pad_nd.default, pool, [0, 0, 0, 0, 2, 3])
    images = noise(3, channels, 9, 7)
    wanted = F.pad(F.avg_pool2d(images, **options), (0, 0, 0, 0, 2, 3))
    results = []
    for isa in USABLE_ISAS:
        isas(isa)
        engine = engine_of(g.module(pad), signature({"x": (channels, 9, 7)}, (0,), {}, 0))
        engine._device = torch.device("cpu")  # a network without tensors is on none
        assert engine.execution == "one native program of 1 step"
        results.append(engine(images))
        torch.testing.assert_close(results[-1], wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(results[-1], results[0]), isa


POOLS = [
    (_aten.max_pool2d.default, ([3, 2], [2, 2], [1, 0], [1, 1], True)),
    (_aten.max_pool2d.default, ([2, 2], [], [0, 0], [1, 1], True)),
    (_aten._adaptive_avg_pool2d.default, ([3, 7],)),
    (_aten._adaptive_avg_pool2d.default, ([1, 1],)),
]


@pytest.mark.parametrize(("target", "options"), POOLS)
def test_pools_that_torch_cuts_to_size(target: Any, options: tuple[Any, ...]) -> None:
    g = GraphBuilder()
    pool = g.call("pool", target, g.input("x"), *options)
    engine = engine_of(g.module(pool), signature({"x": (5, 9, 7)}, (0,), {}, 0))
    engine._device = torch.device("cpu")
    assert engine.execution == "one native program of 1 step"
    images = noise(3, 5, 9, 7)
    torch.testing.assert_close(engine(images), target(images, *options), rtol=1e-6, atol=1e-6)


def test_a_view_that_cannot_be_counted_is_refused() -> None:
    program = CpuProgram()
    x = program.add_map(3, 4, 5)
    with pytest.raises(ValueError, match=r"`size of a map` \(=9223372036854775807\) must"):
        program.view(x, 64, 2**63 - 1, 1)

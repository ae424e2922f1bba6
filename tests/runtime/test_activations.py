"""Native steps of activations: within rounding of PyTorch's, with the same bytes everywhere."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from biper_engine.engine import Engine
from biper_engine.ops.cpu_program import CpuProgram
from tests.networks_by_hand import GraphBuilder, engine_of, signature

pytestmark = pytest.mark.usefixtures("cpu_backend")

_aten = torch.ops.aten

SMALLEST = 2.0**-149
EDGES = [
    *(0.0, -0.0, math.inf, -math.inf, math.nan, SMALLEST, -SMALLEST, 2.0**-126, -(2.0**-126)),
    *(1e-40, -1e-40, 2.0**-24, -(2.0**-24), 1.0, -1.0, 16.5, 17.5, 88.0, -88.0, -88.7, -88.8),
    *(-103.2, -103.9, -104.0, -104.1, -105.0, -105.1, 105.1, -1e4, 1e4, 3.4e38, -3.4e38),
]


@pytest.fixture
def on_every_isa() -> Iterator[Callable[[Callable[[], Tensor]], list[Tensor]]]:
    """Return a function that calls another one on each instruction set."""
    from biper_engine import _cpu

    before = _cpu.isa()

    def call(function: Callable[[], Tensor]) -> list[Tensor]:
        results = []
        for isa in _cpu.usable_isas():
            _cpu.select_isa(isa)
            results.append(function())
        return results

    yield call
    _cpu.select_isa(before)


def values(count: int) -> Tensor:
    """Return the edges, then normal values of many sizes."""
    random = torch.Generator().manual_seed(0)
    scale = torch.empty(count).uniform_(-8, 7, generator=random).exp2()
    normal = torch.randn(count, generator=random) * scale
    return torch.cat([torch.tensor(EDGES), normal])


def function_step(function: str, *operands: Tensor) -> Tensor:
    """Run a program that applies a function to operands of one shape [N, C, H, W]."""
    program = CpuProgram()
    sources = [program.add_map(*x.shape[1:]) for x in operands]
    count = sources[0].values
    (made,) = program.add(
        "elementwise",
        function=function,
        maps=sources,
        sizes=[count],
        strides=[1] * len(sources),
        offsets=[0] * len(sources),
    )
    program.finish(sources, [program.view(made, *operands[0].shape[1:])])
    return program(*operands)[0]


def sigmoid_step(x: Tensor) -> Tensor:
    """Run a program that is the one step, on maps [N, C, H, W]."""
    return function_step("sigmoid", x)


def test_a_sigmoid_is_the_float_nearest_to_the_exact_one_on_every_instruction_set(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]],
) -> None:
    x = values(20_000)
    exact = torch.sigmoid(x.double())
    for got in on_every_isa(lambda: sigmoid_step(x.view(1, 1, 1, -1)).flatten()):
        assert torch.equal(got.isnan(), x.isnan())
        finite = ~x.isnan()
        # Rounded once, from a double that is off by 2^-41: half a place and 2^-17 of one. Of all
        # floats whose size is from 2^-32 to 2^8, 19 do not become the nearest one.
        place = torch.frexp(exact.float()).exponent.double().sub(24).clamp_min(-149).exp2()
        off = (got.double() - exact).abs()[finite] / place[finite]
        assert float(off.max()) <= 0.5 + 2.0**-16
        first = {value: float(got[i]) for i, value in enumerate(EDGES)}
        assert first[math.inf] == first[17.5] == first[3.4e38] == 1.0
        assert first[-math.inf] == first[-104.0] == first[-105.1] == first[-3.4e38] == 0.0
        assert first[0.0] == first[SMALLEST] == first[-SMALLEST] == 0.5
        assert first[-103.2] == first[-103.9] == SMALLEST


def test_a_sigmoid_is_within_rounding_of_torchs() -> None:
    """torch rounds exp(-x) to one place or two, then the sum, then the quotient.

    Together that is 6 x 2^-24 of the result; ours is rounded once, which is another 2^-24. Where
    exp(-x) is beyond the largest float, below -88.7, torch's result is 0, ours less than 2^-126.
    """
    x = values(20_000)
    x = x[~x.isnan()].view(1, 1, 1, -1)
    wanted, got = torch.sigmoid(x).double(), sigmoid_step(x).double()
    assert bool(((got - wanted).abs() <= 7 * 2.0**-24 * wanted + 2.0**-126).all())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 3), (2, 33, 1, 1), (1, 17, 31, 65)])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_shapes_threads_and_instruction_sets_do_not_change_a_byte(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    threads: str,
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", threads)
    x = values(math.prod(shape))[-math.prod(shape) :].view(shape)
    one_by_one = torch.stack([sigmoid_step(v.view(1, 1, 1, 1)).view(()) for v in x.flatten()[:40]])
    for got in on_every_isa(lambda: sigmoid_step(x)):
        assert torch.equal(got.reshape(-1)[:40], one_by_one)
    assert sigmoid_step(x[:0]).shape == (0, *shape[1:])


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * gate, and 0 where PyTorch's 1 + erf or 1 + tanh, twice the gate, rounds to 0."""
    return x * torch.where(gate <= 2.0**-26, 0.0, gate)


def exact_gelu(x: Tensor) -> Tensor:
    """Return x times the normal distribution's function, without cancellation."""
    return gated(x, 0.5 * torch.special.erfc(-x * 0.5**0.5))


def exact_tanh_gelu(x: Tensor) -> Tensor:
    return gated(x, torch.sigmoid(2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "silu": torch.nn.functional.silu,
    "gelu": exact_gelu,
    "gelu_tanh": exact_tanh_gelu,
    "log": torch.log,
    "log1p": torch.log1p,
    "log_sigmoid": lambda x: x.clamp_max(0) - torch.log1p(torch.exp(-x.abs())),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x.clamp(max=700)))),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_activation_is_the_float_nearest_to_the_exact_one_on_every_instruction_set(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]], function: str
) -> None:
    """Rounded once, from a double that is off by 2^-37: half a place and 2^-13 of one."""
    x = values(20_000)
    x = x[x.isfinite()]
    x = x[~FUNCTIONS[function](x.double()).isnan()]
    exact = FUNCTIONS[function](x.double())
    exact = exact.where(exact.abs() < 2.0**128, exact.sign() * math.inf)
    results = on_every_isa(lambda: function_step(function, x.view(1, 1, 1, -1)).flatten())
    for got in results:
        assert torch.equal(got.view(torch.int32), results[0].view(torch.int32))
        place = torch.frexp(exact.float()).exponent.double().sub(24).clamp_min(-149).exp2()
        off = (got.double() - exact).abs() / place
        finite = got.isfinite()
        assert float(off[finite].max()) <= 0.5 + 2.0**-13
        assert torch.equal(got[~finite].double(), exact.float().double()[~finite])


@pytest.mark.parametrize("function", [*FUNCTIONS, "round", "floor", "ceil", "trunc", "sign", "abs"])
def test_edges_of_an_activation_are_pytorchs(function: str) -> None:
    x = torch.tensor(EDGES)
    if function == "gelu":  # PyTorch's is NaN at inf, and inf at 3.4e38
        x = x[~(x.abs() > 1e30)]
    x = x.view(1, 1, 1, -1)
    names = {"gelu_tanh": "gelu"}
    options = {"approximate": "tanh"} if function == "gelu_tanh" else {}
    operator = getattr(_aten, names.get(function, function)).default
    got, wanted = function_step(function, x), operator(x, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


# -- in graphs ------------------------------------------------------------------------------------


def network(g: GraphBuilder, out: fx.Node, shape: tuple[int, ...]) -> Engine:
    engine = engine_of(g.module(out), signature({"x": shape}, (0,), {}, 0))
    engine._device = torch.device("cpu")
    return engine


def test_a_gate_is_part_of_the_program() -> None:
    """Squeeze, two 1x1 convolutions, sigmoid."""
    g = GraphBuilder()
    squeezed = g.call("mean", _aten.mean.dim, g.input("x"), [2, 3], True)
    wide = g.constant("weight", g.normal(9, 5, 1, 1))
    gate = g.call(
        "gate", _aten.sigmoid.default, g.call("conv", _aten.conv2d.default, squeezed, wide)
    )
    engine = network(g, gate, (5, 6, 4))
    assert engine.execution == "one native program of 3 steps"
    x = torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    wanted = torch.sigmoid(torch.conv2d(x.mean((2, 3), keepdim=True), g.constants["weight"]))
    torch.testing.assert_close(engine(x), wanted, rtol=2e-6, atol=1e-6)


def test_a_sigmoid_of_vectors_gives_vectors() -> None:
    g = GraphBuilder()
    weight = g.constant("weight", g.normal(7, 5))
    linear = g.call("linear", _aten.linear.default, g.input("x"), weight)
    engine = network(g, g.call("sigmoid", _aten.sigmoid.default, linear), (5,))
    assert engine.execution == "one native program of 2 steps"
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    wanted = torch.sigmoid(x @ g.constants["weight"].T)
    torch.testing.assert_close(engine(x), wanted, rtol=2e-6, atol=1e-6)


def test_a_flattened_map_keeps_its_order() -> None:
    """A map lies in memory as [H, W, C], its flattened form as [C, H, W]."""
    g = GraphBuilder()
    relu = g.call("relu", _aten.relu.default, g.input("x"))
    flat = g.call("flat", _aten.reshape.default, relu, [-1, 5 * 6 * 4])
    engine = network(g, g.call("sigmoid", _aten.sigmoid.default, flat), (5, 6, 4))
    assert engine.execution == "one native program of 3 steps"  # and a copy in the other order
    x = torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(1))
    wanted = torch.sigmoid(x.relu().flatten(1))
    torch.testing.assert_close(engine(x), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"y": 1}, {"x": None}])
def test_a_step_without_its_map_is_refused(options: dict[str, Any]) -> None:
    program = CpuProgram()
    program.add_map(1, 1, 1)
    with pytest.raises(ValueError, match="`x` is missing"):
        program.add("binarize", **options)


def row_step(function: str, x: Tensor) -> Tensor:
    """Run a program that applies a function to each row of `x` [rows, length]."""
    program = CpuProgram()
    source = program.add_map(x.shape[1], 1, x.shape[0])
    (made,) = program.add("rows", x=source, length=x.shape[1], function=function)
    program.finish([source], [made])
    given = x.t()[None, :, None].contiguous(memory_format=torch.channels_last)
    return program(given)[0].permute(0, 2, 3, 1).flatten()


@pytest.mark.parametrize("length", [1, 7, 16, 33, 196])
def test_a_softmax_is_near_the_exact_one_with_the_same_bytes_everywhere(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]], length: int
) -> None:
    scales = torch.tensor([1e-4, 1.0, 10.0, 100.0, 1e4])[:, None]
    x = torch.cat(
        [
            scales * torch.randn(5, length, generator=torch.Generator().manual_seed(2)),
            torch.full((1, length), -3.0),
        ]
    )
    x[1, 1:2] = -math.inf
    exact = torch.softmax(x.double(), 1)
    below = x.double().amax(1, keepdim=True) - x.double()
    first, *others = on_every_isa(lambda: row_step("softmax", x).view(x.shape))
    assert all(torch.equal(first, other) for other in others)
    # A difference d is rounded to d 2^-24 of it; its exponential to 2^-23, all of them in the sum.
    bound = (2.0**-22 + below.clamp_max(110) * 2.0**-24) * exact + 2.0**-126
    assert bool(((first.double() - exact).abs() <= bound).all())
    assert bool((first[x == -math.inf] == 0).all())


@pytest.mark.parametrize("at", [0, 5, 15, 16, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_softmax_of_nan_and_infinity_is_nan(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]], at: int, value: float
) -> None:
    x = torch.linspace(-2, 2, 21)[None].clone()
    x[0, at] = value
    for got in on_every_isa(lambda: row_step("softmax", x)):
        assert bool(got.isnan().all())


@pytest.mark.parametrize("at", [0, 5, 15, 16, 20])
def test_extremes_of_rows_are_torchs(
    on_every_isa: Callable[[Callable[[], Tensor]], list[Tensor]], at: int
) -> None:
    x = torch.linspace(-2, 2, 21).roll(3).repeat(4, 1)
    x[1, at], x[2, at], x[3, at] = math.nan, math.inf, -math.inf
    for function, wanted in (("maximum", x.amax(1)), ("minimum", x.amin(1))):
        for got in on_every_isa(lambda name=function: row_step(name, x)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)

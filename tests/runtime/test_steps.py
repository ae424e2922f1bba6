"""Every declared operator that has a native step, in graphs of its own, against PyTorch.

Operands come as inputs, and as views of inputs in another memory order; results leave as they are,
and through another step. Functions that are one float operation give PyTorch's bytes; the bound of
others says where it comes from.
"""

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from biper_engine.engine import Engine
from biper_engine.graph import OPERATORS
from biper_engine.graph.sizes import ImagesSize
from biper_engine.runtime import NativePlan
from biper_engine.runtime.steps import _HANDLERS
from tests.graph.calls import CALLS, Flowing, calls_of, told
from tests.images import noise
from tests.networks_by_hand import GraphBuilder, engine_of, signature
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


class Misfit(Exception):
    """A call whose operands no program takes."""


class Call:
    """A graph of a call, and inputs for it.

    Args:
        name: name of the operator's declaration.
        given: arguments, as `CALLS` has them.
        turned: whether operands with two dimensions or more behind the batch come permuted.
    """

    def __init__(self, name: str, given: dict[str, Any], *, turned: bool) -> None:
        self._builder = GraphBuilder()
        self._turned = turned
        self._shapes: dict[str, tuple[int, ...]] = {}
        target = OPERATORS[name].target
        operands = {key: self._operand(key, value) for key, value in given.items()}
        node = self._builder.graph.call_function(target, (), operands)
        if len(target._schema.returns) > 1 or str(target._schema.returns[0].type) != "Tensor":
            node = self._builder.call("part", operator.getitem, node, 0)
        if name.removesuffix("_tensor") in _TO_BOOLS:
            node = self._builder.call("numbers", _aten._to_copy.default, node, dtype=torch.float32)
        self._ends = (node, self._builder.call("end", _aten.neg.default, node))

    def engine(self, *, ends_late: bool) -> Engine:
        form = signature(self._shapes, tuple([0] * len(self._shapes)), {}, [0])
        engine = engine_of(self._builder.module(self._ends[ends_late]), form)
        engine._device = torch.device("cpu")
        return engine

    def inputs(self, batch: int) -> list[Tensor]:
        return [
            noise(batch, *shape, seed=at).abs() + 0.1
            for at, shape in enumerate(self._shapes.values())
        ]

    def _operand(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._operand(f"{key}{at}", item) for at, item in enumerate(value)]
        if isinstance(value, Tensor):
            return self._builder.constant(f"{key}_constant", value)
        if isinstance(value, ImagesSize):
            return self._size(value)
        if not isinstance(value, Flowing):
            return value
        if not value.shape or not isinstance(value.shape[0], ImagesSize):
            return self._builder.constant(f"{key}_constant", value.tensor(1))
        return self._input(f"in_{key}", value)

    def _input(self, key: str, value: Flowing) -> fx.Node:
        batch, *shape = value.shape
        sizes = [size for size in shape if isinstance(size, int)]
        if batch != ImagesSize(1) or value.dtype not in (torch.bool, torch.float32):
            raise Misfit
        turn = self._turned and len(sizes) >= 2
        self._shapes[key] = (*sizes[1:], sizes[0]) if turn else tuple(sizes)
        node = self._builder.input(key)
        if turn:
            dims = [0, len(sizes), *range(1, len(sizes))]
            node = self._builder.call(f"{key}_turned", _aten.permute.default, node, dims)
        if value.dtype == torch.bool:
            node = self._builder.call(f"{key}_mask", _aten.gt.Scalar, node, 0.5)
        return node

    def _size(self, size: ImagesSize) -> fx.Node:
        if not self._shapes:
            self._shapes["in_size"] = (3,)
            self._builder.input("in_size")
        image = next(iter(self._builder.graph.find_nodes(op="placeholder")))
        found = self._builder.call("batch", _aten.sym_size.int, image, 0)
        if size.images == 1:
            return found
        return self._builder.call("batches", operator.mul, found, size.images)


_TO_BOOLS = ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "to_dtype")


# Why a program does not take some of the calls.
REASONS = (
    "takes its statistics from the batch",
    "has no native step",
    "has the rounding mode",
    "gives torch.int64",
    "gives torch.float16",
    "gives torch.float64",
    "has several queries for each key",
    "makes torch.bool",
    "reduces the batch",
    "is a norm of order inf",
    "mixes the numbers of several images",
    "takes a part of the batch",
    "which is constant",
    "which is empty",
    "rolls over all dimensions",
    "has indices that no step takes",
    "convolves in 3 dimensions",
    "has dilation",
    "is not worth a program alone",
    "leaves its program, which cannot return such a value",
)

# One float operation, or none: PyTorch's bytes. (Its roots of long rows are Intel's, rounded less.)
_EXACT = (
    "abs neg sign sgn round floor ceil trunc reciprocal add_number sub sub_number mul "
    "mul_number div div_number reversed_sub maximum minimum relu leaky_relu prelu threshold clamp "
    "clamp_tensor clamp_min clamp_max clamp_min_tensor clamp_max_tensor hardtanh where masked_fill "
    "masked_fill_tensor greater greater_tensor greater_equal greater_equal_tensor less less_tensor "
    "less_equal less_equal_tensor equal equal_tensor not_equal not_equal_tensor clone reshape "
    "permute expand squeeze unsqueeze pixel_shuffle pixel_unshuffle channel_shuffle slice select "
    "split unsafe_split split_sizes unbind diagonal unfold cat stack flip roll repeat pad "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d index_select index take_positions upsample_nearest1d upsample_nearest2d "
    "upsample_nearest3d max_pool2d max_pool2d_positions adaptive_max_pool2d_positions amax amin "
    "max min zeros_like ones_like full_like fill"
)
EXACT = frozenset(_EXACT.split())

STEPS = list(
    dict.fromkeys(name for name, _ in CALLS if name in _HANDLERS and not name.startswith("biper."))
)


def assert_close(name: str, got: Tensor, wanted: Tensor) -> None:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if name in EXACT:
        assert torch.equal(got, wanted)
    else:  # sums of 64 products or fewer in another order, each within 2^-24 of values below 16
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.some(220)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_an_operator_gives_what_pytorch_gives_on_every_instruction_set(
    isas: Callable[[str], None], name: str, turned: bool
) -> None:
    if name == "attention" and turned:
        pytest.skip("PyTorch's kernel reads permuted operands as if they were not")
    for given in calls_of(name):
        # What no program takes is a misfit.
        with told(given), contextlib.suppress(Misfit):
            if given.get("fill_value") is not True:
                require_the_same(isas, name, given, turned=turned)


def require_the_same(
    isas: Callable[[str], None], name: str, given: dict[str, Any], *, turned: bool
) -> None:
    """Require PyTorch's numbers of a call, and the same bytes on every instruction set."""
    results: list[list[Tensor]] = []
    for isa in USABLE_ISAS:
        isas(isa)
        call = Call(name, dict(given), turned=turned)
        engine = call.engine(ends_late=turned)
        plan = engine._get_plan().native
        if not isinstance(plan, NativePlan) or plan.reasons:
            assert any(reason in engine.execution for reason in REASONS)
            return
        batches = (1, 2, 0) if name not in ("pixel_unshuffle",) else (1, 2)  # theirs fails at 0
        results.append([engine(*call.inputs(batch))[0] for batch in batches])
        if len(results) == 1:
            for batch, got in zip(batches, results[0], strict=True):
                assert_close(name, got, one_by_one(engine, *call.inputs(batch))[0])
    for others in results[1:]:
        for got, first in zip(others, results[0], strict=True):
            assert torch.equal(got.view(torch.int32), first.view(torch.int32))


def test_calls_cover_the_operators_that_have_a_step() -> None:
    called = {name for name, _ in CALLS}
    assert set(_HANDLERS) <= called


# -- networks -------------------------------------------------------------------------------------


class Network(GraphBuilder):
    """A graph whose nodes PyTorch names."""

    def add(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def run(self, *outputs: Any, **shapes: tuple[int, ...]) -> Engine:
        form = signature(shapes, tuple([0] * len(shapes)), {}, [0] * len(outputs))
        engine = engine_of(self.module(*outputs), form)
        engine._device = torch.device("cpu")
        return engine


def assert_runs(engine: Engine, *shapes: tuple[int, ...], whole: bool = True) -> None:
    """Require one program that gives what the operators give."""
    plan = engine._get_plan().native
    assert isinstance(plan, NativePlan), plan
    assert plan.is_whole is whole, str(plan)
    for batch in (1, 3, 0):
        inputs = [noise(batch, *shape, seed=at) for at, shape in enumerate(shapes)]
        for got, wanted in zip(engine(*inputs), one_by_one(engine, *inputs), strict=True):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            # Sums of 300 products or fewer in another order, each within 2^-24 of values below 64.
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_attention_of_packed_queries_keys_and_values_is_one_program() -> None:
    """[N, T, 3 C] becomes [3, N, heads, T, d]: the batch is the second dimension for a while."""
    g = Network()
    x = g.input("x")
    normal = g.add(_aten.layer_norm.default, x, [12], g.constant("w", g.normal(12)), None, 1e-5)
    packed = g.add(_aten.linear.default, normal, g.constant("qkv", g.normal(36, 12)))
    split = g.add(_aten.reshape.default, packed, [-1, 5, 3, 2, 6])
    moved = g.add(_aten.permute.default, split, [2, 0, 3, 1, 4])
    parts = g.add(_aten.unbind.int, moved)
    query, key, value = (g.add(operator.getitem, parts, i) for i in range(3))
    flat_q = g.add(_aten.reshape.default, query, [-1, 5, 6])
    turned = g.add(_aten.permute.default, key, [0, 1, 3, 2])
    flat_k = g.add(_aten.reshape.default, turned, [-1, 6, 5])
    scores = g.add(_aten.reshape.default, g.add(_aten.bmm.default, flat_q, flat_k), [-1, 2, 5, 5])
    scaled = g.add(_aten.mul.Tensor, scores, 0.4)
    weights = g.add(_aten._softmax.default, scaled, -1, False)
    flat_w = g.add(_aten.reshape.default, weights, [-1, 5, 5])
    flat_v = g.add(_aten.reshape.default, value, [-1, 5, 6])
    mixed = g.add(_aten.reshape.default, g.add(_aten.bmm.default, flat_w, flat_v), [-1, 2, 5, 6])
    heads = g.add(_aten.permute.default, mixed, [0, 2, 1, 3])
    joined = g.add(_aten.reshape.default, heads, [-1, 5, 12])
    engine = g.run(g.add(_aten.add.Tensor, joined, x), x=(5, 12))
    assert_runs(engine, (5, 12))


def test_a_value_with_its_batch_inside_leaves_as_pytorchs_view() -> None:
    g = Network()
    relu = g.add(_aten.relu.default, g.input("x"))
    moved = g.add(_aten.permute.default, relu, [1, 0, 2])
    end = g.add(_aten.mul.Tensor, g.add(_aten.select.int, moved, 0, 1), 2.0)
    assert_runs(g.run(moved, end, x=(4, 6)), (4, 6), whole=False)


def test_constants_and_sizes_of_the_batch_are_part_of_the_program() -> None:
    """A class token before others, and positions that are computed from a constant."""
    g = Network()
    x = g.input("x")
    batch = g.add(_aten.sym_size.int, x, 0)
    token = g.add(_aten.expand.default, g.constant("token", g.normal(1, 1, 6)), [batch, -1, -1])
    joined = g.add(_aten.cat.default, [token, x], 1)
    halved = g.add(_aten.div.Tensor, g.constant("place", g.normal(1, 5, 6)), 2.0)
    placed = g.add(_aten.add.Tensor, joined, halved)
    zeros = g.add(_aten.zeros.default, [batch, 5, 6], dtype=torch.float32)
    engine = g.run(g.add(_aten.maximum.default, placed, zeros), x=(4, 6))
    assert_runs(engine, (4, 6))


def test_a_constant_that_is_part_of_a_larger_tensor_has_its_own_numbers() -> None:
    g = Network()
    constant = g.constant("part", g.normal(5, 1, 4, 6)[3])
    joined = g.add(_aten.cat.default, [g.add(_aten.mul.Tensor, g.input("x"), constant)], 1)
    wide = g.add(_aten.expand.default, constant, [g.add(_aten.sym_size.int, joined, 0), -1, -1])
    engine = g.run(g.add(_aten.cat.default, [joined, wide], 2), x=(4, 6))
    assert_runs(engine, (4, 6))


def test_images_that_are_folded_into_the_batch_come_out_again() -> None:
    g = Network()
    x = g.input("x")
    flat = g.add(_aten.reshape.default, x, [-1, 6])
    linear = g.add(_aten.linear.default, flat, g.constant("w", g.normal(3, 6)))
    engine = g.run(linear, g.add(_aten.reshape.default, linear, [-1, 2, 2, 3]), x=(4, 6))
    assert_runs(engine, (4, 6))


def test_several_maps_for_each_image_come_from_outside_in_any_memory_layout() -> None:
    g = Network()
    maps = g.add(_aten.reshape.default, g.input("x"), [-1, 3, 4, 5])
    foreign = g.add(_aten.sin.default, maps)
    conv = g.add(_aten.conv2d.default, foreign, g.constant("w", g.normal(6, 3, 1, 1)))
    engine = g.run(g.add(_aten.reshape.default, conv, [-1, 2, 6, 4, 5]), x=(6, 4, 5))
    assert_runs(engine, (6, 4, 5), whole=False)
    assert len(engine._get_plan().native.runs) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 65, 127, 300])
def test_rows_and_matrices_of_any_size(isas: Callable[[str], None], size: int) -> None:
    g = Network()
    x = g.input("x")
    turned = g.add(_aten.permute.default, x, [0, 2, 1])
    products = g.add(_aten.bmm.default, x, turned)
    soft = g.add(_aten._softmax.default, products, 1, False)
    logs = g.add(_aten._log_softmax.default, x, -1, False)
    spread = g.add(_aten.var.correction, x, [2], correction=0)
    norm = g.add(_aten.layer_norm.default, x, [size], None, None, 1e-3)
    engine = g.run(soft, logs, spread, norm, x=(7, size))
    assert_runs(engine, (7, size))
    images = noise(5, 7, size)
    results = []
    for isa in USABLE_ISAS:
        isas(isa)
        results.append(list(copy.deepcopy(engine)(images)))  # made for the instruction set
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("channels", [1, 3, 31, 32, 33, 65])
@pytest.mark.parametrize("options", [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_a_depthwise_convolution_is_pytorchs(channels: int, options: tuple[int, int, int]) -> None:
    g = Network()
    weight, bias = g.normal(channels, 1, 3, 2), g.normal(channels)
    conv = g.add(
        _aten.conv2d.default,
        g.input("x"),
        g.constant("w", weight),
        g.constant("b", bias),
        *([value, value] for value in options),
        channels,
    )
    relu = g.add(_aten.relu.default, conv)
    assert_runs(g.run(relu, x=(channels, 9, 8)), (channels, 9, 8))


def test_operands_of_one_map_at_other_places_are_not_overwritten() -> None:
    """A sum may take the memory of an operand only where nothing reads it elsewhere."""
    g = Network()
    x = g.add(_aten.neg.default, g.input("x"))
    turned = g.add(_aten.permute.default, x, [0, 2, 1])
    total = g.add(_aten.add.Tensor, x, turned)
    flipped = g.add(_aten.mul.Tensor, g.add(_aten.slice.Tensor, total, 1, 2, 4), 2.0)
    assert_runs(g.run(g.add(_aten.add.Tensor, total, turned), flipped, x=(6, 6)), (6, 6))


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_threads_and_batches_do_not_change_a_byte(
    monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", threads)
    g = Network()
    x = g.input("x")
    gate = g.add(_aten.sigmoid.default, g.add(_aten.mean.dim, x, [1], True))
    gated = g.add(_aten.mul.Tensor, x, gate)
    mixed = g.add(_aten.bmm.default, gated, g.add(_aten.permute.default, x, [0, 2, 1]))
    soft = g.add(_aten._softmax.default, mixed, -1, False)
    moved = g.add(_aten.flip.default, g.add(_aten.gelu.default, soft), [1])
    engine = g.run(g.add(_aten.layer_norm.default, moved, [90], None, None, 1e-5), x=(90, 70))
    images = noise(9, 90, 70)
    whole = engine(images)[0]
    assert torch.equal(whole, torch.cat([engine(part)[0] for part in images.split(2)]))
    assert torch.equal(whole.flip(0), engine(images.flip(0))[0])

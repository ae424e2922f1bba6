"""Networks with only some native parts: values between parts, order of parts, and descriptions.

Float operators here have the same arithmetic in a program as in PyTorch (sums, max pools), so that
results are compared bit for bit; with float convolutions or means, within rounding.
"""

import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from biper_engine.engine import Engine, load
from biper_engine.graph import OPERATORS
from biper_engine.graph.signature import InputSpec, Signature
from biper_engine.runtime import NativePlan
from biper_engine.runtime.steps import _HANDLERS
from tests.concurrency import wrong_results
from tests.conversion.comparison import converted
from tests.conversion.test_foreign_models import NETWORKS
from tests.golden import weights
from tests.images import noise
from tests.networks_by_hand import GraphBuilder, engine_of, signature, two_inputs
from tests.runtime.plans import one_by_one

_aten, _biper = torch.ops.aten, torch.ops.biper

SAME = {"stride": [1, 1], "padding": [1, 1, 1, 1]}
CHANNELS = 33


pytestmark = pytest.mark.usefixtures("cpu_backend")


class Network(GraphBuilder):
    """A graph with shorter words for its usual nodes."""

    def bits(self, name: str, x: fx.Node) -> fx.Node:
        return self.call(name, _biper.binarize.default, x)

    def sine(self, name: str, x: fx.Node) -> fx.Node:
        """A foreign operator: it has no native step."""
        return self.call(name, _aten.sin.default, x)

    def conv(self, name: str, bits: fx.Node, residual: fx.Node | None = None) -> fx.Node:
        return self.call(
            name,
            _biper.bconv2d_float.default,
            bits,
            *self.operands(name, CHANNELS, CHANNELS, bits=False),
            residual=residual,
            in_channels=CHANNELS,
            **SAME,
        )

    def conv_pair(self, name: str, bits: fx.Node) -> tuple[fx.Node, fx.Node]:
        both = self.call(
            name,
            _biper.bconv2d_float_bits.default,
            bits,
            *self.operands(name, CHANNELS, CHANNELS, bits=True),
            in_channels=CHANNELS,
            **SAME,
        )
        floats = self.call(f"{name}_floats", operator.getitem, both, 0)
        return floats, self.call(f"{name}_bits", operator.getitem, both, 1)

    def engine(self, *outputs: Any, shape: tuple[int, ...] = (CHANNELS, 6, 6)) -> Engine:
        form = signature({"x": shape}, (0,), {}, [0] * len(outputs))
        engine = engine_of(self.module(*outputs), form)
        engine._device = torch.device("cpu")  # also where a network has no tensors
        return engine


def plan_of(engine: Engine) -> NativePlan:
    plan = engine._get_plan().native
    assert isinstance(plan, NativePlan), plan
    return plan


def outside(engine: Engine) -> list[str]:
    return [node.name for node in plan_of(engine).reasons]


def runs(engine: Engine) -> list[list[str]]:
    return [
        [node.name for step in run.steps for node in step.nodes] for run in plan_of(engine).runs
    ]


def assert_same_bits(engine: Engine, shape: tuple[int, ...] = (CHANNELS, 6, 6)) -> None:
    for batch in (1, 5, 0):
        x = noise(batch, *shape)
        got, wanted = pytree.tree_leaves(engine(x)), one_by_one(engine, x)
        for a, b in zip(got, wanted, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert torch.equal(a, b)


def residual_network(place: str) -> Engine:
    """Two binary convolutions, a pool and a sum, with a foreign operator at one place."""
    g = Network()
    x = g.input("x")
    first = g.sine("foreign", x) if place == "start" else x
    floats, bits = g.conv_pair("conv1", g.bits("bits", first))
    shortcut = g.sine("foreign", floats) if place == "branch" else floats
    middle = g.bits("middle_bits", g.sine("foreign", floats)) if place == "middle" else bits
    second = g.conv("conv2", middle, shortcut)
    pooled = g.call("pool", _aten.max_pool2d.default, second, [2, 2])
    last = g.call("total", _aten.add.Tensor, pooled, pooled)
    return g.engine(g.sine("foreign", last) if place == "end" else last)


PLACES = {
    "start": [["bits", "conv1", "conv2", "pool", "total"]],
    "middle": [["bits", "conv1"], ["middle_bits", "conv2", "pool", "total"]],
    "branch": [["bits", "conv1"], ["conv2", "pool", "total"]],
    "end": [["bits", "conv1", "conv2", "pool", "total"]],
}


def test_every_native_step_is_that_of_a_declared_operator() -> None:
    assert set(_HANDLERS) <= set(OPERATORS)


@pytest.mark.parametrize("place", PLACES)
def test_an_operator_without_a_step_runs_alone_wherever_it_is(place: str) -> None:
    engine = residual_network(place)
    assert runs(engine) == PLACES[place]
    assert outside(engine) == ["foreign"]
    reason = "1 operator outside: foreign (aten.sin.default) has no native step"
    programs = "one native program" if len(PLACES[place]) == 1 else "2 native programs"
    steps = sum(map(len, PLACES[place]))
    assert engine.execution == f"{programs} of {steps} steps, {reason}"
    assert_same_bits(engine)


def test_a_float_convolution_takes_a_clamp_before_its_pool_and_all_equal_bits_along() -> None:
    g = Network()
    weight = g.constant("weight", g.normal(CHANNELS, CHANNELS, 3, 3))
    conv = g.call("stem", _aten.conv2d.default, g.input("x"), weight, None, [1, 1], [1, 1])
    pool = g.call("pool", _aten.max_pool2d.default, g.call("clamp", _aten.relu.default, conv), 2)
    first, second = g.bits("first", pool), g.bits("second", pool)
    engine = g.engine(g.conv("conv1", first), g.conv("conv2", second))
    assert runs(engine) == [["stem", "clamp", "pool", "first", "second", "conv1", "conv2"]]
    assert len(plan_of(engine).steps) == 3
    x = noise(3, CHANNELS, 6, 6)
    for got, wanted in zip(engine(x), one_by_one(engine, x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_packed_map_crosses_from_one_program_to_the_next() -> None:
    engine = residual_network("branch")
    first, second = plan_of(engine).runs
    assert [node.name for node in first.outputs] == ["conv1_floats", "conv1_bits"]
    assert {node.name for node in second.inputs} == {"conv1_bits", "foreign"}


def test_a_network_without_foreign_operators_is_its_program_and_nothing_else() -> None:
    engine = residual_network("nowhere")
    plan = plan_of(engine)
    assert plan.is_whole
    assert engine._get_plan().run is plan.runs[0].program
    assert_same_bits(engine)


def test_branches_side_by_side_share_their_programs() -> None:
    g = Network()
    x = g.input("x")
    ends = []
    for side in "abc":
        first = g.conv(f"{side}1", g.bits(f"{side}_bits", x))
        ends.append(g.conv(f"{side}2", g.bits(f"{side}2_bits", g.sine(f"{side}_sine", first))))
    total = g.call("total", _aten.add.Tensor, ends[0], ends[1])
    engine = g.engine(total, ends[2])
    assert [len(names) for names in runs(engine)] == [6, 7]
    assert_same_bits(engine)


def test_flattened_values_come_in_and_leave() -> None:
    g = Network()
    x = g.input("x")
    mean = g.call("mean", _aten.mean.dim, g.conv("conv", g.bits("bits", x)), [2, 3])
    foreign = g.sine("foreign", mean)
    heads = [g.constant(f"fc{i}.weight", noise(CHANNELS, CHANNELS, seed=i)) for i in (1, 2)]
    hidden = g.call("hidden", _aten.linear.default, foreign, heads[0])
    engine = g.engine(g.call("logits", _aten.linear.default, hidden, heads[1]))
    assert runs(engine) == [["bits", "conv", "mean"], ["hidden", "logits"]]
    images = noise(3, CHANNELS, 6, 6)
    # Sums of 33 terms in another order, twice.
    torch.testing.assert_close(engine(images)[0], one_by_one(engine, images)[0], rtol=0, atol=1e-4)


def test_maps_of_several_views_leave_in_each_form_once() -> None:
    g = Network()
    x = g.input("x")
    floats, bits = g.conv_pair("conv", g.bits("bits", x))
    flat = g.call("flat", _aten.reshape.default, floats, [-1, CHANNELS * 36])
    pooled = g.call("pool", _aten.max_pool2d.default, floats, [6, 6])
    vector = g.call("vector", _aten.reshape.default, pooled, [-1, CHANNELS])
    again = g.call("conv_floats_again", operator.getitem, floats.args[0], 0)
    engine = g.engine(floats, flat, bits, vector, pooled, floats, again)
    assert outside(engine) == []
    assert runs(engine) == [["bits", "conv", "pool", "flat", "pool"]]
    assert len(set(plan_of(engine).runs[0].outputs.values())) == 5
    assert_same_bits(engine)


def test_a_view_of_an_input_leaves_as_a_copy() -> None:
    g = Network()
    x = g.input("x")
    vector = g.call("vector", _aten.reshape.default, x, [-1, CHANNELS])
    relu = g.call("relu", _aten.relu.default, x)
    total = g.call("total", _aten.add.Tensor, relu, g.call("pool", _aten.max_pool2d.default, x, 1))
    engine = g.engine(g.sine("foreign", vector), total, shape=(CHANNELS, 1, 1))
    assert runs(engine) == [["relu", "pool", "total", "vector"]]
    assert outside(engine) == ["foreign"]
    assert_same_bits(engine, (CHANNELS, 1, 1))


def test_images_that_are_not_float32_maps_are_converted_before_the_program() -> None:
    g = Network()
    x = g.input("x")
    floats = g.call("floats", _aten._to_copy.default, x, dtype=torch.float32)
    scaled = g.call("scaled", _aten.sub.Tensor, floats, 127.5)
    module = g.module(g.conv("conv", g.bits("bits", scaled)))
    form = Signature(
        pytree.tree_structure(((0,), {})),
        pytree.tree_structure(0),
        (InputSpec("x", torch.uint8, (None, CHANNELS, 6, 6)),),
    )
    engine = engine_of(module, form)
    assert (runs(engine), outside(engine)) == ([["scaled", "bits", "conv"]], ["floats"])
    images = noise(2, CHANNELS, 6, 6).mul(64).add(128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(engine(images), one_by_one(engine, images)[0])


def test_vectors_as_inputs_make_one_program() -> None:
    g = Network()
    x = g.input("x")
    pixel = g.call("pixel", _aten.reshape.default, x, [-1, CHANNELS, 1, 1])
    engine = g.engine(g.conv("conv", g.bits("bits", pixel)), shape=(CHANNELS,))
    assert engine.execution == "one native program of 2 steps"
    assert_same_bits(engine, (CHANNELS,))


def test_a_single_operator_that_is_not_a_convolution_is_not_worth_a_program() -> None:
    g = Network()
    x = g.input("x")
    pooled = g.call("pool", _aten.max_pool2d.default, g.sine("first", x), [2, 2])
    middle = g.sine("second", pooled)
    engine = g.engine(g.conv("conv", g.bits("bits", middle)))
    assert (runs(engine), outside(engine)) == ([["bits", "conv"]], ["first", "pool", "second"])
    assert plan_of(engine).reasons[pooled].endswith("is not worth a program alone")
    assert "; and 1 more" in engine.execution
    assert_same_bits(engine)


def test_without_a_program_it_runs_operator_by_operator_and_says_why() -> None:
    g = Network()
    engine = g.engine(g.sine("foreign", g.input("x")))
    assert engine.execution == (
        "operator by operator, since foreign (aten.sin.default) has no native step"
    )
    assert_same_bits(engine)


def test_a_value_of_unknown_shape_stays_outside() -> None:
    g = Network()
    x = g.input("x")
    where = g.call("where", _aten.ge.Scalar, x, float("-inf"))
    chosen = g.call("chosen", _aten.masked_select.default, x, where)
    shaped = g.call("shaped", _aten.reshape.default, chosen, [-1, CHANNELS, 6, 6])
    bits = g.bits("bits", shaped)
    engine = g.engine(g.conv("conv", bits), g.conv("other", g.bits("other_bits", x)))
    assert plan_of(engine).reasons[bits].endswith("whose shape is not known before it is computed")
    assert runs(engine) == [["where", "other_bits", "other"]]
    assert where in plan_of(engine).reasons  # bools don't leave
    assert_same_bits(engine)


def test_several_inputs_and_outputs_cross_in_their_order() -> None:
    engine = two_inputs()
    assert engine.execution == "one native program of 5 steps"
    image, mask = noise(2, 3, 6, 6), noise(2, 1, 6, 6)
    result = engine(image, extra={"mask": mask})
    wanted = one_by_one(engine, image, mask)
    for got, value in zip([*result["maps"], result["image"]], wanted, strict=True):
        assert torch.equal(got, value)
    assert result["image"].data_ptr() != image.data_ptr()


def test_bits_flow_natively_between_float16_operators(golden_file: Callable[..., Path]) -> None:
    name = "cifar10/vgg_small_1w1a"
    engine = load(golden_file(name, torch.float16))
    assert all(step.macs is not None for step in plan_of(engine).steps)
    assert len(plan_of(engine).steps) >= 3
    images = torch.from_numpy(weights.images(name, 2, 32))
    assert torch.equal(engine(images), one_by_one(engine, images)[0])


@pytest.mark.some(2)
@pytest.mark.parametrize("name", ["ReActNet", "XNOR-Net", "binary MLP", "flatten, sign"])
def test_networks_of_other_people_run_as_one_program(name: str) -> None:
    network, shape, _ = NETWORKS[name]
    engine, _, images = converted(network, shape, check=False)
    assert plan_of(engine).is_whole
    # A bit within rounding of its threshold may flip: these images have none.
    torch.testing.assert_close(engine(images), one_by_one(engine, images)[0], rtol=1e-5, atol=1e-5)


# -- an engine's life -----------------------------------------------------------------------------


def test_copies_pickles_and_moves_give_the_same() -> None:
    engine, images = residual_network("branch"), noise(2, CHANNELS, 6, 6)
    wanted = engine(images)[0]
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), engine.to("cpu")):
        assert other._plan.is_empty
        assert torch.equal(other(images)[0], wanted)
        assert len(plan_of(other).runs) == 2


def test_new_weights_take_effect() -> None:
    engine, images = residual_network("middle"), noise(2, CHANNELS, 6, 6)
    before = engine(images)[0]
    state = {name: value.clone() for name, value in engine.state_dict().items()}
    state["graph_module.conv2.multiplier"] *= -2
    engine.load_state_dict(state)
    assert not torch.equal(engine(images)[0], before)
    assert_same_bits(engine)


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    batches = [noise(n, CHANNELS, 6, 6, seed=n) for n in (1, 2, 5)]
    assert wrong_results(residual_network("middle"), batches, threads=2, calls=40) == []


def test_the_profile_tells_programs_from_what_runs_outside() -> None:
    engine = residual_network("middle")
    report = engine.profile(noise(2, CHANNELS, 6, 6), rounds=1)
    assert [(row.name, row.backend, row.program) for row in report.nodes] == [
        ("bits", "cpu", 0),
        ("conv1", "cpu", 0),
        ("foreign", "torch", None),
        ("middle_bits", "cpu", 1),
        ("conv2", "cpu", 1),
        ("pool", "cpu", 1),
        ("total", "cpu", 1),
    ]
    assert report.nodes[4].macs == 2 * 36 * CHANNELS * CHANNELS * 9
    reason = "foreign (aten.sin.default) has no native step"
    assert [row.reason for row in report.nodes] == [None, None, reason, None, None, None, None]
    assert str(report).endswith(f"native programs: 2, steps: 2, 4\noutside: {reason}")
    row = report.to_dict()["nodes"][2]
    assert (row["program"], row["reason"]) == (None, reason)


def test_an_empty_value_leaves_no_program() -> None:
    g = Network(3)
    x = g.input("x")
    total = g.call("total", _aten.add.Tensor, x, g.constant("c", g.normal(4)))
    parts = g.call("parts", _aten.split_with_sizes.default, x, [1, 0, 3], 1)
    nothing = g.call("nothing", operator.getitem, parts, 1)
    engine = engine_of(g.module(total, nothing), signature({"x": (4,)}, (0,), {}, (0, 0)))
    sums, empty = engine(torch.ones(3, 4))
    assert torch.equal(sums[0], 1 + engine.graph_module.c)
    assert empty.shape == (3, 0)

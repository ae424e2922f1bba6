"""Plans: prepacked once, dropped when tensors or the forced backend change.

Networks run operator by operator here; tests/runtime/test_native.py has native programs.
"""

import copy
import gc
import linecache
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from biper_engine.engine import Engine
from biper_engine.geometry import Conv2dGeometry
from biper_engine.graph.reading import biper_op, interpret
from biper_engine.ops.backends import use_backend
from biper_engine.ops.reference import ReferenceBackend
from biper_engine.runtime import PlanSlot, plan
from tests.networks_by_hand import GraphBuilder, classifier, classifier_graph

_aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_native_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "native_plan", lambda *_: "it is not wanted")


def planned(engine: Engine) -> fx.GraphModule:
    """Return the graph that an engine's plan runs; bound methods remember it."""
    run = engine._plan.get(engine.graph_module, engine.device).run
    module = run.__self__  # type: ignore[attr-defined]
    assert isinstance(module, fx.GraphModule)
    return module


def test_a_plan_is_made_at_the_first_call_and_kept(images: Tensor) -> None:
    engine = classifier()
    assert engine._plan.is_empty
    engine(images)
    first = planned(engine)
    engine(images)
    assert planned(engine) is first


def test_every_operator_is_bound_to_a_backend(images: Tensor) -> None:
    engine = classifier()
    operators = [n for n in engine.graph_module.graph.nodes if biper_op(n) is not None]
    assert len(operators) == 5
    module = planned(engine)
    assert [n.name for n in module.graph.nodes if biper_op(n) is not None] == []
    assert {n.name for n in operators} <= {n.name for n in module.graph.nodes}
    assert torch.equal(engine(images), engine.graph_module(images)[0])


def test_weights_are_re_laid_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    original = ReferenceBackend.prepack

    def counted(self: ReferenceBackend, weight: Tensor, geometry: Conv2dGeometry) -> Tensor:
        made.append(weight.shape)
        return original(self, weight, geometry)

    monkeypatch.setattr(ReferenceBackend, "prepack", counted)
    engine = classifier()
    with use_backend("reference"):
        engine(images)
        assert len(made) == 3
        engine(images)
    assert len(made) == 3


def test_a_plan_owns_what_it_reads_and_holds_no_more() -> None:
    engine = classifier()
    held = planned(engine).state_dict()
    own = {value.data_ptr() for value in engine.state_dict().values()}
    assert {value.data_ptr() for value in held.values()}.isdisjoint(own)
    assert len(held) == 3  # the stem and the classifier; what operators are bound to is in them


def test_a_node_with_computed_parameters_runs_unchanged(images: Tensor) -> None:
    g = GraphBuilder()
    x = g.input("x")
    threshold = g.call("threshold", _aten.mean.dim, x, [0, 2, 3])
    bits = g.call("bits", torch.ops.biper.binarize.default, x, threshold)
    module = g.module(bits)
    run = PlanSlot().get(module, torch.device("cpu")).run
    assert torch.equal(run(images)[0], module(images)[0])


def test_float_convolutions_return_channels_last_maps(images: Tensor) -> None:
    engine = classifier()
    seen: list[bool] = []

    def call(node: fx.Node, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target is _aten.conv2d.default:
            seen.append(result.is_contiguous(memory_format=torch.channels_last))
        return result

    assert images.is_contiguous()
    interpret(engine.graph_module, [images], call)
    assert seen == [True]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.to("cpu"),
        lambda e: e.float(),
        lambda e: nn.Sequential(e).cpu(),
        lambda e: e.load_state_dict(classifier(1).state_dict()),
        lambda e: nn.Sequential(e).load_state_dict(nn.Sequential(classifier(1)).state_dict()),
    ],
)
def test_a_plan_is_dropped_when_tensors_may_change(
    change: Callable[[Engine], object], images: Tensor
) -> None:
    engine = classifier()
    engine(images)
    change(engine)
    assert engine._plan.is_empty
    assert torch.equal(engine(images), engine.graph_module(images)[0])


def test_a_forced_backend_gets_a_plan_of_its_own(images: Tensor) -> None:
    engine = classifier()
    engine(images)
    first = planned(engine)
    with use_backend("reference"):
        engine(images)
        assert planned(engine) is not first
    engine(images)
    assert planned(engine) is not first


def test_a_plan_made_while_tensors_changed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = classifier()
    original = torch.fx.GraphModule.__init__

    def drop_meanwhile(self: fx.GraphModule, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        engine._plan.drop()

    monkeypatch.setattr(torch.fx.GraphModule, "__init__", drop_meanwhile)
    planned(engine)
    assert engine._plan.is_empty


def test_copies_of_a_slot_are_empty() -> None:
    slot = PlanSlot()
    slot.get(classifier_graph(), torch.device("cpu"))
    assert not slot.is_empty
    assert copy.deepcopy(slot).is_empty
    assert pickle.loads(pickle.dumps(slot)).is_empty


# -- graphs ---------------------------------------------------------------------------------------


@pytest.mark.deep
def test_the_source_of_a_graph_goes_with_its_engine(images: Tensor) -> None:
    def sources() -> tuple[set[str], set[str]]:
        gc.collect()
        kept = fx.graph_module._loader.eval_cache
        return {name for name in linecache.cache if name.startswith("<eval_with")}, set(kept)

    before = sources()
    engines = [classifier(), pickle.loads(pickle.dumps(classifier())), copy.deepcopy(classifier())]
    for engine in engines:
        engine(images)
    lines, texts = sources()
    assert len(texts) == len(before[1]) + 6  # a graph and a plan of each
    assert lines >= before[0]
    del engine, engines
    assert sources() == before

"""Whole networks with fused float ends: when ends are fused, and which backend runs them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import biper_engine
from biper_engine.ops import backends as registry
from biper_engine.ops.backends import Backend, by_name, use_backend
from biper_engine.ops.stem import PLAN_OPERATORS
from biper_engine.runtime import plan
from biper_engine.runtime.fusing import fuse_ends
from tests.images import images
from tests.networks_by_hand import classifier
from tests.runtime.fused_graphs import (
    CPU,
    StemBuilder,
    fused,
    fused_engine,
    operators,
)

_aten = torch.ops.aten


NETWORKS = {
    "cifar10/resnet20_1w1a": ("stem", True),
    "cifar10/vgg_small_1w1a": ("stem_bits", False),
    "imagenet/resnet18_1w1a": ("stem", True),
    "imagenet/mobilenet_1w1a": ("stem", True),
}


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.deep)]
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.weekly] * ("imagenet" in n)) for n in NETWORKS]
)
def test_the_ends_of_the_packages_networks_are_fused(
    name: str, dtype: torch.dtype, golden_file: Callable[..., Path]
) -> None:
    engine = biper_engine.load(golden_file(name, dtype))
    module, result = engine.graph_module, fused_engine(engine)
    op, classifies = NETWORKS[name]
    names = operators(result)
    assert names[0] == op
    assert ("pooled_linear" in names) == classifies
    assert not {"_to_copy", "conv2d", "max_pool2d", "hardtanh", "binarize"} & set(names[:2])
    # What is between the ends is as it was.
    kept = [n for n in operators(module) if n.startswith("bconv2d")]
    assert [n for n in names if n.startswith("bconv2d")] == kept


def test_a_fused_network_gives_the_same_logits_up_to_flips() -> None:
    engine = classifier()
    x = images(16, 3, 8, 8)
    module = fused_engine(engine)
    assert operators(module)[0] == "stem"
    assert operators(module)[-1] == "pooled_linear"
    with use_backend("reference"):
        close = torch.isclose(module(x)[0], engine.graph_module(x)[0], atol=1e-4).all(1)
    # One bit of 66 * 64 in an image within rounding of its threshold, once in a hundred images.
    assert int(close.sum()) >= 15


# -- when, and who runs it ------------------------------------------------------------------------


class Elsewhere(Backend):
    """A backend of another device, with some of the fused operators; it runs nothing."""

    name = "triton"
    device_type = "meta"
    ops: tuple[str, ...] = PLAN_OPERATORS

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reason(self, op: str, geometry: Any, device: torch.device) -> str | None:
        if device.type != self.device_type:
            return "it is elsewhere"
        return "it has none" if op in PLAN_OPERATORS and op not in self.ops else None


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    abstract = {name: None for name in Backend.__abstractmethods__ if name not in vars(Elsewhere)}
    made = type("Elsewhere", (Elsewhere,), {**abstract, **changes})()
    monkeypatch.setitem(registry._REGISTERED, "triton", made)


META = torch.device("meta")


def ends(device: torch.device) -> tuple[str, str]:
    engine = classifier()
    module = fuse_ends(engine.graph_module, device, engine.signature.inputs)
    return operators(module)[0], operators(module)[-1]


def test_nothing_is_fused_where_no_backend_is_better_than_pytorch() -> None:
    assert ends(CPU) == ends(META) == ("conv2d", "linear")
    engine = classifier()
    module, inputs = engine.graph_module, engine.signature.inputs
    for device in (CPU, META):
        assert fuse_ends(module, device, inputs) is module
    assert fuse_ends(module, None, inputs, ops=PLAN_OPERATORS) is module
    assert fuse_ends(module, CPU, None, ops=PLAN_OPERATORS) is module


def test_a_backend_that_has_the_operators_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch)
    assert ends(META) == ("stem", "pooled_linear")
    assert ends(CPU) == ("conv2d", "linear")
    elsewhere(monkeypatch, ops=("pooled_linear",))
    assert ends(META) == ("conv2d", "pooled_linear")


def test_a_forced_backend_decides_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, device_type="cpu")
    assert ends(CPU) == ("conv2d", "linear")
    with use_backend("triton"):
        assert ends(CPU) == ("stem", "pooled_linear")
        assert ends(META) == ("conv2d", "linear")
    with use_backend("reference"):
        assert ends(CPU) == ("conv2d", "linear")  # the graph as it is
        assert ends(META) == ("stem", "pooled_linear")


def test_the_graph_of_the_engine_does_not_change() -> None:
    engine = classifier()
    before, state = str(engine.graph_module.graph), list(engine.state_dict())
    assert fused_engine(engine) is not engine.graph_module
    assert str(engine.graph_module.graph) == before
    assert list(engine.state_dict()) == state


def test_a_plan_binds_the_fused_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "native_plan", lambda *_: "it is not wanted")
    engine = classifier()
    x = images(2, 3, 8, 8)
    calls: list[tuple[bool, bool]] = []
    reference = type(by_name("reference"))
    original: Callable[..., Any] = reference.stem

    def counted(self: Any, x: Tensor, stem: Any) -> Any:
        calls.append((stem.want_float, stem.want_bits))
        return original(self, x, stem)

    monkeypatch.setattr(reference, "stem", counted)
    monkeypatch.setattr(plan, "fuse_ends", functools.partial(fuse_ends, ops=PLAN_OPERATORS))
    with use_backend("reference"):
        assert torch.equal(engine(x), fused_engine(engine)(x)[0])
    assert calls == [(True, True)] * 2


@pytest.mark.parametrize("wanted", ["floats", "bits", "both"])
def test_a_bound_stem_makes_what_is_used(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = StemBuilder()
    clamp = g.call("clamp", _aten.relu.default, g.conv(g.x))
    outputs = {"floats": (clamp,), "bits": (g.bits(clamp),)}
    module = g.module(
        *(outputs["floats"] + outputs["bits"] if wanted == "both" else outputs[wanted])
    )
    if wanted == "floats":
        module.graph.eliminate_dead_code()
    seen: list[tuple[bool, bool]] = []
    reference = type(by_name("reference"))
    original: Callable[..., Any] = reference.stem

    def noted(self: Any, x: Tensor, stem: Any) -> Any:
        seen.append((stem.want_float, stem.want_bits))
        return original(self, x, stem)

    monkeypatch.setattr(reference, "stem", noted)
    result = fused(module, (3, 8, 8))
    x = images(2, 3, 8, 8)
    with use_backend("reference"):
        bound = plan.bound_graph(result, CPU, "it is not wanted")
        for came, expected in zip(bound(x), result(x), strict=True):
            assert torch.equal(came, expected)
    assert seen[0] == (wanted != "bits", wanted != "floats")

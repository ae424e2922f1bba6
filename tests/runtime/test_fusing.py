"""Fused float ends: which operators become one, and that nothing but rounding changes."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import biper_engine
from biper_engine import models
from biper_engine.bits import unpack_channels
from biper_engine.engine import Engine
from biper_engine.ops import backends as registry
from biper_engine.ops.backends import Backend, by_name, use_backend
from biper_engine.ops.stem import PLAN_OPERATORS
from biper_engine.runtime import biper_op, get_constant, plan
from biper_engine.runtime.fusing import MAX_STEM_CHANNELS, fuse_ends
from biper_engine.runtime.signature import InputSpec
from tests.networks_by_hand import GraphBuilder, classifier

_aten, _biper = torch.ops.aten, torch.ops.biper
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIPER_BACKEND", raising=False)


def fused(
    module: fx.GraphModule, *shapes: Sequence[int], dtype: torch.dtype = torch.float32
) -> fx.GraphModule:
    """Return a network with all that can be fused; `shapes` are without the batch."""
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    specs = [InputSpec(n, dtype, (None, *s)) for n, s in zip(names, shapes, strict=True)]
    return fuse_ends(module, CPU, specs, ops=PLAN_OPERATORS)


def fused_engine(engine: Engine) -> fx.GraphModule:
    return fuse_ends(engine.graph_module, CPU, engine.signature.inputs, ops=PLAN_OPERATORS)


def operators(module: fx.GraphModule) -> list[str]:
    """Return the operators of a graph in order, getitem left out."""
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            found.append(biper_op(node) or str(node.target).split(".")[1])
    return found


def the(module: fx.GraphModule, op: str) -> fx.Node:
    (node,) = [node for node in module.graph.nodes if biper_op(node) == op]
    return node


def options(module: fx.GraphModule, op: str) -> dict[str, Any]:
    """Return the keyword arguments of the only node of an operator, tensors looked up."""
    return {
        name: get_constant(module, str(value.target)) if isinstance(value, fx.Node) else value
        for name, value in the(module, op).kwargs.items()
    }


def images(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Stem(GraphBuilder):
    """A network that begins as given and returns the bits, and the floats if wanted."""

    def __init__(self, *, channels: int = 3, out: int = 40, dtype: torch.dtype = torch.float32):
        super().__init__(2)
        self.channels, self.out, self.dtype = channels, out, dtype
        self.x = self.input("x")

    def conv(self, x: fx.Node, kernel: int = 3, *rest: Any, bias: bool = True) -> fx.Node:
        weight = self.normal(self.out, self.channels, kernel, kernel) / kernel**2
        nodes = [self.constant("conv.weight", weight.to(self.dtype)), None]
        if bias:
            nodes[1] = self.constant("conv.bias", self.normal(self.out).to(self.dtype))
        rest = rest or ([1, 1], [kernel // 2])
        return self.call("conv", _aten.conv2d.default, x, *nodes, *rest)

    def bits(self, x: fx.Node, name: str = "bits") -> fx.Node:
        threshold = self.constant(f"{name}.threshold", self.normal(self.out) / 8)
        sense = self.constant(f"{name}.sense", torch.arange(self.out) % 3 == 0)
        return self.call(name, _biper.binarize.default, x, threshold, sense)

    def cast(self, x: fx.Node, dtype: torch.dtype, name: str) -> fx.Node:
        return self.call(name, _aten._to_copy.default, x, dtype=dtype)


def assert_bits_agree(came: Tensor, wanted: Tensor, channels: int, share: float) -> None:
    """Allow the few bits whose values lie within rounding of their threshold."""
    a, b = unpack_channels(came, channels), unpack_channels(wanted, channels)
    assert a.shape == b.shape
    assert float((a != b).double().mean()) <= share


# -- stems ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["", "pool", "clamp", "pool clamp", "clamp pool"])
@pytest.mark.parametrize("floats", [False, True])
def test_what_follows_the_convolution_of_images_is_fused(order: str, floats: bool) -> None:
    g = Stem()
    last = g.conv(g.x, 7, [2, 2], [3, 3], [1, 1], 1)
    for step in order.split():
        if step == "pool":
            last = g.call("pool", _aten.max_pool2d.default, last, [3, 3], [2, 2], [1, 1])
        else:
            last = g.call("clamp", _aten.hardtanh.default, last, -0.7, 0.6)
    bits = g.bits(last)
    module = g.module(bits, last) if floats else g.module(bits)
    result = fused(module, (3, 21, 18))
    op = "stem" if floats else "stem_bits"
    assert operators(result) == [op]
    given = options(result, op)
    assert given["stride"] == [2, 2]
    assert given["padding"] == [3, 3, 3, 3]
    assert ("pool_kernel_size" in given) == ("pool" in order)
    assert (given["clamp_min"], given["clamp_max"]) == (
        (-0.7, 0.6) if "clamp" in order else (None,) * 2
    )
    x = images(4, 3, 21, 18)
    came, wanted = result(x), module(x)
    # Sums of 148 terms in float32 against float64: a bit flips where v is that close to it.
    assert_bits_agree(came[0], wanted[0], 40, 1e-4)
    if floats:
        # 148 terms of magnitudes below 1, each sum rounded to 2^-24 of at most 16.
        assert bool(((came[1] - wanted[1]).abs() <= 148 * 16 * 2.0**-24).all())


@pytest.mark.parametrize(
    ("target", "arguments", "limits"),
    [
        (_aten.relu.default, (), (0.0, None)),
        (_aten.clamp.default, (None, 0.5), (None, 0.5)),
        (_aten.clamp.default, (-1,), (-1.0, None)),
        (_aten.hardtanh.default, (), (-1.0, 1.0)),
    ],
)
def test_every_clamp_is_fused(target: Any, arguments: tuple[Any, ...], limits: Any) -> None:
    g = Stem()
    clamp = g.call("clamp", target, g.conv(g.x), *arguments)
    given = options(fused(g.module(g.bits(clamp)), (3, 8, 8)), "stem_bits")
    assert (given["clamp_min"], given["clamp_max"]) == limits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_conversion_of_the_images_is_fused(dtype: torch.dtype) -> None:
    g = Stem(dtype=dtype)
    clamp = g.call("clamp", _aten.hardtanh.default, g.conv(g.cast(g.x, dtype, "half")))
    module = g.module(g.bits(clamp), clamp)
    result = fused(module, (3, 9, 9))
    assert operators(result) == ["stem"]
    given = options(result, "stem")
    assert given["dtype"] == dtype
    assert given["weight"].dtype == given["bias"].dtype == torch.float32
    x = images(8, 3, 9, 9)
    came, wanted = result(x), module(x)
    assert came[1].dtype == dtype
    # Two roundings of values below 1, of the sum and of the sum with its bias, against one.
    eps = torch.finfo(dtype).eps
    assert bool(((came[1].float() - wanted[1].float()).abs() <= 2 * eps).all())
    assert_bits_agree(came[0], wanted[0], 40, 4 * eps)


def normalised(form: str) -> tuple[Stem, fx.Node, torch.dtype]:
    """Return a network in the making, and its images normalised in one of several ways."""
    g = Stem(dtype=torch.float16 if "half" in form else torch.float32)
    mean = g.constant("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
    std = g.constant("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    x, dtype = g.x, torch.uint8
    if "bytes" in form:
        x = g.call("unit", _aten.div.Tensor, g.cast(x, torch.float32, "floats"), 255)
    elif "direct" in form:
        x = g.call("unit", _aten.div.Tensor, x, 255.0)
    else:
        dtype = torch.float32
    if "reversed" in form:
        x = g.call("centred", _aten.sub.Tensor, mean, x)
    elif "alpha" in form:
        x = g.call("centred", _aten.add.Tensor, x, mean, alpha=-2)
    else:
        x = g.call("centred", _aten.sub.Tensor, x, mean)
    x = g.call("scaled", _aten.div.Tensor, x, std)
    if "half" in form:
        x = g.cast(x, torch.float16, "half")
    return g, x, dtype


@pytest.mark.parametrize(
    "form", ["floats", "bytes", "direct", "bytes half", "floats reversed", "bytes alpha"]
)
def test_the_networks_own_normalisation_is_fused(form: str) -> None:
    g, x, dtype = normalised(form)
    conv = g.conv(x)
    module = g.module(g.bits(conv), conv)
    result = fused(module, (3, 9, 9), dtype=dtype)
    assert operators(result) == ["stem"]
    given = options(result, "stem")
    assert given["scale"].shape == given["offset"].shape == (3,)
    if dtype == torch.uint8:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 3, 9, 9), generator=generator, dtype=dtype)
    else:
        pixels = images(4, 3, 9, 9)
    came, wanted = result(pixels), module(pixels)
    # Pixels below 16 after three roundings, or sixteen half ulps, through weights of 27 / 9.
    eps = torch.finfo(came[1].dtype).eps
    assert bool(((came[1].float() - wanted[1].float()).abs() <= 64 * 3 * eps).all())
    assert_bits_agree(came[0], wanted[0], 40, 200 * eps)


def test_padding_stays_zero_where_the_normalisation_is_fused() -> None:
    g = Stem(out=1)
    shifted = g.call("shifted", _aten.add.Tensor, g.x, 100.0)
    conv = g.conv(shifted)
    module = g.module(conv, g.bits(conv))
    result = fused(module, (3, 4, 4))
    x = images(1, 3, 4, 4)
    assert operators(result) == ["stem"]
    assert torch.allclose(result(x)[0], module(x)[0], rtol=1e-5)


def test_bytes_that_wrap_around_are_not_folded() -> None:
    g = Stem()
    wrapped = g.call("wrapped", _aten.add.Tensor, g.x, 200)
    conv = g.conv(g.cast(wrapped, torch.float32, "floats"))
    module = g.module(g.bits(conv))
    result = fused(module, (3, 9, 9), dtype=torch.uint8)
    assert operators(result) == ["add", "stem_bits"]
    assert the(result, "stem_bits").args[0].name == "wrapped"  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 9, 9), generator=generator, dtype=torch.uint8)
    assert_bits_agree(result(pixels)[0], module(pixels)[0], 40, 1e-3)


def test_a_constant_that_is_no_value_per_channel_is_not_folded() -> None:
    g = Stem()
    image = g.constant("image", images(1, 3, 9, 9))
    conv = g.conv(g.call("centred", _aten.sub.Tensor, g.x, image))
    result = fused(g.module(g.bits(conv)), (3, 9, 9))
    assert operators(result) == ["sub", "stem_bits"]


def test_what_else_uses_the_images_keeps_them() -> None:
    g = Stem()
    half = g.call("doubled", _aten.mul.Tensor, g.x, 2.0)
    conv = g.conv(half)
    module = g.module(g.bits(conv), half)
    result = fused(module, (3, 9, 9))
    assert sorted(operators(result)) == ["mul", "stem_bits"]
    x = images(2, 3, 9, 9)
    assert torch.equal(result(x)[1], module(x)[1])


def test_equal_bits_are_made_once_and_others_stay() -> None:
    g = Stem()
    conv = g.conv(g.x)
    first = g.bits(conv)
    again = g.call("again", _biper.binarize.default, *first.args)
    other = g.call("other", _biper.binarize.default, conv)
    module = g.module(first, again, other)
    result = fused(module, (3, 8, 8))
    assert operators(result) == ["stem", "binarize"]
    x = images(2, 3, 8, 8)
    for came, wanted in zip(result(x), module(x), strict=True):
        assert_bits_agree(came, wanted, 40, 1e-3)


def test_floats_alone_are_fused_with_what_follows() -> None:
    g = Stem()
    clamp = g.call("clamp", _aten.relu.default, g.conv(g.x))
    result = fused(g.module(clamp), (3, 8, 8))
    assert operators(result) == ["stem"]
    x = images(2, 3, 8, 8)
    assert torch.allclose(result(x)[0], g_result(g, x), atol=1e-5)


def g_result(g: GraphBuilder, x: Tensor) -> Tensor:
    module = fx.GraphModule(g.constants, g.graph)
    result: Tensor = module(x)[0]
    return result


def other_convolution(form: str) -> tuple[Stem, fx.Node]:
    g = Stem(channels=MAX_STEM_CHANNELS + 1 if form == "channels" else 4)
    arguments: dict[str, tuple[Any, ...]] = {
        "channels": ([1, 1], [1]),
        "dilation": ([1, 1], [1, 1], [2, 2]),
        "alone": ([1, 1], [1]),
        "computed weights": ([1, 1], [1]),
        "ceil_mode": ([1, 1], [1]),
        "groups": ([1, 1], [1], [1], 2),
    }
    if form == "computed weights":
        weight = g.call("weight", _aten.neg.default, g.constant("w", g.normal(40, 4, 3, 3)))
        return g, g.bits(g.call("conv", _aten.conv2d.default, g.x, weight, None, [1, 1], [1]))
    if form == "groups":
        weight = g.constant("w", g.normal(40, 2, 3, 3))
        return g, g.bits(g.call("conv", _aten.conv2d.default, g.x, weight, None, *arguments[form]))
    conv = g.conv(g.x, 3, *arguments[form])
    return g, conv if form == "alone" else g.bits(conv)


@pytest.mark.parametrize("form", ["channels", "dilation", "alone", "computed weights", "groups"])
def test_other_convolutions_stay(form: str) -> None:
    g, last = other_convolution(form)
    module = g.module(last)
    assert fused(module, (g.channels, 8, 8)) is module


def test_a_pool_with_ceil_mode_stays_behind_the_stem() -> None:
    g = Stem()
    clamp = g.call("clamp", _aten.relu.default, g.conv(g.x))
    pool = g.call("pool", _aten.max_pool2d.default, clamp, [3], [2], [0], [1], True)
    module = g.module(g.bits(pool))
    result = fused(module, (3, 8, 8))
    assert operators(result) == ["stem", "max_pool2d", "binarize"]
    x = images(2, 3, 8, 8)
    assert_bits_agree(result(x)[0], module(x)[0], 40, 1e-3)


def test_a_value_that_is_needed_before_the_clamp_is_kept() -> None:
    g = Stem()
    conv = g.conv(g.x)
    clamp = g.call("clamp", _aten.relu.default, conv)
    module = g.module(conv, g.bits(clamp))
    assert fused(module, (3, 8, 8)) is module


# -- classifiers ----------------------------------------------------------------------------------


def pooled(form: str, dtype: torch.dtype = torch.float32, size: int = 4) -> fx.GraphModule:
    """A mean, what is between, and a linear layer of 33 features."""
    g = GraphBuilder(5)
    x = g.input("x")
    if "avg_pool2d" in form:
        x = g.call("mean", _aten.avg_pool2d.default, x, [size, size])
    elif "adaptive" in form:
        x = g.call("mean", _aten._adaptive_avg_pool2d.default, x, [1, 1])
    else:
        x = g.call("mean", _aten.mean.dim, x, [-1, -2], "keepdim" in form)
    if "affine" in form:
        scale = g.constant(
            "scale", (g.normal(33, 1, 1) if x.args[2:] != (False,) else g.normal(33)).to(dtype)
        )
        x = g.call("scaled", _aten.mul.Tensor, x, scale)
        x = g.call("moved", _aten.sub.Tensor, x, 0.25)
    if "squeeze" in form:
        x = g.call("flat", _aten.squeeze.dims, x, [2, 3])
    elif "reshape" in form:
        x = g.call("flat", _aten.reshape.default, x, [-1, 33])
    weight = g.constant("fc.weight", g.normal(10, 33).to(dtype))
    bias = None if "no bias" in form else g.constant("fc.bias", g.normal(10).to(dtype))
    return g.module(g.call("fc", _aten.linear.default, x, weight, bias))


POOLED = (
    "mean",
    "mean keepdim reshape",
    "mean keepdim squeeze",
    "mean reshape",
    "avg_pool2d reshape",
    "adaptive reshape no bias",
    "mean affine",
    "avg_pool2d affine reshape",
    "adaptive affine squeeze no bias",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", POOLED)
def test_a_mean_and_the_linear_layer_behind_it_are_fused(form: str, dtype: torch.dtype) -> None:
    module = pooled(form, dtype)
    result = fused(module, (33, 4, 4), dtype=dtype)
    assert operators(result) == ["pooled_linear"]
    x = images(5, 33, 4, 4).to(dtype)
    came, wanted = result(x)[0], module(x)[0]
    assert came.dtype == dtype
    # 33 products below 16 and their roundings, of the mean, its affine function and the sum.
    assert bool(((came - wanted).abs() <= 33 * 4 * torch.finfo(dtype).eps).all())


def test_weights_that_nothing_changes_are_shared() -> None:
    module = pooled("mean")
    result = fused(module, (33, 4, 4))
    own = {tensor.data_ptr() for tensor in module.buffers()}
    assert {tensor.data_ptr() for tensor in result.buffers()} == own


@pytest.mark.parametrize(
    ("form", "size"), [("avg_pool2d reshape", 4), ("mean keepdim", 4), ("mean affine twice", 4)]
)
def test_other_means_stay(form: str, size: int) -> None:
    if form == "mean affine twice":
        g = GraphBuilder()
        mean = g.call("mean", _aten.mean.dim, g.input("x"), [2, 3])
        weight = g.constant("w", g.normal(10, 33))
        module = g.module(g.call("fc", _aten.linear.default, mean, weight), mean)
        assert fused(module, (33, 5, 5)) is module
    elif form == "mean keepdim":
        g = GraphBuilder()
        mean = g.call("mean", _aten.mean.dim, g.input("x"), [2])
        weight = g.constant("w", g.normal(10, 5))
        module = g.module(g.call("fc", _aten.linear.default, mean, weight))
        assert fused(module, (33, 5, 5)) is module
    else:
        module = pooled(form, size=size)
        assert fused(module, (33, 5, 5)) is module  # a window of 4x4 is not the whole map


# -- whole networks -------------------------------------------------------------------------------

NETWORKS = {
    "cifar10/resnet20_1w1a": ("stem", True),
    "cifar10/vgg_small_1w1a": ("stem_bits", False),
    "imagenet/resnet18_1w1a": ("stem", True),
    "imagenet/mobilenet_1w1a": ("stem", True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.deep] * ("imagenet" in n)) for n in NETWORKS]
)
def test_the_ends_of_the_packages_networks_are_fused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = models.build(name).eval()
    engine = biper_engine.convert(model, compute_dtype=dtype, check=False, zero_weights="positive")
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
    g = Stem()
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


def test_infinite_limits_are_no_limits_in_effect() -> None:
    g = Stem()
    clamp = g.call("clamp", _aten.hardtanh.default, g.conv(g.x), -1.0, math.inf)
    given = options(fused(g.module(g.bits(clamp)), (3, 8, 8)), "stem_bits")
    assert (given["clamp_min"], given["clamp_max"]) == (-1.0, math.inf)

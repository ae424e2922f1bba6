"""Networks that compute the images of a batch independently, and others."""

import operator

import pytest
import torch
from torch import fx

from biper_engine.graph.batching import images_are_independent
from biper_engine.graph.signature import InputSpec
from tests.networks_by_hand import GraphBuilder, classifier, two_inputs

_aten = torch.ops.aten


def mixing(form: str) -> fx.GraphModule:
    """A network in which the images of a batch meet, or may."""
    g = GraphBuilder()
    x = g.input("x")
    if form == "mean":
        x = g.call("y", _aten.sub.Tensor, x, g.call("m", _aten.mean.dim, x, [0], True))
    elif form == "softmax":
        x = g.call("y", _aten._softmax.default, x, -4, False)
    elif form == "reshape":
        x = g.call("y", _aten.reshape.default, x, [4, -1])
    elif form == "unknown":
        x = g.call("y", _aten.flip.default, x, [0])
    elif form == "cat":
        x = g.call("y", _aten.cat.default, [x, x], 0)
    elif form == "threshold":
        threshold = g.call("m", _aten.mean.dim, x, [0, 2, 3])
        x = g.call("y", torch.ops.biper.binarize.default, x, threshold)
    elif form == "permute":
        x = g.call("y", _aten.permute.default, x, [1, 0, 2, 3])
    elif form == "slice":
        x = g.call("y", _aten.slice.Tensor, x, 0, 0, 1)
    elif form == "batch norm":
        norm = [g.constant(n, torch.ones(3)) for n in ("w", "b", "m", "v")]
        x = g.call("y", _aten.batch_norm.default, x, *norm, True, 0.1, 1e-5, False)
    elif form == "constant output":
        return g.module(x, g.constant("c", torch.ones(61, 2)))
    elif form == "constant per row":
        x = g.call("y", _aten.add.Tensor, x, g.constant("c", torch.ones(61, 1, 1, 1)))
    else:
        assert form == "product"
        flat = g.call("f", _aten.reshape.default, x, [-1, 192])
        x = g.call("y", _aten.mm.default, flat, g.call("t", _aten.permute.default, flat, [1, 0]))
    return g.module(x)


def apart(form: str) -> fx.GraphModule:
    """A network in which the images of a batch stay apart, though it moves what is in them."""
    g = GraphBuilder()
    x = g.input("x")
    if form == "flip":
        x = g.call("y", _aten.flip.default, x, [-1])
    elif form == "roll":
        x = g.call("y", _aten.roll.default, x, [1], [2])
    elif form == "repeat":
        x = g.call("y", _aten.repeat.default, x, [1, 2, 1, 1])
    elif form == "split":
        parts = g.call("y", _aten.split.Tensor, x, 2, 1)
        x = g.call("z", operator.getitem, parts, 1)
    elif form == "index":
        x = g.call("y", _aten.index.Tensor, x, [None, g.constant("i", torch.tensor([2, 0]))])
    elif form == "reflect":
        x = g.call("y", _aten.reflection_pad2d.default, x, [1, 1, 1, 1])
    elif form == "attention":
        x = g.call("y", _aten._scaled_dot_product_flash_attention_for_cpu.default, x, x, x)
        x = g.call("z", operator.getitem, x, 0)
    else:
        assert form == "topk"
        x = g.call("z", operator.getitem, g.call("y", _aten.topk.default, x, 2, -1), 1)
    return g.module(x)


APART = ("flip", "roll", "repeat", "split", "index", "reflect", "attention", "topk")
MIXING = (
    *("mean", "softmax", "reshape", "unknown", "cat", "threshold", "permute", "slice"),
    *("batch norm", "constant output", "constant per row", "product"),
)
SPEC = InputSpec("x", torch.float32, (None, 3, 8, 8))


@pytest.mark.parametrize("form", MIXING)
def test_images_that_may_meet_are_found(form: str) -> None:
    assert not images_are_independent(mixing(form), [SPEC])


@pytest.mark.parametrize("form", APART)
def test_images_that_stay_apart_are_found(form: str) -> None:
    assert images_are_independent(apart(form), [SPEC])


def test_a_fixed_batch_or_unknown_inputs_are_no_batch() -> None:
    module = classifier().graph_module
    assert not images_are_independent(module, [InputSpec("image", torch.float32, (61, 3, 8, 8))])
    assert not images_are_independent(module, None)
    assert images_are_independent(module, classifier().signature.inputs)
    net = two_inputs()
    assert images_are_independent(net.graph_module, net.signature.inputs)


def test_float_operators_that_keep_images_apart_are_known() -> None:
    g = GraphBuilder()
    x = g.input("x")
    norm = [g.constant(n, torch.ones(3)) for n in ("w", "b", "m", "v")]
    x = g.call("n", _aten.batch_norm.default, x, *norm, False, 0.1, 1e-5, False)
    x = g.call("p", _aten._prelu_kernel.default, x, g.constant("slope", torch.ones(1, 3, 1, 1)))
    x = g.call("pad", _aten.constant_pad_nd.default, x, [0, 0, 0, 0, 0, 1], 0)
    x = g.call("c", _aten.cat.default, [x, x], 1)
    gate = g.call("m", _aten.mean.dim, x, [2, 3], True)
    gate = g.call("s", _aten.sigmoid.default, gate)
    x = g.call("g", _aten.mul.Tensor, x, gate)
    x = g.call("q", _aten.avg_pool2d.default, x, [8, 8])
    x = g.call("z", _aten.squeeze.dims, x, [2, 3])
    x = g.call("l", _aten.layer_norm.default, x, [8], None, None, 1e-5, False)
    x = g.call("k", _aten._softmax.default, x, -1, False)
    assert images_are_independent(g.module(x), [SPEC])

"""An export is written only if flips within rounding explain what differs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from biper_engine.errors import ExportError
from biper_engine.export.check import compare, example_inputs
from biper_engine.export.float_form import float_form
from tests.networks_by_hand import classifier, two_inputs

NETWORK = classifier().network
MAPS = 3  # packed maps that a sign made: of the stem and of two layers
FORM = float_form(NETWORK.graph_module, example_inputs(NETWORK.signature.inputs, 2))
for node in FORM.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self):
    FORM.graph.output_node().args = ((*FORM.graph.output_node().args[0], node),)
FORM.recompile()


def run(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    with torch.no_grad():
        results = list(FORM(*inputs))
    return results[:1], results[1:]


def test_equal_answers_agree_and_are_counted() -> None:
    found = compare(NETWORK, run, "mine 1.0", batches=(2, 3))
    assert (found.runtime, found.images, found.bits_differ) == ("mine 1.0", 5, 0)
    assert found.bits == 5 * (33 * 64 + 33 * 64 + 40 * 64)
    assert found.top1 == 1.0
    assert found.largest_difference <= 1e-4 * found.largest_output
    assert "0 of 33,920 bits differ" in str(found)
    assert "top-1 agreement 100.00%" in str(found)


def test_few_other_bits_are_stated_with_their_layer() -> None:
    def flipping(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, maps = run(inputs)
        maps[1] = maps[1].clone()
        maps[1][0, 0, 0, 0] *= -1
        outputs[0] = outputs[0].clone()
        outputs[0][0] += 1
        return outputs, maps

    found = compare(NETWORK, flipping, "mine", batches=(2, 3))
    assert (found.bits_differ, found.first_different) == (2, "layer1_0")
    assert found.largest_difference == pytest.approx(1, rel=1e-3)


def test_many_other_bits_are_a_defect() -> None:
    def inverted(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, maps = run(inputs)
        return outputs, [maps[0], -maps[1], maps[2]]

    with pytest.raises(ExportError, match=r"other bits than the engine, [\d,]+ of .* in layer1_0"):
        compare(NETWORK, inverted, "mine")


@pytest.mark.parametrize("with_maps", [True, False])
def test_other_outputs_behind_equal_bits_are_a_defect(with_maps: bool) -> None:
    def wrong(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, maps = run(inputs)
        return [outputs[0] * 1.01], maps if with_maps else []

    with pytest.raises(ExportError, match="other outputs"):
        compare(NETWORK, wrong, "mine")


def test_outputs_of_nan_are_a_defect() -> None:
    with pytest.raises(ExportError, match="other outputs"):
        compare(NETWORK, lambda inputs: ([x * torch.nan for x in run(inputs)[0]], []), "mine")


def test_a_network_of_several_outputs_has_no_top_1() -> None:
    network = two_inputs().network
    form = float_form(network.graph_module, example_inputs(network.signature.inputs, 2))
    found = compare(network, lambda inputs: (list(form(*inputs)), []), "mine")
    assert (found.top1, found.bits) == (None, 0)

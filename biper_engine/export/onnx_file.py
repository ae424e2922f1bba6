"""Networks as ONNX models in standard operators, and in QONNX's form of binary networks."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from biper_engine.errors import ExportError
from biper_engine.export.flat import Flat, free_batch
from biper_engine.graph.operators import operator_for

__all__ = ["OPSET", "onnx_model", "quiet", "sign_outputs", "to_qonnx"]

OPSET = 18
_QONNX = "qonnx.custom_op.general"


def onnx_model(
    network: fx.GraphModule,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    *,
    batched: Sequence[bool] | None = None,
    outputs: Sequence[str] | None = None,
) -> Any:
    """Return an `onnx.ModelProto` of a network in float operators.

    Args:
        network: takes the inputs, returns a tuple of tensors.
        inputs: a tensor for each input; values do not matter, and sizes are fixed.
        names: a name for each input.
        batched: for each input, whether its first dimension may have any size; None for none.
        outputs: a name for each output.

    Raises:
        ExportError: an operator has no form in ONNX.
    """
    try:
        with quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                Flat(network),
                tuple(torch.zeros_like(x) for x in inputs),
                dynamo=True,
                input_names=list(names),
                output_names=None if outputs is None else list(outputs),
                dynamic_shapes=free_batch(batched) if batched else None,
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_refusal(error)) from error
    assert program is not None
    return program.model_proto


def _refusal(error: BaseException) -> str:
    """Return one sentence of an exporter's error, which has the operator in its causes."""
    cause: BaseException | None = error
    while cause is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(cause))
        if found:
            return (
                f"The operator {_name(found[1])} has no form in ONNX, so nothing was written. "
                "Change the model, or keep this part of it out of the exported network."
            )
        cause = cause.__cause__
    first = str(error).splitlines()[0]
    return f"PyTorch cannot write this network as ONNX: {first}"


def _name(operator: str) -> str:
    """Return the name in files of `aten.sin`, or the name itself."""
    packet: Any = torch.ops
    for part in operator.split("."):
        packet = getattr(packet, part, None)
    for overload in getattr(packet, "overloads", list)():
        declared = operator_for(getattr(packet, overload))
        if declared is not None:
            return repr(declared.name)
    return repr(operator)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters print about themselves and their attempts; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- signs ----------------------------------------------------------------------------------------


def _constants(model: Any) -> dict[str, Any]:
    """Return initializers and constants by name, as arrays."""
    from onnx import numpy_helper

    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return known


def _signs(model: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of nodes `v >= threshold` and `where(that, 1, -1)`, in order."""
    known = _constants(model)
    made = {node.output[0]: node for node in model.graph.node if node.output}

    def is_number(name: str, wanted: float) -> bool:
        return name in known and known[name].size == 1 and float(known[name].flat[0]) == wanted

    return [
        (made[node.input[0]], node)
        for node in model.graph.node
        if node.op_type == "Where"
        and is_number(node.input[1], 1.0)
        and is_number(node.input[2], -1.0)
        and node.input[0] in made
        and made[node.input[0]].op_type == "GreaterOrEqual"
    ]


def sign_outputs(model: Any) -> Any:
    """Return a copy of a model that also returns every map of signs, in the graph's order."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name for tensor in copy.graph.initializer}
    signs = [where for _, where in _signs(copy)] + [
        node
        for node in copy.graph.node
        if node.op_type == "BipolarQuant" and node.input[0] not in weights
    ]
    for node in signs:
        copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    return copy


def to_qonnx(model: Any) -> Any:
    """Return a model whose signs and binary weights are QONNX's BipolarQuant.

    `where(v >= t, 1, -1)` becomes `BipolarQuant(v - t, 1)`: a difference of floats has the sign of
    their comparison. A convolution's weights of +-1 become `BipolarQuant(weights, 1)`. The model
    holds the definition of BipolarQuant as a function, so that a runtime of ONNX runs it, too.
    """
    import onnx
    from onnx import helper

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    scale = helper.make_tensor("bipolar_scale", onnx.TensorProto.FLOAT, [1], [1.0])
    changed.graph.initializer.append(scale)
    replaced = {}
    for compared, where in _signs(model):
        margin = f"{where.output[0]}_margin"
        replaced[where.output[0]] = [
            helper.make_node("Sub", list(compared.input), [margin]),
            _bipolar(margin, where.output[0]),
        ]
    weights = _binary_weights(changed)
    nodes = [_bipolar(name, f"{name}_bipolar") for name in weights]
    for node in changed.graph.node:
        new = replaced.get(node.output[0])
        if new is None:
            for at, name in enumerate(node.input):
                if at == 1 and name in weights and node.op_type == "Conv":
                    node.input[at] = f"{name}_bipolar"
        nodes += [node] if new is None else new
    kept = _without_unused(nodes, changed)
    del changed.graph.node[:]
    changed.graph.node.extend(kept)
    changed.opset_import.append(helper.make_opsetid(_QONNX, 1))
    changed.functions.append(_definition())
    return changed


def _bipolar(source: str, target: str) -> Any:
    from onnx import helper

    return helper.make_node("BipolarQuant", [source, "bipolar_scale"], [target], domain=_QONNX)


def _binary_weights(model: Any) -> list[str]:
    """Return the names of the weights of convolutions that are all -1 or 1, in order."""
    known = _constants(model)
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    return [
        name for name in dict.fromkeys(names) if name in known and (abs(known[name]) == 1).all()
    ]


def _without_unused(nodes: list[Any], model: Any) -> list[Any]:
    """Leave out the comparisons that nothing reads any more."""
    read = {name for node in nodes for name in node.input}
    read |= {output.name for output in model.graph.output}
    return [
        node
        for node in nodes
        if node.op_type != "GreaterOrEqual" or any(name in read for name in node.output)
    ]


def _definition() -> Any:
    """Return BipolarQuant as a function: `scale` where x >= 0, else `-scale`."""
    from onnx import helper

    nodes = [
        helper.make_node("CastLike", ["nought", "x"], ["zero"]),
        helper.make_node("GreaterOrEqual", ["x", "zero"], ["positive"]),
        helper.make_node("Neg", ["scale"], ["negated"]),
        helper.make_node("Where", ["positive", "scale", "negated"], ["y"]),
    ]
    nodes.insert(0, helper.make_node("Constant", [], ["nought"], value_float=0.0))
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(_QONNX, "BipolarQuant", ["x", "scale"], ["y"], nodes, imports)

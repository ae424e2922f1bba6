"""Weights for which no engine can be compared with its model: NaN, and infinite factors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from biper_engine.conversion.products import find_product
from biper_engine.errors import ConversionError
from biper_engine.graph.reading import constant

__all__ = ["require_finite"]


def require_finite(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Check the constants of a graph.

    PyTorch's kernel decides whether NaN or an infinite weight times a padded zero is NaN or is
    skipped, so the results of other kernels cannot be compared with it. Infinite constants that are
    not a factor of a product, such as the mask of attention, are allowed.

    Args:
        graph_module: a simplified graph.
        model: the model, for the names of parameters and buffers in the message.

    Raises:
        ConversionError: a constant is NaN, or the weight of a product is infinite.
    """
    for node in graph_module.graph.nodes:
        product = find_product(graph_module, node)
        factors = () if product is None else tuple(factor.node for factor in product.factors)
        for held, tensor in _constants(graph_module, node):
            wrong = ~tensor.isfinite() if held in factors else tensor.isnan()
            if bool(wrong.any()):
                where = f" of {node.meta.get('layer', node.name)}" if product else ""
                raise ConversionError(
                    f"A weight{where} is NaN or infinite in {int(wrong.sum())} of "
                    f"{tensor.numel()} values{_named(model)}, so the model has no outputs that an "
                    "engine could be compared with. Load weights that are finite."
                )


def _constants(graph_module: fx.GraphModule, node: fx.Node) -> Iterator[tuple[fx.Node, Tensor]]:
    for operand in node.all_input_nodes:
        tensor = constant(graph_module, operand)
        if tensor is not None and tensor.is_floating_point():
            yield operand, tensor


def _named(model: nn.Module) -> str:
    """Name parameters and buffers that are not finite."""
    held = (*model.named_parameters(), *model.named_buffers())
    names = [name for name, tensor in held if not bool(tensor.isfinite().all())]
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""

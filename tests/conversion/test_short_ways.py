"""Results on the short way have the sizes, strides and types of PyTorch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from biper_engine.conversion.short_ways import _MAPS, ShapeMode

aten = torch.ops.aten
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.clamp.default: (-0.5, None),
    aten.hardtanh.default: (-0.5, 2.0),
    aten.leaky_relu.default: (0.1,),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "float16": Tensor.half,
    "int64": Tensor.long,
}
OPERATORS = sorted(_MAPS, key=str)


def described(result: Any) -> list[Any]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [
        (tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype, t.device) for t in tensors
    ]


def run(kind: type[FakeTensorMode], operator: Any, x: Tensor, *args: Any) -> Any:
    """Call an operator on a tensor without data and with a symbolic batch."""
    mode = kind(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    sizes = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (x.dim() - 1)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    with enable_python_dispatcher(), mode:
        result = operator(mode.from_tensor(x, symbolic_context=context), *args)
        first = result[0] if isinstance(result, tuple) else result
        assert isinstance(first.shape[0], torch.SymInt)
        return described(result)


@pytest.mark.some(11)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_maps_have_the_form_of_pytorchs(operator: Any, layout: str) -> None:
    if layout == "int64" and operator is aten.leaky_relu.default:
        pytest.skip("it takes no integers")
    x, args = LAYOUTS[layout](torch.randn(3, 4, 5, 6)), ARGUMENTS.get(operator, ())
    wanted = described(operator(x, *args))
    assert run(ShapeMode, operator, x, *args) == wanted
    assert run(FakeTensorMode, operator, x, *args) == wanted


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "expanded", "float16"])
def test_a_batch_norm_has_the_form_of_pytorchs(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6))
    parameters = [torch.rand(x.shape[1], dtype=x.dtype) for _ in range(4)]
    operator = aten._native_batch_norm_legit_no_training.default
    arguments = (*parameters, 0.1, 1e-5)
    wanted = described(operator(x, *arguments))
    assert run(ShapeMode, operator, x, *arguments) == wanted


def test_parameters_of_another_type_make_what_pytorch_makes() -> None:
    operator = aten._native_batch_norm_legit_no_training.default
    arguments = (torch.randn(3, 4, 5, 6).half(), *torch.rand(4, 4), 0.1, 1e-5)
    assert run(ShapeMode, operator, *arguments) == run(FakeTensorMode, operator, *arguments)


def test_parameters_of_other_channels_are_an_error() -> None:
    operator = aten._native_batch_norm_legit_no_training.default
    with pytest.raises(RuntimeError):
        run(ShapeMode, operator, torch.randn(3, 4, 5, 6), *torch.rand(4, 7), 0.1, 1e-5)


def test_a_bound_may_be_a_tensor() -> None:
    operator = aten.clamp.Tensor
    x = torch.randn(3, 4)
    assert run(ShapeMode, operator, x, torch.zeros(4)) == described(operator(x, torch.zeros(4)))

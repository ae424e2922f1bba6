"""Shapes without data: our rules give the same results as PyTorch's."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from biper_engine.engine import Engine
from biper_engine.graph import OPERATORS, MisfitError
from biper_engine.graph.shapes import call_without_data
from tests.fresh import fresh_run
from tests.networks_by_hand import classifier, two_inputs

aten = torch.ops.aten


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, F64 = blank(2, 6, 9, 8), blank(2, 6, 9, 8, dtype=torch.float64)
INT = blank(2, 6, 9, 8, dtype=torch.int32)
V = [blank(6) for _ in range(4)]
WEIGHT = blank(4, 3, 3, 2)

# Whatever else fits is in tests/graph/test_operators.py.
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.hardtanh.default, (X,)),
    (aten.hardtanh.default, (INT, -2, 3)),
    (aten.clamp.default, (X, -1.0, 1.0)),
    (aten.add.Tensor, (X, F64)),
    (aten.add.Tensor, (X, blank(5, 1, 1))),
    (aten.add.Tensor, (X, blank(2, 1, 9, 1))),
    *[
        (op, (images, number))
        for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
        for images in (INT, blank(2, 3, 4, 5, dtype=torch.uint8))
        for number in (2, 0.5, True)
        if not (op is aten.sub.Tensor and number is True)
    ],
    (aten._prelu_kernel.default, (X, blank(1, 5, 1, 1))),
    (aten.cat.default, ([X, blank(2, 6, 8, 1)], -1)),
    (aten.cat.default, ([X, F64], 0)),
    (aten.cat.default, ([X, INT], 5)),
    (aten.conv2d.default, (X, WEIGHT, blank(4), [2, 1], [1, 0], [1, 2], 2)),
    (aten.conv2d.default, (X, WEIGHT, blank(3), [1, 1], [0, 0], [1, 1], 2)),
    (aten.conv2d.default, (X, WEIGHT, None, [0, 1], [0, 0], [1, 1], 2)),
    (aten.conv2d.default, (X, WEIGHT, None, [1, 1], [0, 0], [9, 1], 2)),
    (aten.conv2d.default, (X, WEIGHT.double(), None, [1, 1], [0, 0], [1, 1], 2)),
    (aten.conv2d.default, (X, WEIGHT, None, [2], [1], [1], 2)),
    (aten.linear.default, (blank(2, 5), blank(3, 5), blank(3))),
    (aten.linear.default, (blank(2, 4), blank(3, 5))),
    (aten.linear.default, (blank(2, 5), blank(3, 5), blank(4))),
    (aten.batch_norm.default, (X, *V, False, 0.1, 1e-5, False)),
    (aten.batch_norm.default, (X, None, None, *V[2:], False, 0.1, 1e-5, False)),
    (aten.batch_norm.default, (X, *V[:3], blank(5), False, 0.1, 1e-5, False)),
    (aten.max_pool2d.default, (X, [2, 2], [2, 2], [0, 0], [1, 1], False)),
    (aten.max_pool2d.default, (X, [3], [2], [1], [1], True)),
    (aten.max_pool2d.default, (X, [10, 3])),
    (aten.max_pool2d.default, (X, [2, 2], [2, 2], [2, 2])),
    (aten.avg_pool2d.default, (X, [2, 2], [], [0, 0], False, True, 3)),
    (aten.avg_pool2d.default, (X, [2, 2], [0, 1])),
    (aten.mean.dim, (X, [-1, -2], True)),
    (aten.mean.dim, (X, [4])),
    (aten.mean.dim, (X, [1, -3])),
    (aten.mean.dim, (X, [])),
    (aten._adaptive_avg_pool2d.default, (X, [3, 20])),
    (aten._adaptive_avg_pool2d.default, (X, [3])),
]  # fmt: skip


def outcome(target: Any, args: tuple[Any, ...]) -> Any:
    """Return dtype and shape of a result, or that there is none."""
    try:
        result = target(*args)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ArithmeticError):
        return None
    return result.dtype, tuple(result.shape)


@pytest.mark.parametrize(("target", "args"), CALLS)
def test_a_call_has_the_shape_that_pytorch_gives_it_or_is_refused(
    target: Any, args: tuple[Any, ...]
) -> None:
    assert outcome(lambda *a: call_without_data(target, a, {}), args) == outcome(target, args)


def _half_of_four(x: Tensor) -> Tensor:
    """An operator of somebody else, with a check of its own."""
    assert x.shape[0] % 4 == 0
    return x[::2]


X61 = blank(61, 6, 9, 8)
REFUSED: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.nonzero.default, (X61,)),  # the shape depends on values
    (aten._local_scalar_dense.default, (blank(),)),
    (aten.geqrf.default, (X61,)),  # no rule
    (aten.reshape.default, (X61, [7, -1])),  # another batch than 61
    (aten.add.Tensor, (X61, blank(2, 6, 9, 8))),
    (aten.select.int, (X61, 0, 100)),
    (operator.floordiv, (61, 0)),
    (_half_of_four, (X61,)),
    (torch.ops.biper.bconv2d.default, (blank(61, 9, 8, 1, dtype=torch.int32), WEIGHT)),
]


@pytest.mark.parametrize(
    ("target", "args"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x)[:40])
)
def test_a_call_that_may_be_fine_with_data_has_no_known_result(
    target: Any, args: tuple[Any, ...]
) -> None:
    kwargs = {"in_channels": 64} if target is torch.ops.biper.bconv2d.default else {}
    with pytest.raises(MisfitError):
        call_without_data(target, args, kwargs)


@pytest.mark.parametrize("error", [AttributeError, AssertionError, KeyError, TypeError])
def test_a_mistake_in_a_rule_of_ours_is_not_hidden(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(**_: Any) -> Any:
        raise error("a mistake")

    monkeypatch.setitem(vars(OPERATORS["relu"]), "result", rule)
    with pytest.raises(error, match="a mistake"):
        call_without_data(aten.relu.default, (X,), {})


@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil_mode=st.booleans(),
    target=st.sampled_from([aten.avg_pool2d.default, aten.max_pool2d.default]),
)
def test_pools_end_where_pytorch_ends_them(
    size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, target: Any
) -> None:
    args = (blank(1, 2, size, 7), [kernel, 2], [stride, 1], [padding, 0])
    options = ([1, 1], ceil_mode) if target is aten.max_pool2d.default else (ceil_mode,)
    call = (*args, *options)
    assert outcome(lambda *a: call_without_data(target, a, {}), call) == outcome(target, call)


@pytest.mark.parametrize("network", [classifier, two_inputs])
def test_loading_and_planning_import_no_compiler(
    network: Callable[[], Engine], tmp_path: Path
) -> None:
    """PyTorch's rules would import SymPy and Dynamo: seconds for milliseconds of work."""
    network().save(tmp_path / "net.biper")
    code = (
        "import sys, biper_engine\n"
        f"biper_engine.load({str(tmp_path / 'net.biper')!r}).execution\n"
        "loaded = {'sympy', 'torch._dynamo'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = fresh_run(code)
    assert done.returncode == 0, done.stderr

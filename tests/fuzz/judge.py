"""Whether a file is handled correctly: refused with a FileFormatError, or loaded and run.

A loaded network runs at two batch sizes, on its default backend and on the reference. Packed maps
must be equal, operator by operator. Outputs must be equal bit for bit if every sum is exact in
float32, and close otherwise; after a sign of floats, rounding may flip a bit, so that outputs are
only compared operator by operator.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import biper_engine
from biper_engine.engine import Engine
from biper_engine.errors import FileFormatError
from biper_engine.graph import ImagesSize, Value, network_values, operator_of
from biper_engine.graph.reading import interpret
from biper_engine.serialization import check_backend
from biper_engine.serialization.execution import call_node

BATCHES = (1, 3)
_MOST_WORK = 1 << 26
_EXACT = {
    *("conv2d", "linear", "add", "sub", "mul", "clamp", "hardtanh", "relu", "max_pool2d", "pad"),
    *("reshape", "permute", "slice", "select", "cat", "flip", "squeeze", "unsqueeze", "expand"),
    *("biper.binarize", "biper.unbinarize", "biper.bmaxpool2d", "biper.bconv2d"),
    *("biper.bconv2d_float", "biper.bconv2d_bits", "biper.bconv2d_float_bits"),
}
_CLOSE = 1e-3
_BAD_POSITION = ("index out of range", "out of bounds", "out of range")


def judge(path: Path) -> dict[str, Any]:
    """Return the outcome of a file, with a finding where it is wrong.

    Raises:
        Exception: what `load`, or the engine, raised; it should not have.
    """
    try:
        engine = biper_engine.load(path)
    except FileFormatError as error:
        return {"outcome": "refused", "said": str(error)[len(str(path)) + 2 :][:200]}
    str(engine.report), repr(engine), engine.execution
    if work(engine) > _MOST_WORK:
        return {"outcome": "too large to run"}
    try:
        finding = run(engine)
    except (IndexError, RuntimeError) as error:
        if any(text in str(error) for text in _BAD_POSITION):
            return {"outcome": "runs where a caller's positions are in range"}
        raise
    return {"outcome": "runs", **({} if finding is None else {"finding": finding})}


def work(engine: Engine) -> float:
    """Return about how many values one call computes, products counted one by one."""
    total = 0.0
    values = network_values(engine.graph_module, engine.signature.inputs)
    for node, value in values.items():
        several = value if isinstance(value, tuple) else (value,)
        elements = sum(_elements(part) for part in several)
        declared = operator_of(node)
        taps = 1.0
        for name in ("weight", "mat2", "batch2", "kernel_size", "key"):
            if declared is not None and name in declared.arguments:
                taps = max(taps, _taps(declared.named(node).get(name), values))
        total += elements * taps
    return total


def _elements(value: Any) -> float:
    if not isinstance(value, Value):
        return 0.0
    sizes = [
        size.images * max(BATCHES) + size.more if isinstance(size, ImagesSize) else size
        for size in value.shape
    ]
    return float(math.prod(sizes))


def _taps(argument: Any, values: Any) -> float:
    if isinstance(argument, list | tuple):
        return float(math.prod(argument))
    known = values.get(argument) if isinstance(argument, torch.fx.Node) else None
    if not isinstance(known, Value) or not known.shape:
        return 1.0
    return _elements(known) / max(1.0, _elements(Value(known.dtype, known.shape[:1])))


def run(engine: Engine) -> str | None:
    """Return what is wrong with the answers to some batches, None where nothing is."""
    batches = [example(engine, images) for images in BATCHES]
    with torch.no_grad():
        got = [outputs(engine, inputs) for inputs in batches]
        with biper_engine.use_backend("reference"):
            wanted = [outputs(engine, inputs) for inputs in batches]
    if any(_is_outside_contract(x) for x in itertools.chain(*wanted)):
        return None
    report = check_backend(engine.network, inputs=batches[-1])
    if report.first_different is not None and _values_are_finite(engine, batches[-1]):
        return f"operator {report.first_different} differs from the reference"
    exact, flips = _is_exact(engine), _may_flip(engine)
    pairs = zip(itertools.chain(*got), itertools.chain(*wanted), strict=True)
    for position, (a, b) in enumerate(pairs):
        difference = _difference(a, b, exact=exact, flips=flips)
        if difference:
            return f"output {position} {difference}"
    return None


def example(engine: Engine, images: int) -> list[Tensor]:
    """Return inputs of quarters from -4 to 4; integers are 0 or 1."""
    random = torch.Generator().manual_seed(images)
    made = []
    for spec in engine.signature.inputs:
        shape = [images if size is None else size for size in spec.shape]
        if spec.dtype.is_floating_point:
            values = torch.randint(-16, 17, shape, generator=random) / 4
        else:
            values = torch.randint(0, 2, shape, generator=random)
        made.append(values.to(spec.dtype))
    return made


def outputs(engine: Engine, inputs: list[Tensor]) -> list[Any]:
    return list(engine._run(inputs))


def _is_outside_contract(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all())


def _values_are_finite(engine: Engine, inputs: list[Tensor]) -> bool:
    """Whether no NaN nor infinity reaches an operator on bits, which says nothing of them."""
    finite = True

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        nonlocal finite
        result = call_node(node, args, kwargs, prepack=False)
        several = result if isinstance(result, tuple | list) else (result,)
        finite = finite and not any(_is_outside_contract(x) for x in several)
        return result

    with torch.no_grad(), biper_engine.use_backend("reference"):
        interpret(engine.graph_module, inputs, call)
    return finite


def _is_exact(engine: Engine) -> bool:
    """Whether every sum of the network is exact in float32, by its operators and its constants."""
    declared = list(map(operator_of, engine.graph_module.graph.nodes))
    if any(d is not None and d.name not in _EXACT for d in declared):
        return False
    # Products of products of quarters, a few thousand of them, stay below 2^24 units.
    return all(
        bool(((x * 4).frac() == 0).all()) and bool((x.abs() <= 16).all())
        for x in engine.state_dict().values()
        if x.is_floating_point()
    ) and not _has_tiles(engine)


def _has_tiles(engine: Engine) -> bool:
    """Whether a convolution runs in Winograd's tiles, whose factors are no quarters."""
    for node in engine.graph_module.graph.nodes:
        declared = operator_of(node)
        if declared is not None and declared.name == "conv2d":
            values = network_values(engine.graph_module, engine.signature.inputs)
            weight = values[declared.named(node)["weight"]]
            if isinstance(weight, Value) and weight.shape[2:] == (7, 7):
                return True
    return False


def _may_flip(engine: Engine) -> bool:
    """Whether floats that were rounded are compared with a threshold."""
    names = {"biper.binarize", "biper.bconv2d_bits", "biper.bconv2d_float_bits", "sign", "round"}
    names |= {"floor", "ceil", "trunc", "argmax", "argmin", "topk", "sort", "where"}
    found = {d.name for d in map(operator_of, engine.graph_module.graph.nodes) if d is not None}
    return bool(found & names) or any("equal" in name or "less" in name for name in found)


def _difference(a: Any, b: Any, *, exact: bool, flips: bool) -> str | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None if type(a) is type(b) and a == b else f"is {a!r:.50}, not {b!r:.50}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
    if torch.equal(a, b) or a.numel() == 0:
        return None
    if exact:
        return f"differs in {int((a != b).sum())} of {a.numel()} values, all of which are exact"
    if flips or not a.is_floating_point():
        return None
    error = float((a.double() - b.double()).abs().max())
    scale = float(b.double().abs().max())
    return None if error <= _CLOSE * (scale + 1) else f"is {error:.3g} off, of {scale:.3g}"

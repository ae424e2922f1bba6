"""`convert`: a PyTorch BNN in, an `Engine` out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from biper_engine.conversion.pipeline import Built, build, nothing_packed
from biper_engine.conversion.segments import check_segments
from biper_engine.engine import Engine, InputSpec, Signature
from biper_engine.errors import ConversionError, UnconvertedWarning
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport, LayerReport

__all__ = ["convert"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    keep_float: Sequence[str] = (),
    unconverted: Literal["warn", "raise", "ignore"] = "warn",
    compute_dtype: torch.dtype = torch.float32,
    check: bool = True,
    metadata: Metadata | None = None,
) -> Engine:
    """Convert a binary neural network into an engine that runs on packed bits.

    The model is evaluated as `model.eval()(*example_inputs)` on a copy; the model itself is not
    changed. Layers are recognised by what they compute, not by class or name.

    Args:
        model: any `nn.Module` with float32 parameters.
        example_inputs: a tensor [N, C, H, W], or a tuple of positional arguments (any pytree of
            tensors). Batch is free afterwards; every other size is fixed, one engine per image
            size. None takes `model.input_shape`, which the networks of this package have.
        keep_float: module paths to leave in floating point, as `fnmatch` patterns.
        unconverted: what to do when a layer with binary weights or inputs stays float: warn with
            its name and cost, raise, or ignore.
        compute_dtype: dtype of float maps between layers and of float layers. float32 is the exact
            mode; float16 and bfloat16 are faster where hardware supports them, and approximate.
        check: verify the result segment by segment on the example and two seeded random inputs.
        metadata: preprocessing and class names; None takes `model.metadata` if it has one.

    Returns:
        The engine; `engine.report` says what was packed and what not, and why.

    Raises:
        ConversionError: the model cannot be captured, has no layer with binary weights, or the
            check failed.
        ValueError: an argument is out of range.

    Example:
        >>> engine = biper_engine.convert(model, torch.randn(1, 3, 32, 32))
        >>> logits = engine(images)
    """
    _check_options(unconverted, compute_dtype)
    stage = _provenance(model).stage
    if stage == 1:
        raise ConversionError(
            "This is a stage-1 network: its weights are sin(w0*w), real numbers, and no bits can "
            "hold them. Train stage 2, which takes their signs, and convert that checkpoint."
        )
    _require_float32(model)
    examples = _example_inputs(model, example_inputs)
    built = build(
        model,
        examples,
        keep_float=tuple(keep_float),
        compute_dtype=compute_dtype,
    )
    if not any(row.packed or row.binary_weight for row in built.rows):
        raise ConversionError(nothing_packed(built, _provenance(model)))
    _announce(built.rows, unconverted, tuple(keep_float))
    engine = _engine(
        model,
        built,
        metadata,
        {
            "keep_float": list(keep_float),
            "compute_dtype": str(compute_dtype).removeprefix("torch."),
        },
    )
    if check:
        _check(engine, built)
    return engine


def _check_options(unconverted: str, compute_dtype: torch.dtype) -> None:
    if unconverted not in ("warn", "raise", "ignore"):
        raise ValueError(f"`unconverted` (={unconverted!r}) must be 'warn', 'raise' or 'ignore'.")
    if compute_dtype not in _DTYPES:
        raise ValueError(f"`compute_dtype` (={compute_dtype}) must be one of {_DTYPES}.")


def _require_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ConversionError(
                f"Parameters must be float32, but `{name}` is {parameter.dtype}; pass "
                "model.float() and a float32 example. `compute_dtype` sets the engine's dtype."
            )


def _provenance(model: nn.Module) -> Provenance:
    provenance = getattr(model, "provenance", None)
    return provenance if isinstance(provenance, Provenance) else Provenance()


def _example_inputs(model: nn.Module, given: Any) -> tuple[Any, ...]:
    if isinstance(given, Tensor):
        return (given,)
    if isinstance(given, tuple):
        return given
    if given is not None:
        raise TypeError(
            f"`example_inputs` is a {type(given).__name__}; pass a tensor, or a tuple with one "
            "entry per positional argument of the model."
        )
    shape = getattr(model, "input_shape", None)
    if shape is None:
        raise ConversionError(
            f"{type(model).__name__} does not say which input it takes. Pass an example, e.g. "
            "convert(model, torch.randn(1, 3, 224, 224)); its values do not matter, its size does."
        )
    generator = torch.Generator().manual_seed(0)
    device = next(iter(model.parameters()), torch.empty(0)).device
    return (torch.randn(2, *shape, generator=generator).to(device),)


def _announce(rows: Sequence[LayerReport], unconverted: str, keep_float: tuple[str, ...]) -> None:
    left = [row for row in rows if row.binary and not row.packed and not row.by_choice]
    if not left or unconverted == "ignore":
        return
    total = sum(row.macs for row in rows) or 1
    by_reason: dict[str, list[str]] = {}
    for row in left:
        cost = f"{row.name} ({row.macs / total:.1%} of all MACs)"
        by_reason.setdefault(row.reason, []).append(cost)
    listed = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    message = f"{len(left)} binary layer(s) stay in floating point. {listed}"
    if unconverted == "raise":
        raise ConversionError(message + ". Pass unconverted='warn' to convert the rest.")
    warnings.warn(message, UnconvertedWarning, stacklevel=3)


def _engine(
    model: nn.Module, built: Built, metadata: Metadata | None, options: dict[str, Any]
) -> Engine:
    tensors = [*model.parameters(), *model.buffers()]
    report = ConversionReport(
        layers=tuple(built.rows),
        bytes_before=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        bytes_after=sum(
            buffer.numel() * buffer.element_size() for buffer in built.lowered.buffers()
        ),
    )
    placeholders = [node for node in built.lowered.graph.nodes if node.op == "placeholder"]
    signature = Signature(
        in_spec=built.in_spec,
        out_spec=built.out_spec,
        inputs=tuple(
            InputSpec(name=node.name, dtype=example.dtype, shape=(None, *example.shape[1:]))
            for node, example in zip(placeholders, built.examples, strict=True)
        ),
    )
    own = getattr(model, "metadata", None)
    return Engine(
        _bare(built.lowered),
        signature=signature,
        report=report,
        metadata=metadata or (own if isinstance(own, Metadata) else None),
        provenance=_provenance(model),
        options=options,
    )


def _bare(lowered: fx.GraphModule) -> fx.GraphModule:
    """Copy a lowered graph without the notes of the passes; tensors are shared."""
    graph = copy.deepcopy(lowered.graph)
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule(lowered, graph)


def _check(engine: Engine, built: Built) -> None:
    """Verify on the example and on two seeded random inputs."""
    generator = torch.Generator().manual_seed(0)
    batches = [built.examples]
    for _ in range(2):
        batches.append(
            tuple(
                torch.randn(example.shape, generator=generator).to(example)
                if example.dtype.is_floating_point
                else example
                for example in built.examples
            )
        )
    report = check_segments(engine, built, batches)
    if not report.ok:
        raise ConversionError(
            "The converted network does not agree with the model:\n"
            f"{report.table()}\nThis is a defect of biper_engine; please report it with the model. "
            "`check=False` skips this check."
        )

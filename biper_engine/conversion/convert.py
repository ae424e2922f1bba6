"""`convert`, from a PyTorch BNN to an `Engine`."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from biper_engine.conversion.check import Batch, check_against_model
from biper_engine.conversion.copying import unwrapped
from biper_engine.conversion.modes import plain_modes
from biper_engine.conversion.observe import FailedCallError
from biper_engine.conversion.pipeline import Built, build, nothing_packed
from biper_engine.conversion.segments import NanInputError
from biper_engine.conversion.verify_report import VerifyReport
from biper_engine.converted import ConvertedNetwork
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError, UnconvertedWarning
from biper_engine.graph.signature import InputSpec, Signature
from biper_engine.graph.structure import CONSTANT_TYPES
from biper_engine.metadata import Metadata, Provenance
from biper_engine.report import ConversionReport, LayerReport

__all__ = ["convert", "convert_and_verify"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    keep_float: Sequence[str] = (),
    unconverted: Literal["warn", "raise", "ignore"] = "warn",
    compute_dtype: torch.dtype = torch.float32,
    check: bool = True,
    metadata: Metadata | None = None,
) -> Engine:
    """Convert a binary neural network into an engine that runs on packed bits.

    A copy of the model is evaluated as `model.eval()(*example_inputs)`; the model itself is not
    changed. Layers are recognised by what they compute, not by class or name.

    Args:
        model: any `nn.Module` with float32 parameters; also the result of `torch.compile`,
            `nn.DataParallel` or `DistributedDataParallel`, or an `ExportedProgram`.
        example_inputs: a tensor [N, C, H, W], a tuple of positional arguments, or a dict of
            arguments by name, as in `model(**example_inputs)`. Each may be a pytree of tensors and
            constants (None, bool, int, float, str), which are fixed: a call must pass the same
            ones. The engine takes any batch size; every other size is fixed, one engine per image
            size. None takes `model.input_shape`, which the networks of this package have.
        keep_float: module paths to leave in floating point, as `fnmatch` patterns.
        unconverted: what to do when a layer with binary weights or inputs stays float: warn with
            its name and cost, raise, or ignore.
        compute_dtype: dtype of float maps between layers and of float layers. float32 is the exact
            mode; float16 and bfloat16 are approximate, and faster if the hardware supports them.
        check: verify the result on the example and two seeded random inputs, or only on the
            example's rows if the model computes NaN from random numbers or raises an error.
        metadata: preprocessing and class names; None takes `model.metadata` if it has one.

    Returns:
        The engine; `engine.report` says what was packed, what was not, and why.

    Raises:
        ConversionError: the model cannot be captured, has no layer with binary weights, or the
            check failed.
        TypeError: `model` is not a module, or `example_inputs` has another type.
        ValueError: an argument is out of range.

    Examples:
        >>> engine = biper_engine.convert(model, torch.randn(1, 3, 32, 32))
        >>> logits = engine(images)
    """
    engine, _ = convert_and_verify(
        model,
        example_inputs,
        keep_float=keep_float,
        unconverted=unconverted,
        compute_dtype=compute_dtype,
        check=check,
        metadata=metadata,
    )
    return engine


@plain_modes()
def convert_and_verify(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
    *,
    keep_float: Sequence[str],
    unconverted: Literal["warn", "raise", "ignore"],
    compute_dtype: torch.dtype,
    check: bool,
    metadata: Metadata | None = None,
) -> tuple[Engine, VerifyReport | None]:
    """Return the result of `convert`, and the report of its check, or None without a check."""
    _check_options(unconverted, compute_dtype)
    model = unwrapped(model)
    stage = _provenance(model).stage
    if stage == 1:
        raise ConversionError(
            "This is a stage-1 network: its weights are real numbers (in BiPer's, sin(w0*w)), and "
            "no bits can hold them. Train stage 2, which takes their signs, and convert that "
            "checkpoint."
        )
    _require_float32(model)
    args, kwargs = _example_inputs(model, example_inputs)
    built = build(
        model,
        args,
        example_kwargs=kwargs,
        keep_float=tuple(keep_float),
        compute_dtype=compute_dtype,
    )
    if not any(row.packed or row.binary_weight for row in built.rows):
        raise ConversionError(nothing_packed(built, _provenance(model)))
    _announce(built.rows, unconverted)
    _announce_checks(built.dropped_checks, unconverted)
    engine = _engine(
        model,
        built,
        _names(model, args, kwargs),
        metadata,
        {
            "keep_float": list(keep_float),
            "compute_dtype": str(compute_dtype).removeprefix("torch."),
        },
    )
    return engine, _check(engine, model, built) if check else None


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


def _example_inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of the model."""
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, tuple):
        return given, {}
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return (), dict(given)
    if given is not None:
        raise TypeError(
            f"`example_inputs` is a {type(given).__name__}; pass a tensor, a tuple with one entry "
            "per positional argument of the model, or a dict with its arguments by name."
        )
    shape = getattr(model, "input_shape", None)
    if shape is None:
        raise ConversionError(
            f"{type(model).__name__} does not say which input it takes. Pass an example, e.g. "
            "convert(model, torch.randn(1, 3, 224, 224)); its values do not matter, its size does."
        )
    generator = torch.Generator().manual_seed(0)
    device = next(iter(model.parameters()), torch.empty(0)).device
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float32, device="cpu")
    return (images.to(device),), {}


def _names(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    """Return the names of a model's parameters, and the defaults of those without an argument."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # a function without Python source
        return (), ()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return (), ()
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    left = [parameter for parameter in named[len(args) :] if parameter.name not in kwargs]
    return tuple(parameter.name for parameter in named), tuple(
        (parameter.name, parameter.default)
        for parameter in left
        if type(parameter.default) in CONSTANT_TYPES
    )


def _announce_checks(checks: Sequence[str], unconverted: str) -> None:
    if not checks or unconverted == "ignore":
        return
    message = (
        "The engine does not check values of its input, as the model does in "
        f"{', '.join(checks)}: where the model raises or prints, the engine returns a result"
    )
    if unconverted == "raise":
        raise ConversionError(message + ". Pass unconverted='warn' to convert the rest.")
    warnings.warn(message + ".", UnconvertedWarning, stacklevel=5)


def _announce(rows: Sequence[LayerReport], unconverted: str) -> None:
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
    warnings.warn(message, UnconvertedWarning, stacklevel=5)


def _engine(
    model: nn.Module,
    built: Built,
    names: tuple[tuple[str, ...], tuple[tuple[str, Any], ...]],
    metadata: Metadata | None,
    options: dict[str, Any],
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
        names=names[0],
        defaults=names[1],
    )
    own = getattr(model, "metadata", None)
    network = ConvertedNetwork(
        _bare(built.lowered),
        signature=signature,
        report=report,
        metadata=metadata or (own if isinstance(own, Metadata) else None),
        provenance=_provenance(model),
        options=options,
    )
    return Engine(network)


def _bare(lowered: fx.GraphModule) -> fx.GraphModule:
    """Copy a lowered graph without the passes' metadata; tensors are shared."""
    graph = copy.deepcopy(lowered.graph)
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule(lowered, graph)


def _check(engine: Engine, model: nn.Module, built: Built) -> VerifyReport:
    """Verify on the example and on two seeded random inputs of other batch sizes."""
    own = built.examples[0].shape[0] if built.examples else 0
    small, large = [size for size in (1, 3, 2) if size != own][:2]
    generator = torch.Generator().manual_seed(0)
    batches = [  # the first batch is also the last call
        _random_batch(built.examples, small, generator),
        built.examples,
        _random_batch(built.examples, large, generator),
    ]
    try:
        report = check_against_model(engine, model, built, batches)
    except (NanInputError, FailedCallError):
        # The logarithm of a random number, for example, or a value that the model does not take.
        batches = [_repeated(built.examples, size) for size in (small, own, large)]
        report = check_against_model(engine, model, built, batches)
    if report.ok:
        return report
    if not report.model.captured:
        sizes_called = ", ".join(str(size) for size in report.model.batches)
        raise ConversionError(
            "The model does not compute what its trace computes: with batches of "
            f"{sizes_called} images, outputs differ by {report.model.error:.1%}. It reads "
            "something that is not an argument, a parameter or a buffer, or takes another path for "
            "other inputs; make that an argument, and check with other batch sizes."
        )
    raise ConversionError(
        "The converted network does not agree with the model:\n"
        f"{report.table()}\nThis is a defect of biper_engine; please report it with the model. "
        "`check=False` skips this check."
    )


def _random_batch(examples: Batch, size: int, generator: torch.Generator) -> Batch:
    """Return normal numbers for float inputs, else the example's rows, which are valid."""
    return tuple(
        torch.randn((size, *x.shape[1:]), generator=generator).to(x)
        if x.dtype.is_floating_point
        else _repeated((x,), size)[0]
        for x in examples
    )


def _repeated(examples: Batch, size: int) -> Batch:
    return tuple(x[torch.arange(size, device=x.device) % x.shape[0]] for x in examples)

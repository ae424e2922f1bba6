"""The engine: a converted network as a `torch.nn.Module` for inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from biper_engine import ops as _ops  # noqa: F401  (registers the operators that graphs call)
from biper_engine import serialization
from biper_engine.converted import ConvertedNetwork
from biper_engine.graph.choice import backends_of
from biper_engine.graph.memory import align_weights, create_on, isolate_outputs
from biper_engine.graph.portable import from_portable, release_source, to_portable
from biper_engine.ops.cpu_threads import thread_count
from biper_engine.ops.devices import require_device
from biper_engine.ops.readable import has_plain_dispatch, is_wrapped, readable, refuse_tangents
from biper_engine.runtime import (
    Plan,
    PlanSlot,
    ProfileReport,
    is_watched,
    profile,
    program_section,
)

if TYPE_CHECKING:
    from biper_engine.export import ExportReport

__all__ = ["Engine", "load"]


class Engine(nn.Module):
    """A binary network that runs on packed bits, for inference; it is called like the model.

    Calls are safe from several threads. A returned tensor is never written to again and shares no
    memory with an input.

    A call uses the current values of the engine's tensors, also after the engine was sent to
    another process, or its tensors were written to or replaced; the next call then prepares itself
    again. Writes that PyTorch does not count, such as through `tensor.data` or NumPy, are detected
    in tensors of up to 4 kB, and in larger ones on a CPU if they change one of 32 samples of 64
    bytes; call `engine.to(engine.device)` after other such writes.

    On a CUDA GPU, calls run as CUDA graphs, one for each shape, dtype and layout of the inputs. The
    first call of a shape runs operator by operator, the second captures the graph; `warmup` does
    both at once. A batch of at least half the size of a captured one runs on that graph, if the
    network computes the images of a batch independently. Graphs may hold a quarter of the memory
    that was free at the first capture; above that, the least recently used are dropped. Work is on
    the caller's current stream. While the caller captures a graph, the engine captures nothing, and
    the caller's graph gets the engine's operators. TF32 is always off for float32.

    Args:
        network: the converted network; the engine owns its graph from now on, and has the rest as
            attributes of the same names.
    """

    def __init__(self, network: ConvertedNetwork) -> None:
        super().__init__()
        graph_module = network.graph_module
        isolate_outputs(graph_module)
        align_weights(graph_module)
        graph_module.requires_grad_(False)
        super().train(False)
        self.graph_module = release_source(graph_module.eval())
        self.signature = network.signature
        self.report = network.report
        self.metadata = network.metadata
        self.provenance = network.provenance
        self.options = dict(network.options)
        self.proof = network.proof
        self._plan = PlanSlot()
        self._returns_tensor = self.signature.out_spec == pytree.tree_structure(0)
        self._refresh()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @property
    def network(self) -> ConvertedNetwork:
        """The converted network of the engine, in its current state."""
        return ConvertedNetwork(
            **{known.name: getattr(self, known.name) for known in fields(ConvertedNetwork)}
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch, of an engine that takes a single tensor.

        Raises:
            ValueError: the engine takes several tensors.
        """
        if len(self.signature.inputs) != 1:
            raise ValueError(
                f"This engine takes {len(self.signature.inputs)} tensors ({self.signature}), so it "
                "has no single `input_shape`; see `engine.signature.inputs`."
            )
        return tuple(size for size in self.signature.inputs[0].shape if size is not None)

    @property
    def execution(self) -> str:
        """A short description of how calls run now.

        On a CPU: the number of native programs, and the operators outside; `profile` names every
        operator outside of them, with the reason. On a CUDA GPU: the number of operators in one
        CUDA graph, and of shapes of inputs that have a graph; or why calls run operator by
        operator, such as an error that ended a capture.

        Raises:
            BackendUnavailableError: a forced backend cannot run the network.
        """
        return self._get_plan().execution

    @property
    def num_threads(self) -> int:
        """Number of threads that a call from this thread may use now, if the cpu backend runs it.

        `BIPER_NUM_THREADS` and `torch.set_num_threads` set it.

        Raises:
            BackendUnavailableError: a forced backend cannot run the network.
            ValueError: `BIPER_NUM_THREADS` is not an integer from 1 to 1024.
        """
        on_cpu = "cpu" in backends_of(self.graph_module, self._device)
        return thread_count() if on_cpu else torch.get_num_threads()

    @property
    def device(self) -> torch.device | None:
        """Device of the engine's tensors; None for a network without tensors."""
        return self._device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; arguments and results have the form of the model's.

        A CUDA engine also takes images in pinned CPU memory and copies them without waiting: do not
        write to such a tensor before the results are ready.

        Raises:
            TypeError: the arguments or a dtype are not those of the conversion.
            GeometryError: the image size, number of channels or rank is not that of the conversion.
            ValueError: an input is on another device than the engine (and not in pinned memory for
                an engine on a CUDA GPU), its memory was freed, or `BIPER_NUM_THREADS` is not an
                integer from 1 to 1024.
            RuntimeError: an input requires grad while grad is enabled, or has a tangent of
                forward-mode AD.
            BackendUnavailableError: a forced backend cannot run the network.
        """
        # A network's maps evict Python from the caches between calls. The general path then takes
        # 30 us of the 350 us of a ResNet-18 for 32x32 pixels on a Zen 4, this path 10 us.
        outputs = None if kwargs or is_compiling() else self._plan.run_as_is(args)
        if outputs is None:
            inputs = self.signature.flatten(args, kwargs)
            self.signature.check(inputs, self._device)
            outputs = self._run(inputs)
        if self._returns_tensor:
            return outputs[0]
        return pytree.tree_unflatten(outputs, self.signature.out_spec)

    def warmup(self, shapes: Iterable[Sequence[int]]) -> None:
        """Run images of zeros, so that later calls with such batches need no further preparation.

        On a CUDA GPU this captures a graph of each shape, even if a larger batch has one.

        Args:
            shapes: shapes of the first input, with the batch, such as `[(1, 3, 224, 224)]`; every
                other input gets the same batch.

        Raises:
            TypeError: `shapes` contains something other than shapes.
            GeometryError: the engine does not take a shape.
            BackendUnavailableError: a forced backend cannot run the network.
        """
        for shape in shapes:
            if not isinstance(shape, Sequence) or not shape:
                raise TypeError(
                    f"`shapes` must contain shapes of whole batches, such as "
                    f"[(1, 3, 224, 224)], but it contains {shape!r}."
                )
            batch = shape[0]
            inputs = [
                torch.zeros(
                    [batch if size is None else size for size in spec.shape],
                    dtype=spec.dtype,
                    device=self._device,
                )
                for spec in self.signature.inputs
            ]
            inputs[0] = inputs[0].new_zeros(tuple(shape))
            self.signature.check(inputs, self._device)
            self._run(inputs, warm_up=True)

    def profile(self, *args: Any, rounds: int = 20, **kwargs: Any) -> ProfileReport:
        """Run the network and time each step or operator.

        The rows of a native program are its steps. Rows of operators outside programs do not add up
        to the time of a call: the time between operators is in no row, and the overhead of timing
        is in each; if there are programs, these rows say why they are outside. If the cpu backend
        ran a binary convolution, its cores' popcount peak is also measured, in about 0.1 s.

        Args:
            *args: as for a call.
            rounds: number of calls for the medians, step by step and, alternating with those,
                whole; a few more whole calls warm up first. All call the module, with hooks.
            **kwargs: as for a call.

        Raises:
            ValueError: `rounds` is below 1; otherwise as for a call.
        """
        inputs = self.signature.flatten(args, kwargs)
        self.signature.check(inputs, self._device)
        if self._device is not None:
            inputs = [x.to(self._device) for x in inputs]  # from pinned memory
        with torch.no_grad(), self._without_autocast(inputs):
            inputs, plan = self._readable(inputs), self._get_plan()
            return profile(
                *(plan.module, inputs, self._device, rounds, plan.native),
                call=partial(self, *args, **kwargs),
            )

    def save(self, path: str | os.PathLike[str], *, program: bool | None = None) -> None:
        """Write a `.biper` file atomically; `biper_engine.load` reads it.

        Args:
            path: a new file, or one to replace.
            program: whether the file also has the network's native program, which the C library
                runs (see docs/c.md). None leaves out one whose tensors are not those of the graph
                and add more than an eighth to the file. A network that is not one native program
                is saved with the reason for that instead.

        Raises:
            FileFormatError: the network has an operator, an argument or a structure of inputs or
                outputs that files cannot hold; no file is written.
            OSError: the file cannot be written; an existing file does not change.
        """
        make_program = None if program is False else program_section
        serialization.write(self.network, path, make_program=make_program, any_size=program is True)

    def export(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        *,
        batch: int | None = None,
    ) -> ExportReport:
        """Write the network for another program, and compare its answers with the engine's.

        The file is written only if the other program, where it is installed, agrees up to bits
        within rounding of their thresholds; the report has the differences. Inputs are flat, in the
        order of `signature.inputs`.

        Args:
            path: the file to write.
            format: "onnx", in standard operators; "qonnx", with signs and binary weights as
                QONNX's BipolarQuant; "openvino", on BinaryConvolution; "aoti", a package of
                `torch._inductor.aoti_compile_and_package`. None takes it from the name: .onnx, .xml
                or .pt2.
            batch: batch size of an OpenVINO file; 1 if None. In the other formats it is free.

        Raises:
            ExportError: an operator has no such form, a package is missing, or the answers differ;
                no file is written.
            OSError: the file cannot be written; an existing file does not change.
        """
        from biper_engine.export import export  # loads PyTorch's exporter

        return export(self.network, path, format, batch)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: an engine is always in evaluation mode, also inside a model in training."""
        return self

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which compiles Python code; an engine has a graph.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "torch.jit.script cannot compile an engine: use engine.export(path, format='aoti') for "
            "a program in C++, torch.export.export, or engine.save."
        )

    def extra_repr(self) -> str:
        """Return the number of packed layers, the bytes and the inputs."""
        report = self.report
        return (
            f"packed {report.packed}/{len(report.layers)} layers, "
            f"{report.bytes_before:,} -> {report.bytes_after:,} bytes, input {self.signature}"
        )

    def __repr__(self) -> str:
        return f"Engine({self.extra_repr()})"

    # -- a call -----------------------------------------------------------------------------------

    def _run(self, inputs: list[Tensor], *, warm_up: bool = False) -> Any:
        refuse_tangents(
            (spec.name, x) for spec, x in zip(self.signature.inputs, inputs, strict=True)
        )
        with self._without_autocast(inputs):
            if torch.compiler.is_compiling() or _is_traced(inputs):
                return self.graph_module.forward(*inputs)
            inputs = self._readable(inputs)
            plan = self._get_plan()
            return plan.warm_up(*inputs) if warm_up else plan.run(*inputs)

    def _readable(self, inputs: list[Tensor]) -> list[Tensor]:
        return [
            readable(spec.name, x) for spec, x in zip(self.signature.inputs, inputs, strict=True)
        ]

    def _without_autocast(self, inputs: list[Tensor]) -> AbstractContextManager[Any]:
        device = self._device or (inputs[0].device if inputs else torch.device("cpu"))
        autocast = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=False) if autocast else nullcontext()

    def _get_plan(self) -> Plan:
        signature = self.signature
        return self._plan.get(
            *(self.graph_module, self._device, signature.inputs),
            positional=signature.is_positional,
        )

    # -- state ------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "graph_module" and "_plan" in self.__dict__:
            self._refresh()

    def _refresh(self) -> None:
        """Recompute values that depend on the tensors, and drop the plan made from them."""
        tensors = [*self.graph_module.buffers(), *self.graph_module.parameters()]
        self._device = tensors[0].device if tensors else None
        create_on(self.graph_module, self._device)
        self._dtypes = tuple(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._plan.drop()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the engine as `nn.Module.to` does; its dtypes stay.

        Raises:
            BackendUnavailableError: PyTorch or this machine does not have the device.
        """
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, str | int | torch.device):
            require_device(device)
        return super().to(*args, **kwargs)

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move the engine to a GPU as `nn.Module.cuda` does; raises as `to`."""
        return self.to(
            torch.device("cuda", device) if isinstance(device, int) else device or "cuda"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for dtype in self._dtypes:
            changed = fn(torch.empty(0, dtype=dtype, device=self._device)).dtype
            if changed != dtype:
                raise TypeError(
                    f"This call would change {dtype} tensors of an engine to {changed}, but its "
                    "dtypes are fixed when it is converted. Use `.to(device)` without a dtype, or "
                    "convert the model again with `compute_dtype=torch.float16` (or bfloat16, "
                    "float32)."
                )

        def keep_layout(tensor: Tensor) -> Tensor:
            # `.to(memory_format=...)` is for float maps: packed words have only one layout.
            changed = fn(tensor)
            return changed if changed.is_floating_point() else changed.contiguous()

        super()._apply(keep_layout, recurse)  # type: ignore[no-untyped-call]
        self._refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A GraphModule is pickled as Python source and loses its nodes' names.
        modules = {**self._modules}
        del modules["graph_module"]
        graph = to_portable(self.graph_module)
        return {**self.__dict__, "_modules": modules, "_portable_graph": graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = state.pop("_portable_graph")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.graph_module = from_portable(graph).eval()


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Engine:
    """Read an engine from a `.biper` file; `engine.proof` is the file's proof, not yet replayed.

    Args:
        path: a file that `Engine.save` wrote.
        device: device of the engine.

    Raises:
        FileFormatError: the file is truncated, edited, foreign or of an unknown version; the
            message says what was found, what was expected and what to do.
        OSError: there is no such file, or it cannot be read.
        BackendUnavailableError: PyTorch or this machine does not have the device.
    """
    place = require_device(device)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever `set_default_device` says
        engine = Engine(serialization.read(path))
        return engine if place.type == "cpu" else engine.to(place)


def _after_load(engine: Engine, _incompatible_keys: Any) -> None:
    engine._refresh()


def _is_traced(inputs: list[Tensor]) -> bool:
    """Whether a call is recorded or transformed: FakeTensor, make_fx, torch.jit, torch.func."""
    return is_watched() or any(not has_plain_dispatch(x) or is_wrapped(x) for x in inputs)

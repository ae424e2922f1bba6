"""Compile kernels without a GPU, with the arguments that their launchers pass."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, and its arguments by name."""

    kernel: Any
    arguments: dict[str, Any]


@contextlib.contextmanager
def recorded(module: Any, names: list[str], capability: int) -> Iterator[list[Launch]]:
    """Note the launches of a module's kernels instead of doing them."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def note(*values: Any, **named: Any) -> None:
                given = dict(zip(self.kernel.arg_names, values, strict=False)) | named
                launches.append(Launch(self.kernel, given))

            return note

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, Recorder(getattr(module, name)))
        patch.setattr(module.launch, "capability", lambda device: capability)
        yield launches


@dataclass(frozen=True)
class Code:
    """What became of a kernel on a target.

    Attributes:
        text: machine code.
        spills: accesses to memory that stands for registers; bytes of it on AMD.
        conversions: integers that become float32, one for each accumulator of a thread.
        fused: multiply-adds with one rounding. Both of these are 0 on AMD.
    """

    target: str
    text: str
    spills: int
    registers: int
    conversions: int
    fused: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return signature, constants and attributes as a launch on a GPU would have them."""
    signature, constants, attributes = {}, {}, {}
    fixed = {parameter.name: parameter for parameter in launch.kernel.params}
    for index, name in enumerate(launch.kernel.arg_names):
        value, parameter = launch.arguments[name], fixed[name]
        free = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and free):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def compiled(launch: Launch, target: str) -> Code:
    signature, constants, attributes = specialised(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {key: launch.arguments[key] for key in OPTIONS if key in launch.arguments}
    made = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        # Scalar registers that spill go to lanes of vector registers, not to memory.
        memory = r"\.(?:vgpr_spill_count|private_segment_fixed_size): +(\d+)"
        spills = sum(map(int, re.findall(memory, text)))
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text).group(1))
    else:
        text = _sass(made.asm["cubin"])
        spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
        registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", text)))
        assert ".ftz" not in made.asm["ptx"]
    intermediate = made.asm.get("ptx", "")
    conversions = intermediate.count("cvt.rn.f32")
    # Blackwell also does two at a time: `fma.rn.f32x2`.
    fused = intermediate.count("fma.rn.f32") + intermediate.count("fma.rn.f32x2")
    return Code(target, text, spills, registers, conversions, fused)

"""Builds of csrc/c, and the library called from Python as a C program calls it."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import pytest

from tests.native.builds import need_native, shared, succeed

ROOT = Path(__file__).resolve().parents[2]
MOST_RANK = 16


def installed(temporary: pytest.TempPathFactory) -> Path:
    """Build and install csrc/c, once for all processes of a test run; return the prefix."""
    need_native()
    if shutil.which("cmake") is None:
        pytest.skip("no cmake (pip install cmake)")

    def build(folder: Path) -> Path:
        # Compiling with -O3 takes twice as long, and the bytes are the same.
        flags = "-DCMAKE_CXX_FLAGS_RELEASE=-O1"
        succeed("cmake", "-S", ROOT / "csrc/c", "-B", folder / "build", flags)
        succeed("cmake", "--build", folder / "build", "-j2")
        succeed("cmake", "--install", folder / "build", "--prefix", folder / "prefix")
        return folder / "prefix"

    return shared(temporary, "c_library", build)


def library_in(prefix: Path) -> Path:
    """Return the shared library of an installation."""
    (path,) = [
        path for path in prefix.glob("lib*/**/libbiper.*") if path.suffix in (".so", ".dylib")
    ]
    return path


class Buffer(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("values", c_int64))


class TensorInfo(ctypes.Structure):
    _fields_ = (
        *(("name", c_char_p), ("type", c_int), ("rank", c_int32)),
        *(("sizes", c_int64 * MOST_RANK), ("values", c_int64)),
    )


class ImageInfo(ctypes.Structure):
    _fields_ = (
        *(("pixels", c_void_p), ("height", c_int64), ("width", c_int64)),
        *(("channels", c_int64), ("row_bytes", c_int64)),
    )


class Options(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("threads", c_int64))


class CError(Exception):
    """A call that failed: its status, then what `biper_error` says."""


class Library:
    """libbiper."""

    def __init__(self, path: Path) -> None:
        self.calls = ctypes.CDLL(str(path))
        for name in ("biper_error", "biper_version", "biper_class_name"):
            getattr(self.calls, name).restype = c_char_p
        for name in ("biper_input_count", "biper_output_count", "biper_class_count"):
            getattr(self.calls, name).restype = c_int64
        tensors, buffers = POINTER(TensorInfo), POINTER(Buffer)
        self.calls.biper_load.argtypes = (c_char_p, POINTER(Options), POINTER(c_void_p))
        self.calls.biper_load_memory.argtypes = (
            *(c_void_p, c_size_t, POINTER(Options), POINTER(c_void_p)),
        )
        self.calls.biper_free.argtypes = (c_void_p,)
        for name in ("input", "output"):
            getattr(self.calls, f"biper_{name}").argtypes = (c_void_p, c_int64, tensors)
            getattr(self.calls, f"biper_{name}_count").argtypes = (c_void_p,)
        self.calls.biper_class_count.argtypes = (c_void_p,)
        self.calls.biper_class_name.argtypes = (c_void_p, c_int64)
        self.calls.biper_has_preprocessing.argtypes = (c_void_p,)
        run = (c_void_p, c_int64, buffers, c_int64, buffers, c_int64)
        self.calls.biper_run.argtypes = run
        images = (c_void_p, c_int64, POINTER(ImageInfo))
        self.calls.biper_run_images.argtypes = (*images, buffers, c_int64)
        self.calls.biper_prepare_images.argtypes = (*images, buffers)

    def check(self, status: int) -> None:
        if status:
            raise CError(status, self.calls.biper_error().decode())

    def load(self, path: Path | str, threads: int = 1) -> Model:
        made, options = c_void_p(), Options(ctypes.sizeof(Options), threads)
        self.check(self.calls.biper_load(str(path).encode(), byref(options), byref(made)))
        return Model(self, made)

    def load_memory(self, data: bytes) -> Model:
        made = c_void_p()
        self.check(self.calls.biper_load_memory(data, len(data), None, byref(made)))
        return Model(self, made)


class Model:
    """A loaded network."""

    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.handle, self.library = handle, library
        self.inputs = self._described("input")
        self.outputs = self._described("output")

    def __del__(self) -> None:
        self.library.calls.biper_free(self.handle)

    def _described(self, kind: str) -> list[tuple[str, list[int]]]:
        calls = self.library.calls
        found = []
        for i in range(getattr(calls, f"biper_{kind}_count")(self.handle)):
            info = TensorInfo()
            self.library.check(getattr(calls, f"biper_{kind}")(self.handle, i, byref(info)))
            found.append((info.name.decode(), list(info.sizes[: info.rank])))
        return found

    def run(self, *inputs: np.ndarray, batch: int | None = None) -> list[np.ndarray]:
        """Run on float32 arrays of one batch."""
        batch = len(inputs[0]) // self.inputs[0][1][0] if batch is None else batch
        kept = [np.ascontiguousarray(x, dtype=np.float32) for x in inputs]
        outputs = self._outputs(batch)
        self.library.check(
            self.library.calls.biper_run(
                *(self.handle, batch, buffers(kept), len(kept), buffers(outputs), len(outputs))
            )
        )
        return outputs

    def _outputs(self, batch: int) -> list[np.ndarray]:
        return [
            np.full([batch * sizes[0], *sizes[1:]], np.nan, np.float32) for _, sizes in self.outputs
        ]

    def run_images(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run on images of bytes [H, W, C]."""
        outputs = self._outputs(len(images))
        self.library.check(
            self.library.calls.biper_run_images(
                *(self.handle, len(images), described(images), buffers(outputs), len(outputs))
            )
        )
        return outputs

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Return what an image [H, W, C] is for the network."""
        made = np.full(self.inputs[0][1], np.nan, np.float32)
        self.library.check(
            self.library.calls.biper_prepare_images(
                *(self.handle, 1, described([image]), buffers([made]))
            )
        )
        return made


def buffers(arrays: Sequence[np.ndarray]) -> ctypes.Array[Buffer]:
    return (Buffer * len(arrays))(*(Buffer(x.ctypes.data, x.size) for x in arrays))


def described(images: Sequence[np.ndarray]) -> ctypes.Array[ImageInfo]:
    """Describe images that stay where they are, perhaps with gaps between their rows."""
    return (ImageInfo * len(images))(
        *(ImageInfo(x.ctypes.data, *x.shape, x.strides[0]) for x in images)
    )

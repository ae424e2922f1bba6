"""The C library: the answers of Python, byte for byte, its messages, and what it exports."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from ctypes import byref, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import biper_engine
from biper_engine.engine import Engine, load
from biper_engine.metadata import Metadata
from biper_engine.preprocessing import image_to_tensor
from biper_engine.serialization import container
from tests.c.library import Buffer, CError, Library, buffers, installed, library_in
from tests.fuzz.bases import BASES, call_networks
from tests.golden.networks import BIPER
from tests.native.builds import run, setup_functions, succeed
from tests.networks_by_hand import classifier
from tests.runtime.test_program_section import (
    PARTS,
    rewritten,
    spliced,
    two_classifiers,
    unpacked_weights,
)

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.deep


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory)


@pytest.fixture(scope="module")
def library(prefix: Path) -> Library:
    return Library(library_in(prefix))


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("c") / "classifier.biper"
    classifier().save(path)
    return path


def inputs_of(engine: Engine, batch: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(batch)
    return [
        torch.randn([batch if n is None else n for n in spec.shape], generator=made)
        for spec in engine.signature.inputs
    ]


def require_same(library: Library, path: Path, batches: tuple[int, ...], threads: int = 1) -> None:
    engine, model = load(path), library.load(path, threads)
    for batch in batches:
        inputs = inputs_of(engine, batch)
        got = model.run(*(x.numpy() for x in inputs), batch=batch)
        for mine, wanted in zip(got, engine._run(inputs), strict=True):
            assert list(mine.shape) == list(wanted.shape)
            assert mine.tobytes() == wanted.contiguous().numpy().tobytes()


# -- answers --------------------------------------------------------------------------------------


# One of each kind; the others differ in widths.
NETWORKS = ("cifar10/resnet20_1w1a", "cifar10/vgg_small_1w1a", "imagenet/resnet18_1w1a")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.weekly] * (n not in NETWORKS)) for n in BIPER]
)
def test_networks_give_the_bytes_that_python_gives(
    name: str, library: Library, golden_file: Callable[..., Path]
) -> None:
    require_same(library, golden_file(name), (1, 3))


def test_weights_that_stay_packed_in_a_file_give_the_bytes_that_python_gives(
    library: Library, tmp_path: Path
) -> None:
    unpacked_weights().save(tmp_path / "net.biper")
    require_same(library, tmp_path / "net.biper", (1, 3))


@pytest.mark.parametrize("name", ["classifier", "binary", "float", "two"])
@pytest.mark.parametrize("threads", [1, 2])
def test_networks_by_hand_give_the_bytes_that_python_gives(
    name: str, threads: int, library: Library, tmp_path: Path
) -> None:
    BASES[name]().save(tmp_path / "net.biper")
    require_same(library, tmp_path / "net.biper", (1, 2, 7, 0), threads)


def test_every_operator_with_a_native_step_gives_the_bytes_that_python_gives(
    library: Library, tmp_path: Path
) -> None:
    loaded, path = set(), tmp_path / "net.biper"
    for name, engine in call_networks():
        engine.save(path, program=True)
        if "reason" in container.read(path)[0]["program"]:
            with pytest.raises(CError, match="is not one native program") as error:
                library.load(path)
            assert error.value.args[0] == 4
            continue
        loaded.add(name)
        require_same(library, path, (1, 3))
    assert len(loaded) > 80


def test_a_model_runs_in_several_threads_at_once(library: Library, classifier_file: Path) -> None:
    engine, model = load(classifier_file), library.load(classifier_file, threads=2)
    batches = [inputs_of(engine, batch)[0] for batch in (1, 5)]
    wanted = [engine(x).numpy().tobytes() for x in batches]
    wrong = []

    def call() -> None:
        for i in range(200):
            (got,) = model.run(batches[i % 2].numpy())
            if got.tobytes() != wanted[i % 2]:
                wrong.append(i)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_a_file_in_memory_loads(library: Library, classifier_file: Path) -> None:
    engine = load(classifier_file)
    model = library.load_memory(classifier_file.read_bytes())
    (x,) = inputs_of(engine, 2)
    assert model.run(x.numpy())[0].tobytes() == engine(x).numpy().tobytes()
    assert model.inputs == [("image", [1, *engine.input_shape])]


def test_a_size_that_no_memory_has_is_refused(library: Library) -> None:
    for size in (2**64 - 1, 2**64 - 64, 2**63):
        with pytest.raises(CError, match="not enough memory") as error:
            library.check(library.calls.biper_load_memory(b"x", size, None, byref(c_void_p())))
        assert error.value.args[0] == 5


# -- images ---------------------------------------------------------------------------------------


def with_metadata(path: Path, metadata: Metadata) -> None:
    engine = classifier()
    engine.metadata = metadata
    engine.save(path)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.7])
def test_images_become_what_python_makes_of_them(
    interpolation: Any, crop: float, library: Library, tmp_path: Path
) -> None:
    from PIL import Image

    size = classifier().input_shape
    metadata = Metadata(
        input_size=size, interpolation=interpolation, crop_pct=crop,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    with_metadata(tmp_path / "net.biper", metadata)
    model, engine = library.load(tmp_path / "net.biper"), load(tmp_path / "net.biper")
    random = np.random.default_rng(0)
    sides = [(h, w) for h in (1, 5, size[1], 37, 300) for w in (1, size[2], 29, 211)]
    for height, width in sides:
        for channels in (1, 3):
            pixels = random.integers(0, 256, (height, width, channels), np.uint8)
            image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            wanted = image_to_tensor(image, metadata)
            assert model.prepare(pixels).tobytes() == wanted.numpy().tobytes(), (height, width)
    wide = random.integers(0, 256, (9, 40, 3), np.uint8)[:, :11]  # rows with a gap
    tensor = image_to_tensor(Image.fromarray(np.ascontiguousarray(wide)), metadata)
    (logits,) = model.run_images([wide, wide])
    assert logits.tobytes() == engine(torch.stack([tensor, tensor])).numpy().tobytes()


def test_images_become_grey_as_pillow_makes_them(library: Library, tmp_path: Path) -> None:
    from PIL import Image

    g = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(42, 3))
    metadata = Metadata(input_size=(1, 6, 7), mean=(0.1,), std=(0.3,), class_names=("a", "b", "c"))
    engine = biper_engine.convert(
        _SignOf(model), torch.randn(2, 1, 6, 7, generator=g), metadata=metadata, check=False
    )
    engine.save(tmp_path / "grey.biper")
    loaded = library.load(tmp_path / "grey.biper")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    wanted = image_to_tensor(Image.fromarray(pixels), metadata)
    assert loaded.prepare(pixels).tobytes() == wanted.numpy().tobytes()


class _SignOf(torch.nn.Module):
    def __init__(self, model: torch.nn.Sequential) -> None:
        super().__init__()
        self.model = model
        model[1].weight.data = model[1].weight.data.sign()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(torch.where(x >= 0, 1.0, -1.0))


def test_a_file_without_preprocessing_takes_no_images(library: Library, tmp_path: Path) -> None:
    BASES["float"]().save(tmp_path / "net.biper")
    model = library.load(tmp_path / "net.biper")
    with pytest.raises(CError, match=r"has no preprocessing.*Prepare the images yourself"):
        model.prepare(np.zeros((4, 4, 3), np.uint8))


# -- messages -------------------------------------------------------------------------------------


def test_wrong_calls_are_refused(library: Library, classifier_file: Path) -> None:
    model = library.load(classifier_file)
    channels, height, width = load(classifier_file).input_shape
    fits = np.zeros((2, channels, height, width), np.float32)
    with pytest.raises(CError, match=r"`input 'image'` has \d+ elements, but \d+ are wanted"):
        model.run(fits[:1], batch=2)
    with pytest.raises(CError, match=r"`input_count` \(=2\) must be from 1 to 1"):
        model.run(fits, fits)
    with pytest.raises(CError, match=r"`batch` \(=-1\) must be from 0"):
        library.check(library.calls.biper_run(model.handle, -1, None, 1, None, 1))
    with pytest.raises(CError, match=r"`threads` \(=2000\) must be from 0 to 1024"):
        library.load(classifier_file, threads=2000)
    with pytest.raises(CError, match="`model` is null"):
        library.check(library.calls.biper_run(None, 1, None, 1, None, 1))


def test_an_output_in_the_memory_of_an_input_is_refused(
    library: Library, classifier_file: Path
) -> None:
    model, engine = library.load(classifier_file), load(classifier_file)
    memory = inputs_of(engine, 2)[0].numpy()
    before, classes = memory.copy(), model.outputs[0][1][1]
    given = buffers([memory])
    for first in (0, 5, memory.size - 1):
        inside = (Buffer * 1)(Buffer(memory.ctypes.data + 4 * first, 2 * classes))
        with pytest.raises(CError, match="memory of an output overlaps that of an input"):
            library.check(library.calls.biper_run(model.handle, 2, given, 1, inside, 1))
    assert np.array_equal(memory, before)


def test_files_that_cannot_be_used_are_named(
    library: Library, classifier_file: Path, tmp_path: Path
) -> None:
    data = bytearray(classifier_file.read_bytes())
    said = {
        "missing": (None, 2, "there is no such file"),
        "empty": (b"", 3, "too short for any .biper file"),
        "zip": (b"PK\x03\x04" * 9, 3, "a torch checkpoint"),
        "short": (bytes(data[:-5]), 3, "is truncated"),
        "long": (bytes(data) + b"x", 3, "has bytes after its end"),
        "edited": (bytes(data[:-3]) + b"xyz", 3, "was edited or damaged"),
    }
    for name, (contents, status, message) in said.items():
        path = tmp_path / name
        if contents is not None:
            path.write_bytes(contents)
        with pytest.raises(CError) as error:
            library.load(path)
        assert error.value.args[0] == status
        assert str(path) in error.value.args[1]
        assert message in error.value.args[1]
    with pytest.raises(CError, match="no regular file"):
        library.load(tmp_path)


def test_a_wrong_instruction_set_is_no_fault_of_the_file(
    prefix: Path, classifier_file: Path
) -> None:
    environment = {**os.environ, "BIPER_CPU_ISA": "avx1024"}
    done = run(prefix / "bin/biper-run", classifier_file, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("biper-run: BIPER_CPU_ISA (='avx1024') names no instruction set")
    assert "edited" not in done.stderr


def test_biper_run_names_no_class_where_an_output_is_not_finite(
    prefix: Path, classifier_file: Path, tmp_path: Path
) -> None:
    size = int(np.prod(load(classifier_file).input_shape))
    np.full(size, np.nan, np.float32).tofile(tmp_path / "nan.raw")
    done = run(prefix / "bin/biper-run", classifier_file, tmp_path / "nan.raw")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nan.raw' has no class: an output of the network is NaN or infinite." in done.stderr


@pytest.mark.parametrize(
    ("name", "reason"), [("missing/out.npy", "No such file"), ("folder", "directory")]
)
def test_biper_run_says_why_it_cannot_write(
    prefix: Path, classifier_file: Path, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    np.zeros(int(np.prod(load(classifier_file).input_shape)), np.float32).tofile(tmp_path / "x.raw")
    output = tmp_path / name
    done = run(prefix / "bin/biper-run", "--output", output, classifier_file, tmp_path / "x.raw")
    assert done.returncode == 1
    assert f"Cannot write '{output}': " in done.stderr
    assert reason in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.raw"]


def test_biper_run_keeps_an_output_that_it_cannot_replace(
    prefix: Path, classifier_file: Path, tmp_path: Path
) -> None:
    np.zeros(int(np.prod(load(classifier_file).input_shape)), np.float32).tofile(tmp_path / "x.raw")
    (tmp_path / "out.npy").write_bytes(b"earlier")
    (tmp_path / "out.npy.part").mkdir()
    done = run(
        prefix / "bin/biper-run",
        "--output",
        tmp_path / "out.npy",
        classifier_file,
        tmp_path / "x.raw",
    )
    assert done.returncode == 1
    assert (tmp_path / "out.npy").read_bytes() == b"earlier"


def test_a_file_without_a_program_says_how_to_get_one(library: Library, tmp_path: Path) -> None:
    classifier().save(tmp_path / "net.biper", program=False)
    with pytest.raises(CError, match=r"has no native program: save it again") as error:
        library.load(tmp_path / "net.biper")
    assert error.value.args[0] == 4


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_file_is_refused(part: str, library: Library, tmp_path: Path) -> None:
    for path in two_classifiers(tmp_path):
        require_same(library, path, (1, 3))
    path = spliced(part, tmp_path)
    with pytest.raises(CError, match=r"was not saved together with its graph") as error:
        library.load(path)
    assert error.value.args[0] == 3
    assert str(path) in error.value.args[1]


def test_a_program_without_a_seal_says_how_to_get_one(library: Library, tmp_path: Path) -> None:
    path = two_classifiers(tmp_path)[0]
    header, tensors = container.read(path)
    header["program"]["version"] = 1
    old = rewritten(tmp_path / "old.biper", header, tensors)
    with pytest.raises(CError, match=r"older version of biper_engine.*save it again") as error:
        library.load(old)
    assert error.value.args[0] == 4
    load(old).save(tmp_path / "new.biper", program=True)
    require_same(library, tmp_path / "new.biper", (1, 3))


# -- the package ----------------------------------------------------------------------------------


def test_the_library_is_small_and_exports_its_functions_alone(prefix: Path) -> None:
    path = library_in(prefix)
    assert path.stat().st_size <= 2 << 20
    if sys.platform != "linux":
        return
    symbols = succeed("nm", "-D", "--defined-only", path).split()[2::3]
    header = (ROOT / "csrc/c/biper.h").read_text(encoding="utf-8")
    assert {name for name in symbols if name} == {
        word.partition("(")[0] for line in header.splitlines() if line.startswith("BIPER_API")
        for word in line.replace("*", " ").split() if word.startswith("biper_") and "(" in word
    }  # fmt: skip
    dynamic = succeed("readelf", "-d", path)
    assert "libbiper.so.0.1]" in dynamic
    assert "python" not in dynamic
    assert "torch" not in dynamic


def test_flags_are_those_of_the_module_of_python() -> None:
    text = (ROOT / "csrc/c/CMakeLists.txt").read_text(encoding="utf-8")
    setup = setup_functions()
    for flag in ("-fno-fast-math", "-ffp-contract=off", "-fno-lto"):
        assert flag in [*setup["FLAGS"], *setup["FIXED_FLAGS"]]
        assert flag in text
    for name, flags in setup["X86_FLAGS"].items():
        kind = name.removeprefix("isa_").removesuffix(".cpp")
        assert f"set({kind} {' '.join(flags)})" in text


def test_the_example_builds_and_runs(prefix: Path, classifier_file: Path, tmp_path: Path) -> None:
    succeed(
        *("cmake", "-S", ROOT / "examples/c", "-B", tmp_path / "build"),
        f"-DCMAKE_PREFIX_PATH={prefix}",
    )
    succeed("cmake", "--build", tmp_path / "build")
    engine = load(classifier_file)
    (x,) = inputs_of(engine, 1)
    x.numpy().tofile(tmp_path / "image.raw")
    said = succeed(tmp_path / "build/classify", classifier_file, tmp_path / "image.raw")
    logits = engine(x)[0]
    best = int(logits.argmax())
    assert said.split() == ["class", str(best), "(no", "name):", f"{float(logits[best]):.9g}"]


def test_the_header_is_c11_and_the_example_compiles_alone(prefix: Path, tmp_path: Path) -> None:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    library = library_in(prefix)
    flags = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{prefix / 'include'}")
    source, program = ROOT / "examples/c/classify.c", tmp_path / "classify"
    succeed(compiler, *flags, source, f"-L{library.parent}", "-lbiper", "-o", program)


def test_biper_run_prints_classes(prefix: Path, tmp_path: Path) -> None:
    metadata = Metadata(
        input_size=classifier().input_shape,
        class_names=tuple(f"class {i}" for i in range(_classes())),
    )
    path, program = tmp_path / "net.biper", prefix / "bin/biper-run"
    with_metadata(path, metadata)
    engine = load(path)
    (x,) = inputs_of(engine, 2)
    np.save(tmp_path / "x.npy", x.numpy())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    header = b"P6\n# a comment\n30 20\n255\n"
    (tmp_path / "image.ppm").write_bytes(header + pixels.tobytes())
    np.save(tmp_path / "pixels.npy", pixels)
    x.numpy().tofile(tmp_path / "x.raw")
    images = [tmp_path / name for name in ("x.npy", "image.ppm", "pixels.npy", "x.raw")]
    said = succeed(program, "--top", "1", "--output", tmp_path / "y.npy", path, *images)
    assert said.count("class ") == 6
    assert "image.ppm\n" in said
    from PIL import Image

    tensor = image_to_tensor(Image.fromarray(pixels), metadata)[None]
    wanted = torch.cat([engine(y) for y in (x, tensor, tensor, x)])
    assert np.load(tmp_path / "y.npy").tobytes() == wanted.numpy().tobytes()
    assert "input image: [N, " in succeed(program, path)


def _classes() -> int:
    return int(classifier()(torch.zeros(1, *classifier().input_shape)).shape[1])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--help",), 0, "Usage: biper-run"),
        (("--version",), 0, "biper-run 0.1.0"),
        ((), 2, "Name a .biper file. See biper-run --help."),
        (("--wrong", "FILE"), 2, "There is no option --wrong."),
        (("--top", "x", "FILE"), 2, "--top (='x') must be an integer from 1 to 1024."),
        (("--top",), 2, "--top needs a value."),
        (("missing.biper", "x.npy"), 1, "Cannot read 'missing.biper': there is no such file."),
        (("FILE", "missing.npy"), 1, "Cannot read 'missing.npy': "),
        (("FILE", "."), 1, "Cannot read '.': "),
        (("FILE", "/dev/null"), 1, "Cannot read '/dev/null': it is empty"),
        (("FILE", "FILE"), 1, "but the network takes [N, 3, "),
    ],
)
def test_biper_run_says_what_is_wrong(
    words: tuple[str, ...], status: int, said: str, prefix: Path, classifier_file: Path
) -> None:
    named = [str(classifier_file) if word == "FILE" else word for word in words]
    done = run(prefix / "bin/biper-run", *named, env=dict(os.environ))
    assert done.returncode == status, done.stderr
    assert said in (done.stdout if status == 0 else done.stderr)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"GIF89a", "a GIF image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image"),
        (b"II*\0", "a TIFF image"),
        (b"MM\0*", "a TIFF image"),
        (b"\0\0\0\x20ftypavif", "a HEIF or AVIF image"),
        (b"BM", "a BMP image"),
        (b"P3\n2 2\n", "a PBM, PGM, PPM or PAM image that is not of bytes"),
        (b"PK\x03\x04", "a zip archive"),
    ],
)
def test_biper_run_takes_no_other_image_for_raw_values(
    start: bytes, kind: str, prefix: Path, classifier_file: Path, tmp_path: Path
) -> None:
    size = 4 * int(np.prod(load(classifier_file).input_shape))
    start += size.to_bytes(4, "little") if start == b"BM" else b""
    (tmp_path / "photo").write_bytes(start + bytes(size - len(start)))
    done = run(prefix / "bin/biper-run", classifier_file, tmp_path / "photo")
    assert done.returncode == 1
    assert f"photo' is {kind}" in done.stderr
    assert "convert it to .ppm" in done.stderr

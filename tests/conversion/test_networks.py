"""The networks of this package, with golden weights on every backend and with random weights."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from biper_engine import backends, load, use_backend
from biper_engine.conversion import convert, verify
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError, UnconvertedWarning
from biper_engine.models import Network, available, build
from tests.golden import weights

PACKED = {
    "cifar10/resnet20_1w1a": 18,
    "cifar10/resnet20_1w32a": 0,
    "cifar10/resnet18_1w1a": 16,
    "cifar10/resnet18A_1w1a": 16,
    "cifar10/resnet18B_1w1a": 16,
    "cifar10/resnet18C_1w1a": 16,
    "cifar10/vgg_small_1w1a": 5,
    "imagenet/resnet18_1w1a": 16,
    "imagenet/resnet34_1w1a": 32,
    "imagenet/mobilenet_1w1a": 39,
}


# The others, which differ in widths or take larger images, are for `make test-deep`.
QUICK = ("cifar10/resnet20_1w1a", "cifar10/resnet18A_1w1a", "cifar10/vgg_small_1w1a")
CASES = [pytest.param(n, marks=() if n in QUICK else (pytest.mark.deep,)) for n in PACKED]


def model_of(name: str) -> Network:
    model = build(name, frequency=20, stage=2).eval()
    model.load_state_dict(weights.tensors(model))
    return model


@cache
def images_of(name: str) -> torch.Tensor:
    return torch.from_numpy(weights.images(name, 4, build(name).input_shape[1]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that converts a network once and returns its file."""

    @cache
    def file_of(name: str) -> Any:
        path = tmp_path_factory.mktemp("engines") / "network.biper"
        convert(model_of(name), unconverted="ignore", check=False).save(path)
        return path

    return file_of


def errors(engine: Engine, name: str, batch: int) -> list[float]:
    """Return the distance of each golden image's logits from the official ones in float64.

    It is relative to their norm, over the classes that are recorded.
    """
    case = weights.read("inference")[name]
    expected = torch.tensor(case["logits"]["stage2"], dtype=torch.float64)
    images = images_of(name)
    index = torch.arange(max(batch, 4)) % 4
    calls = [engine(images[part]) for part in index.split(batch)]
    logits = torch.cat(calls).double()[:, :: case["every"]]
    distance = (logits - expected[index]).norm(dim=1) / expected[index].norm(dim=1)
    # Of an image that comes more than once, the worst.
    return [float(distance[index == image].max()) for image in range(4)]


def test_every_network_is_here() -> None:
    assert tuple(PACKED) == available()


@pytest.mark.parametrize("name", CASES)
def test_every_binary_convolution_is_packed_and_the_logits_are_the_official_ones(
    name: str, files: Callable[[str], Any], run: Any
) -> None:
    engine = load(files(name))
    assert engine.report.packed == PACKED[name]
    report = verify(engine, model_of(name), images_of(name))
    assert report.ok, report.table()
    assert report.layers_equal == report.layers == PACKED[name]
    for batch in (1, 3, 8):
        # One image may have a bit that lies within rounding of its threshold.
        off = [error for error in errors(engine, name, batch) if not error <= 2e-6]
        assert len(off) <= 1, f"batch {batch}: {off}"


HALF = [
    pytest.param(n, marks=() if n == "cifar10/resnet20_1w1a" else (pytest.mark.deep,))
    for n in PACKED
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", HALF)
def test_streams_of_half_precision_verify(name: str, dtype: torch.dtype) -> None:
    model, images = model_of(name), images_of(name)[:2]
    engine = convert(model, images, compute_dtype=dtype, unconverted="ignore", check=False)
    for backend in backends():
        if backend.name not in ("cpu", "reference") or not backend.available:
            continue
        with use_backend(backend.name):
            report = verify(engine, model, images)
        assert report.ok, report.table()
        assert report.layers_equal == report.layers == PACKED[name]
        if PACKED[name]:
            assert report.input_bits_differ > 0, "half precision flips bits end to end"


def test_a_network_for_large_images_on_the_preferred_backend(files: Callable[[str], Any]) -> None:
    name = "imagenet/resnet18_1w1a"
    engine = load(files(name))
    assert files(name).stat().st_size <= 4_400_000
    assert engine.report.bytes_before == 46_820_232
    assert sum(not error <= 2e-6 for error in errors(engine, name, 3)) <= 1


def test_an_engine_knows_what_its_network_knows() -> None:
    model = build("cifar10/resnet20_1w1a", frequency=12.5).eval()
    engine = convert(model, check=False)
    assert engine.input_shape == (3, 32, 32)
    assert engine.provenance == model.provenance
    assert engine.metadata == model.metadata


def test_binary_weights_alone_stay_float_and_the_report_says_why() -> None:
    model = model_of("cifar10/resnet20_1w32a")
    with pytest.warns(
        UnconvertedWarning, match=r"18 binary layer\(s\).*binary, but its input is a ReLU"
    ):
        engine = convert(model)
    rows = {row.name: row for row in engine.report.layers}
    assert sum(row.binary_weight for row in rows.values()) == 18
    assert rows["layer3.2.conv2"].reason == "its weight is binary, but its input is a ReLU"
    assert not rows["linear"].binary_weight
    with pytest.raises(ConversionError, match="18 binary layer"):
        convert(model, unconverted="raise")


def test_the_float_operators_are_the_fewest_possible() -> None:
    """BatchNorm is folded, and a clamp comes after the max pool behind it."""
    graph = convert(build("imagenet/resnet18_1w1a"), check=False).graph_module.graph
    names = [str(node.target) for node in graph.nodes if "aten" in str(node.target)]
    stem = ["aten.conv2d.default", "aten.max_pool2d.default", "aten.hardtanh.default"]
    tail = ["aten.avg_pool2d.default", "aten.reshape.default", "aten.linear.default"]
    assert names == [*stem, *["aten.conv2d.default"] * 3, *tail]


@pytest.mark.parametrize("name", ["cifar10/resnet18A_1w1a", "imagenet/resnet18_1w1a"])
def test_a_fresh_network_and_a_zero_image(name: str) -> None:
    """BatchNorm without an offset makes zeros of zeros; of ImageNet's, the scales are 1e-8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
    engine = convert(model, check=False)
    assert engine.report.packed == PACKED[name]
    images = torch.cat([torch.zeros(1, *model.input_shape), images_of(name)[:1]])
    for image in images.split(1):
        report = verify(engine, model, image)
        assert report.ok, report.table()
        assert report.exact_zeros > 0 or bool(image.any())
    assert f"{report.exact_zeros} exact zeros" in str(report)

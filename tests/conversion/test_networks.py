"""The networks of this package, with golden weights on every backend and with random weights."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from biper_engine import backends, load, use_backend
from biper_engine.conversion import convert, verify
from biper_engine.engine import Engine
from biper_engine.errors import UnconvertedWarning
from biper_engine.models import build
from tests.golden import weights
from tests.golden.networks import BIPER, golden_images, model_of

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


# Of the others, which differ in widths or take larger images, two are for `make test-deep`, and the
# rest for `make test-weekly`.
QUICK = ("cifar10/resnet20_1w1a",)
DEEP = ("cifar10/vgg_small_1w1a", "imagenet/resnet18_1w1a")
CASES = [
    pytest.param(n, marks=[pytest.mark.deep if n in DEEP else pytest.mark.weekly])
    if n not in QUICK
    else n
    for n in PACKED
]


def errors(engine: Engine, name: str, batch: int) -> list[float]:
    """Return the distance of each golden image's logits from the official ones in float64.

    It is relative to their norm, over the classes that are recorded.
    """
    case = weights.read("inference")[name]
    expected = torch.tensor(case["logits"]["stage2"], dtype=torch.float64)
    images = golden_images(name)
    index = torch.arange(max(batch, 4)) % 4
    calls = [engine(images[part]) for part in index.split(batch)]
    logits = torch.cat(calls).double()[:, :: case["every"]]
    distance = (logits - expected[index]).norm(dim=1) / expected[index].norm(dim=1)
    # Of an image that comes more than once, the worst.
    return [float(distance[index == image].max()) for image in range(4)]


def test_every_network_is_here() -> None:
    assert tuple(PACKED) == BIPER


def assert_official(engine: Engine, name: str, *batches: int) -> None:
    for batch in batches:
        # One image may have a bit that lies within rounding of its threshold.
        off = [error for error in errors(engine, name, batch) if not error <= 2e-6]
        assert len(off) <= 1, f"batch {batch}: {off}"


@pytest.mark.parametrize("name", CASES)
def test_every_binary_convolution_is_packed_and_the_logits_are_the_official_ones(
    name: str, golden_file: Callable[..., Path]
) -> None:
    engine = load(golden_file(name))
    assert engine.report.packed == PACKED[name]
    report = verify(engine, model_of(name), golden_images(name))
    assert report.ok, report.table()
    assert report.layers_equal == report.layers == PACKED[name]
    assert_official(engine, name, 3)


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.weekly,)) for n in PACKED]
)
def test_the_logits_are_the_official_ones_on_every_backend(
    name: str, golden_file: Callable[..., Path], run: Any
) -> None:
    assert_official(load(golden_file(name)), name, 1, 3, 8)


@pytest.mark.weekly
@pytest.mark.parametrize("name", PACKED)
def test_every_binary_convolution_is_exact_on_every_backend(
    name: str, golden_file: Callable[..., Path], run: Any
) -> None:
    report = verify(load(golden_file(name)), model_of(name), golden_images(name))
    assert report.ok, report.table()


# The deep tests have one of each kind.
KINDS = [
    (QUICK[0], torch.float16, "cpu"),
    (QUICK[0], torch.bfloat16, "reference"),
    ("cifar10/vgg_small_1w1a", torch.float16, "cpu"),
    ("imagenet/resnet18_1w1a", torch.float16, "cpu"),
]
EVERY = product(PACKED, (torch.float16, torch.bfloat16), ("cpu", "reference"))
HALF = [
    pytest.param(*case, marks=pytest.mark.deep if case in KINDS else pytest.mark.weekly)
    for case in EVERY
]


@pytest.mark.parametrize(("name", "dtype", "backend"), HALF)
def test_streams_of_half_precision_verify(
    name: str, dtype: torch.dtype, backend: str, golden_file: Callable[..., Path]
) -> None:
    if not {info.name: info.available for info in backends()}[backend]:
        pytest.skip(f"no {backend} backend here")
    engine = load(golden_file(name, dtype))
    with use_backend(backend):
        report = verify(engine, model_of(name), golden_images(name)[:2])
    assert report.ok, report.table()
    assert report.layers_equal == report.layers == PACKED[name]
    if PACKED[name]:
        assert report.input_bits_differ > 0, "half precision flips bits end to end"


def test_an_engine_knows_what_its_network_knows() -> None:
    model = build("cifar10/vgg_small_1w1a", frequency=12.5).eval()
    engine = convert(model, check=False)
    assert engine.input_shape == (3, 32, 32)
    assert engine.provenance == model.provenance
    assert engine.metadata == model.metadata


@pytest.mark.deep
def test_binary_weights_alone_stay_float_and_the_report_says_why() -> None:
    model = model_of("cifar10/resnet20_1w32a")
    with pytest.warns(
        UnconvertedWarning, match=r"18 binary layer\(s\).*binary, but its input is a ReLU"
    ):
        engine = convert(model, check=False)
    rows = {row.name: row for row in engine.report.layers}
    assert sum(row.binary_weight for row in rows.values()) == 18
    assert rows["layer3.2.conv2"].reason == "its weight is binary, but its input is a ReLU"
    assert not rows["linear"].binary_weight


@pytest.mark.deep
def test_the_file_is_small_and_the_float_operators_are_the_fewest_possible(
    golden_file: Callable[..., Path],
) -> None:
    """BatchNorm is folded, and a clamp comes after the max pool behind it."""
    path = golden_file("imagenet/resnet18_1w1a")
    assert path.stat().st_size <= 4_400_000
    engine = load(path)
    assert engine.report.bytes_before == 46_820_232
    graph = engine.graph_module.graph
    names = [str(node.target) for node in graph.nodes if "aten" in str(node.target)]
    stem = ["aten.conv2d.default", "aten.max_pool2d.default", "aten.hardtanh.default"]
    tail = ["aten.avg_pool2d.default", "aten.reshape.default", "aten.linear.default"]
    assert names == [*stem, *["aten.conv2d.default"] * 3, *tail]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cifar10/resnet20_1w1a", marks=pytest.mark.deep),
        pytest.param("imagenet/resnet18_1w1a", marks=pytest.mark.weekly),
    ],
)
def test_a_fresh_network_and_a_zero_image(name: str) -> None:
    """BatchNorm without an offset makes zeros of zeros; of ImageNet's, the scales are 1e-8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
    engine = convert(model, check=False)
    assert engine.report.packed == PACKED[name]
    report = verify(engine, model, torch.zeros(1, *model.input_shape))
    assert report.ok, report.table()
    assert report.exact_zeros > 0
    assert f"{report.exact_zeros} exact zeros" in str(report)

"""Networks that are not BiPer's: the equations, names, counts and checkpoints of their papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biper_engine.errors import CheckpointError
from biper_engine.metadata import Provenance
from biper_engine.models import (
    available,
    build,
    export_official,
    load_checkpoint,
    registry,
    save_checkpoint,
)
from biper_engine.models.bnext import AnnealedConv2d, BNext
from biper_engine.models.network import Network
from biper_engine.models.registry import architecture, state_dict_shapes
from biper_engine.nn import BinaryLayer, binary_layers
from tests.golden.networks import BIPER
from tests.golden.published import SMALL, digest, names, small
from tests.models.published_equations import Published

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = tuple(n for n in available() if n not in BIPER and architecture(n).is_binary)
ADABIN = "cifar10/adabin_resnet20"
TINY = "imagenet/bnext_of_these_tests"

# Binary layers, parameters, MACs of the binary layers' and of the other layers' weights.
COUNTS = {
    "cifar10/birealnet18": (16, 11_173_962, 547_356_672, 8_066_048),
    "cifar10/adabin_resnet20": (18, 271_262, 40_108_032, 443_008),
    "imagenet/reactnet_resnet18": (16, 11_704_424, 1_676_279_808, 137_793_536),
    "imagenet/reactnet_a": (31, 29_343_592, 4_816_896_000, 11_862_016),
    "imagenet/bnext_tiny": (31, 30_862_236, 4_816_896_000, 13_344_512),
    "imagenet/bnext_small": (31, 68_594_614, 10_838_016_000, 21_128_640),
    "imagenet/bnext_middle": (47, 134_501_974, 20_086_456_320, 24_262_080),
    "imagenet/bnext_large": (63, 326_546_640, 52_150_927_360, 39_418_880),
    "imagenet/binaryvit_small": (124, 22_491_771, 3_556_675_584, 10_145_792),
}
LARGE = ("imagenet/bnext_middle", "imagenet/bnext_large")
COUNTED = [pytest.param(n, marks=[pytest.mark.deep] * (n in LARGE)) for n in COUNTS]


def images_of(name: str, count: int) -> Tensor:
    size = SMALL[name][1]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def equations_of(network: Network, parameters: dict[str, Tensor]) -> Published:
    return Published({**network.state_dict(), **parameters}, training=network.training)


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_the_equations(name: str) -> None:
    network = small(name).double().eval()
    images = images_of(name, 2)
    with torch.no_grad():
        wanted = getattr(equations_of(network, {}), name)(images)
        torch.testing.assert_close(network(images), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.some(3)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_those_of_the_equations(name: str) -> None:
    network = small(name).double().train()
    images = images_of(name, 3)
    parameters = {
        key: value.detach().clone().requires_grad_() for key, value in network.named_parameters()
    }
    logits = getattr(equations_of(network, parameters), name)(images)
    factors = torch.arange(logits.numel(), dtype=torch.float64).view_as(logits).cos()
    wanted = torch.autograd.grad(
        (logits * factors).sum(), list(parameters.values()), allow_unused=True
    )
    (network(images) * factors).sum().backward()
    size = max(float(gradient.norm()) for gradient in wanted if gradient is not None)
    for (key, parameter), gradient in zip(network.named_parameters(), wanted, strict=True):
        if gradient is None:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        # Gradients that cancel, as that of a bias before BatchNorm, are rounding of the others.
        bound = 1e-9 * float(gradient.norm()) + 1e-13 * size
        assert float((parameter.grad - gradient).norm()) <= bound, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_official_code(name: str) -> None:
    shapes = {
        key: list(shape)
        for key, shape in state_dict_shapes(name, architecture(name).num_classes).items()
    }
    wanted = names()[name]
    assert (digest(shapes) if isinstance(wanted, str) else shapes) == wanted


def counted(network: Network) -> tuple[int, int]:
    """Return the MACs of one image in binary layers and in the others, of all that have weights."""
    macs = {True: 0, False: 0}

    def count(module: Any, _: Any, result: Tensor) -> None:
        taps = module.weight[0].numel() if isinstance(module, nn.Linear) else 0
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            taps = module.in_channels // module.groups * height * width
        macs[isinstance(module, BinaryLayer)] += taps * result.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        logits = network(torch.zeros(1, *network.input_shape, device="meta"))
    assert logits.shape == (1, 7)
    return macs[True], macs[False]


@pytest.mark.some(2)
@pytest.mark.parametrize("name", COUNTED)
def test_layers_parameters_and_macs(name: str) -> None:
    layers, parameters, *macs = COUNTS[name]
    with torch.device("meta"):
        network = build(name, num_classes=7).eval()
    assert len(list(binary_layers(network))) == layers
    classifier = network.get_submodule(architecture(name).classifier)
    assert isinstance(classifier, nn.Linear)
    missing = (architecture(name).num_classes - 7) * (classifier.in_features + 1)
    assert sum(p.numel() for p in network.parameters()) + missing == parameters
    binary, others = counted(network)
    assert [binary, others + missing - missing // (classifier.in_features + 1)] == macs


def test_every_published_network_is_counted() -> None:
    assert tuple(COUNTS) == PUBLISHED == tuple(names())


# Table 2 of ReActNet: binary operations and floating-point ones.
@pytest.mark.parametrize(
    ("name", "binary", "others"),
    [("imagenet/reactnet_a", 4.82e9, 0.12e8), ("imagenet/reactnet_resnet18", 1.68e9, None)],
)
def test_operations_are_those_of_the_paper_of_reactnet(
    name: str, binary: float, others: float | None
) -> None:
    assert COUNTS[name][2] == pytest.approx(binary, rel=0.003)
    assert others is None or COUNTS[name][3] == pytest.approx(others, rel=0.02)


# README of BNext: operations in 10^9, one for 64 binary ones, and the share of the binary ones.
@pytest.mark.parametrize(
    ("size", "operations", "share"),
    [
        ("tiny", 0.077, 0.9781),
        ("small", 0.172, 0.9847),
        ("middle", 0.317, 0.9902),
        ("large", 0.819, 0.9949),
    ],
)
def test_operations_are_those_of_the_readme_of_bnext(
    size: str, operations: float, share: float
) -> None:
    binary = COUNTS[f"imagenet/bnext_{size}"][2]
    assert binary / 64e9 == pytest.approx(operations * share, rel=0.003)


def test_a_frequency_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`frequency` \(=20\) is for the networks of BiPer; cifar"
    ):
        build(ADABIN, frequency=20)


@pytest.mark.parametrize("name", SMALL)
def test_stage_1_multiplies_with_real_weights(name: str) -> None:
    network = small(name)
    layers = [layer for _, layer in binary_layers(network)]
    assert {layer.stage for layer in layers} == {2}
    for layer in layers:
        row = layer.quantized_weight()[0]
        assert len(row.unique()) == 2
        layer.stage = 1
        assert len(layer.quantized_weight()[0].unique()) > 2
        with pytest.raises(ValueError, match="`stage`"):
            layer.stage = 3
    assert {layer.stage for layer in layers} == {1}


def test_weights_of_bnext_harden_with_their_temperature() -> None:
    layer = AnnealedConv2d(1, 1, 1, 1, stage=1)
    nn.init.constant_(layer.weight, -0.25)
    for temperature, wanted in ((1.0, -0.25), (0.5, -0.5), (0.1, -1.0), (1e-8, -1.0), (0.0, -1.0)):
        layer.temperature.fill_(temperature)
        assert layer.quantized_weight().item() == wanted
        assert layer.stage == (2 if temperature < 1e-7 else 1)


def test_training_keeps_weights_and_shares_of_bnext_in_their_ranges() -> None:
    network = small("bnext").train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("scale", "binary_conv.weight")):
                parameter.mul_(10)
    network(torch.randn(2, 3, 64, 64))
    for name, parameter in network.named_parameters():
        if name.endswith("binary_conv.weight"):
            assert parameter.abs().max().item() <= 1.5
        elif name.endswith("scale"):
            assert 0 <= parameter.min().item() <= parameter.max().item() <= 1


class TestCheckpoints:
    @pytest.fixture
    def tiny(self, monkeypatch: pytest.MonkeyPatch) -> Network:
        """A small BNext under a name of its own."""
        entry = registry._published(TINY, BNext, "", None, width=8, depths=(1, 1, 1, 1))
        monkeypatch.setitem(registry._ARCHITECTURES, TINY, entry)
        return build(TINY)

    def test_the_published_form_loads_without_further_words(self, tmp_path: Path) -> None:
        network = build(ADABIN)
        state = {f"module.{key}": value for key, value in network.state_dict().items()}
        path = tmp_path / "model.th"
        torch.save({"state_dict": state, "best_prec1": torch.tensor(88.02)}, path)
        loaded = load_checkpoint(path)
        assert loaded.provenance == Provenance(architecture=ADABIN, frequency=None, stage=2)
        assert loaded.metadata == architecture(ADABIN).metadata
        ours, theirs = network.state_dict(), loaded.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        with pytest.raises(CheckpointError, match="whose weights have no frequency"):
            load_checkpoint(path, frequency=20)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_our_form_has_the_stage_and_no_frequency(self, tmp_path: Path, stage: int) -> None:
        network = build(ADABIN, num_classes=3, stage=stage)
        save_checkpoint(tmp_path / "net.pt", network)
        loaded = load_checkpoint(tmp_path / "net.pt")
        assert loaded.provenance == network.provenance
        assert {layer.stage for _, layer in binary_layers(loaded)} == {stage}

    def test_a_file_that_either_stage_may_have_written_needs_the_stage(
        self, tmp_path: Path, tiny: Network, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert architecture("imagenet/reactnet_resnet18").published_stage is None
        entry = registry._published(
            TINY, BNext, "", None, published_stage=None, width=8, depths=(1, 1, 1, 1)
        )
        monkeypatch.setitem(registry._ARCHITECTURES, TINY, entry)
        torch.save(tiny.state_dict(), tmp_path / "bare.pth")
        with pytest.raises(CheckpointError, match=r"does not say its stage.*Pass stage=2"):
            load_checkpoint(tmp_path / "bare.pth", arch=TINY)
        assert load_checkpoint(tmp_path / "bare.pth", arch=TINY, stage=2).provenance.stage == 2

    def test_the_temperature_of_a_file_says_its_stage(self, tmp_path: Path, tiny: Network) -> None:
        for _, layer in binary_layers(tiny):
            layer.stage = 1
        torch.save({"model": tiny.state_dict()}, tmp_path / "warm.pth")
        with pytest.raises(CheckpointError, match="is of stage 1 by the temperature"):
            load_checkpoint(tmp_path / "warm.pth", arch=TINY)
        assert load_checkpoint(tmp_path / "warm.pth", arch=TINY, stage=1).provenance.stage == 1

    def test_the_official_form_of_biper_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="wanted a network of BiPer"):
            export_official(tmp_path / "none", build(ADABIN), epochs=1)
        assert not (tmp_path / "none").exists()


def test_the_page_has_the_counts_and_the_published_accuracies() -> None:
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text("utf-8")
    products = {"imagenet/binaryvit_small": (38, 265.5e6)}  # of two activations
    for name, (layers, _, binary, floats) in COUNTS.items():
        more, more_macs = products.get(name, (0, 0.0))
        layers += more
        counts = f"{(binary + more_macs) / 1e6:,.1f} M | {floats / 1e6:,.1f} M"
        assert f"| `{name}` | {layers} | {counts} |" in page
        top1 = architecture(name).reported_top1
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert top1 is None or f" | {top1} % | " in row

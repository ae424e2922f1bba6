"""Trained weights as signs: what is read is what was written, as far as stage 2 can tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import biper_engine
from biper_engine import models
from biper_engine.models import registry, signs_file
from biper_engine.nn import binarize_weight, binary_layers
from biper_engine.nn.binarizers import WEIGHT_BINARIZERS, wave
from biper_engine.preprocessing import image_to_tensor, raw_pixels
from biper_engine.training.data import DIGITS_METADATA, digits
from biper_engine.training.recipe import read_recipe
from biper_engine.training.recipe import shipped as recipes

FREQUENCIES = {read_recipe(name).frequency for name in recipes()} | {
    *(entry.frequency for entry in map(registry.architecture, models.available())),
    *(0.1, 1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 100.0, 12345.678),
}


@pytest.mark.parametrize("binarizer", WEIGHT_BINARIZERS)
@pytest.mark.parametrize("frequency", sorted(f for f in FREQUENCIES if f is not None))
def test_latent_weights_have_exactly_the_signs(frequency: float, binarizer: str) -> None:
    bits = torch.tensor([True, False, False, True])
    latent = signs_file.latent_of(bits, frequency)
    assert latent.dtype == torch.float32
    found = binarize_weight(latent, frequency=frequency, stage=2, binarizer=binarizer)
    assert found.tolist() == [1.0, -1.0, -1.0, 1.0]
    if binarizer != "sign":  # far from every zero, whatever sine the machine has
        assert float(wave(latent, frequency, binarizer).abs().min()) > 0.49


def trained_like(**options: object) -> models.Network:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = models.build("cifar10/resnet20_1w1a", num_classes=7, **options).eval()
        for _, layer in binary_layers(network):
            layer.latent().data.mul_(3)  # over several periods
        for name, value in network.state_dict().items():
            if "running_mean" in name or name.endswith("alpha"):
                value.normal_()
    network.metadata = DIGITS_METADATA
    return network


@pytest.mark.parametrize("options", [{"frequency": 10.0}, {"weight_binarizer": "triangle"}])
def test_a_network_gives_the_same_bits_when_it_is_read(
    tmp_path: Path, options: dict[str, object]
) -> None:
    network = trained_like(**options)
    signs_file.write_signs(tmp_path / "signs.safetensors", network)
    before = torch.get_rng_state()
    found = signs_file.read_signs(tmp_path / "signs.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training
    assert (found.provenance, found.metadata) == (network.provenance, network.metadata)
    latent = {f"{name}.weight" for name, _ in binary_layers(network)}
    for key, value in network.state_dict().items():
        if key not in latent:
            assert torch.equal(found.state_dict()[key], value), key
    for (_, ours), (_, theirs) in zip(binary_layers(found), binary_layers(network), strict=True):
        assert torch.equal(ours.quantized_weight(), theirs.quantized_weight())
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(found(images), network(images))
    assert (tmp_path / "signs.safetensors").stat().st_size < 80_000


def test_what_signs_do_not_tell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "signs.safetensors"
    with pytest.raises(ValueError, match="stage 1, whose weights are more than their signs"):
        signs_file.write_signs(path, trained_like(stage=1))
    with pytest.raises(ValueError, match="adabin_resnet20 of stage 2, whose weights are more"):
        signs_file.write_signs(path, models.build("cifar10/adabin_resnet20"))
    network = trained_like()
    network.get_parameter("layer1.0.conv1.weight").data[0, 0, 0, 0] = 0.0
    with pytest.raises(ValueError, match=r"`layer1.0.conv1.weight` has a weight without a sign"):
        signs_file.write_signs(path, network)
    assert not path.exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "signs.safetensors"
    with pytest.raises(biper_engine.CheckpointError, match=r"Cannot read the weights '.*signs"):
        signs_file.read_signs(path)
    signs_file.write_signs(path, trained_like())
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 50):
        path.write_bytes(damaged)
        with pytest.raises(biper_engine.CheckpointError, match="Cannot read the weights"):
            signs_file.read_signs(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path, {"biper": "[" * 100_000})
    with pytest.raises(biper_engine.CheckpointError, match="Cannot read the weights"):
        signs_file.read_signs(path)
    save_file(tensors, path)
    with pytest.raises(biper_engine.CheckpointError, match="does not hold the weights of a netw"):
        signs_file.read_signs(path)


@pytest.mark.parametrize("change", ["missing", "short", "floats"])
def test_a_file_with_other_weights_is_named(tmp_path: Path, change: str) -> None:
    path, key = tmp_path / "signs.safetensors", "layer1.0.conv1.weight"
    signs_file.write_signs(path, trained_like())
    with signs_file.safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    bits = tensors.pop(key)
    if change != "missing":
        tensors[key] = bits[:-1].clone() if change == "short" else bits.float()
    save_file(tensors, path, header)
    with pytest.raises(biper_engine.CheckpointError, match=key):
        signs_file.read_signs(path)


def test_a_header_with_other_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / "signs.safetensors"
    signs_file.write_signs(path, trained_like())
    with signs_file.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["biper"])
    save_file(load_file(path), path, {"biper": json.dumps({**header, "metadata": "x"})})
    with pytest.raises(biper_engine.CheckpointError, match="does not hold the weights of a netw"):
        signs_file.read_signs(path)


@pytest.mark.some(1)
@pytest.mark.parametrize("name", models.shipped())
def test_a_trained_network_is_the_one_that_its_engine_was_made_of(name: str) -> None:
    model, engine = models.pretrained(name), models.load(name)
    assert engine.metadata == model.metadata
    images = torch.stack([image_to_tensor(one, model.metadata) for one in models.samples(name)])
    made = biper_engine.convert(model, images[:2], check=False)
    assert made.state_dict().keys() == engine.state_dict().keys()
    for key, value in made.state_dict().items():
        assert torch.equal(value, engine.state_dict()[key]), key
    with torch.inference_mode():
        assert torch.equal(made(images), engine(images))
        assert torch.equal(model(images).argmax(1), engine(images).argmax(1))


def test_a_default_device_does_not_matter() -> None:
    name, images = "digits/resnet20_1w1a", torch.rand(2, 3, 32, 32)
    wanted = models.load(name)(images)
    with torch.device("meta"):  # as after torch.set_default_device("cuda")
        model, engine = models.pretrained(name), models.load(name)
        assert torch.equal(engine(images), wanted)
        assert torch.equal(model(images).argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", models.shipped())
def test_samples_are_one_for_each_class(name: str) -> None:
    found, model = models.samples(name), models.pretrained(name)
    assert len(found) == len(models.card(name).classes)
    images = torch.stack([image_to_tensor(image, model.metadata) for image in found])
    right = model(images).argmax(1) == torch.arange(len(found))
    assert int(right.sum()) >= 0.8 * len(found)


def test_samples_of_the_digits_are_test_images() -> None:
    test = digits()[1]
    labels = test.labels().tolist()
    for label, image in enumerate(models.samples("digits/resnet20_1w1a")):
        pixels = test.pixels[labels.index(label)]
        assert torch.equal(raw_pixels(image), pixels)


@pytest.mark.parametrize("function", [models.pretrained, models.samples])
def test_an_unknown_name_has_the_nearest_one(function: object) -> None:
    with pytest.raises(ValueError, match=r"no trained network 'digits/resnet'.*Did you mean"):
        function("digits/resnet")  # type: ignore[operator]

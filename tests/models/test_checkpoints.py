import collections
import pickle

import pytest
import torch
from torch import nn

from biper_engine.errors import CheckpointError
from biper_engine.metadata import Metadata
from biper_engine.models import build, load_checkpoint, save_checkpoint
from biper_engine.nn import binary_layers
from tests.golden.networks import LARGE_ARE_DEEP

NAME = "cifar10/resnet20_1w1a"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = build(NAME, stage=2)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
    return network.eval()


@pytest.fixture
def official(network):
    """A checkpoint as the official main.py saves it."""
    state = {
        key: value.reshape(1) if key.endswith("tau") else value
        for key, value in network.state_dict().items()
    }
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "epoch": 3,
        "model": "resnet20_1w1a",
        "state_dict": collections.OrderedDict(state),
        "best_prec1": 86.98,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }


def saved(path, contents):
    torch.save(contents, path)
    return path


def write_config(directory, text, model="resnet20_1w1a"):
    lines = f"model:  {model}\nprint_freq:  100\n{text}\nload_ckpt_stage1:  \n"
    (directory / "config.txt").write_text(f"2024-03-01 12:00:00\n\n{lines}")


def same_weights(network, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


class TestOwnFormat:
    def test_round_trip_keeps_everything(self, network, tmp_path):
        original = build(NAME, num_classes=4, frequency=12.5, stage=1)
        original.metadata = Metadata(input_size=(3, 32, 32), class_names=("a", "b", "c", "d"))
        path = tmp_path / "net.pt"
        save_checkpoint(path, original, config={"lr": 0.1}, metrics={"accuracy": 0.5})
        loaded = load_checkpoint(path)
        assert same_weights(original, loaded)
        assert loaded.provenance == original.provenance
        assert loaded.metadata == original.metadata
        assert not loaded.training
        contents = torch.load(path, weights_only=True)
        assert contents["config"] == {"lr": 0.1}
        assert contents["metrics"] == {"accuracy": 0.5}
        assert (contents["format"], contents["version"]) == ("biper_engine.checkpoint", 0)

    def test_loading_leaves_the_random_state_alone(self, network, tmp_path):
        save_checkpoint(tmp_path / "net.pt", network)
        before = torch.random.get_rng_state()
        load_checkpoint(tmp_path / "net.pt")
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_agreeing_arguments_are_accepted(self, network, tmp_path):
        save_checkpoint(tmp_path / "net.pt", network)
        loaded = load_checkpoint(tmp_path / "net.pt", arch=NAME, frequency=20, stage=2)
        assert same_weights(network, loaded)

    @pytest.mark.parametrize("argument", [{"frequency": 30.0}, {"stage": 1}])
    def test_contradicting_arguments_are_refused(self, network, tmp_path, argument):
        save_checkpoint(tmp_path / "net.pt", network)
        with pytest.raises(CheckpointError, match="contradicts the file, which says 2"):
            load_checkpoint(tmp_path / "net.pt", **argument)

    def test_stage_is_that_of_the_layers(self, tmp_path):
        network = build(NAME, stage=1)
        for layer in network.modules():
            if hasattr(layer, "stage"):
                layer.stage = 2
        save_checkpoint(tmp_path / "net.pt", network)
        assert load_checkpoint(tmp_path / "net.pt").provenance.stage == 2

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("version", 99, "checkpoint version 99"),
            ("frequency", None, "entry 'frequency' is None, wanted float"),
            ("stage", "2", "entry 'stage' is '2', wanted int"),
            ("stage", 7, "stage"),
            ("frequency", -1.0, "frequency"),
            ("model", "imagenet/nothing", "does not know"),
            ("state_dict", [], "no state dict"),
            ("state_dict", {"a": 1}, "entry 'a' is int"),
            ("state_dict", {"a": torch.eye(2).to_sparse()}, "wanted a dense tensor"),
            ("state_dict", {"a": torch.ones(2, dtype=torch.complex64)}, "wanted a dense tensor"),
            ("metadata", {"crop_pct": 7}, "entry 'metadata' is invalid"),
            ("metadata", 3, "entry 'metadata' is invalid"),
        ],
    )
    def test_edited_files_are_refused(self, network, tmp_path, key, value, message):
        save_checkpoint(tmp_path / "net.pt", network)
        contents = torch.load(tmp_path / "net.pt", weights_only=True)
        contents[key] = value
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(saved(tmp_path / "edited.pt", contents))

    def test_failed_save_leaves_the_old_file_and_nothing_else(self, network, tmp_path, monkeypatch):
        path = tmp_path / "net.pt"
        save_checkpoint(path, network)
        before = path.read_bytes()

        def break_off(contents, file):
            file.write(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(torch, "save", break_off)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, network)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_saving_a_foreign_module_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"Linear that biper_engine\.models\.build did not"):
            save_checkpoint(tmp_path / "net.pt", nn.Linear(2, 2))

    def test_saving_mixed_stages_is_refused(self, tmp_path):
        network = build(NAME)
        network.layer1[0].conv1.stage = 1
        with pytest.raises(ValueError, match="mixes"):
            save_checkpoint(tmp_path / "net.pt", network)

    def test_config_must_be_plain(self, network, tmp_path):
        with pytest.raises(TypeError):
            save_checkpoint(tmp_path / "net.pt", network, config={"x": object()})


class TestOfficialFormat:
    def test_settings_come_from_config_txt(self, network, official, tmp_path):
        write_config(tmp_path, "freq:  20.0\ntau:  0.04\nstage2:  True")
        loaded = load_checkpoint(saved(tmp_path / "model_best.pth.tar", official))
        assert same_weights(network, loaded)
        assert (loaded.provenance.frequency, loaded.provenance.stage) == (20.0, 2)
        assert loaded.provenance.architecture == NAME
        assert loaded.metadata == build(NAME).metadata

    def test_stage_2_false_is_stage_1(self, official, tmp_path):
        write_config(tmp_path, "freq:  20.0\nstage2:  False")
        loaded = load_checkpoint(saved(tmp_path / "a.pth.tar", official))
        assert loaded.provenance.stage == 1

    def test_bare_prefixed_and_without_beta(self, network, official, tmp_path):
        bare = {
            f"module.{key}": value
            for key, value in official["state_dict"].items()
            if not key.endswith(("beta", "tau", "num_batches_tracked"))
        }
        path = saved(tmp_path / "bare.pth", bare)
        with pytest.raises(
            CheckpointError, match=r"resnet20_1w1a and cifar10/resnet20_1w32a.*Pass"
        ):
            load_checkpoint(path, frequency=20.0, stage=2)
        loaded = load_checkpoint(path, arch=NAME, frequency=20.0, stage=2)
        assert torch.equal(loaded.layer1[0].conv1.alpha, network.layer1[0].conv1.alpha)
        assert torch.equal(loaded.layer3[2].conv2.beta, torch.ones(64, 1, 1))

    @pytest.mark.some(2)
    @pytest.mark.parametrize("name", LARGE_ARE_DEEP)
    def test_every_network_is_told_by_its_name_and_shapes(self, tmp_path, name):
        network = build(name, stage=2)
        state = {
            key: value.reshape(1) if key.endswith("tau") else value
            for key, value in network.state_dict().items()
        }
        contents = {"epoch": 7, "model": name.split("/")[1], "state_dict": state}
        write_config(tmp_path, "freq:  20.0\nstage2:  True", model=contents["model"])
        loaded = load_checkpoint(saved(tmp_path / "model_best.pth.tar", contents))
        assert loaded.provenance.architecture == name
        assert loaded.metadata == network.metadata
        assert same_weights(network, loaded)

    def test_config_txt_names_the_network_of_a_bare_file(self, tmp_path):
        network = build("cifar10/resnet20_1w32a")
        write_config(tmp_path, "freq:  20.0\nstage2:  True", model="resnet20_1w32a")
        path = saved(tmp_path / "bare.pth", network.state_dict())
        assert load_checkpoint(path).provenance.architecture == "cifar10/resnet20_1w32a"

    def test_a_config_txt_of_another_network_is_refused(self, official, tmp_path):
        write_config(tmp_path, "freq:  20.0\nstage2:  True", model="vgg_small_1w1a")
        path = saved(tmp_path / "a.pth.tar", official)
        with pytest.raises(CheckpointError, match=r"'resnet20_1w1a', but .* of 'vgg_small_1w1a'"):
            load_checkpoint(path)

    def test_beta_is_dropped_where_the_network_has_none(self, tmp_path):
        network = build("cifar10/resnet20_1w32a")
        state = dict(network.state_dict())
        state |= {f"{key}.beta": layer.alpha for key, layer in binary_layers(network)}
        contents = {"model": "resnet20_1w32a", "state_dict": state}
        loaded = load_checkpoint(saved(tmp_path / "a.pth", contents), frequency=20.0, stage=2)
        assert same_weights(network, loaded)
        contents["state_dict"] = {**state, "conv1.beta": torch.ones(1)}
        with pytest.raises(CheckpointError, match=r"conv1\.beta is unknown"):
            load_checkpoint(saved(tmp_path / "b.pth", contents), frequency=20.0, stage=2)

    def test_beta_tells_binary_from_real_activations(self, network, tmp_path):
        path = saved(tmp_path / "bare.pth", network.state_dict())
        loaded = load_checkpoint(path, frequency=20.0, stage=2)
        assert loaded.provenance.architecture == NAME

    @pytest.mark.parametrize("steps", ["MultiStepLR", "LambdaLR", "CosineAnnealingLR"])
    def test_optimizer_and_scheduler_entries_are_ignored(self, network, official, tmp_path, steps):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        sum(parameter.sum() for parameter in network.parameters()).backward()
        optimizer.step()
        network.zero_grad()
        options = {"MultiStepLR": [3], "LambdaLR": lambda epoch: 1.0, "CosineAnnealingLR": 9}
        schedule = getattr(torch.optim.lr_scheduler, steps)(optimizer, options[steps])
        official |= {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
        official["best_prec1"] = torch.tensor(86.98)
        loaded = load_checkpoint(saved(tmp_path / "a.pth", official), frequency=20.0, stage=2)
        assert loaded.provenance.architecture == NAME

    def test_other_class_counts_are_read_from_the_shapes(self, tmp_path):
        network = build("cifar10/vgg_small_1w1a", num_classes=100)
        contents = {"model": "vgg_small_1w1a", "state_dict": network.state_dict()}
        loaded = load_checkpoint(saved(tmp_path / "a.pth", contents), frequency=20.0, stage=2)
        assert loaded.fc.out_features == 100
        assert loaded.metadata is None

    @pytest.mark.parametrize(
        ("arguments", "config", "message"),
        [
            ({"stage": 2}, None, r"does not say its frequency.*Pass frequency=20\.0"),
            ({"frequency": 20.0}, None, r"does not say its stage.*Pass stage=2"),
            ({"stage": 2}, "stage2:  True", "does not say its frequency"),
            (
                {"frequency": 30.0},
                "freq:  20.0\nstage2:  True",
                r"`frequency` \(=30\.0\) contradicts '.*config\.txt', which says 20\.0",
            ),
            ({"stage": 1}, "freq:  20.0\nstage2:  True", "`stage`.*contradicts"),
            ({}, "freq:  twenty\nstage2:  True", "'freq: twenty', wanted a number"),
            ({}, "freq:  20.0\nstage2:  yes", "'stage2: yes', wanted True or False"),
        ],
    )
    def test_missing_or_contradictory_settings(
        self, official, tmp_path, arguments, config, message
    ):
        if config is not None:
            write_config(tmp_path, config)
        path = saved(tmp_path / "a.pth.tar", official)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, **arguments)

    def test_another_architecture_is_named_with_its_first_differences(self, official, tmp_path):
        path = saved(tmp_path / "a.pth.tar", official)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, arch="cifar10/resnet18_1w1a", frequency=20.0, stage=2)
        message = str(caught.value)
        assert "is not a checkpoint of cifar10/resnet18_1w1a" in message
        assert "the file itself says 'resnet20_1w1a'" in message
        assert "conv1.weight is [16, 3, 3, 3], wanted [64, 3, 3, 3]; bn1.weight is" in message
        assert "more." in message

    def test_shapes_that_contradict_the_model_key(self, official, tmp_path):
        official["model"] = "vgg_small_1w1a"
        path = saved(tmp_path / "a.pth.tar", official)
        with pytest.raises(CheckpointError, match="not a checkpoint of cifar10/vgg_small_1w1a"):
            load_checkpoint(path, frequency=20.0, stage=2)

    def test_unknown_networks_are_refused(self, tmp_path):
        path = saved(tmp_path / "a.pth", nn.Linear(3, 4).state_dict())
        with pytest.raises(CheckpointError, match=r"fits no known network.*conv1\.weight is miss"):
            load_checkpoint(path, frequency=20.0, stage=2)

    def test_unknown_arch_argument(self, official, tmp_path):
        path = saved(tmp_path / "a.pth", official)
        with pytest.raises(ValueError, match="Did you mean 'cifar10/resnet20_1w1a'"):
            load_checkpoint(path, arch="resnet20_1w1a", frequency=20.0, stage=2)

    def test_the_state_of_our_own_training_is_refused_with_advice(self, tmp_path):
        contents = {"pytorch-lightning_version": "2.6", "state_dict": {}, "biper_config": {}}
        path = saved(tmp_path / "a.ckpt", contents)
        with pytest.raises(CheckpointError, match=r"stage1\.pt or stage2\.pt"):
            load_checkpoint(path)


class TestDamagedFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"Cannot read checkpoint .*No such file"):
            load_checkpoint(tmp_path / "none.pt")

    def test_directory(self, tmp_path):
        with pytest.raises(CheckpointError, match="Cannot read checkpoint"):
            load_checkpoint(tmp_path)

    def test_empty(self, tmp_path):
        (tmp_path / "a.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="is empty"):
            load_checkpoint(tmp_path / "a.pt")

    def test_not_a_checkpoint(self, tmp_path):
        (tmp_path / "a.pt").write_text("hello")
        with pytest.raises(CheckpointError, match=r"is not a PyTorch checkpoint.*b'hell'"):
            load_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
    def test_truncated(self, network, tmp_path, share):
        path = tmp_path / "a.pt"
        save_checkpoint(path, network)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match="is truncated"):
            load_checkpoint(path)

    @pytest.mark.parametrize("length", [1, 2, 20, 200, 2000, 20000])
    def test_truncated_in_the_old_container(self, network, tmp_path, length):
        path = tmp_path / "a.pt"
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path, frequency=20.0, stage=2)

    def test_flipped_bytes_never_raise_anything_else(self, network, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        for position in range(0, len(data), 3):
            flipped = bytearray(data)
            flipped[position] ^= 0x55
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                load_checkpoint(path, frequency=20.0, stage=2)

    def test_code_in_a_pickle_is_not_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Attack:
            def __reduce__(self):
                return (marker.write_text, ("x",))

        (tmp_path / "a.pt").write_bytes(pickle.dumps(Attack()))
        torch.save({"state_dict": Attack()}, tmp_path / "b.pt")
        for name in ("a.pt", "b.pt"):
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path / name)
        assert not marker.exists()

    def test_a_tensor_alone_is_not_a_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds a Tensor, wanted a dict"):
            load_checkpoint(saved(tmp_path / "a.pt", torch.ones(3)))

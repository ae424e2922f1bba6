"""Checkpoints in the official code's format."""

import re

import pytest
import torch
from torch import nn

from biper_engine.models import build, export_official, load_checkpoint
from tests.golden.networks import LARGE_ARE_DEEP


@pytest.mark.some(2)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", LARGE_ARE_DEEP)
def test_what_is_exported_loads_again(tmp_path, name, stage):
    network = build(name, frequency=12.5, stage=stage)
    path = export_official(tmp_path / "new" / "directory", network, epochs=3, top1=61.4)
    loaded = load_checkpoint(path)
    assert loaded.provenance == network.provenance
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_the_file_has_what_the_official_scripts_read(tmp_path):
    network = build("imagenet/resnet18_1w1a", frequency=20, stage=1)
    settings = {"dataset": "cifar10", "lr": 1e-05}
    path = export_official(tmp_path, network, epochs=3, top1=61.4, settings=settings)
    assert path.name == "model_best.pth.tar"
    contents = torch.load(path, weights_only=True)
    wanted = {"epoch": 3, "model": "resnet18_1w1a", "best_prec1": 61.4}
    assert {key: value for key, value in contents.items() if key != "state_dict"} == wanted
    assert list(contents["state_dict"]) == list(network.state_dict())
    lines = (tmp_path / "config.txt").read_text().splitlines()
    assert lines[1] == ""
    assert lines[2:] == [
        "model:  resnet18_1w1a",
        "dataset:  cifar10",
        "epochs:  3",
        "lr:  1e-05",
        "freq:  20.0",
        "stage2:  False",
    ]
    # The expression by which main_stage2.py looks for the frequency.
    match = re.search(r"freq:\s+(\d+\.\d+)", "\n".join(lines))
    assert match is not None
    assert match[1] == "20.0"


def test_a_foreign_network_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"models\.build did not make"):
        export_official(tmp_path / "none", nn.Linear(2, 2), epochs=1)
    assert not (tmp_path / "none").exists()

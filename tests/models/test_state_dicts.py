"""State dicts as training scripts leave them: under any keys, with prefixes, or two at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biper_engine.cli.sources import load_weights
from biper_engine.errors import CheckpointError
from biper_engine.models import Network, build, load_checkpoint

NAME = "cifar10/resnet18A_1w1a"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return build(NAME).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def load(path: Path, contents: Any) -> Network:
    torch.save(contents, path)
    return load_checkpoint(path, frequency=20.0, stage=2)


def check(tmp_path: Path, contents: Any, state: State) -> None:
    """Read it both as a network of the registry and into one whose code the caller has."""
    loaded = load(tmp_path / "a.pt", contents).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())
    model = build(NAME)
    load_weights(model, tmp_path / "a.pt")
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


PREFIXES = [
    *("module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "backbone.", "student."),
    *("model.module.", "net.backbone.", "some.wrapper.of.theirs.", "network._orig_mod.module."),
]


@pytest.mark.some(3)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_common_prefix_is_taken_off(tmp_path: Path, state: State, prefix: str) -> None:
    check(tmp_path, prefixed(state, prefix), state)
    beside = {"criterion.weight": torch.ones(10), "epoch": 3}
    check(tmp_path, {"state_dict": {**prefixed(state, prefix), **beside}}, state)


def test_wrappers_between_the_parts_of_a_name_are_taken_out(tmp_path: Path, state: State) -> None:
    compiled = {name.replace(".conv1.", ".conv1._orig_mod."): v for name, v in state.items()}
    check(tmp_path, compiled, state)
    parallel = {name.replace("layer1.", "layer1.module."): v for name, v in state.items()}
    check(tmp_path, prefixed(parallel, "net."), state)


KEYS = [
    *(("state_dict",), ("model",), ("model_state_dict",), ("net",), ("ema",), ("model_ema",)),
    *(("params",), ("network", "weights"), ("checkpoint", "model", "state_dict"), ("1",)),
]


@pytest.mark.some(4)
@pytest.mark.parametrize("keys", KEYS, ids="/".join)
def test_a_state_dict_under_any_keys_is_found(
    tmp_path: Path, state: State, keys: tuple[str, ...]
) -> None:
    contents: dict[str, Any] = prefixed(state, "module.")
    for key in reversed(keys):
        contents = {"epoch": 3, key: contents, "best": torch.tensor(0.5)}
    check(tmp_path, contents, state)


def test_a_foreign_lightning_checkpoint_is_read(tmp_path: Path, state: State) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    contents = {
        "pytorch-lightning_version": "2.6",
        "state_dict": {**prefixed(state, "model."), "loss.weight": torch.ones(10)},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1},
    }
    check(tmp_path, contents, state)


def test_a_dict_for_each_module_is_read(tmp_path: Path, state: State) -> None:
    tree: dict[str, Any] = {}
    for name, value in state.items():
        *modules, last = name.split(".")
        place = tree
        for module in modules:
            place = place.setdefault(module, {})
        place[last] = value
    check(tmp_path, tree, state)


def test_what_profilers_leave_is_ignored(tmp_path: Path, state: State) -> None:
    spare = {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)}
    check(tmp_path, {**state, **spare}, state)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"state_dict": ""}, {"ema": ""}),
        ({"model": "student."}, {"model": "teacher."}),
        ({"": ""}, {"model_ema": "module."}),
        ({"": ""}, {"": "ema."}),
    ],
)
def test_two_networks_that_fit_are_refused_unless_they_are_equal(
    tmp_path: Path, state: State, first: dict[str, str], second: dict[str, str]
) -> None:
    def merged(one: State, two: State) -> dict[str, Any]:
        contents: dict[str, Any] = {}
        for places, tensors in ((first, one), (second, two)):
            for key, prefix in places.items():
                place = contents.setdefault(key, {}) if key else contents
                place.update(prefixed(tensors, prefix))
        return contents

    torch.save(merged(state, other(state)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds two networks that fit: .*Save the one"):
        load_checkpoint(tmp_path / "a.pt", frequency=20.0, stage=2)
    with pytest.raises(CheckpointError, match=r"holds two networks that fit: .*Save the one"):
        load_weights(build(NAME), tmp_path / "a.pt")
    if first != {"": ""}:
        check(tmp_path, merged(state, state), state)


def test_a_teacher_of_another_size_is_not_a_second_network(tmp_path: Path, state: State) -> None:
    teacher = prefixed(build("cifar10/resnet18B_1w1a").state_dict(), "teacher.")
    torch.save({"model": {**prefixed(state, "student."), **teacher}}, tmp_path / "a.pt")
    model = build(NAME)
    load_weights(model, tmp_path / "a.pt")
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])
    loaded = load_checkpoint(tmp_path / "a.pt", arch=NAME, frequency=20.0, stage=2)
    assert torch.equal(loaded.state_dict()["conv1.weight"], state["conv1.weight"])


def test_the_names_that_do_not_fit_are_told_apart(tmp_path: Path, state: State) -> None:
    wrong = prefixed(state, "module.")
    del wrong["module.bn1.weight"]
    wrong["module.extra"] = torch.zeros(1)
    wrong["module.linear.bias"] = torch.zeros(3)
    torch.save({"net": wrong}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(build(NAME), tmp_path / "a.pt")
    assert str(caught.value) == (
        f"'{tmp_path / 'a.pt'}' does not fit ResNet18, by what is under 'net' / 'module.*': of "
        "another shape is linear.bias ([3], wanted [10]); missing is bn1.weight; unknown is extra. "
        "Pass the weights of exactly this network."
    )
    with pytest.raises(
        CheckpointError, match=r"under 'net' / 'module\.\*': bn1\.weight is missing"
    ):
        load_checkpoint(tmp_path / "a.pt", arch=NAME, frequency=20.0, stage=2)


def test_a_file_without_tensors_is_reported_as_such(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="has no state dict: there is no tensor in it, only"):
        load_checkpoint(tmp_path / "a.pt", frequency=20.0, stage=2)
    with pytest.raises(CheckpointError, match="has no state dict: there is no tensor in it"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")


def test_a_network_that_is_wrapped_itself_takes_plain_names(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": plain.state_dict()}, tmp_path / "a.pt")
    for wrapped in (
        nn.DataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))),
        nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))}),
    ):
        load_weights(wrapped, tmp_path / "a.pt")
        first = next(iter(wrapped.state_dict().values()))
        assert torch.equal(first, plain[0].weight)


def test_a_tensor_without_data_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2, device="meta").state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="entry 'weight' is without data; wanted a dense"):
        load_weights(nn.Linear(2, 2), tmp_path / "a.pt")

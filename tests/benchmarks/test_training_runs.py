"""Runs of a training side by side: what differs is told, what is not finished is refused."""

import json
import shutil
from pathlib import Path

import pytest
import training_runs


def test_runs_are_recorded_with_what_each_changes(small_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(small_run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["seed"] = 7
    config["stage2"]["lr"] = 0.125
    (other / "config.json").write_text(json.dumps(config))
    words = ["small", str(small_run), str(other), "--machine", "here", "--results", str(tmp_path)]
    assert training_runs.main(words) == 0
    held = json.loads((tmp_path / "training-small-here.json").read_text())
    first, second = held["runs"]
    assert (first["changes"], second["changes"]) == ({}, {"seed": 7, "stage2.lr": 0.125})
    result = json.loads((small_run / "result.json").read_text())
    for number, stage in enumerate(second["stages"], 1):
        assert stage["test_accuracy"] == result[f"stage{number}"]["test_accuracy"]
        assert 0 < stage["quantization_error"] < 1


def test_runs_join_a_record_that_exists(small_run: Path, tmp_path: Path) -> None:
    words = ["small", str(small_run), "--machine", "here", "--results", str(tmp_path)]
    assert training_runs.main(words) == 0
    path = tmp_path / "training-small-here.json"
    alone = json.loads(path.read_text())
    alone["versions"]["torch"] = "2.11.0"
    path.write_text(json.dumps(alone))
    other = shutil.copytree(small_run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "seed": 7}))
    assert training_runs.main(["small", str(other), *words[2:], "--add"]) == 0
    held = json.loads(path.read_text())
    first, second = held["runs"]
    assert [first] == alone["runs"]
    assert held["recipe"] == alone["recipe"]
    assert second["run"] == "other"
    assert second["changes"] == {"seed": 7}
    assert second["versions"] == {**held["versions"], "torch": second["versions"]["torch"]}


def test_a_run_that_is_not_finished_is_refused(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({"stage1": result["stage1"]}))
    words = ["small", str(run), "--machine", "here", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        training_runs.main(words)
    assert "biper train --resume" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))

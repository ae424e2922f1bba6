"""Lightning's checkpoints and the metrics, written atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from biper_engine.training import lightning_files
from biper_engine.training.lightning_files import AtomicCheckpoints, MetricsFile


def test_a_checkpoint_that_fails_halfway_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "stage1.ckpt"
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, path)

    def break_off(contents: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpoints().save_checkpoint({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}
    assert os.listdir(path.parent) == ["stage1.ckpt"]


def test_a_checkpoint_is_never_moved_from_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("written elsewhere first")

    monkeypatch.setattr(shutil, "move", never)
    monkeypatch.setattr(tempfile, "mkstemp", never)
    AtomicCheckpoints().save_checkpoint({"epoch": 1}, tmp_path / "stage1.ckpt")
    assert torch.load(tmp_path / "stage1.ckpt") == {"epoch": 1}


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "logs" / "metrics.csv")
    metrics.save()
    assert not (tmp_path / "logs").exists()
    metrics.log_metrics({"epoch": 0, "train_loss": 2.5}, 3)
    metrics.log_metrics({"epoch": 0, "val_accuracy": 0.5}, 3)
    metrics.log_metrics({"epoch": 1, "train_loss": 1.5}, 7)
    metrics.save()
    assert (tmp_path / "logs" / "metrics.csv").read_text() == (
        "epoch,step,train_loss,val_accuracy\n0,3,2.5,0.5\n1,7,1.5,\n"
    )


def test_a_resumed_run_keeps_earlier_rows_and_repeats_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for epoch in range(4):
        first.log_metrics({"epoch": epoch, "train_loss": 4.0 - epoch}, 10 * epoch)
    first.save()
    second = MetricsFile(path)
    second.log_metrics({"epoch": 2, "train_loss": 9.0}, 20)
    second.save()
    assert path.read_text() == "epoch,step,train_loss\n0,0,4.0\n1,10,3.0\n2,20,9.0\n"


def test_a_metrics_file_goes_through_the_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(lightning_files, "write_atomically", lambda path, _: written.append(path))
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"epoch": 0}, 0)
    metrics.save()
    assert written == [tmp_path / "metrics.csv"]

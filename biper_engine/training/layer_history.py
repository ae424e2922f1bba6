"""What becomes of the binary weights, by epoch and layer. Imports Lightning: import in functions.

`layers.csv` has a row for each epoch and binary layer:

    epoch, layer, weights
    flips               weights whose sign differs from that at the end of the epoch before
    quantization_error  the paper's measure, `nn.weight_errors`; empty for networks of other papers
    official_error      the official code's measure
    closed_form         the paper's measure of Laplace weights of the same spread
    spread              mean |w|

Everything is measured at the end of an epoch, with one wait for the device.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from biper_engine.files import write_atomically
from biper_engine.nn import WeightError, binary_layers, weight_errors

__all__ = ["LayerHistory"]

_COLUMNS = (
    *("epoch", "layer", "weights", "flips"),
    *("quantization_error", "official_error", "closed_form", "spread"),
)


class LayerHistory(Callback):
    """Measure the layers after each epoch, for a file of their own and for the logs.

    Logs the share of signs that changed, `sign_flips`, and the mean of `quantization_error` over
    the layers. TensorBoard gets them for each layer, too. A resumed run keeps the rows of earlier
    epochs, and compares with the signs that the interrupted epoch started from.

    Args:
        path: of the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._bits: dict[str, Tensor] = {}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self._rows = [{**row, "epoch": int(row["epoch"])} for row in csv.DictReader(file)]

    def state_dict(self) -> dict[str, Any]:
        """Return the signs at the end of the latest epoch, in bytes of eight."""
        return {name: _packed(bits) for name, bits in self._bits.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the signs of an interrupted run."""
        self._bits = dict(state_dict)  # packed; `on_train_start` knows their shapes

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the signs from which training starts."""
        # Other strategies split the weights among devices.
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            return
        stored, self._bits = self._bits, _bits(pl_module.network)
        for name, packed in stored.items():
            if name in self._bits:
                self._bits[name] = _unpacked(packed, self._bits[name])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure and log."""
        if not self._bits:
            return
        epoch, now = trainer.current_epoch, _bits(pl_module.network)
        counts = torch.stack([(now[name] != self._bits[name]).sum() for name in now]).tolist()
        flips = dict(zip(now, counts, strict=True))
        sizes = {name: bits.numel() for name, bits in now.items()}
        errors = weight_errors(pl_module.network)
        self._bits = now
        pl_module.log("sign_flips", sum(flips.values()) / sum(sizes.values()))
        if errors:
            mean = sum(one.error for one in errors.values()) / len(errors)
            pl_module.log("quantization_error", mean)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _log_layers(logger, flips, sizes, errors, trainer.global_step - 1)
        self._rows = [row for row in self._rows if row["epoch"] < epoch]
        for name, weights in sizes.items():
            self._rows.append(_row(epoch, name, weights, flips[name], errors.get(name)))
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(_COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))


def _row(
    epoch: int, name: str, weights: int, flips: int, measured: WeightError | None
) -> dict[str, Any]:
    row = {"epoch": epoch, "layer": name, "weights": weights, "flips": flips}
    if measured is None:
        return row
    return {
        **row,
        "quantization_error": measured.error,
        "official_error": measured.official,
        "closed_form": measured.closed_form,
        "spread": measured.spread,
    }


def _log_layers(
    logger: Logger,
    flips: Mapping[str, int],
    sizes: Mapping[str, int],
    errors: Mapping[str, WeightError],
    step: int,
) -> None:
    values = {f"sign_flips/{name}": count / sizes[name] for name, count in flips.items()}
    values |= {f"quantization_error/{name}": one.error for name, one in errors.items()}
    logger.log_metrics(values, step)


@torch.no_grad()
def _bits(network: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight_bits() for name, layer in binary_layers(network)}


def _packed(bits: Tensor) -> Tensor:
    """Return eight bits in each byte, on the CPU."""
    flat = bits.detach().flatten().to("cpu", torch.uint8)
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8)
    return (padded << shifts).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, like: Tensor) -> Tensor:
    """Return the bits in the shape and on the device of `like`."""
    bits = (packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: like.numel()].bool().view(like.shape).to(like.device)

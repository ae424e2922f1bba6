"""Recurrent layers beside binary ones: equal to the model, in engines and in files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biper_engine


class Recurrent(nn.Module):
    """A binary layer over tokens, then a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(F.linear(torch.sign(x), torch.sign(self.weight)) * 0.1)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(
            lambda: nn.LSTM(16, 6, 2, bidirectional=True, batch_first=True), marks=pytest.mark.deep
        ),
        lambda: nn.LSTM(16, 6, bias=False, batch_first=True),
        pytest.param(lambda: nn.LSTM(16, 6, proj_size=3, batch_first=True), marks=pytest.mark.deep),
        pytest.param(
            lambda: nn.GRU(16, 6, 2, bidirectional=True, batch_first=True), marks=pytest.mark.deep
        ),
    ],
)
def test_recurrent_layers_are_equal_after_loading(layer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recurrent(layer()).eval()
    engine = biper_engine.convert(model, torch.randn(2, 5, 16), unconverted="ignore")
    engine.save(tmp_path / "net.biper")
    loaded = biper_engine.load(tmp_path / "net.biper")
    for batch in (1, 3):
        x = torch.randn(batch, 5, 16)
        with torch.no_grad():
            (wanted, *_), (got, *_), (again, *_) = model(x), engine(x), loaded(x)
        assert torch.equal(got, again)
        torch.testing.assert_close(got, wanted)

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


STATES: dict[str, Any] = {
    "new": lambda self, x: x.new_zeros(x.shape[0], 32),
    "expanded": lambda self, x: self.start.expand(x.shape[0], -1),
    "repeated": lambda self, x: self.start.repeat(x.shape[0], 1),
    "multiplied": lambda self, x: x[:, 0] * 0,
}


class BinaryCell(nn.Module):
    """A recurrent cell whose first state is 0: its sign is 0, too."""

    def __init__(self, state: str) -> None:
        super().__init__()
        self.state = STATES[state]
        self.weights = nn.ParameterList(torch.randn(32, 32) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(32))
        self.register_buffer("start", torch.zeros(1, 32))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.state(self, x)
        for step in range(2):
            pairs = zip((x[:, step], hidden), self.weights, strict=True)
            parts = [F.linear(torch.sign(y), torch.sign(weight)) for y, weight in pairs]
            hidden = torch.tanh(0.1 * (parts[0] + parts[1] + self.bias))
        return hidden


@pytest.mark.parametrize("state", STATES)
def test_a_first_state_of_zeros_has_no_sign(state: str) -> None:
    torch.manual_seed(0)
    model, x = BinaryCell(state).eval(), torch.randn(3, 2, 32)
    engine = biper_engine.convert(model, x)
    report = biper_engine.verify(engine, model, x)
    assert report.ok
    assert "end to end: no bit differs" in report.summary()

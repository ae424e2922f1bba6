"""Small forms of networks that are not BiPer's: binary weights are packed, verified and saved."""

from pathlib import Path

import pytest
import torch

from biper_engine import load
from biper_engine.conversion import convert, verify
from biper_engine.nn import binary_layers
from tests.golden.published import SMALL, small

pytestmark = pytest.mark.usefixtures("one_thread")

CONVOLUTIONAL = [name for name in SMALL if name != "binaryvit"]
# One of each kind of layer is enough for `make test-deep`.
DEEP = ("adabin", "react_resnet", "bnext")
CASES = [
    pytest.param(n, marks=pytest.mark.deep if n in DEEP else pytest.mark.weekly)
    for n in CONVOLUTIONAL
]


@pytest.mark.parametrize("name", CASES)
def test_every_binary_weight_is_packed_and_a_file_holds_it(name: str, tmp_path: Path) -> None:
    model = small(name).eval()
    size = SMALL[name][1]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    engine = convert(model, images, unconverted="ignore", check=False)
    packed = {row.name for row in engine.report.layers if row.packed}
    assert {layer for layer, _ in binary_layers(model)} <= packed
    report = verify(engine, model, images)
    assert report.ok, report.table()
    engine.save(tmp_path / "network.biper")
    assert torch.equal(load(tmp_path / "network.biper")(images), engine(images))

"""Try an installed wheel: convert, verify, save, load and run a network on the native kernels."""

import tempfile
from pathlib import Path

import torch

import biper_engine


def main() -> None:
    """Fail unless the native backend is there and the engine is proved equal to the network."""
    missing = {info.name: info.reason for info in biper_engine.backends() if not info.available}
    assert "cpu" not in missing, missing["cpu"]
    torch.manual_seed(0)
    model = biper_engine.models.build("cifar10/resnet20_1w1a").eval()
    images = torch.randn(4, 3, 32, 32)
    engine = biper_engine.convert(model, images)
    report = biper_engine.verify(engine, model, images)
    assert report.ok, str(report)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.biper")
        engine.save(path)
        assert torch.equal(biper_engine.load(path)(images), engine(images))
    print(f"torch {torch.__version__}, {biper_engine.__file__}: {engine.execution}")


main()

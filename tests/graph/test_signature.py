"""Signatures: constants and names among the arguments, structures of results, and their files."""

import copy
import pickle
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine.conversion import verify
from biper_engine.engine import Engine
from tests.conversion.comparison import convert_quietly, images_of
from tests.conversion.foreign_models import PlainNet, seeded


class Scores(NamedTuple):
    logits: Tensor
    auxiliary: Any


class Rich(nn.Module):
    """Takes and returns more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(PlainNet)

    def forward(self, x: Tensor, scale: Any = None, mode: str = "once", times: int = 1) -> Any:
        y = self.net(x) * times
        y = y if scale is None else y * scale
        if mode == "once":
            return y
        return OrderedDict(
            scores=Scores(y, None), rest=[times, 0.5, True, mode, float("inf")], more={"y": y + 1}
        )


IMAGES = images_of((3, 8, 8))


def test_constants_and_names() -> None:
    model = Rich().eval()
    engine = convert_quietly(model, (IMAGES[:2], None, "once", 3), check=False)
    with torch.no_grad():
        expected = model(IMAGES, None, "once", 3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((IMAGES, None, "once", 3), {}),
        ((IMAGES,), {"times": 3, "mode": "once", "scale": None}),
        ((), {"x": IMAGES, "scale": None, "mode": "once", "times": 3}),
    ]
    for args, kwargs in calls:
        torch.testing.assert_close(engine(*args, **kwargs), expected, rtol=1e-5, atol=1e-5)
    assert verify(engine, model, (IMAGES,)).ok


def test_other_constants_are_refused() -> None:
    engine = convert_quietly(Rich().eval(), (IMAGES[:2], None, "once", 3), check=False)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((IMAGES, None, "once", 4), {}),
        ((IMAGES, None, "twice", 3), {}),
        ((IMAGES, None, "once", 3.0), {}),
        ((IMAGES, IMAGES, "once", 3), {}),
        ((IMAGES,), {}),
        ((IMAGES, None, "once", 3), {"x": IMAGES}),
        ((IMAGES, None, "once", 3), {"other": 1}),
    ]
    for args, kwargs in calls:
        with pytest.raises(TypeError, match=r"'once', 3\).*Other values are fixed at conversion"):
            engine(*args, **kwargs)


def test_arguments_by_name_with_defaults_left_out() -> None:
    model = Rich().eval()
    engine = convert_quietly(model, {"x": IMAGES[:2], "scale": torch.ones(2, 1)}, check=False)
    scale = torch.full((4, 1), 2.0)
    with torch.no_grad():
        expected = model(IMAGES, scale)
    for got in (
        engine(IMAGES, scale),
        engine(x=IMAGES, scale=scale),
        engine(IMAGES, scale=scale, mode="once", times=1),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="fixed at conversion"):
        engine(IMAGES, scale=scale, times=2)


def test_a_single_input_by_name() -> None:
    engine = convert_quietly(Rich().eval(), IMAGES[:2], check=False)
    torch.testing.assert_close(engine(x=IMAGES), engine(IMAGES))


@cache
def rich_engine() -> Engine:
    return convert_quietly(Rich().eval(), {"x": IMAGES[:2], "mode": "twice", "times": 2})


def twice(engine: Engine) -> Any:
    return engine(IMAGES, mode="twice", times=2)


def assert_rich(result: Any) -> None:
    assert type(result) is OrderedDict
    assert result["scores"].auxiliary is None
    assert result["rest"] == [2, 0.5, True, "twice", float("inf")]
    assert type(result["rest"][2]) is bool
    assert torch.equal(result["scores"].logits + 1, result["more"]["y"])


def test_structures_of_results(tmp_path: Path) -> None:
    model = Rich().eval()
    engine = rich_engine()
    result = twice(engine)
    assert_rich(result)
    assert type(result["scores"]) is Scores
    with torch.no_grad():
        expected = model(IMAGES, None, "twice", 2)
    torch.testing.assert_close(result["scores"].logits, expected["scores"].logits)
    engine.save(tmp_path / "rich.biper")
    loaded = biper_engine.load(tmp_path / "rich.biper")
    assert type(twice(loaded)["scores"]).__name__ == "Scores"
    for again in (loaded, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert_rich(twice(again))
        assert torch.equal(twice(again)["scores"].logits, result["scores"].logits)


def test_structures_compile() -> None:
    engine = rich_engine()
    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert_rich(compiled(engine))

"""Layers of the GPU check, on a CPU: what is right is timed, what is wrong is named."""

from typing import Any

import gpu_layers
import pytest
import torch
from gpu_layers import Case, contest, conv, equal
from gpu_roofline import Conv

from biper_engine.bench import Budget
from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry
from biper_engine.ops.backends import by_name

CPU = torch.device("cpu")
ONCE = Budget(seconds=0, fewest=1, most=1, warmup=0)
SMALL = (
    conv("small", (33, 20), 5, **gpu_layers.STREAMED),
    conv("small", (64, 32), 6, pool=gpu_layers.HALVING),
    conv("small", (32, 32), 4, groups=2, **gpu_layers.STREAMED),
    conv("small", (64, 16), 3, kernel=1, want_float=True, want_bits=False),
)


@pytest.mark.parametrize("layer", SMALL, ids=gpu_layers.variant)
def test_the_reference_is_timed_as_any_backend(
    layer: Conv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layers, "BACKENDS", ("reference", "cuda"))
    with torch.inference_mode():
        values = contest(layer, 2, CPU, ONCE)
    assert values["wrong"] == []
    assert {"reference", "float16"} <= set(values["ms"])
    assert "cuda" in values["did_not_run"] or torch.cuda.is_available()
    assert values["work"] == layer.work(2, 2).to_dict()
    assert ("int8" in values["ms"]) == (layer.geometry.groups == 1)


def test_a_backend_that_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layers, "BACKENDS", ("reference",))
    own = Case.ours
    made = []

    def ours(case: Case, backend: str) -> Any:
        made.append(backend)
        if len(made) == 1:  # what is right
            return own(case, backend)

        def wrong() -> Any:
            floats, bits = own(case, backend)()
            assert bits is not None
            return floats, bits ^ 1

        return wrong

    monkeypatch.setattr(Case, "ours", ours)
    with torch.inference_mode():
        values = contest(SMALL[0], 1, CPU, ONCE)
    assert values["wrong"] == ["reference"]
    assert "reference" not in values["ms"]
    assert "float16" in values["ms"]


def test_the_rivals_do_the_same_product() -> None:
    case = Case(SMALL[0], 2, CPU)
    dots = by_name("reference").bconv2d(case.bits, case.packed, case.layer.geometry, None)
    assert torch.equal(case.float16()().float(), dots.float())
    product = Conv(
        name="",
        network="product",
        geometry=Conv2dGeometry(in_channels=64, out_channels=24, kernel_size=(1, 1)),
        size=(4, 8),
    )
    case = Case(product, 1, CPU)
    dots = by_name("reference").bconv2d(case.bits, case.packed, product.geometry, None)
    rows = dots.permute(0, 2, 3, 1).reshape(32, 24)
    assert torch.equal(case.float16()().float(), rows.float())
    assert case.int8()().shape == (32, 24)


def test_no_product_does_the_work_of_groups() -> None:
    with pytest.raises(BackendUnavailableError, match="groups"):
        Case(SMALL[2], 1, CPU).int8()


def test_maps_are_equal_by_their_bytes() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float16)
    assert equal((zeros, None), (zeros.clone(), None))
    assert not equal((zeros, None), (-zeros, None))
    assert not equal((zeros, None), (zeros, zeros))
    assert not equal((zeros,), (zeros.bfloat16(),))
    nan = torch.full_like(zeros, torch.nan)
    assert equal((nan,), (nan.clone(),))


def test_names_tell_shapes_apart() -> None:
    assert conv("n", (64, 64), 56).name == "64@56"
    assert conv("n", (64, 128), 56, stride=2).name == "64>128@56/2"
    assert conv("n", (512, 512), 14, kernel=1).name == "512@14 1x1"
    assert conv("n", (512, 512), 14, groups=32).name == "512@14 g32"

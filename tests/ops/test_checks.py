"""Every check, by its message, called directly and through the operators."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from biper_engine import ops
from biper_engine.errors import GeometryError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import checks

CPU = torch.device("cpu")
CONV = Conv2dGeometry(in_channels=33, out_channels=4, kernel_size=(3, 3))
BITS = torch.zeros(2, 5, 5, 2, dtype=torch.int32)
WEIGHT = torch.zeros(4, 3, 3, 2, dtype=torch.int32)
EPILOGUE = ops.Epilogue(
    multiplier=torch.zeros(4),
    bias=torch.zeros(4),
    threshold=torch.zeros(4),
    sense=torch.zeros(4, dtype=torch.bool),
)
MAP = torch.zeros(2, 33, 5, 5)


def fused(**changes: Any) -> Callable[[], Any]:
    """Return a call of bconv2d_float_bits with some of its arguments or epilogue changed."""
    names = {field.name for field in dataclasses.fields(ops.Epilogue)}
    inside = {name: value for name, value in changes.items() if name in names}
    outside = {name: value for name, value in changes.items() if name not in names}

    def call() -> Any:
        epilogue = dataclasses.replace(EPILOGUE, **inside)
        arguments = {"bits": BITS, "weight": WEIGHT, "geometry": CONV, **outside}
        return ops.bconv2d_float_bits(epilogue=epilogue, **arguments)

    return call


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "map dtype": (
        lambda: ops.binarize(MAP.double()),
        TypeError,
        r"`x.dtype` \(=torch.float64\) must be float32, float16 or bfloat16",
    ),
    "map rank": (
        lambda: ops.binarize(MAP[0]),
        GeometryError,
        r"`x` must be \[N, C, H, W\], but its shape is \(33, 5, 5\)",
    ),
    "map without channels": (
        lambda: ops.binarize(MAP[:, :0]),
        GeometryError,
        r"`x` must have channels, but its shape is \(2, 0, 5, 5\)",
    ),
    "threshold dtype": (
        lambda: ops.binarize(MAP, torch.zeros(33, dtype=torch.float64)),
        TypeError,
        r"`threshold` must be torch.float32, but its dtype is torch.float64",
    ),
    "sense dtype": (
        lambda: ops.binarize(MAP, None, torch.zeros(33)),
        TypeError,
        r"`sense` must be torch.bool, but its dtype is torch.float32",
    ),
    "threshold length": (
        lambda: ops.binarize(MAP, torch.zeros(32)),
        GeometryError,
        r"`threshold` must be \[33\], one value per channel, but its shape is \(32,\)",
    ),
    "threshold rank": (
        lambda: ops.binarize(MAP, torch.zeros(1, 33)),
        GeometryError,
        r"`threshold` must be \[33\].* shape is \(1, 33\)",
    ),
    "unbinarize dtype": (
        lambda: ops.unbinarize(BITS, 33, dtype=torch.int32),
        TypeError,
        r"`dtype` \(=torch.int32\) must be float32, float16 or bfloat16",
    ),
    "bits dtype": (
        lambda: ops.unbinarize(BITS.long(), 33),
        TypeError,
        r"`bits` must be int32 words, but its dtype is torch.int64",
    ),
    "no channels": (
        lambda: ops.unbinarize(BITS, 0),
        GeometryError,
        r"`channels` \(=0\) must be at least 1",
    ),
    "words": (
        lambda: ops.unbinarize(BITS, 65),
        GeometryError,
        r"`bits` must be \[N, H, W, 3\] for 65 channels \(32 in a word\).*\(2, 5, 5, 2\)",
    ),
    "bits rank": (
        lambda: ops.unbinarize(BITS[0], 33),
        GeometryError,
        r"`bits` must be \[N, H, W, 2\] .* shape is \(5, 5, 2\)",
    ),
    "pool bits": (
        lambda: ops.bmaxpool2d(BITS, 65, Pool2dGeometry()),
        GeometryError,
        r"`bits` must be \[N, H, W, 3\]",
    ),
    "pool direction": (
        lambda: ops.bmaxpool2d(BITS, 33, Pool2dGeometry(), torch.zeros(33)),
        TypeError,
        r"`take_and` must be torch.bool",
    ),
    "pool window": (
        lambda: ops.bmaxpool2d(BITS, 33, Pool2dGeometry(kernel_size=(6, 1))),
        GeometryError,
        r"A 6x1 pool does not fit into a 5x5 map",
    ),
    "conv bits": (
        lambda: ops.bconv2d(BITS[..., :1], WEIGHT, CONV),
        GeometryError,
        r"`bits` must be \[N, H, W, 2\] for 33 channels",
    ),
    "weight dtype": (
        lambda: ops.bconv2d(BITS, WEIGHT.float(), CONV),
        TypeError,
        r"`weight` must be int32 words, but its dtype is torch.float32",
    ),
    "weight rank": (
        lambda: ops.bconv2d(BITS, WEIGHT[0], CONV),
        GeometryError,
        r"`weight` must be \[O, KH, KW, words\], but its shape is \(3, 3, 2\)",
    ),
    "weight shape": (
        lambda: ops.bconv2d(BITS, WEIGHT[..., :1], CONV),
        GeometryError,
        r"`weight` must be \[4, 3, 3, 2\], \[O, KH, KW, words of 33 channels\], but its shape is "
        r"\(4, 3, 3, 1\)",
    ),
    "image smaller than the kernel": (
        lambda: ops.bconv2d(BITS[:, :2], WEIGHT, CONV),
        GeometryError,
        r"3x3 kernel .* does not fit into a 2x5 image",
    ),
    "groups": (
        lambda: ops.bconv2d(BITS, WEIGHT, dataclasses.replace(CONV, groups=3, out_channels=6)),
        GeometryError,
        r"`out_channels` \(=4\) must be divisible by `groups` \(=3\)",
    ),
    "prepack weight": (
        lambda: ops.prepack(WEIGHT[..., :1], CONV, "reference"),
        GeometryError,
        r"`weight` must be int32 \[4, 3, 3, 2\], but it is torch.int32 \(4, 3, 3, 1\)",
    ),
    "prepacked for another backend": (
        lambda: ops.bconv2d(BITS, WEIGHT, CONV, prepacked=WEIGHT, backend="reference"),
        GeometryError,
        r"`prepacked` must be .* for the reference backend, which runs this call, but it is "
        r"torch.int32 \[4, 3, 3, 2\]; make it with `prepack\(weight, geometry, 'reference'\)`",
    ),
    "prepacked of another layer": (
        fused(prepacked=torch.zeros(5, 33, 3, 3), backend="reference"),
        GeometryError,
        r"`prepacked` must be torch.float32 \[4, 33, 3, 3\]",
    ),
    "multiplier dtype": (
        fused(multiplier=torch.zeros(4).double()),
        TypeError,
        "`multiplier` must be torch.float32",
    ),
    "bias length": (fused(bias=torch.zeros(5)), GeometryError, r"`bias` must be \[4\]"),
    "slope rank": (fused(slope=torch.zeros(())), GeometryError, r"`slope` must be \[4\]"),
    "shift dtype": (fused(shift=torch.zeros(4).half()), TypeError, "`shift` must be torch.float32"),
    "pool_min dtype": (
        fused(pool=Pool2dGeometry(kernel_size=(2, 2)), pool_min=torch.zeros(4)),
        TypeError,
        "`pool_min` must be torch.bool",
    ),
    "epilogue threshold": (fused(threshold=torch.zeros(3)), GeometryError, r"`threshold` must be"),
    "epilogue sense": (fused(sense=torch.zeros(4)), TypeError, r"`sense` must be torch.bool"),
    "no threshold": (fused(threshold=None), ValueError, "`threshold` and `sense` must be given"),
    "no sense": (fused(sense=None), ValueError, "`threshold` and `sense` must be given"),
    "clamp and slope": (
        fused(clamp_min=0.0, slope=torch.zeros(4)),
        ValueError,
        "`slope` and `clamp_min`/`clamp_max` exclude each other",
    ),
    "upper clamp and slope": (
        fused(clamp_max=0.0, slope=torch.zeros(4)),
        ValueError,
        "`slope` and `clamp_min`/`clamp_max` exclude each other",
    ),
    "pool of accumulators": (
        fused(pool=Pool2dGeometry(kernel_size=(4, 4))),
        GeometryError,
        "A 4x4 pool does not fit into a 3x3 map",
    ),
    "residual dtype": (
        fused(residual=torch.zeros(2, 4, 3, 3).double()),
        TypeError,
        r"`residual.dtype` \(=torch.float64\)",
    ),
    "residual that would broadcast": (
        fused(residual=torch.zeros(2, 4, 1, 1)),
        GeometryError,
        r"`residual` must have the output's shape \(2, 4, 3, 3\), but it is \(2, 4, 1, 1\)",
    ),
    "stream dtype": (fused(dtype=torch.float64), TypeError, r"`dtype` \(=torch.float64\)"),
}


@pytest.mark.parametrize(("call", "kind", "message"), CASES.values(), ids=CASES)
def test_wrong_arguments_are_refused(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_correct_arguments_are_accepted() -> None:
    fused()()
    fused(residual=torch.zeros(2, 4, 3, 3).half(), clamp_min=0.0)()


def test_the_bits_of_other_operators_need_a_threshold_too() -> None:
    epilogue = dataclasses.replace(EPILOGUE, threshold=None, sense=None)
    with pytest.raises(ValueError, match="`threshold` and `sense` must be given to return bits"):
        ops.bconv2d_bits(BITS, WEIGHT, CONV, epilogue)
    assert ops.bconv2d_float(BITS, WEIGHT, CONV, epilogue).shape == (2, 4, 3, 3)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("bias", lambda t: checks.check_per_channel({"bias": t}, 4, CPU)),
        ("weight", lambda t: checks.check_conv(BITS, WEIGHT.to("meta"), CONV, None)),
        ("prepacked", lambda t: checks.check_conv(BITS, WEIGHT, CONV, t)),
        ("residual", lambda t: checks.check_residual(MAP.to("meta"), (2, 33, 5, 5), CPU)),
    ],
)
def test_operands_on_two_devices_are_refused(name: str, check: Callable[[Any], Any]) -> None:
    message = f"`{name}` is on meta, but the input is on cpu; move one with `.to()`."
    with pytest.raises(ValueError, match=re.escape(message)):
        check(torch.zeros(4, device="meta"))


def test_wrong_shapes_are_found_while_tracing() -> None:
    wrong = torch.zeros(2, 5, 5, 3, dtype=torch.int32, device="meta")
    with pytest.raises(GeometryError, match=r"`bits` must be \[N, H, W, 2\]"):
        ops.bconv2d(wrong, WEIGHT.to("meta"), CONV)
    with pytest.raises(GeometryError, match=r"`x` must be \[N, C, H, W\]"):
        ops.binarize(torch.zeros(3, 3, device="meta"))

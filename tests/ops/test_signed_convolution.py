"""The convolution of two signs with a scale: the bytes of the float one, on bits or not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from biper_engine.errors import GeometryError
from biper_engine.ops import signed_convolution as module
from biper_engine.ops.cpu_module import native
from biper_engine.ops.signed_convolution import bits_pay, signed_conv2d
from tests.images import noise

PLAIN: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
# Channels in, out, kernel, and what differs from PLAIN.
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "16 channels": (16, 16, 3, {}),
    "33 channels": (33, 20, 3, {"padding": (0, 2)}),
    "stride": (64, 40, 3, {"stride": (2, 1)}),
    "1x1": (48, 64, 1, {"padding": (0, 0), "stride": (2, 2)}),
    "dilation": (32, 32, 3, {"dilation": (2, 1), "padding": (2, 1)}),
    "groups": (64, 96, 3, {"groups": 2}),
    "one channel in a group": (6, 12, 3, {"groups": 6}),
}


@pytest.fixture(autouse=True)
def needs_native() -> None:
    if native() is None:
        pytest.skip("the native module was not built")


def operands(case: str, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    channels, outputs, kernel, changes = CASES[case]
    options = PLAIN | changes
    weight = noise(outputs, channels // options["groups"], kernel, kernel, seed=2)
    alpha = noise(outputs, 1, 1, seed=3)
    alpha[0] = 0.0
    layout = torch.channels_last
    x = noise(batch, channels, 9, 7, seed=1).contiguous(memory_format=layout)
    return x, weight, alpha, options


def product(x: Tensor, weight: Tensor, alpha: Tensor, options: dict[str, Any]) -> Tensor:
    return F.conv2d(x.sign(), weight.sign(), None, **options) * alpha


def same_bytes(got: Tensor, wanted: Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32))


class Watched:
    """Notes what the native module says."""

    def __init__(self) -> None:
        self.said: list[bool] = []

    def signed_conv(self, *values: Any) -> bool:
        self.said.append(native().signed_conv(*values))
        return self.said[-1]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    watch = Watched()
    monkeypatch.setattr(module, "native", lambda: watch)
    return watch.said


@pytest.fixture
def own_isa() -> Iterator[None]:
    before = native().isa()
    yield
    native().select_isa(before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("own_isa")
def test_bits_have_the_bytes_of_floats(case: str, watched: list[bool]) -> None:
    x, weight, alpha, options = operands(case)
    wanted = product(x, weight, alpha, options)
    for isa in native().usable_isas():
        native().select_isa(isa)
        got = signed_conv2d(x, weight, alpha, **options)
        assert same_bytes(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert watched == [True] * len(native().usable_isas())


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan")])
@pytest.mark.parametrize("place", ["x", "weight"])
def test_what_bits_cannot_say_runs_in_float(value: float, place: str, watched: list[bool]) -> None:
    x, weight, alpha, options = operands("33 channels")
    (x if place == "x" else weight)[1, 32, 0, 1] = value
    got = signed_conv2d(x, weight, alpha, **options)
    assert watched == [False]
    assert got.is_contiguous(memory_format=torch.channels_last)
    wanted = product(x, weight, alpha, options)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same_bytes(got.nan_to_num(), wanted.nan_to_num())


def test_every_place_of_a_zero_is_found(watched: list[bool]) -> None:
    x, weight, alpha, options = operands("33 channels", batch=1)
    for index in range(x.numel()):
        changed = x.permute(0, 2, 3, 1).flatten()
        changed = changed.index_fill(0, torch.tensor(index), 0.0).view(1, 9, 7, 33)
        signed_conv2d(changed.permute(0, 3, 1, 2), weight, alpha, **options)
    assert not any(watched)


def test_infinite_and_tiny_values_have_their_sign(watched: list[bool]) -> None:
    x, weight, alpha, options = operands("16 channels")
    tiny = 2.0**-149
    for index, value in enumerate((torch.inf, -torch.inf, tiny, -tiny)):
        x[0, index, 2, 3] = value
        weight[index, 1, 1, 1] = value
    wanted = product(x, weight, alpha, options)
    assert same_bytes(signed_conv2d(x, weight, alpha, **options), wanted)
    assert watched == [True]


def test_threads_and_layouts_do_not_change_the_bytes() -> None:
    x, weight, alpha, options = operands("stride", batch=40)
    wanted = product(x, weight, alpha, options)
    wide = torch.zeros(40, 64, 9, 14)
    wide[..., ::2] = x
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for laid in (x, x.contiguous(), wide[..., ::2]):
            assert same_bytes(signed_conv2d(laid, weight, alpha, **options), wanted)
    torch.set_num_threads(before)


def test_no_images_have_an_empty_map() -> None:
    x, weight, alpha, options = operands("16 channels", batch=0)
    assert signed_conv2d(x, weight, alpha, **options).shape == (0, 16, 9, 7)


def test_without_the_extension_floats_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, alpha, options = operands("groups")
    wanted = signed_conv2d(x, weight, alpha, **options)
    monkeypatch.setattr(module, "native", lambda: None)
    got = signed_conv2d(x, weight, alpha, **options)
    assert same_bytes(got, wanted)
    assert got.stride() == wanted.stride()
    assert not bits_pay(x, weight, alpha, **options)


def test_where_bits_pay() -> None:
    x, weight, alpha, options = operands("16 channels")

    def pay(x: Tensor, weight: Tensor, alpha: Tensor, **changes: Any) -> bool:
        return bits_pay(x, weight, alpha, **(options | changes))

    assert pay(x, weight, alpha)
    assert not pay(x.contiguous(), weight, alpha)
    assert not pay(x.double(), weight.double(), alpha.double())
    assert not pay(x[0], weight, alpha)
    assert not pay(x, weight[:, :15], alpha)
    assert not pay(x, weight, alpha[:1])
    assert not pay(x, weight, alpha, padding=(1,))
    assert not pay(x, weight, alpha, stride=1)
    assert not pay(x, weight, alpha, stride=(0, 1))
    assert not pay(x[:, :, :2], weight, alpha, padding=(0, 0))
    assert not pay(x, torch.ones(16, 16, 1024, 1024), alpha, padding=(1024, 1024))


def test_a_scale_with_gaps_in_memory_is_read_right() -> None:
    x, weight, alpha, options = operands("16 channels")
    for strided in (torch.tensor(0.5).expand(16, 1, 1), alpha.repeat(1, 1, 2)[..., :1]):
        wanted = product(x, weight, strided, options)
        for _ in range(5):
            assert same_bytes(signed_conv2d(x, weight, strided, **options), wanted)


def test_opcheck_passes() -> None:
    x, weight, alpha, options = operands("stride")
    op = torch.ops.biper.signed_conv2d.default
    for laid in (x, x.contiguous()):
        torch.library.opcheck(op, (laid, weight, alpha), options)


@pytest.mark.parametrize(
    ("error", "place", "value", "words"),
    [
        (TypeError, "x", torch.ones(2, 16, 9, 7, dtype=torch.float64), "`x` must be float32"),
        (TypeError, "alpha", torch.ones(16, 1, 1, dtype=torch.bfloat16), "`alpha` must be float32"),
        (GeometryError, "x", torch.ones(16, 9, 7), r"\(16, 9, 7\)"),
        (GeometryError, "weight", torch.ones(16, 15, 3, 3), r"\(16, 15, 3, 3\)"),
        (GeometryError, "alpha", torch.ones(16), r"\[16, 1, 1\]"),
        (GeometryError, "x", torch.ones(2, 16, 1, 0), "0"),
        (GeometryError, "stride", (0, 1), "stride"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    error: type[Exception], place: str, value: Any, words: str
) -> None:
    x, weight, alpha, options = operands("16 channels")
    given = {"x": x, "weight": weight, "alpha": alpha, **options, place: value}
    with pytest.raises(error, match=words):
        signed_conv2d(**given)


@pytest.mark.parametrize("place", range(2, 6))
@pytest.mark.parametrize("zero", [False, True])
def test_the_native_module_refuses_other_memory(place: int, zero: bool) -> None:
    x, weight, alpha, _ = operands("16 channels")
    x[0, 0, 0, 0] *= not zero
    out = torch.empty(2, 16, 9, 7)
    tensors = [x, weight, alpha, out]
    memory = [(t.data_ptr(), t.numel() - (at + 2 == place), 1) for at, t in enumerate(tensors)]
    geometry = (16, 16, 1, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="elements"):
        native().signed_conv(geometry, (2, 9, 7), *memory, 1)

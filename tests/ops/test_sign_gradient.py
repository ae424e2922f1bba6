"""The native gradient of a scaled sign beside its formula in float64, and its bytes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from biper_engine.nn import functional
from biper_engine.nn.binarizers import ACTIVATION_SURROGATES
from biper_engine.ops import sign_gradient as module
from biper_engine.ops.cpu_module import native
from biper_engine.ops.sign_gradient import scaled_sign_gradient
from tests.images import noise

EPSILON = functional.SCALE_EPSILON
# A sample is the last three dimensions, or the last one; 32 values make a row of the kernel's, 128
# of these a sum in float.
MAPS = [(1, 1, 1, 2), (3, 1, 4, 8), (2, 3, 5, 7), (2, 16, 16, 16), (2, 5, 32, 33), (1, 2, 3, 11)]
ROWS = [(1, 2), (4, 31), (3, 32), (2, 3, 33), (5, 65), (2, 4096), (3, 4099)]


def needs_native() -> None:
    if native() is None:
        pytest.skip("the native module was not built")


def native_gradient(
    x: Tensor, gradient: Tensor, sample_dims: int, surrogate: str = "bireal"
) -> Tensor:
    dims = tuple(range(-sample_dims, 0))
    return scaled_sign_gradient(x, gradient, dims, surrogate, EPSILON)


def formula(x: Tensor, gradient: Tensor, sample_dims: int, surrogate: str = "bireal") -> Tensor:
    return module._formula(x, gradient, tuple(range(-sample_dims, 0)), surrogate, EPSILON)


def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return noise(*shape, seed=1) * 1.5 + 0.25, noise(*shape, seed=2)


@pytest.fixture
def own_isa() -> Iterator[None]:
    needs_native()
    before = native().isa()
    yield
    native().select_isa(before)


@pytest.mark.parametrize("surrogate", ACTIVATION_SURROGATES)
@pytest.mark.parametrize("shape", [*MAPS, *ROWS], ids=str)
def test_the_kernel_has_the_values_of_the_formula(shape: tuple[int, ...], surrogate: str) -> None:
    x, gradient = pair(shape)
    dims = 3 if shape in MAPS else 1
    got = native_gradient(x, gradient, dims, surrogate)
    wanted = formula(x.double(), gradient.double(), dims, surrogate)
    # A few roundings of float32 in each term, and sums of up to 128 values.
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sample_dims", [1, 2, 3, 4])
def test_a_sample_may_have_any_number_of_the_last_dimensions(sample_dims: int) -> None:
    x, gradient = pair((3, 4, 5, 6))
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = x.contiguous(memory_format=layout)
        wanted = formula(x.double(), gradient.double(), sample_dims)
        got = native_gradient(laid, gradient, sample_dims)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6)


def test_other_dimensions_have_the_formula() -> None:
    x, gradient = pair((3, 4, 5, 6))
    got = scaled_sign_gradient(x, gradient, (-3, -2), "bireal", EPSILON)
    assert torch.equal(got, module._formula(x, gradient, (-3, -2), "bireal", EPSILON))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_have_the_formula(dtype: torch.dtype) -> None:
    x, gradient = (t.to(dtype) for t in pair((3, 4, 5, 6)))
    assert torch.equal(native_gradient(x, gradient, 3), formula(x, gradient, 3))


def test_layouts_change_the_values_by_no_more_than_the_order_of_sums() -> None:
    x, gradient = pair((2, 6, 7, 5))
    wanted = native_gradient(x, gradient, 3)
    wide, step = pair((2, 6, 7, 10)), (slice(None),) * 3 + (slice(None, None, 2),)
    for left, right in [
        (x.contiguous(memory_format=torch.channels_last), gradient),
        (x, gradient.contiguous(memory_format=torch.channels_last)),
        (x.transpose(1, 3).contiguous().transpose(1, 3), gradient),
    ]:
        torch.testing.assert_close(native_gradient(left, right, 3), wanted, rtol=2e-6, atol=2e-6)
    strided = tuple(t[step] for t in wide)
    assert torch.equal(
        native_gradient(*strided, 3), native_gradient(*(t.contiguous() for t in strided), 3)
    )


def test_channels_last_stays_channels_last() -> None:
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in pair((2, 6, 7, 5)))
    assert native_gradient(x, gradient, 3).is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_without_memory_of_its_own_is_read_right() -> None:
    x, _ = pair((2, 3, 4, 5))
    same = torch.ones(()).expand(2, 3, 4, 5)
    assert torch.equal(native_gradient(x, same, 3), native_gradient(x, same.contiguous(), 3))


@pytest.mark.parametrize("surrogate", ACTIVATION_SURROGATES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_special_values_spoil_their_own_sample_alone(value: float, surrogate: str) -> None:
    x, gradient = pair((3, 2, 5, 7))
    spoilt = x.clone()
    spoilt[1, 1, 2, 3] = value
    got, wanted = (run(spoilt, gradient, 3, surrogate) for run in (native_gradient, formula))
    clean = native_gradient(x, gradient, 3, surrogate)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[2], clean[2])
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("surrogate", ACTIVATION_SURROGATES)
def test_a_gradient_that_is_not_finite_stays_visible(surrogate: str) -> None:
    x, gradient = pair((3, 2, 5, 7))
    for value in (float("nan"), float("inf")):
        gradient[1, 1, 2, 3] = value
        got, wanted = (run(x, gradient, 3, surrogate) for run in (native_gradient, formula))
        assert torch.equal(got.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1)])
def test_equal_values_and_single_values_are_as_in_the_formula(shape: tuple[int, ...]) -> None:
    gradient = noise(*shape, seed=2)
    for value in (0.0, -0.0, 0.001, 3.0):
        x = torch.full(shape, value)
        got, wanted = (run(x, gradient, 3) for run in (native_gradient, formula))
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-4, equal_nan=True)


def test_no_samples_have_no_gradient() -> None:
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        assert native_gradient(torch.zeros(shape), torch.zeros(shape), 3).shape == shape


@pytest.mark.parametrize("surrogate", ACTIVATION_SURROGATES)
@pytest.mark.usefixtures("own_isa")
def test_instruction_sets_and_threads_do_not_change_the_bytes(surrogate: str) -> None:
    before = torch.get_num_threads()
    for shape in (*MAPS, (7, 3, 50, 41)):
        x, gradient = pair(shape)
        results = []
        for isa in native().usable_isas():
            native().select_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(native_gradient(x, gradient, 3, surrogate))
        torch.set_num_threads(before)
        assert all(torch.equal(results[0], result) for result in results)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, gradient = pair((5, 3, 9, 7))
    whole = native_gradient(x, gradient, 3)
    alone = [native_gradient(a, b, 3) for a, b in zip(x.split(1), gradient.split(1), strict=True)]
    assert torch.equal(whole, torch.cat(alone))


def test_without_the_extension_the_formula_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", lambda: None)
    x, gradient = pair((2, 3, 4, 5))
    assert torch.equal(native_gradient(x, gradient, 3), formula(x, gradient, 3))


def test_the_layer_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    taken = []
    run = native().sign_gradient

    class Watched:
        def sign_gradient(self, *values: object) -> None:
            taken.append(values)
            run(*values)

    monkeypatch.setattr(module, "native", Watched)
    x, gradient = pair((2, 3, 4, 5))
    x.requires_grad_()
    functional.binarize_activation(x, scale_dims=(-3, -2, -1)).backward(gradient)
    assert len(taken) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_passes(layout: torch.memory_format) -> None:
    x, gradient = (t.contiguous(memory_format=layout) for t in pair((2, 3, 4, 5)))
    op = torch.ops.biper.sign_gradient.default
    for dims in (1, 3):
        torch.library.opcheck(op, (x, gradient, dims), {"surrogate": "clip", "epsilon": EPSILON})


@pytest.mark.parametrize(
    ("error", "gradient", "changes", "words"),
    [
        (TypeError, torch.ones(2, 3, dtype=torch.float64), {}, "float64"),
        (ValueError, torch.ones(2, 4), {}, r"\(2, 4\)"),
        (ValueError, torch.ones(2, 3), {"sample_dims": 3}, "sample_dims"),
        (ValueError, torch.ones(2, 3), {"sample_dims": 0}, "sample_dims"),
        (ValueError, torch.ones(2, 3), {"surrogate": "birael"}, "birael"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    error: type[Exception], gradient: Tensor, changes: dict[str, object], words: str
) -> None:
    given = {"sample_dims": 1, "surrogate": "bireal", "epsilon": EPSILON, **changes}
    with pytest.raises(error, match=words):
        torch.ops.biper.sign_gradient(torch.ones(2, 3), gradient, **given)

"""TF32 is off while a network runs, and restored afterwards."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from biper_engine.ops.precision import without_tf32


def switches() -> tuple[Any, ...]:
    backends = torch.backends
    return (
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


@pytest.fixture
def _keep_switches() -> Iterator[None]:
    cudnn, _, precision = switches()
    yield
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.set_float32_matmul_precision(precision)


@pytest.mark.usefixtures("_keep_switches")
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_off_inside_and_as_before_after(convolutions: bool, precision: str) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(precision)
    before = switches()
    with without_tf32():
        assert switches() == (False, False, "highest")
        with without_tf32():
            assert switches() == (False, False, "highest")
        assert switches() == (False, False, "highest")
    assert switches() == before
    with pytest.raises(KeyError), without_tf32():
        raise KeyError
    assert switches() == before


@pytest.mark.usefixtures("_keep_switches")
def test_tf32_stays_off_until_the_last_thread_is_out() -> None:
    torch.backends.cudnn.allow_tf32 = True
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with without_tf32():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=stay)
    with without_tf32():
        thread.start()
        assert entered.wait(30)
    assert not torch.backends.cudnn.allow_tf32
    leave.set()
    thread.join()
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9")
def test_the_newer_names_of_the_switches_are_kept_too() -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision, matmul.fp32_precision = "tf32", "tf32"
        with without_tf32():
            assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before

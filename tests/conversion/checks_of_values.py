"""Functions that look at the values of a tensor. pytest would rewrite their asserts in a test."""

import contextlib

import torch
from torch import Tensor


def raises(x: Tensor) -> None:
    if x.max() > 100:
        raise ValueError(f"too large: {x.max().item()}")


def raises_else(x: Tensor) -> None:
    if not torch.isnan(x).any() and (x < 100).all():
        pass
    else:
        message = "no such input"
        raise ValueError(message)


def asserts(x: Tensor) -> None:
    assert (x < 100).all(), "too large"
    assert not (x.isnan().any() or x.isinf().any())  # noqa: PT018
    torch._assert(x.min() > -100, "too small")


def asks_functions(x: Tensor) -> None:
    if torch.equal(x, x + 1) or bool(x.isnan().all()):
        raise ValueError


def asks_in_a_context(x: Tensor) -> None:
    with torch.no_grad():
        assert 0 <= x.abs().max() < 100


def prints(x: Tensor) -> None:
    if x.max() > 100:
        import warnings

        print("large", x.max())
        warnings.warn("large", stacklevel=1)


def stops_in_a_debugger(x: Tensor) -> Tensor:
    try:
        if x.data.max() > 100:
            breakpoint()
    except ValueError:
        x = x / 255
    return x


def prints_or_changes(x: Tensor) -> Tensor:
    if x.max() > 100:
        print("large")
    else:
        x = x / 255
    return x


def prints_a_change(x: Tensor) -> None:
    if x.max() > 100:
        print(x.add_(1))


class _Counter:
    calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def __call__(self, x: Tensor) -> None:
        if x.max() > 1:
            print(self.count())


prints_its_calls = _Counter()


def branches(x: Tensor) -> Tensor:
    if x.max() > 100:
        x = x / 255
    return x


def branches_beside(x: Tensor) -> Tensor:
    if x.max() > 100:
        x = x / 255
    elif x.min() < -100:
        raise ValueError
    return x


def raises_at_the_end(x: Tensor) -> Tensor:
    if x.max() > 100:
        if x.min() < -100:
            raise ValueError
        x = x / 255
    return x


def catches(x: Tensor) -> Tensor:
    try:
        assert x.max() < 100
    except AssertionError:
        x = x / 255
    return x


def is_caught(x: Tensor) -> Tensor:
    with contextlib.suppress(ValueError):
        raises(x)
        return x
    return x / 255


def counts(x: Tensor) -> Tensor:
    while x.max() > 100:
        x = x / 2
    return x


def chooses(x: Tensor) -> Tensor:
    return x / 255 if x.max() > 100 else x


def keeps(x: Tensor) -> None:
    large = bool(x.max() > 100)
    if large:
        raise ValueError


def asks_a_number(x: Tensor) -> None:
    if x.max().item() > 100:
        raise ValueError


def only_small(x: Tensor) -> None:
    assert x.abs().max() <= 1

"""Observe: calls of the model itself, and everything that they may change."""

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from biper_engine.conversion import verify
from biper_engine.conversion.observe import Observed
from biper_engine.errors import ConversionError
from tests.conversion.comparison import convert_quietly
from tests.conversion.foreign_models import QConv

IN_SPEC = pytree.tree_structure(((0,), {}))
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))

CALLS = [0]


class Layer(nn.Module):
    """A layer with places to remember things in."""

    shared = torch.zeros(1)

    def __init__(self, forward: Callable[["Layer", Tensor], Any]) -> None:
        super().__init__()
        self.run = forward
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("mean", torch.zeros(3))
        self.count = 0
        self.memory: Any = None
        self.history: list[Tensor] = []
        self.cache: dict[Any, Any] = {}
        self.ring: deque[float] = deque([0.0], maxlen=1)
        self.array = np.zeros(2)
        self.settings = Settings()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Settings:
    """A plain object that a module holds."""

    def __init__(self) -> None:
        self.seen = 0


class Around(nn.Module):
    """A model with a layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def count(s: Layer, x: Tensor) -> Tensor:
    s.count += 1
    return x


def integrate(s: Layer, x: Tensor) -> Tensor:
    s.memory = x.mean() if s.memory is None else 0.9 * s.memory + x.mean()
    return x + s.memory


def append(s: Layer, x: Tensor) -> Tensor:
    s.history.append(x.mean())
    return x


def remember_in_a_dict(s: Layer, x: Tensor) -> Tensor:
    s.cache["last"] = x
    return x


def rotate(s: Layer, x: Tensor) -> Tensor:
    s.ring.append(float(x.mean()))
    return x


def write_to_an_array(s: Layer, x: Tensor) -> Tensor:
    s.array[0] += 1
    return x


def change_an_object(s: Layer, x: Tensor) -> Tensor:
    s.settings.seen += 1
    return x


def update_a_buffer(s: Layer, x: Tensor) -> Tensor:
    s.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
    return x


def replace_a_buffer(s: Layer, x: Tensor) -> Tensor:
    s.mean = x.mean((0, 2, 3))
    return x


def shrink_a_parameter(s: Layer, x: Tensor) -> Tensor:
    s.scale.data.mul_(0.5)
    return x * s.scale


def set_the_class(s: Layer, x: Tensor) -> Tensor:
    Layer.shared = x.mean().reshape(1)
    return x


def initialise_from_data(s: Layer, x: Tensor) -> Tensor:
    if s.count == 0:
        s.mean.copy_(x.mean((0, 2, 3)))
        s.count = 1
    return x - s.mean.view(3, 1, 1)


def call_three_times(model: nn.Module) -> None:
    observed = Observed(model, IN_SPEC)
    observed([IMAGES])
    observed([OTHERS])
    observed.again()


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (count, "attribute `layer.count`"),
        (integrate, "attribute `layer.memory`"),
        (append, "attribute `layer.history`"),
        (remember_in_a_dict, "attribute `layer.cache['last']`"),
        (rotate, "attribute `layer.ring[0]`"),
        (write_to_an_array, "attribute `layer.array`"),
        (change_an_object, "attribute `layer.settings.seen`"),
        (update_a_buffer, "buffer `layer.mean`"),
        (replace_a_buffer, "buffer `layer.mean`"),
        (shrink_a_parameter, "parameter `layer.scale`"),
        (set_the_class, "attribute `Layer.shared`"),
        (initialise_from_data, "buffer `layer.mean`"),
    ],
)
def test_what_a_call_changes_is_refused_by_name(
    forward: Callable[[Layer, Tensor], Tensor], name: str
) -> None:
    model = Around(Layer(forward))
    with pytest.raises(ConversionError) as caught:
        call_three_times(model)
    assert str(caught.value).startswith(f"A call of the model changes its {name}")
    assert "defect" not in str(caught.value)


def keep_the_output(s: Layer, x: Tensor) -> Tensor:
    s.memory = x * 2
    s.history = [x, s.memory]
    return s.memory + 1


def keep_the_output_beside_weights(s: Layer, x: Tensor) -> Tensor:
    s.memory = x * 2
    return centre_and_keep_the_scale(s, x)


def keep_the_output_for_the_next_call(s: Layer, x: Tensor) -> Tensor:
    before, s.memory = s.memory, x.mean()
    return x if before is None else x + before


def test_an_attribute_that_is_only_written_is_no_state() -> None:
    call_three_times(Around(Layer(keep_the_output)))


def test_an_attribute_that_the_next_call_reads_is_state() -> None:
    with pytest.raises(ConversionError, match=r"changes its attribute `layer.memory`"):
        call_three_times(Around(Layer(keep_the_output_for_the_next_call)))


def centre_in_place(s: Layer, x: Tensor) -> Tensor:
    s.weight.data -= s.weight.mean()
    return x * s.weight.abs().mean()


def centre_and_keep_the_scale(s: Layer, x: Tensor) -> Tensor:
    s.weight.data = s.weight.data - s.weight.data.mean()
    s.memory = s.weight.abs().mean()
    s.scale.data.copy_(s.memory * torch.ones(3, 1, 1))
    return x * s.scale


def centre_and_count(s: Layer, x: Tensor) -> Tensor:
    s.weight.data -= s.weight.mean()
    s.count += 1
    return x * s.count


def centre_with_the_input(s: Layer, x: Tensor) -> Tensor:
    s.weight.data -= s.weight.mean() + 1e-5 * x.mean()
    return x * s.weight.abs().mean()


@pytest.mark.parametrize(
    "forward", [centre_in_place, centre_and_keep_the_scale, keep_the_output_beside_weights]
)
def test_weights_that_are_centred_in_place_are_the_models_own_in_every_call(
    forward: Callable[[Layer, Tensor], Tensor],
) -> None:
    model = Around(Layer(forward))
    model.layer.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    copied = copy.deepcopy(model)
    copied(IMAGES)
    once = copied.layer.weight.detach().clone()
    copied(IMAGES)
    assert not torch.equal(copied.layer.weight, once), "the second call must change the weights"
    call_three_times(model)


def count_in_a_weight(s: Layer, x: Tensor) -> Tensor:
    s.weight.data[0] += 1
    return x * s.weight[0]


def test_a_counter_among_many_weights_is_refused() -> None:
    model = Around(Layer(count_in_a_weight))
    model.layer.weight = nn.Parameter(torch.ones(20_000))
    with pytest.raises(ConversionError, match=r"changes its parameter `layer.weight`"):
        call_three_times(model)


def test_weights_that_are_changed_by_the_input_are_refused() -> None:
    model = Around(Layer(centre_with_the_input))
    model.layer.weight = nn.Parameter(torch.randn(64))
    with pytest.raises(ConversionError, match=r"changes its parameter `layer.weight`"):
        call_three_times(model)


def test_what_else_changes_beside_weights_that_are_centred_is_refused() -> None:
    model = Around(Layer(centre_and_count))
    model.layer.weight = nn.Parameter(torch.randn(64))
    with pytest.raises(ConversionError, match=r"changes its attribute `layer.count`"):
        call_three_times(model)


def test_a_global_variable_is_state() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            CALLS[0] += 1
            return x * CALLS[0]

    observed = Observed(Counting(), IN_SPEC)
    observed([IMAGES])
    with pytest.raises(ConversionError, match=r"attribute `.*CALLS\[0\]`"):
        observed([OTHERS])


def table(s: Layer, x: Tensor) -> Tensor:
    if s.memory is None:
        s.memory = torch.linspace(0, 1, x.shape[-1])
    return x + s.memory


def binarize_in_place(s: Layer, x: Tensor) -> Tensor:
    s.scale.data = s.scale.data.sign()
    return x * s.scale


def flag(s: Layer, x: Tensor) -> Tensor:
    s.cache["ready"] = True
    return x


def swap(s: Layer, x: Tensor) -> Tensor:
    held = s.scale.data.clone()
    s.scale.data.mul_(3)
    result = x * s.scale
    s.scale.data.copy_(held)
    return result


def write_to_the_input(s: Layer, x: Tensor) -> Tensor:
    return x.clamp_(-1, 1)


@pytest.mark.parametrize("forward", [table, binarize_in_place, flag, swap, write_to_the_input])
def test_a_value_that_every_first_call_sets_alike_is_not_state(
    forward: Callable[[Layer, Tensor], Tensor],
) -> None:
    model = Around(Layer(forward))
    observed = Observed(model, IN_SPEC)
    before = IMAGES.clone()
    first = observed([IMAGES])
    observed([OTHERS])
    assert torch.equal(observed.again().outputs[0], first.outputs[0])
    assert torch.equal(IMAGES, before)
    assert model.layer.memory is None


@pytest.mark.parametrize(
    "draw",
    [lambda: random.random(), lambda: float(np.random.rand()), lambda: float(torch.rand(1))],  # noqa: NPY002
    ids=["random", "numpy", "torch"],
)
def test_random_numbers_in_a_result_are_refused(draw: Callable[[], float]) -> None:
    python, torch_state = random.getstate(), torch.get_rng_state()
    observed = Observed(Layer(lambda s, x: x + draw()), IN_SPEC)
    observed([IMAGES])
    with pytest.raises(ConversionError, match="gives different outputs for the same input"):
        observed.again()
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_stateful_model_is_not_converted() -> None:
    class Membrane(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv(3, 8, 3, padding=1)
            self.charge: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.charge = x if self.charge is None else 0.5 * self.charge + x
            return self.conv(self.charge).mean((2, 3))

    with pytest.raises(ConversionError, match="attribute `charge`"):
        convert_quietly(Membrane(), IMAGES)


def test_a_model_that_takes_another_path_when_it_is_traced_is_refused() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return y if type(x) is Tensor else y + 1

    with pytest.raises(ConversionError, match="does not compute what its trace computes") as caught:
        convert_quietly(Sneaky(), IMAGES)
    assert "defect" not in str(caught.value)


def test_state_outside_of_the_model_is_named() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            CALLS[0] += 1
            return self.conv(x).mean((2, 3)) + CALLS[0]

    with pytest.raises(ConversionError, match=r"changes its attribute .*CALLS\[0\]"):
        convert_quietly(Counting(), IMAGES)


def test_a_model_that_fails_for_another_batch_is_named() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor and len(x) != 2:
                raise KeyError(len(x))
            return self.conv(x).mean((2, 3))

    with pytest.raises(ConversionError, match=r"^The model itself fails .* a batch of 1; .*KeyErr"):
        convert_quietly(Picky(), IMAGES)


def test_modes_of_the_caller_do_not_change_the_answers() -> None:
    model = nn.Conv2d(3, 4, 3)
    plain = Observed(model, IN_SPEC)([IMAGES]).outputs[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        other = Observed(model, IN_SPEC)([IMAGES]).outputs[0]
    assert torch.equal(plain, other)
    assert not other.is_inference()


def test_verify_takes_what_convert_takes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QConv(3, 8, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return F.hardtanh(self.conv(a)).mean((2, 3)) + b

    model, a, b = Two().eval(), IMAGES, torch.randn(2, 8)
    engine = convert_quietly(model, (a, b))
    assert verify(engine, model, (a, b)).images == 2
    assert verify(engine, model, [(a, b), (a[:1], b[:1])]).images == 3
    with pytest.raises(ValueError, match=r"takes 2 tensors .* one tensor of shape"):
        verify(engine, model, a)

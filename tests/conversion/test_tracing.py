"""Tracing: aliases, memory and swapped weights are correct; what a graph cannot hold is refused."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion.capture import capture
from biper_engine.conversion.simplify import simplify
from biper_engine.errors import ConversionError
from tests.conversion.comparison import Functional


class Net(nn.Module):
    """A few layers and a buffer, with a forward pass from outside."""

    def __init__(self, run: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(6, 5)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def assert_captured(run: Callable[[Net, Tensor], Any]) -> None:
    """Require that the simplified graph computes what the model does, at three batch sizes."""
    torch.manual_seed(0)
    model = Net(run).eval()
    graph_module = capture(model, (torch.randn(2, 3, 4, 6),)).graph_module
    simplify(graph_module)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, 6)
        with torch.no_grad():
            expected, got = model(x.clone()), graph_module(x.clone())[0]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# -- aliases --------------------------------------------------------------------------------------


def alias(self: Net, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    z += 1
    return y * 3


def view_of_a_view(self: Net, x: Tensor) -> Tensor:
    y = x.clone()
    rows = y.view(x.shape[0], -1)
    rows[:, 3:9] = 7
    y += 1
    return rows


def writes(self: Net, x: Tensor) -> Tensor:
    y = x + 1
    y[:, 1].fill_(2.0)
    y[:, 2].copy_(x[:, 0])
    y[..., 0] = y[..., 1]
    y[y > 0.5] = 0.25
    torch.mul(x, 3, out=y[:, :1].expand_as(x).clone())
    return y.masked_fill_(y > 1, 7.0)


def out_argument(self: Net, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.mul(x, 3, out=out)
    return out + x


def data_with_an_older_view(self: Net, x: Tensor) -> Tensor:
    y = x * 1
    old = y[:, :1]
    y.data = y.data.sign()
    return y + old


def data_of_another_shape(self: Net, x: Tensor) -> Tensor:
    y = x * 1
    y.data = y.data.mean(1, keepdim=True)
    return y * 2


def data_that_is_shared(self: Net, x: Tensor) -> Tensor:
    y, other = x * 1, x * 2
    y.data = other
    other.add_(1)
    return y


def data_of_a_constant(self: Net, x: Tensor) -> Tensor:
    y = x * 1
    y.data = self.table.expand(1, 3, 4, 6) - 3.0
    return x * y


def deep_copy(self: Net, x: Tensor) -> Tensor:
    y = copy.deepcopy(x)
    y += 1
    return y * x


def views_in_place(self: Net, x: Tensor) -> Tensor:
    y = x + 0
    y.unsqueeze_(1).transpose_(2, 3)
    z = x[:, :1] + 0
    z.squeeze_(1).t_() if z.dim() == 2 else z.squeeze_(1)
    return y.sum(1) + z.unsqueeze_(2)


@pytest.mark.some(6)
@pytest.mark.parametrize(
    "run",
    [
        *(alias, view_of_a_view, writes, out_argument),
        *(data_with_an_older_view, data_of_another_shape, data_that_is_shared),
        *(data_of_a_constant, deep_copy, views_in_place),
    ],
)
def test_aliases_and_writes(run: Callable[[Net, Tensor], Tensor]) -> None:
    assert_captured(run)


# -- memory ---------------------------------------------------------------------------------------


def strided(self: Net, x: Tensor) -> Tensor:
    return self.conv(x).as_strided((x.shape[0], 4, 3), (96, 1, 7))


def strided_and_permuted(self: Net, x: Tensor) -> Tensor:
    y = x.transpose(1, 2).clone()
    return y.as_strided((x.shape[0], 5), (72, 3))


def written_by_stride(self: Net, x: Tensor) -> Tensor:
    y = x * 1
    y.as_strided((x.shape[0], 4), (72, 1)).add_(10)
    return y


def complex_numbers(self: Net, x: Tensor) -> Tensor:
    pairs = x.permute(0, 2, 3, 1).reshape(x.shape[0], 3, 12, 2).transpose(1, 2).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * 1j)


def bytes_of_floats(self: Net, x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().view(torch.uint8).int()


def circular(self: Net, x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 0, 3), mode="circular")


def unfolded(self: Net, x: Tensor) -> Tensor:
    return self.conv(x).unfold(2, 3, 1).sum(-1)


@pytest.mark.parametrize(
    "run",
    [
        *(strided, strided_and_permuted, written_by_stride, complex_numbers, bytes_of_floats),
        *(circular, unfolded),
    ],
)
def test_operators_that_read_memory(run: Callable[[Net, Tensor], Tensor]) -> None:
    assert_captured(run)


def test_the_memory_around_a_view_is_refused() -> None:
    model = Net(lambda self, x: x[:, 1:].as_strided((x.shape[0], 4), (72, 1)))
    with pytest.raises(ConversionError, match="reads the memory around a view"):
        simplify(capture(model, (torch.randn(2, 3, 4, 6),)).graph_module)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda self, x: (x * 1).set_(x * 2), "set_"),
        (lambda self, x: (x * 1).resize_(x.shape[0], 3, 3), "resize_"),
    ],
)
def test_other_memory_is_refused(run: Callable[[Net, Tensor], Any], name: str) -> None:
    with pytest.raises(
        ConversionError, match=f"^The model replaces the memory of a tensor: `{name}`"
    ):
        capture(Net(run), (torch.randn(2, 3, 4, 6),))


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 4, batch_first=True, bidirectional=True),
        nn.LSTM(6, 4, 2, batch_first=True, proj_size=3, dropout=0.5),
        nn.GRU(6, 4, batch_first=True, bidirectional=True),
        nn.RNN(6, 4, batch_first=True, nonlinearity="relu"),
    ],
    ids=str,
)
def test_recurrent_modules(layer: nn.Module) -> None:
    model = Functional(lambda self, x: self.layer(x.sign())[0], layer=layer).eval()
    graph_module = capture(model, (torch.randn(1, 2, 6),)).graph_module
    simplify(graph_module)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 2, 6)
        with torch.no_grad():
            torch.testing.assert_close(graph_module(x)[0], model(x), rtol=1e-5, atol=1e-6)


def test_recurrent_modules_with_time_first() -> None:
    def run(self: nn.Module, x: Tensor, state: Tensor) -> Tensor:
        y, _ = self.layer(x.transpose(0, 1), (state.transpose(0, 1), state.transpose(0, 1) * 2))
        return y[-1]

    model = Functional(run, layer=nn.LSTM(6, 4, 2)).eval()
    graph_module = capture(model, (torch.randn(2, 3, 6), torch.randn(2, 2, 4))).graph_module
    simplify(graph_module)
    inputs = torch.randn(5, 3, 6), torch.randn(5, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-6)


def test_recurrent_cells_with_a_state_given() -> None:
    def run(self: nn.Module, x: Tensor, state: Tensor) -> Tensor:
        h, c = self.lstm(x[:, 0], (state, state * 2))
        return self.gru(h, c) + self.rnn(x[:, 1], h)

    model = Functional(
        run, lstm=nn.LSTMCell(6, 4), gru=nn.GRUCell(4, 4), rnn=nn.RNNCell(6, 4)
    ).eval()
    graph_module = capture(model, (torch.randn(2, 3, 6), torch.randn(2, 4))).graph_module
    simplify(graph_module)
    inputs = torch.randn(5, 3, 6), torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(graph_module(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-6)


# -- swapped weights ------------------------------------------------------------------------------


def copied_in_place(self: Net, x: Tensor) -> Tensor:
    weight = self.linear.weight
    saved = weight.data.clone()
    weight.data.sign_()
    y = self.linear(x)
    weight.data.copy_(saved)
    return y


def assigned(self: Net, x: Tensor) -> Tensor:
    weight = self.linear.weight
    saved, weight.data = weight.data, weight.data.sign()
    try:
        return self.linear(x)
    finally:
        weight.data = saved


def written_by_numpy(self: Net, x: Tensor) -> Tensor:
    weight = self.linear.weight
    saved = weight.data.clone()
    np.sign(weight.detach().numpy(), out=weight.detach().numpy())
    y = self.linear(x)
    weight.data.copy_(saved)
    return y


def functional_call(self: Net, x: Tensor) -> Tensor:
    signs = {name: value.sign() for name, value in self.linear.named_parameters()}
    return torch.func.functional_call(self.linear, signs, (x,)) + self.linear(x)


def loaded(self: Net, x: Tensor) -> Tensor:
    saved = {name: value.clone() for name, value in self.linear.state_dict().items()}
    self.linear.load_state_dict({name: value.sign() for name, value in saved.items()})
    y = self.linear(x)
    self.linear.load_state_dict(saved)
    return y - self.linear(x)


def every_step_another(self: Net, x: Tensor) -> Tensor:
    ys = []
    for step in range(3):
        self.linear.weight.data.mul_(step + 1)
        ys.append(self.linear(x))
    self.linear.weight.data.div_(6)
    return torch.cat(ys, 1)


@pytest.mark.parametrize(
    "run",
    [
        *(copied_in_place, assigned, written_by_numpy, functional_call, loaded, every_step_another),
    ],
)
def test_weights_that_are_swapped_within_a_call(run: Callable[[Net, Tensor], Tensor]) -> None:
    assert_captured(run)


def test_a_weight_that_is_used_twice_is_one_constant() -> None:
    model = Net(lambda self, x: self.linear(self.linear(x)[..., :1] + self.table))
    graph_module = capture(model, (torch.randn(2, 3, 4, 6),)).graph_module
    tensors = [*graph_module.parameters(), *graph_module.buffers()]
    assert sorted(len(tensor.shape) for tensor in tensors) == [1, 1, 2]


# -- refused --------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[Net, Tensor], Any]] = {
    "bernoulli": lambda self, x: torch.bernoulli(x.sigmoid()),
    "rand_like": lambda self, x: x + torch.rand_like(x),
    "native_dropout": lambda self, x: F.dropout(x),
    "uniform": lambda self, x: x * self.linear.weight.data.clone().uniform_()[0],
    "randn": lambda self, x: x + torch.randn(6),
    "randperm": lambda self, x: x[..., torch.randperm(6)],
    "multinomial": lambda self, x: x[..., torch.multinomial(self.table + 1, 3)],
    "rrelu_with_noise": lambda self, x: F.rrelu(x, training=True),
    "rand": lambda self, x: x + torch.rand(x.shape[0], 1, 1, 1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operators_are_named(name: str) -> None:
    place = r"the model's own forward \(.*test_tracing.py:\d+\)"
    words = f"^The model draws random numbers in eval mode: `{name}` in {place}"
    with pytest.raises(ConversionError, match=words):
        capture(Net(RANDOM[name]), (torch.randn(2, 3, 4, 6),))


@pytest.mark.parametrize("draw", [random.random, np.random.random_sample], ids=["random", "numpy"])
def test_random_numbers_of_python_and_numpy_are_seen(draw: Callable[[], float]) -> None:
    with pytest.raises(ConversionError, match=r"the generator of .*random` changed"):
        capture(Net(lambda self, x: x * draw()), (torch.randn(2, 3, 4, 6),))


def test_randomness_in_training_only_is_accepted() -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        x = F.rrelu(F.dropout(x, 0.5, self.training), training=self.training)
        return F.scaled_dot_product_attention(x, x, x) + F.dropout(x, 0.0)

    assert_captured(run)


def swallowed(self: Net, x: Tensor) -> Tensor:
    try:
        return x * 2 if float(x.sum()) > 0 else x
    except Exception:
        return x * 3


def swallowed_without_a_name(self: Net, x: Tensor) -> Tensor:
    try:
        return x + torch.from_numpy(x.numpy())
    except:  # noqa: E722
        return x * 3


def pickled(self: Net, x: Tensor) -> Tensor:
    try:
        return pickle.loads(pickle.dumps(x))  # type: ignore[no-any-return]
    except Exception:
        return x * 3


LEAVING: dict[str, Callable[[Net, Tensor], Any]] = {
    r"`\.item\(\)`": lambda self, x: x * x.max().item(),
    r"`\.(tolist|item)\(\)`": lambda self, x: x * x.mean((1, 2, 3)).tolist()[0],
    r"`\.numpy\(\)`": swallowed_without_a_name,
    r"`float\(\)`": swallowed,
    r"`int\(\)`": lambda self, x: x * int(x.max()),
    r"`bool\(\)`": lambda self, x: x if (x > 0).all() else -x,
    "`pickle`": pickled,
    r"`\.data_ptr\(\)`": lambda self, x: x * (x.data_ptr() % 2),
    r"`torch\.equal\(\)`": lambda self, x: x * torch.equal(x, x + 1),
    r"`torch\.tensor\(\)`": lambda self, x: x + torch.tensor([x.max(), x.min()])[0],
}


@pytest.mark.parametrize("how", LEAVING)
def test_values_of_the_input_that_leave_the_graph(how: str) -> None:
    words = f"^A value computed from the input leaves the graph: {how} in .*test_tracing.py"
    with pytest.raises(ConversionError, match=words):
        capture(Net(LEAVING[how]), (torch.randn(2, 3, 4, 6),))


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (lambda self, x: x[x > 0].sum() + x, "indexing with a mask"),
        (lambda self, x: x + x.nonzero().sum(), "`nonzero`"),
        (lambda self, x: x + torch.unique(x).sum(), "`_unique2`"),
        (lambda self, x: x + torch.masked_select(x, x > 0).sum(), "`masked_select`"),
        (lambda self, x: x + torch.where(x > 0)[0].sum(), "`nonzero`"),
    ],
)
def test_shapes_that_depend_on_values(run: Callable[[Net, Tensor], Any], what: str) -> None:
    words = f"^The shape of a result depends on values of the input: {what} in "
    with pytest.raises(ConversionError, match=words):
        capture(Net(run), (torch.randn(2, 3, 4, 6),))


def test_a_constant_mask_is_accepted() -> None:
    assert_captured(lambda self, x: x[..., self.table > 2] + x[:, :, :1, :3])


def into_a_buffer(self: Net, x: Tensor) -> Tensor:
    self.table.copy_(x.mean((0, 1, 2)))
    return x + self.table


def into_data(self: Net, x: Tensor) -> Tensor:
    self.linear.bias.data = x.mean((0, 1, 2))[:5]
    return self.linear(x)


def into_a_new_tensor(self: Net, x: Tensor) -> Tensor:
    sums = torch.zeros(6)
    sums[0] = x.sum()
    return x + sums


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (into_a_buffer, "`table`"),
        (into_data, "`linear.bias`"),
        (into_a_new_tensor, "a tensor of shape"),
    ],
)
def test_writing_the_input_into_what_stays(run: Callable[[Net, Tensor], Any], name: str) -> None:
    words = f"^The model writes values computed from the input into {name}.* in .*test_tracing.py"
    with pytest.raises(ConversionError, match=words):
        capture(Net(run), (torch.randn(2, 3, 4, 6),))


def asks_in_a_try(self: Net, x: Tensor) -> Tensor:
    try:
        return x * 2 if x.shape[0] != 1 else x
    except ConversionError:
        return x * 3


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: x * 2 if x.shape[0] > 1 else x,
        lambda self, x: x * 2 if x.shape[0] > 8 else x,
        lambda self, x: x * min(x.shape[0], 2),
        lambda self, x: x * int(x.shape[0] == 1),
        asks_in_a_try,
    ],
)
def test_a_branch_on_the_batch_size(run: Callable[[Net, Tensor], Any]) -> None:
    words = r"^The model branches on the batch size in .*test_tracing.py, line \d+; a converted"
    with pytest.raises(ConversionError, match=words):
        capture(Net(run), (torch.randn(2, 3, 4, 6),))


def test_a_check_that_holds_for_every_batch_size_is_accepted() -> None:
    def run(self: Net, x: Tensor) -> Tensor:
        assert x.shape[0] > 0
        assert x.shape[0]
        return self.conv(x) * x.shape[0]

    assert_captured(run)


def test_control_flow_operators_are_named() -> None:
    model = Net(lambda self, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)))
    with pytest.raises(ConversionError, match=r"^The model has control flow: `cond` in .*test_tr"):
        capture(model, (torch.randn(2, 3, 4, 6),))


def test_the_module_is_named_where_a_submodule_draws() -> None:
    inner = Functional(lambda self, x: torch.bernoulli(x.sigmoid()))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), inner))
    with pytest.raises(ConversionError, match=r"`bernoulli` in `1\.1` \(.*test_tracing.py:\d+\)"):
        capture(model, (torch.randn(2, 3, 4, 6),))


def test_a_randomized_relu_is_a_leaky_one_in_eval_mode() -> None:
    assert_captured(lambda self, x: F.rrelu(self.conv(x), 0.1, 0.4))

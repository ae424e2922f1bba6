"""Engines whose tensors were changed by others, and inputs of every kind: correct or refused."""

import copy
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from biper_engine.engine import Engine
from biper_engine.ops.backends import use_backend
from biper_engine.ops.cpu_module import native
from biper_engine.runtime import tensors
from tests.networks_by_hand import classifier

NAMES = (
    "conv1.weight",
    "layer1.0.conv1.weight",
    "layer1.0.conv1.multiplier",
    "layer1.1.conv1.threshold",
    "layer1.1.conv1.sense",
    "layer2.0.conv1.bias",
    "fc.weight",
    "fc.bias",
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def place(engine: Engine, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return engine.graph_module.get_submodule(path), last


def held(engine: Engine, name: str) -> Tensor:
    return engine.graph_module.get_buffer(name)


def other(name: str) -> Tensor:
    return held(classifier(1), name).clone()


def refill_memory() -> None:
    """Put NaN wherever memory is free."""
    sizes = (10, 33, 40, 100, 1000, 5000)
    del [torch.full((n,), float("nan")) for n in sizes for _ in range(50)][:]


# -- other tensors --------------------------------------------------------------------------------


def by_copy(engine: Engine, name: str) -> None:
    held(engine, name).copy_(other(name))


def by_copy_in_inference_mode(engine: Engine, name: str) -> None:
    with torch.inference_mode():
        held(engine, name).copy_(other(name))


def by_data_copy(engine: Engine, name: str) -> None:
    held(engine, name).data.copy_(other(name))


def by_numpy(engine: Engine, name: str) -> None:
    held(engine, name).numpy()[...] = other(name).numpy()


def by_data(engine: Engine, name: str) -> None:
    held(engine, name).data = other(name)


def by_set(engine: Engine, name: str) -> None:
    held(engine, name).set_(other(name))  # type: ignore[call-overload]


def by_swap(engine: Engine, name: str) -> None:
    torch.utils.swap_tensors(held(engine, name), other(name))


def by_setattr(engine: Engine, name: str) -> None:
    setattr(*place(engine, name), other(name))


def by_parameter(engine: Engine, name: str) -> None:
    module, last = place(engine, name)
    delattr(module, last)
    module.register_parameter(last, nn.Parameter(other(name), requires_grad=False))


def by_attribute(engine: Engine, name: str) -> None:
    module, last = place(engine, name)
    delattr(module, last)
    object.__setattr__(module, last, other(name))


def by_assign(engine: Engine, name: str) -> None:
    engine.load_state_dict(
        {**engine.state_dict(), f"graph_module.{name}": other(name)}, assign=True
    )


def by_negative(engine: Engine, name: str) -> None:
    value = other(name)
    negative = value if value.dtype == torch.bool else torch._neg_view(-value)
    setattr(*place(engine, name), negative)


def by_misaligned(engine: Engine, name: str) -> None:
    value = other(name)
    memory = bytearray(value.nbytes + 1)
    odd = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=1)
    setattr(*place(engine, name), odd.view(value.shape).copy_(value))


def by_inference_tensor(engine: Engine, name: str) -> None:
    with torch.inference_mode():
        setattr(*place(engine, name), other(name))


def by_resized(engine: Engine, name: str) -> None:
    held(engine, name).resize_(0).resize_(other(name).shape).copy_(other(name))


@pytest.mark.some(2)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "change",
    [
        *(by_copy, by_copy_in_inference_mode, by_data_copy, by_numpy, by_data, by_set, by_swap),
        *(by_setattr, by_parameter, by_attribute, by_assign, by_negative, by_misaligned),
        *(by_inference_tensor, by_resized),
    ],
)
def test_other_values_are_those_of_the_next_call(
    change: Callable[[Engine, str], None], backend: str | None, images: Tensor
) -> None:
    if native() is None and change in (by_data_copy, by_numpy):
        pytest.skip("no write that PyTorch does not count is seen without the compiled module")
    engine, fresh = classifier(), classifier()
    # One tensor of each dtype is enough for the slow backend: plans are made alike for all.
    names = ("conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.sense") if backend else NAMES
    with use_backend(backend) if backend else torch.no_grad():
        for name in names:
            before = engine(images)
            change(engine, name)
            by_setattr(fresh, name)
            wanted = copy.deepcopy(fresh)(images)
            assert torch.equal(engine(images), wanted), name
            assert not torch.equal(wanted, before), name


def test_a_write_of_one_value_to_a_large_tensor_is_seen(images: Tensor) -> None:
    engine = classifier()
    weight = nn.Parameter(torch.randn(500, 33), requires_grad=False)
    setattr(*place(engine, "fc.weight"), weight)
    setattr(*place(engine, "fc.bias"), torch.zeros(500))
    before = engine(images)
    weight[250, 3] += 1.0
    after = engine(images)
    assert (after != before).any(0).nonzero().flatten().tolist() == [250]


@pytest.mark.some(7)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["share_memory", "share_memory_", "reduction"])
def test_tensors_in_shared_memory_give_the_same(way: str, name: str, images: Tensor) -> None:
    engine = classifier()
    before = engine(images)
    if way == "share_memory":
        engine.share_memory()  # type: ignore[no-untyped-call]
    elif way == "share_memory_":
        held(engine, name).share_memory_()  # type: ignore[no-untyped-call]
    else:
        ForkingPickler.dumps(engine)
    refill_memory()
    assert torch.equal(engine(images), before)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_values_are_refused_by_name(name: str, images: Tensor) -> None:
    engine = classifier()
    engine(images)
    held(engine, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"The memory of `engine\.{name}` was freed"):
        engine(images)
    setattr(*place(engine, name), other(name).to("meta"))
    with pytest.raises(ValueError, match=rf"`{name}` is on meta, but the engine is on cpu"):
        engine(images)
    setattr(*place(engine, name), other(name).to_sparse())
    with pytest.raises(TypeError, match=rf"`engine\.{name}` must be a plain tensor .*sparse"):
        engine(images)
    delattr(*place(engine, name))
    with pytest.raises(TypeError, match=rf"tensor `{name}` is missing"):
        engine(images)


@pytest.mark.some(7)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_dtype_are_refused(
    name: str, dtype: torch.dtype, images: Tensor
) -> None:
    engine = classifier()
    if held(engine, name).dtype == dtype:
        pytest.skip("it is the same")
    engine(images)
    setattr(*place(engine, name), held(engine, name).to(dtype))
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        engine(images)


def test_functional_calls_take_their_tensors_and_leave_the_engines(images: Tensor) -> None:
    engine, state = classifier(), classifier(1).state_dict()
    before, wanted = engine(images), classifier(1)(images)
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(engine, state, (images,)), wanted)
        assert torch.equal(engine(images), before)
    trained = {
        name: value.clone().requires_grad_() if value.is_floating_point() else value
        for name, value in state.items()
    }
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"`conv1\.weight` requires grad"):
        torch.func.functional_call(engine, trained, (images,))
    stacked = {name: torch.stack((value, value)) for name, value in state.items()}
    with pytest.raises(TypeError, match=r"transform of torch\.func"):
        torch.func.vmap(lambda s: torch.func.functional_call(engine, s, (images,)))(stacked)
    assert torch.equal(engine(images), before)


def test_another_graph_in_its_place_is_called(images: Tensor) -> None:
    engine, another = classifier(), classifier(1)
    engine(images)
    engine.graph_module = another.graph_module
    assert torch.equal(engine(images), another(images))


def test_tensors_that_never_rest_are_refused(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restless:
        def holds(self) -> bool:
            return False

    monkeypatch.setattr(tensors, "_watch", lambda _: Restless())
    with pytest.raises(RuntimeError, match="changed at every attempt"):
        classifier()(images)


def test_copies_and_moves_while_others_call_change_no_answer(images: Tensor) -> None:
    engine = classifier()
    wanted = engine(images)
    stop, wrong = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            if not torch.equal(engine(images), wanted):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for name in NAMES:
        assert torch.equal(copy.deepcopy(engine)(images), wanted)
        held(engine, name).share_memory_()  # type: ignore[no-untyped-call]
        refill_memory()
        held(engine, name).data = held(engine, name).clone()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- processes ------------------------------------------------------------------------------------


def _answer(engine: Engine, images: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(engine(images).numpy().tobytes())


@pytest.mark.deep
def test_a_spawned_process_gives_the_same_bytes_and_so_does_the_parent(images: Tensor) -> None:
    engine = classifier()
    before = engine(images)
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        queue = context.SimpleQueue()
        process = context.Process(target=_answer, args=(engine, images, queue))
        process.start()
        got = queue.get()
        process.join(60)
        assert process.exitcode == 0
        refill_memory()
        assert torch.equal(engine(images), before)
        assert got == before.numpy().tobytes()


# -- inputs ---------------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    memory = bytearray(x.nbytes + 1)
    odd = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1)
    return odd.view(x.shape).copy_(x)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda x: torch._neg_view(-x),
    "negative, channels_last": lambda x: torch._neg_view(
        (-x).contiguous(memory_format=torch.channels_last)
    ),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "zeros": lambda x: torch._efficientzerotensor(x.shape),
    "misaligned": misaligned,
    "misaligned, channels_last": lambda x: misaligned(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "expanded": lambda x: x[:1].expand(3, 3, 8, 8),
    "one value": lambda x: x[:1, :1, :1, :1].expand(3, 3, 8, 8),
    "overlapping": lambda x: x.flatten().as_strided((3, 3, 8, 8), (1, 2, 3, 4)),
    "copied when written": lambda x: torch._lazy_clone(x),  # type: ignore[attr-defined]
}


@pytest.mark.some(7)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_what_torch_says_that_they_are(
    kind: str, backend: str | None, images: Tensor
) -> None:
    engine, x = classifier(), INPUTS[kind](images)
    plain = torch.empty(3, 3, 8, 8).copy_(x)
    with use_backend(backend) if backend else torch.no_grad():
        wanted = engine(plain)
        assert torch.equal(engine(x), wanted)
    bits = torch.ops.biper.binarize(plain)
    assert torch.equal(torch.ops.biper.binarize(x), bits)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (freed, ValueError, "The memory of `image` was freed"),
        (Tensor.to_sparse, TypeError, "`image` must be a plain tensor .*sparse"),
        (Tensor.to_mkldnn, TypeError, "`image` must be a plain tensor .*mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), TypeError, "`image` .* is nested"),
    ],
    ids=["freed", "sparse", "oneDNN", "nested"],
)
def test_inputs_without_plain_memory_are_refused(
    make: Callable[[Tensor], Tensor], error: type[Exception], message: str, images: Tensor
) -> None:
    engine = classifier()
    engine(images)
    with pytest.raises(error, match=message):
        engine(make(images))


def test_operators_refuse_freed_memory(images: Tensor) -> None:
    with pytest.raises(ValueError, match="was freed"):
        torch.ops.biper.binarize(freed(images))


@pytest.mark.parametrize("grad", [False, True])
def test_a_tangent_is_refused(grad: bool, images: Tensor) -> None:
    engine = classifier()
    wanted = engine(images)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(images.clone(), images)  # type: ignore[no-untyped-call]
        for call in (engine, torch.ops.biper.binarize):
            with pytest.raises(RuntimeError, match="tangent of forward-mode AD: pass its primal"):
                call(dual)
        assert torch.equal(engine(images), wanted)
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jvp(engine, (images,), (images,))
    with pytest.raises(RuntimeError, match="tangent"):
        torch.func.jacfwd(engine)(images)


def test_transforms_of_torch_func_run_the_operators(images: Tensor) -> None:
    engine = classifier()
    wanted = engine(images)
    assert_close(torch.func.vmap(engine)(images[:, None])[:, 0], wanted)
    assert_close(torch.func.functionalize(engine)(images), wanted)


@pytest.mark.parametrize("early", [False, True])
def test_make_fx_records_the_operators(early: bool, images: Tensor) -> None:
    engine = classifier()
    wanted = engine(images)
    recorded = make_fx(engine, pre_dispatch=early)(images)
    assert any("biper" in str(node.target) for node in recorded.graph.nodes)
    assert_close(recorded(images), wanted)
    assert torch.equal(engine(images), wanted)

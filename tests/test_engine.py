"""The engine as a module: calls, errors, copies, dtypes, state and compilers."""

import copy
import io
import multiprocessing
import os
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from biper_engine.engine import Engine
from biper_engine.errors import BackendUnavailableError, GeometryError
from biper_engine.graph.signature import InputSpec, Signature
from biper_engine.ops.backends import backends, use_backend
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature, two_inputs

_aten = torch.ops.aten


@pytest.fixture(scope="module")
def engine() -> Engine:
    return classifier()


def test_a_call_gives_what_the_graph_gives(engine: Engine, images: Tensor) -> None:
    # Native float layers round in another order than torch's.
    torch.testing.assert_close(engine(images), engine.graph_module(images)[0])


def test_an_empty_batch_gives_an_empty_result(engine: Engine, images: Tensor) -> None:
    assert engine(images[:0]).shape == (0, 10)


def test_a_result_does_not_depend_on_the_other_images(engine: Engine, images: Tensor) -> None:
    # Equal but for the order of sums in a float layer, which may depend on a row's place.
    torch.testing.assert_close(engine(images.flip(0)), engine(images).flip(0))


def test_a_channels_last_input_gives_the_same(engine: Engine, images: Tensor) -> None:
    given = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(engine(given), engine(images))


def test_pytrees_have_the_forms_of_the_model() -> None:
    image, mask = torch.randn(2, 3, 6, 6), torch.ones(2, 1, 6, 6)
    result = two_inputs()(image, extra={"mask": mask})
    assert list(result) == ["maps", "image"]
    assert [value.shape for value in result["maps"]] == [(2, 8, 6, 6)] * 2
    assert torch.equal(result["image"], image)


def test_the_order_of_keywords_and_keys_does_not_matter() -> None:
    g = GraphBuilder()
    a, b, c = g.input("a"), g.input("b"), g.input("c")
    sizes: dict[str, tuple[int, ...]] = {"a": (2,), "b": (2,), "c": (2,)}
    form = signature(sizes, (), {"first": {"a": 0, "b": 0}, "second": 0}, 0)
    ab = g.call("ab", _aten.sub.Tensor, a, b)
    module = g.module(g.call("abc", _aten.div.Tensor, ab, c))
    net = engine_of(module, form)
    x, y, z = (torch.full((1, 2), value) for value in (9.0, 3.0, 2.0))
    assert net(second=z, first={"b": y, "a": x}).tolist() == [[3.0, 3.0]]


def test_a_result_never_shares_memory_with_an_input_or_a_constant() -> None:
    g = GraphBuilder()
    x = g.input("x")
    flat = g.call("flat", _aten.reshape.default, x, [-1, 4])
    constant = g.constant("table", torch.zeros(3))
    form = signature({"x": (2, 2)}, (0,), {}, (0, 0, 0, 0))
    module = g.module(x, flat, constant, flat)
    net = engine_of(module, form)
    given = torch.zeros(1, 2, 2)
    for value in net(given):
        value.fill_(7)
    assert given.sum() == 0
    assert net(given)[2].sum() == 0


def test_a_result_is_never_overwritten(engine: Engine, images: Tensor) -> None:
    first = engine(images)
    kept = first.clone()
    engine(images + 1)
    assert torch.equal(first, kept)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"images of 3x8x8 \(one engine per image size\); got .*\[2, 3, 16, 16\]"),
        ((2, 1, 8, 8), r"got `image` of shape \[2, 1, 8, 8\]; convert again with an example"),
        ((3, 8, 8), r"add the batch dimension with `x.unsqueeze\(0\)`"),
        ((8,), r"got `image` of shape \[8\]; pass 4 dimensions, the batch first"),
    ],
)
def test_a_wrong_shape_is_refused(engine: Engine, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        engine(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
def test_a_wrong_dtype_is_refused(engine: Engine, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"`image` must be float32, but it is {str(dtype)[6:]}"):
        engine(torch.zeros(1, 3, 8, 8, dtype=dtype))


def test_a_value_that_is_not_a_tensor_is_refused(engine: Engine) -> None:
    with pytest.raises(TypeError, match="`image` must be a tensor, but it is <class 'int'>"):
        engine(1)


def test_a_wrong_number_of_inputs_is_refused(engine: Engine, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"takes 1 tensor as .* got 2 values"):
        engine(images, images)
    with pytest.raises(TypeError, match=r"takes 1 tensor as .* got 0 values"):
        engine()


def test_a_wrong_structure_is_refused(images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"'extra': \{'mask': 'mask'\}.*'extra': 'Tensor'"):
        two_inputs()(images, extra=images)


def test_an_input_on_another_device_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="`image` is on meta, but the engine is on cpu"):
        engine(torch.empty(1, 3, 8, 8, device="meta"))


def test_an_input_that_requires_grad_is_refused(engine: Engine, images: Tensor) -> None:
    given = images.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"inference only.*`torch.no_grad\(\)`"):
        engine(given)
    with torch.no_grad():
        assert torch.equal(engine(given), engine(images))


def test_a_forced_backend_that_cannot_run_raises(
    engine: Engine, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_BACKEND", "refrence")
    with pytest.raises(BackendUnavailableError, match="Did you mean 'reference'"):
        engine(images)


def test_a_signature_without_a_leaf_for_each_input_is_refused() -> None:
    other = signature({"image": (3, 8, 8)}, (0,), {}, 0)
    spec = InputSpec("x", torch.float32, (None, 3))
    with pytest.raises(ValueError, match="`in_spec` has 1 leaves, but `inputs` describes 2"):
        Signature(other.in_spec, other.out_spec, (spec, spec))


# -- a good citizen among modules -----------------------------------------------------------------


def test_repr_is_short_and_says_what_matters(engine: Engine) -> None:
    assert repr(engine) == (
        "Engine(packed 2/3 layers, 80,000 -> 9,000 bytes, input image: float32 [N, 3, 8, 8])"
    )


def test_input_shape_is_that_of_one_image(engine: Engine) -> None:
    assert engine.input_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="takes 2 tensors"):
        _ = two_inputs().input_shape


def test_a_training_parent_leaves_the_engine_in_evaluation_mode() -> None:
    parent = nn.Sequential(classifier(), nn.Linear(10, 2)).train()
    assert parent[1].training
    assert not parent[0].training
    assert not any(module.training for module in parent[0].modules())


def test_an_engine_has_nothing_to_train(engine: Engine) -> None:
    assert list(engine.parameters()) == []
    assert not any(value.requires_grad for value in engine.state_dict().values())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float64),
        lambda m: m.type(torch.float32),
        lambda m: nn.Sequential(m).half(),
    ],
)
def test_a_change_of_dtype_is_refused(change: Any, images: Tensor) -> None:
    engine = classifier()
    before = engine(images)
    with pytest.raises(TypeError, match="convert the model again with `compute_dtype="):
        change(engine)
    assert torch.equal(engine(images), before)


def test_a_change_to_the_same_dtype_or_layout_changes_nothing(images: Tensor) -> None:
    engine = classifier()
    before = engine(images)
    state = {name: value.clone() for name, value in engine.state_dict().items()}
    moved = engine.float().to(torch.float32).to("cpu").to(memory_format=torch.channels_last)
    assert moved is engine
    torch.testing.assert_close(engine(images), before)
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
    words = engine.state_dict()["graph_module.layer1.0.conv1.weight"]
    assert words.is_contiguous()


def test_a_state_dict_round_trips(images: Tensor) -> None:
    one, other = classifier(0), classifier(1)
    assert not torch.equal(one(images), other(images))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(images), other(images))


def test_a_state_dict_loaded_through_a_parent_reaches_the_engine(images: Tensor) -> None:
    one, other = nn.Sequential(classifier(0)), nn.Sequential(classifier(1))
    other(images)
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(one(images), other(images))


def test_a_state_dict_holds_no_prepacked_weights(images: Tensor) -> None:
    engine = classifier()
    before = set(engine.state_dict())
    engine(images)
    assert set(engine.state_dict()) == before


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(way: str, called: bool, images: Tensor) -> None:
    engine = classifier()
    expected = classifier()(images)
    if called:
        engine(images)
    if way == "deepcopy":
        copied = copy.deepcopy(engine)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(engine))
    else:
        torch.save(engine, buffer := io.BytesIO())
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert str(copied.graph_module.graph) == str(engine.graph_module.graph)
    for value in engine.state_dict().values():
        value.zero_()
    assert torch.equal(copied(images), expected)
    assert (copied.report, copied.signature) == (engine.report, engine.signature)


def _call_in_process(engine: Engine, images: Tensor, queue: Any) -> None:
    queue.put(engine(images).tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_can_call_even_if_the_lock_was_held(images: Tensor) -> None:
    engine = classifier()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    lock = engine._plan._locks.setdefault(os.getpid(), threading.Lock())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own thread pool does not survive a fork
    try:
        with lock:
            process = context.Process(target=_call_in_process, args=(engine, images, queue))
            process.start()
            process.join(30)
        assert process.exitcode == 0
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(torch.tensor(queue.get()), engine(images))


def test_concurrent_first_calls_agree(images: Tensor) -> None:
    engine, expected = classifier(), classifier()(images)
    results: list[Tensor] = []
    barrier = threading.Barrier(8)

    def call() -> None:
        barrier.wait()
        for _ in range(5):
            results.append(engine(images))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(torch.equal(result, expected) for result in results)


def test_autocast_changes_nothing(engine: Engine, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = engine(images)
    assert result.dtype == torch.float32
    assert torch.equal(result, engine(images))


def test_a_plan_made_in_inference_mode_runs_later_calls(images: Tensor) -> None:
    engine = classifier()
    with torch.inference_mode():
        first = engine(images)
    assert torch.equal(engine(images), first)
    assert torch.equal(copy.deepcopy(engine)(images), first)


def test_results_do_not_depend_on_the_backend_being_forced(engine: Engine, images: Tensor) -> None:
    expected = engine(images)
    with use_backend("reference"):
        torch.testing.assert_close(engine(images), expected)


# -- compilers ------------------------------------------------------------------------------------


def test_torch_compile_takes_the_whole_engine(engine: Engine, images: Tensor) -> None:
    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), engine(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(images).dtype == torch.float32


def test_torch_compile_takes_pytrees() -> None:
    net = two_inputs()
    image, mask = torch.randn(2, 3, 6, 6), torch.ones(2, 1, 6, 6)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    result = compiled(image, extra={"mask": mask})
    torch.testing.assert_close(result, net(image, extra={"mask": mask}))


@pytest.mark.parametrize("inside", [False, True])
def test_torch_script_is_refused_in_one_sentence(engine: Engine, inside: bool) -> None:
    module = torch.nn.Sequential(engine, torch.nn.ReLU()) if inside else engine
    with pytest.raises(
        TypeError, match=r"torch\.jit\.script cannot compile an engine: use "
    ) as caught:
        torch.jit.script(module)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_keeps_the_batch_dynamic(engine: Engine, images: Tensor, strict: bool) -> None:
    shapes = {"args": ({0: torch.export.Dim("batch")},)}
    program = torch.export.export(engine, (images,), dynamic_shapes=shapes, strict=strict)
    more = torch.cat([images, images])
    torch.testing.assert_close(program.module()(more), engine(more))


def test_a_fake_call_makes_no_plan() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    engine = classifier()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert engine(torch.empty(2, 3, 8, 8)).shape == (2, 10)
    assert engine._plan.is_empty


def test_warming_up_leaves_nothing_to_prepare(images: Tensor) -> None:
    engine = classifier()
    engine.warmup([(1, 3, 8, 8), images.shape])
    plan = engine._get_plan()
    assert not engine._plan.is_empty
    engine(images)
    assert engine._get_plan() is plan


def test_warming_up_takes_every_input_and_nothing_but_shapes() -> None:
    engine = two_inputs()
    engine.warmup([(2, 3, 6, 6)])
    assert not engine._plan.is_empty
    with pytest.raises(GeometryError, match="converted for images of 3x6x6"):
        engine.warmup([(2, 3, 7, 6)])
    with pytest.raises(TypeError, match="shapes of whole batches, such as"):
        engine.warmup((2, 3, 6, 6))  # type: ignore[arg-type]


def test_the_number_of_threads_is_that_of_what_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    if {info.name: info.available for info in backends()}["cpu"]:
        with use_backend("cpu"):
            assert engine.num_threads == 3
    with use_backend("reference"):
        assert engine.num_threads == torch.get_num_threads()

"""Requirements of torch for operators: opcheck, shape functions, compile, export, modes."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from biper_engine import bits as contract
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import (
    Epilogue,
    bconv2d,
    bconv2d_bits,
    bconv2d_float,
    bconv2d_float_bits,
    binarize,
    bmaxpool2d,
    prepack,
    unbinarize,
)
from biper_engine.ops.functional import epilogue_options, geometry_options
from biper_engine.ops.matrix_operators import MATRIX_SCHEMAS
from biper_engine.ops.plan_operators import PLAN_SCHEMAS
from biper_engine.ops.registration import SCHEMAS
from tests.images import noise

ALL_SCHEMAS = {**SCHEMAS, **MATRIX_SCHEMAS, **PLAN_SCHEMAS}

CONV = Conv2dGeometry(
    in_channels=66,
    out_channels=34,
    kernel_size=(3, 3),
    stride=(2, 1),
    padding=(1, 1, 0, 2),
    groups=2,
)
SIZE, POOLED = (7, 6), (3, 5)
POOL = Pool2dGeometry(kernel_size=(2, 2), padding=(1, 1), stride=(2, 1))


class Call(nn.Module):
    """One operator with everything but its batched inputs held, as an engine holds it."""

    def __init__(self, op: str, inputs: tuple[str, ...], **constants: Any) -> None:
        super().__init__()
        self.op, self.inputs = getattr(torch.ops.biper, op).default, inputs
        self.tensors = [name for name, value in constants.items() if isinstance(value, Tensor)]
        for name in self.tensors:
            self.register_buffer(name, constants.pop(name))
        self.constants = constants

    def arguments(self, *batched: Tensor) -> dict[str, Any]:
        held = {name: getattr(self, name) for name in self.tensors}
        return {**dict(zip(self.inputs, batched, strict=True)), **held, **self.constants}

    def forward(self, *batched: Tensor) -> Any:
        return self.op(**self.arguments(*batched))


class Residual(Call):
    """A call with two batched inputs; export wants their names."""

    def forward(self, bits: Tensor, residual: Tensor) -> Any:  # type: ignore[override]
        return self.op(**self.arguments(bits, residual))


class Pair(Call):
    """A call with two packed maps."""

    def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
        return self.op(**self.arguments(a, b))


class Single(Call):
    """A call with one batched input."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.op(**self.arguments(x))


WEIGHT = contract.pack_weight(noise(34, 33, 3, 3) > 0)
SENSE = torch.arange(34) % 2 == 0
OPERANDS = {"weight": WEIGHT, "multiplier": noise(34, seed=1), "bias": noise(34, seed=2)}
BITS_OUT = {"threshold": noise(34, seed=3), "sense": SENSE}
EPILOGUE = Epilogue(
    multiplier=OPERANDS["multiplier"],
    bias=OPERANDS["bias"],
    pool=POOL,
    pool_min=OPERANDS["multiplier"] < 0,
    slope=noise(34, seed=4),
    shift=noise(34, seed=5),
)
FUSED = {**epilogue_options(EPILOGUE), **geometry_options(CONV)}

STEM = {
    "weight": noise(34, 3, 3, 3, seed=6),
    "bias": noise(34, seed=2),
    "stride": [1, 2],
    "padding": [1, 1, 0, 2],
    "pool_kernel_size": [2, 2],
    "pool_stride": [2, 1],
    "pool_padding": [1, 1],
    "clamp_min": -20.0,
    "clamp_max": 30.0,
    "scale": noise(3, seed=7),
    "offset": noise(3, seed=8),
    **BITS_OUT,
}

MODULES: dict[str, Callable[[], Call]] = {
    "binarize": lambda: Single(
        "binarize", ("x",), threshold=noise(66), sense=torch.arange(66) % 2 == 0
    ),
    "unbinarize": lambda: Single("unbinarize", ("bits",), channels=66, dtype=torch.float16),
    "bmaxpool2d": lambda: Single(
        "bmaxpool2d",
        ("bits",),
        channels=66,
        kernel_size=[3, 2],
        stride=[2, 1],
        padding=[1, 1],
        take_and=torch.arange(66) % 2 == 0,
    ),
    "prepack": lambda: Single(
        "prepack", ("weight",), backend="reference", **geometry_options(CONV)
    ),
    "bconv2d": lambda: Single("bconv2d", ("bits",), weight=WEIGHT, **geometry_options(CONV)),
    "bconv2d_float": lambda: Residual(
        "bconv2d_float", ("bits", "residual"), dtype=torch.bfloat16, **OPERANDS, **FUSED
    ),
    "bconv2d_bits": lambda: Residual(
        "bconv2d_bits", ("bits", "residual"), **OPERANDS, **BITS_OUT, **FUSED
    ),
    "bconv2d_float_bits": lambda: Residual(
        "bconv2d_float_bits",
        ("bits", "residual"),
        dtype=torch.float16,
        **OPERANDS,
        **BITS_OUT,
        **FUSED,
    ),
    "bmatmul": lambda: Pair("bmatmul", ("a", "b"), channels=66, groups=2, low_b=0),
    "bmatmul_float": lambda: Pair(
        "bmatmul_float",
        ("a", "b"),
        **{"channels": 66, "groups": 3, "low_a": 0, "dtype": torch.float16},
        **{"multiplier": 0.3, "row_multiplier": 0.2, "column_multiplier": -0.1, "bias": 2.0},
    ),
    "weight_linear": lambda: Single(
        "weight_linear",
        ("x",),
        **{"weight": WEIGHT[:, 0, 0], "multiplier": noise(34, seed=1)},
        **{"bias": noise(34, seed=2), "offset": noise(34, seed=3)},
    ),
    "unpack_weight": lambda: Single(
        "unpack_weight",
        ("weight",),
        **{"low": noise(34, seed=1), "high": noise(34, seed=2), "channels": 33},
        dtype=torch.bfloat16,
    ),
    "stem": lambda: Single("stem", ("x",), dtype=torch.float16, **STEM),
    "stem_bits": lambda: Single("stem_bits", ("x",), **STEM),
    "pooled_linear": lambda: Single(
        "pooled_linear", ("x",), weight=noise(10, 66, seed=1), bias=noise(10, seed=2)
    ),
}


def inputs_of(module: Call, batch: int) -> tuple[Tensor, ...]:
    if module.inputs == ("weight",):
        return (WEIGHT,)
    if "weight" in module.tensors and module.inputs == ("x",) and module.weight.dim() == 4:
        return (noise(batch, module.weight.shape[1], *SIZE, seed=batch),)  # a stem's images
    if module.inputs == ("x",) and module.op == torch.ops.biper.weight_linear.default:
        return (noise(batch, 4, 3, 33, seed=batch),)
    x = noise(batch, 66, *SIZE, seed=batch)
    if module.inputs == ("x",):
        return (x,)
    packed = contract.pack_channels((x > 0).permute(0, 2, 3, 1))
    if module.inputs == ("bits",):
        return (packed,)
    if module.inputs == ("a", "b"):
        return packed, packed[:, :, 1:4].bitwise_not()
    rows, columns = POOL.output_size(*CONV.output_size(*SIZE))
    return (packed, noise(batch, 34, rows, columns, seed=9))


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(result: Any, expected: Any) -> None:
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> Call:
    return MODULES[request.param]()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_operator_is_covered() -> None:
    assert set(MODULES) == set(ALL_SCHEMAS)


@pytest.mark.some(2)
def test_opcheck_passes(module: Call) -> None:
    for batch in (2, 0):
        torch.library.opcheck(module.op, (), module.arguments(*inputs_of(module, batch)))


@pytest.mark.parametrize("op", ALL_SCHEMAS)
def test_arguments_have_the_defaults_of_the_schema(op: str) -> None:
    module = MODULES[op]()
    given = module.arguments(*inputs_of(module, 1))
    arguments = getattr(torch.ops.biper, op).default._schema.arguments
    minimal = {
        a.name: given[a.name]
        for a in arguments
        if not a.has_default_value() or (a.name == "groups" and "weight" in given)
    }
    torch.library.opcheck(module.op, (), minimal, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.some(2)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_without_a_graph_break(module: Call) -> None:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (2, 5, 1):
        inputs = inputs_of(module, batch)
        assert_same(compiled(*inputs), module(*inputs))


@pytest.mark.usefixtures("fresh_compiler")
def test_the_typed_front_compiles_without_a_graph_break() -> None:
    threshold, sense = BITS_OUT["threshold"], SENSE
    epilogue = dataclasses.replace(EPILOGUE, threshold=threshold, sense=sense)

    def front(x: Tensor) -> tuple[Tensor, ...]:
        packed = binarize(x)
        pooled = bmaxpool2d(packed, 66, POOL)
        floats, packed_out = bconv2d_float_bits(packed, WEIGHT, CONV, epilogue)
        return unbinarize(pooled, 66), floats, packed_out, bconv2d(packed, WEIGHT, CONV)

    x = noise(2, 66, *SIZE)
    assert_same(torch.compile(front, fullgraph=True, backend="aot_eager")(x), front(x))


@pytest.mark.some(5)
@pytest.mark.deep
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_inductor(module: Call) -> None:
    def surrounded(*inputs: Tensor) -> list[Tensor]:
        return [t + 1 for t in tensors(module(*(x + 0 for x in inputs)))]

    compiled = torch.compile(surrounded, fullgraph=True)
    for batch in (2, 5):
        inputs = inputs_of(module, batch)
        assert_same(compiled(*inputs), surrounded(*inputs))


@pytest.mark.some(4)
def test_exports_with_a_dynamic_batch(module: Call) -> None:
    inputs = inputs_of(module, 2)
    batch = torch.export.Dim("batch")
    dynamic = None if module.inputs == ("weight",) else tuple({0: batch} for _ in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=dynamic)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert module.op in targets
    for size in (1, 2, 5):
        inputs = inputs_of(module, size)
        assert_same(program.module()(*inputs), module(*inputs))


def layouts(x: Tensor) -> Iterator[Tensor]:
    """Yield x in several memory layouts, and in sizes of one."""
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.stack([x, x], -1)[..., 0]
    yield x[:1]
    yield x[:0]


@pytest.mark.some(22)
def test_shape_functions_give_the_real_strides(
    module: Call, device: torch.device, need: Callable[..., None]
) -> None:
    op = module.op.__name__.partition(".")[0]
    need(op, CONV if op.startswith("bconv2d") else None)
    module = module.to(device)
    inputs = tuple(x.to(device) for x in inputs_of(module, 3))
    for first in layouts(inputs[0]):
        if module.inputs == ("weight",) and first.shape != WEIGHT.shape:
            continue
        real_inputs = (first, *(x[: first.shape[0]] for x in inputs[1:]))
        real = tensors(module(*real_inputs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            arguments = tree_map_only(Tensor, mode.from_tensor, module.arguments(*real_inputs))
            fake = tensors(module.op(**arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 64, 1, 1), (1, 33, 3, 1), (5, 1, 2, 2)])
def test_prepack_promises_its_strides_also_for_sizes_of_one(shape: tuple[int, ...]) -> None:
    weight = contract.pack_weight(noise(*shape) > 0)
    conv = Conv2dGeometry(
        in_channels=shape[1], out_channels=shape[0], kernel_size=(shape[2], shape[3])
    )
    real = prepack(weight, conv, "reference")
    fake = prepack(weight.to("meta"), conv, "reference")
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_result(module: Call, dtype: torch.dtype) -> None:
    inputs = inputs_of(module, 2)
    expected = module(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        assert_same(module(*inputs), expected)


def test_autocast_does_not_round_accumulators(
    device: torch.device, need: Callable[..., None]
) -> None:
    conv = Conv2dGeometry(in_channels=257, out_channels=2, kernel_size=(3, 3))
    need("bconv2d", conv)  # 9 * 257 is odd and beyond 2^11: neither half type holds it
    ones = contract.pack_channels(torch.ones(1, 3, 3, 257, dtype=torch.bool)).to(device)
    weight = contract.pack_weight(torch.ones(2, 257, 3, 3, dtype=torch.bool)).to(device)
    epilogue = Epilogue(multiplier=torch.ones(2, device=device), bias=torch.zeros(2, device=device))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=dtype):
            assert bconv2d(ones, weight, conv).flatten().tolist() == [2313, 2313]
            floats = bconv2d_float(ones, weight, conv, epilogue)
            assert floats.flatten().tolist() == [2313.0, 2313.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_does_not_change_the_result(module: Call, dtype: torch.dtype) -> None:
    inputs = inputs_of(module, 2)
    expected = module(*inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert_same(module(*inputs), expected)
    finally:
        torch.set_default_dtype(before)


def test_results_never_require_a_gradient(module: Call) -> None:
    inputs = inputs_of(module, 2)
    expected = module(*inputs)

    def requiring(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(tensor.is_floating_point())

    arguments = tree_map_only(Tensor, requiring, module.arguments(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = module.op(**arguments)
    assert not any(tensor.requires_grad for tensor in tensors(result))
    assert_same(result, expected)
    if any(isinstance(a, Tensor) and a.requires_grad for a in arguments.values()):
        torch.library.opcheck(module.op, (), arguments, test_utils="test_autograd_registration")


def test_inference_mode_gives_the_same_result(module: Call) -> None:
    inputs = inputs_of(module, 2)
    expected = module(*inputs)
    with torch.inference_mode():
        assert_same(module(*inputs), expected)


def test_results_are_fresh_memory(module: Call) -> None:
    inputs = inputs_of(module, 2)
    held = {t.untyped_storage().data_ptr() for t in (*inputs, *module.buffers())}
    results = {t.untyped_storage().data_ptr() for t in tensors(module(*inputs))}
    assert not held & results
    assert len(results) == len(tensors(module(*inputs)))


def test_the_typed_front_passes_every_argument() -> None:
    packed, residual = inputs_of(MODULES["bconv2d_float"](), 2)
    epilogue = dataclasses.replace(EPILOGUE, threshold=BITS_OUT["threshold"], sense=SENSE)
    shared = (packed, WEIGHT, CONV, epilogue)
    fused = MODULES["bconv2d_float_bits"]()(packed, residual)
    half = torch.float16
    assert_same(bconv2d_float_bits(*shared, residual=residual, dtype=half), fused)
    assert_same(bconv2d_float(*shared, residual=residual, dtype=half), fused[0])
    assert_same(bconv2d_bits(*shared, residual=residual), fused[1])
    brain = bconv2d_float(*shared, residual=residual, dtype=torch.bfloat16)
    assert_same(brain, MODULES["bconv2d_float"]()(packed, residual))
    clamped = Epilogue(
        multiplier=EPILOGUE.multiplier, bias=EPILOGUE.bias, clamp_min=-0.5, clamp_max=0.25
    )
    result = bconv2d_float(packed, WEIGHT, CONV, clamped)
    assert (float(result.min()), float(result.max())) == (-0.5, 0.25)

"""What is the cpu backend's own: instruction sets, forks, float streams."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from biper_engine.errors import BackendUnavailableError
from biper_engine.geometry import Conv2dGeometry, Pool2dGeometry
from biper_engine.ops import Epilogue, bconv2d, bconv2d_float_bits, binarize, prepack, use_backend
from biper_engine.ops.backends import backends, by_name, select
from biper_engine.ops.cpu_processor import popcount_peak
from biper_engine.ops.native_arguments import geometry_values
from tests.fresh import fresh_run
from tests.images import noise
from tests.shared import USABLE_ISAS

REASON = {info.name: info.reason for info in backends()}["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cpu: {REASON}")

CONV = Conv2dGeometry(
    in_channels=70, out_channels=130, kernel_size=(3, 3), padding=(1, 1, 1, 1), stride=(1, 1)
)


@pytest.fixture(params=USABLE_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    from biper_engine import _cpu

    before = _cpu.isa()
    _cpu.select_isa(request.param)
    with use_backend("cpu"):
        yield request.param
    _cpu.select_isa(before)


def case(conv: Conv2dGeometry = CONV, size: int = 40, batch: int = 2) -> dict[str, Any]:
    """Return operands of a convolution that is worth several threads."""
    channels = conv.out_channels
    bits = binarize(noise(batch, conv.in_channels, size, size), backend="reference")
    words = torch.randint(
        -(2**31), 2**31, conv.weight_shape, generator=torch.Generator().manual_seed(1)
    )
    epilogue = Epilogue(
        multiplier=noise(channels, seed=2),
        bias=noise(channels, seed=3),
        clamp_min=-1.0,
        threshold=noise(channels, seed=4),
        sense=noise(channels, seed=5) > 0,
    )
    return {"bits": bits, "weight": words.to(torch.int32), "geometry": conv, "epilogue": epilogue}


# -- instruction sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 16, 17, 191, 192, 225, 32 * 1020, 32 * 1021 + 5])
@pytest.mark.parametrize("differs", ["first", "second", "both"])
def test_the_largest_sums_do_not_overflow(isa: str, channels: int, differs: str) -> None:
    """Every bit of a pixel differs from its weight, beside a pixel of which none does."""
    conv = Conv2dGeometry(in_channels=channels, out_channels=33, kernel_size=(1, 1))
    weight = torch.full(conv.weight_shape, -1, dtype=torch.int32)
    bits = torch.full((1, 1, 5, conv.weight_shape[-1]), -1, dtype=torch.int32)
    pixels = {"first": slice(0, None, 2), "second": slice(1, None, 2), "both": slice(None)}[differs]
    bits[:, :, pixels] = 0
    wanted = torch.full((1, 33, 1, 5), channels, dtype=torch.int32)
    wanted[..., pixels] = -channels
    assert torch.equal(bconv2d(bits, weight, conv), wanted)


def test_the_forced_instruction_set_is_the_one_that_runs(isa: str) -> None:
    program = (
        "import torch\n"
        "from biper_engine import ops, _cpu\n"
        "from biper_engine.geometry import Conv2dGeometry\n"
        "conv = Conv2dGeometry(in_channels=3, out_channels=2, kernel_size=(1, 1))\n"
        "weight = torch.zeros(conv.weight_shape, dtype=torch.int32)\n"
        "packed = ops.prepack(weight, conv, 'cpu')\n"
        "print(_cpu.isa(), packed[1].item())\n"  # the header of re-laid weights names their kernels
    )
    done = fresh_run(program, BIPER_CPU_ISA=isa)
    ids = {"portable": "1", "avx2": "2", "avx512": "3", "neon": "4"}
    assert done.stdout.split() == [isa, ids[isa]], done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("avx1024", "names no instruction set of this build"), ("AVX2", "those that run here:")],
)
def test_an_instruction_set_that_cannot_run_makes_the_backend_unavailable(
    name: str, said: str
) -> None:
    program = (
        "import biper_engine\n"
        "print({i.name: i.reason for i in biper_engine.backends()}['cpu'])\n"
        "biper_engine.ops.binarize(__import__('torch').zeros(1, 1, 1, 1), backend='cpu')\n"
    )
    done = fresh_run(program, BIPER_CPU_ISA=name)
    assert f"BIPER_CPU_ISA (='{name}')" in done.stdout
    assert said in done.stdout
    assert "BackendUnavailableError: Backend 'cpu' cannot run here: BIPER_CPU_ISA" in done.stderr


def test_weights_of_another_instruction_set_are_refused() -> None:
    from biper_engine import _cpu

    usable = _cpu.usable_isas()
    if len(usable) < 2:
        pytest.skip("one instruction set only")
    data = case(size=3)
    before = _cpu.isa()
    try:
        _cpu.select_isa(usable[-1])
        prepacked = prepack(data["weight"], CONV, "cpu")
        prepacked = prepacked.new_zeros(_size_for(usable[0])).copy_(_resized(prepacked, usable[0]))
        with pytest.raises(ValueError, match="made for another convolution or instruction set"):
            bconv2d(data["bits"], data["weight"], CONV, prepacked=prepacked, backend="cpu")
    finally:
        _cpu.select_isa(before)


def _size_for(isa: str) -> int:
    from biper_engine import _cpu

    _cpu.select_isa(isa)
    return int(_cpu.prepacked_words(geometry_values(CONV)))


def _resized(prepacked: Tensor, isa: str) -> Tensor:
    """Keep the header, but give the length that another instruction set would have."""
    size = _size_for(isa)
    return torch.nn.functional.pad(prepacked, (0, max(0, size - len(prepacked))))[:size]


def test_the_peak_is_measured(isa: str) -> None:
    peak = popcount_peak()
    assert peak.isa == isa
    assert peak.macs_per_second > 0
    assert peak.macs_per_clock is None or peak.macs_per_clock > 0


# -- threads --------------------------------------------------------------------------------------


@pytest.mark.some(7)
@pytest.mark.parametrize(
    "pool", [Pool2dGeometry(), Pool2dGeometry(kernel_size=(3, 3), stride=(2, 2))]
)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_byte(
    isa: str, pool: Pool2dGeometry, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = Conv2dGeometry(
        in_channels=70,
        out_channels=130 if groups != 2 else 128,
        kernel_size=(3, 3),
        padding=(1, 1, 1, 1),
        groups=groups,
    )
    data = case(conv)
    data["epilogue"] = Epilogue(**{**vars(data["epilogue"]), "pool": pool})
    results = []
    for threads in ("1", "2", "3", "7"):
        monkeypatch.setenv("BIPER_NUM_THREADS", threads)
        results.append(bconv2d_float_bits(**data))
    for floats, bits in results[1:]:
        assert torch.equal(floats, results[0][0])
        assert torch.equal(bits, results[0][1])
    wanted = bconv2d_float_bits(**data, backend="reference")
    assert torch.equal(results[0][0], wanted[0])
    assert torch.equal(results[0][1], wanted[1])


def test_results_are_on_the_cpu_for_any_default_device() -> None:
    data, x, backend = case(), noise(2, 40, 6, 6), by_name("cpu")

    def results() -> list[Tensor | None]:  # as plans call it
        bits = backend.binarize(x, None, None)
        pooled = backend.bmaxpool2d(bits, 40, Pool2dGeometry(kernel_size=(2, 2)), None)
        signs = backend.unbinarize(pooled, 40, torch.float32)
        fused = backend.bconv2d_fused(
            **data, residual=None, prepacked=None, float_dtype=torch.float32, want_bits=True
        )
        return [bits, pooled, signs, *fused]

    wanted = results()
    with torch.device("meta"):
        found = results()
    for result, expected in zip(found, wanted, strict=True):
        assert result is not None
        assert expected is not None
        assert torch.equal(result, expected)


def test_concurrent_calls_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "2")
    monkeypatch.setenv("BIPER_BACKEND", "cpu")
    data = case()
    wanted = bconv2d_float_bits(**data)
    same: list[bool] = []

    def call() -> None:
        for _ in range(10):
            floats, bits = bconv2d_float_bits(**data)
            same.append(torch.equal(floats, wanted[0]) and torch.equal(bits, wanted[1]))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40


def test_our_own_threads_give_the_same_where_torch_has_none_to_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from biper_engine import _cpu
    from biper_engine.ops.cpu_module import torch_parallel_region

    monkeypatch.setenv("BIPER_NUM_THREADS", "3")
    data = case()
    wanted = bconv2d_float_bits(**data, backend="cpu")
    _cpu.share_threads(0)
    try:
        assert not _cpu.shares_threads()
        for _ in range(5):
            floats, bits = bconv2d_float_bits(**data, backend="cpu")
            assert torch.equal(floats, wanted[0])
            assert torch.equal(bits, wanted[1])
    finally:
        _cpu.share_threads(torch_parallel_region())


def _in_child(queue: Any) -> None:
    from biper_engine import _cpu

    data = case()
    results = [bconv2d_float_bits(**data, backend=name) for name in ("cpu", "reference")]
    equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    queue.put((equal, _cpu.shares_threads()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_computes_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "2")
    bconv2d_float_bits(**case(), backend="cpu")  # the parent's threads are running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    torch.set_num_threads(1)  # as DataLoader does in its workers: torch's own threads cannot fork
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == (True, False)
    finally:
        child.join(timeout=10)
        child.kill()


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return bconv2d_float_bits(**case(), backend="cpu")[1] + index * 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_data_loader_worker_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIPER_NUM_THREADS", "2")
    wanted = _Rows()[0]
    loader = torch.utils.data.DataLoader(
        _Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    results = list(loader)
    assert len(results) == 4
    assert all(torch.equal(result, wanted) for result in results)


# -- float streams --------------------------------------------------------------------------------


def stream_through(residual: Tensor, dtype: torch.dtype) -> Tensor:
    """Store a float map by way of a convolution that adds nothing to it."""
    channels = residual.shape[1]
    conv = Conv2dGeometry(in_channels=1, out_channels=channels, kernel_size=(1, 1))
    bits = torch.zeros(*residual.shape[:1], *residual.shape[2:], 1, dtype=torch.int32)
    weight = torch.zeros(conv.weight_shape, dtype=torch.int32)
    nothing = Epilogue(
        multiplier=torch.zeros(channels),
        bias=torch.full((channels,), -0.0),
        threshold=torch.zeros(channels),
        sense=torch.zeros(channels, dtype=torch.bool),
    )
    return bconv2d_float_bits(bits, weight, conv, nothing, residual=residual, dtype=dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).view(1, 64, 32, 32)
    values = torch.where(values.isnan(), torch.zeros((), dtype=dtype), values)
    result = stream_through(values, torch.float32)
    assert torch.equal(result, values.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2, 50, 40, 40), generator=generator)
    values = patterns.to(torch.int32).view(torch.float32)
    halves = torch.randint(-(2**15), 2**15, values.shape, generator=generator)
    exact = halves.to(torch.int16).view(torch.float16).float()
    # Halfway between two halves, and one place beside it; most random floats are out of range.
    between = exact + exact.sign() * exact.abs().clamp_min(2**-14).log2().floor().exp2() * 2**-11
    beside = (between.view(torch.int32) + 1).view(torch.float32)
    for given in (values, exact, between, beside, exact * 2.0**-10, between * 2.0**-14):
        finite = torch.where(given.isnan(), torch.zeros(()), given)
        result = stream_through(finite, dtype)
        assert torch.equal(result.view(torch.int16), (finite + 0.0).to(dtype).view(torch.int16))


def test_it_takes_cpu_tensors_only() -> None:
    reason = by_name("cpu").unsupported_reason("binarize", None, torch.device("cuda", 0))
    assert reason == "it runs on the CPU, the tensors are on cuda:0"
    with use_backend("cpu"), pytest.raises(BackendUnavailableError, match="it runs on the CPU"):
        select("binarize", None, torch.device("cuda", 0))

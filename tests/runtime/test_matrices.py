"""Native programs of products on bits: attention and weight-only layers are one program each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import biper_engine
from biper_engine.engine import Engine
from biper_engine.ops import use_backend
from biper_engine.ops.cpu_module import native
from tests.conversion.test_activation_products import Heads, rounded, seeded
from tests.conversion.test_weight_only import Linear
from tests.images import noise

pytestmark = [
    pytest.mark.skipif(native() is None, reason="there are no native kernels"),
    pytest.mark.filterwarnings("ignore::biper_engine.errors.UnconvertedWarning"),
]

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: Heads(64, 2, rounded), (9, 64)),
    "heads across words": (lambda: Heads(66, 2, rounded), (9, 66)),
    "rows": (lambda: nn.Sequential(Linear(70, 65), nn.ReLU(), Linear(65, 10)), (70,)),
    "tokens": (lambda: nn.Sequential(Linear(70, 65), nn.ReLU(), Linear(65, 10)), (9, 70)),
    "a single layer": (lambda: Linear(300, 33), (300,)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Engine, Tensor]:
    make, shape = MODELS[request.param]
    return biper_engine.convert(seeded(make), noise(2, *shape)), noise(5, *shape, seed=1)


@pytest.mark.some(2)
def test_the_network_is_one_program(case: tuple[Engine, Tensor]) -> None:
    engine, x = case
    engine(x)
    assert engine.execution.startswith("one native program of")
    assert "outside" not in engine.execution


@pytest.mark.some(2)
def test_every_instruction_set_and_batch_gives_the_same_bytes(
    case: tuple[Engine, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, x = case
    before, results = native().isa(), {}
    try:
        for isa in native().usable_isas():
            native().select_isa(isa)
            for threads in ("1", "3"):
                monkeypatch.setenv("BIPER_NUM_THREADS", threads)
                fresh = biper_engine.engine.Engine(engine.network)
                results[isa, threads] = fresh(x)
                rows = torch.cat([fresh(row[None]) for row in x])
                assert torch.equal(rows, results[isa, threads])
    finally:
        native().select_isa(before)
    first = next(iter(results.values()))
    assert all(torch.equal(result, first) for result in results.values())


@pytest.mark.some(2)
def test_the_reference_gives_the_same_numbers(case: tuple[Engine, Tensor]) -> None:
    engine, x = case
    with use_backend("reference"):
        wanted = engine(x)
    torch.testing.assert_close(engine(x), wanted, rtol=1e-4, atol=1e-4)

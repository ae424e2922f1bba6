import json
from pathlib import Path
from typing import Any

import pytest
import tables


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def test_a_program_has_its_best_number_of_streams(results: Path) -> None:
    ways = {f"{name}, {n}": 100.0 * n for name in tables.STREAMS for n in (1, 2)}
    rates = {**ways, "engine": 500.0}
    contest = {
        "batch": 1,
        "contestants": {name: {"median_images_per_second": rate} for name, rate in rates.items()},
        "best": {name: f"{name}, 2" for name in tables.STREAMS},
        "engine_times_as_fast": dict.fromkeys(tables.STREAMS, 2.5),
    }
    write(results / "streams-cifar10-resnet18_1w1a-epyc-zen4.json", batches=[contest])
    *_, row = tables.streams().splitlines()
    assert row == "| `cifar10/resnet18_1w1a` | 1 | 500 | 200, 2.5x | 200, 2.5x | 200, 2.5x |"


def test_a_rival_beyond_avx2_is_in_no_table_of_avx2(results: Path) -> None:
    contest = {
        "batch": 1,
        "contestants": {name: {"median_ms": 6.0} for name in (*tables.AVX2, "engine")},
        "engine_times_as_fast": dict.fromkeys(tables.AVX2, 1.0),
    }
    path = results / "rivals-cifar10-resnet18_1w1a-2t-avx2-epyc-zen4.json"
    write(path, beyond_the_isa={"OpenVINO binary f32": "wide"}, batches=[contest])
    assert "| `cifar10/resnet18_1w1a` | 1 | 6.00 | 6.00, 1.0x |" in tables.avx2()
    write(path, beyond_the_isa={"OpenVINO int8": "wide"}, batches=[contest])
    with pytest.raises(ValueError, match="OpenVINO int8 went beyond AVX2"):
        tables.avx2()

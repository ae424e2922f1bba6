"""The client that loads servers counts what is lost; docs/deploy.md has the recorded figures."""

import asyncio
import json
from pathlib import Path

import pytest
import serving

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "benchmarks/results/serving-cifar10-resnet18_1w1a-xeon.json"


def test_the_page_has_the_recorded_figures() -> None:
    found = json.loads(RECORD.read_text("utf-8"))["contestants"]
    ours, plain = found[serving.OURS], found[serving.FLOAT]
    assert (ours["requests"], ours["lost"], plain["lost"]) == (10_000, 0, 0)
    rates = [f"{each['images_per_second']:.0f} images per second" for each in (ours, plain)]
    slowest = [f"{each['percentile_99_ms'] / 1e3:.2f} s" for each in (ours, plain)]
    page = " ".join((ROOT / "docs/deploy.md").read_text("utf-8").split())
    assert [figure for figure in (*rates, *slowest) if figure not in page] == []


def test_an_answer_that_is_wrong_or_missing_is_lost() -> None:
    pytest.importorskip("aiohttp", reason='pip install "biper-engine[train]"')
    answers = [b"200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"] * 6
    answers[1] = b"503 Busy\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    answers[3] = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while answers and await reader.readuntil(b"x"):
            if not (text := answers.pop(0)):
                break
            writer.write(b"HTTP/1.1 " + text)
        writer.close()

    async def loaded() -> serving.Load:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        found = await serving._load(
            url, [b"x"], 5, 1, lambda _number, _values: "wrong" if len(answers) == 5 else None,
            serving.Load(),
        )  # fmt: skip
        server.close()
        return found

    found = asyncio.run(loaded())
    assert len(found.latencies_ms) == 2
    assert found.problems[:2] == ["wrong", "status 503"]
    assert found.problems[2].startswith("ServerDisconnectedError")

"""Load `biper serve` and a plain FastAPI loop around the float network, in turn.

    python benchmarks/serving.py [NETWORK] --machine NAME [--requests N] [--at-once N]

Each is a process of its own; the client, in this process, shares the processors with them. Every
answer of `biper serve` is compared with the engine's. The float network is the float twin: the same
layers without signs, in eager PyTorch, called image by image as the body of a route.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TURNS = 2
PICTURES = 16
BIPER = "from biper_engine.cli import main; raise SystemExit(main())"
OURS, FLOAT = "biper serve", "FastAPI, float twin"


@dataclass
class Load:
    """What a client saw.

    Attributes:
        seconds: of all requests together.
        latencies_ms: of each answered request.
        problems: what was wrong with the others.
    """

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """Return figures as JSON values."""
        cuts = statistics.quantiles(self.latencies_ms, n=100)
        return {
            "requests": len(self.latencies_ms) + len(self.problems),
            "lost": len(self.problems),
            "images_per_second": len(self.latencies_ms) / self.seconds,
            "median_ms": cuts[49],
            "percentile_99_ms": cuts[98],
        }


def load(
    url: str,
    bodies: list[bytes],
    requests: int,
    at_once: int,
    *,
    check: Callable[[int, Any], str | None] = lambda _number, _values: None,
    into: Load | None = None,
) -> Load:
    """Send requests from `at_once` clients; each keeps its connection.

    Args:
        url: of the route.
        bodies: images, sent in turn.
        requests: how many in all.
        at_once: clients.
        check: called with the number of a body and the answer; returns what is wrong.
        into: an earlier load, which this one is added to.
    """
    return asyncio.run(_load(url, bodies, requests, at_once, check, into or Load()))


async def _load(
    url: str,
    bodies: list[bytes],
    requests: int,
    at_once: int,
    check: Callable[[int, Any], str | None],
    found: Load,
) -> Load:
    import aiohttp

    numbers = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = number % len(bodies)
            start = time.perf_counter()
            try:
                async with session.post(url, data=bodies[body]) as answer:
                    values = await answer.json()
                wrong = f"status {answer.status}" if answer.status != 200 else check(body, values)
            except (TimeoutError, aiohttp.ClientError, ValueError) as error:
                wrong = repr(error)
            if wrong is None:
                found.latencies_ms.append(1e3 * (time.perf_counter() - start))
            else:
                found.problems.append(wrong)

    connector = aiohttp.TCPConnector(limit=at_once)
    kind = {"Content-Type": "image/png"}
    async with aiohttp.ClientSession(connector=connector, headers=kind) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(at_once)))
        found.seconds += time.perf_counter() - start
    return found


@contextmanager
def server(words: list[str], log: Path) -> Iterator[str]:
    """Run a server in a process of its own, and give its URL when its log has it."""
    with log.open("wb") as written:
        process = subprocess.Popen([sys.executable, *words], stdout=written, stderr=written)
    try:
        while "http://127.0.0.1:" not in log.read_text("utf-8"):
            if process.poll() is not None:
                raise RuntimeError(log.read_text("utf-8"))
            time.sleep(0.1)
        port = log.read_text("utf-8").partition("http://127.0.0.1:")[2].split()[0].split("/")[0]
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def pictures(height: int, width: int) -> list[bytes]:
    """Return PNG files of noise."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    files = []
    for _ in range(PICTURES):
        file = io.BytesIO()
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files


def compared_with(file: Path, bodies: list[bytes]) -> Callable[[int, Any], str | None]:
    """Return a check that an answer has the engine's own likeliest class and logit."""
    from biper_engine.preprocessing import open_image
    from biper_engine.serving import open_classifier

    classifier = open_classifier(file)
    tensors = [classifier.tensor(open_image(body)) for body in bodies]
    wanted = [classifier(tensor[None])[0] for tensor in tensors]
    best = [(int(logits.argmax()), float(logits.max())) for logits in wanted]

    def check(number: int, values: Any) -> str | None:
        top = values["images"][0]["top"][0]
        found = (top["index"], top["logit"])
        return None if found == best[number] else f"{found} is not {best[number]}"

    return check


def measure(name: str, requests: int, float_requests: int, at_once: int) -> dict[str, Any]:
    """Return the figures of both."""
    import biper_engine
    from biper_engine.cli.sources import random_network

    model = random_network(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "network.biper")
        biper_engine.convert(model).save(file)
        _, height, width = model.metadata.input_size
        bodies = pictures(height, width)
        check = compared_with(file, bodies)
        words = ["-c", BIPER, "serve", str(file), "--port", "0", "--quiet"]
        plain = [str(Path(__file__).with_name("serving_float.py")), name, str(free_port())]
        found = {OURS: Load(), FLOAT: Load()}
        with (
            server(words, Path(folder, "ours.log")) as ours,
            server(plain, Path(folder, "float.log")) as rival,
        ):
            for url in (ours, rival):
                load(url, bodies, 4 * at_once, at_once)
            for _ in range(TURNS):
                load(ours, bodies, requests // TURNS, at_once, check=check, into=found[OURS])
                load(rival, bodies, float_requests // TURNS, at_once, into=found[FLOAT])
        problems = {who: each.problems[:3] for who, each in found.items() if each.problems}
        figures = {who: each.told() for who, each in found.items()}
    return {"network": name, "at_once": at_once, "contestants": figures, "problems": problems}


def free_port() -> int:
    """Return a port that nobody has now."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="cifar10/resnet18_1w1a")
    parser.add_argument("--machine", help="name for the recorded file; none records nothing")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--float-requests", type=int, default=2_000)
    parser.add_argument("--at-once", type=int, default=64)
    options = parser.parse_args()
    from recording import RESULTS, record

    from biper_engine.bench.machine import machine_facts

    values = measure(options.network, options.requests, options.float_requests, options.at_once)
    for who, figures in values["contestants"].items():
        print(
            f"{who:20} {figures['images_per_second']:8.0f} images/s, median "
            f"{figures['median_ms']:.1f} ms, 99th percentile {figures['percentile_99_ms']:.1f} ms, "
            f"{figures['requests']:,} requests, {figures['lost']} lost"
        )
    if options.machine:
        name = options.network.replace("/", "-")
        path = RESULTS / f"serving-{name}-{options.machine}.json"
        record({"machine": machine_facts(), **values}, path)
        print(path)


if __name__ == "__main__":
    main()

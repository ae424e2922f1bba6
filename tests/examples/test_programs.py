"""The examples run, with little work."""

import http.client
import io
import json
import runpy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import biper_engine

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.deep
def test_the_network_of_reactnets_kind_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason='pip install "biper-engine[train]"')
    with torch.random.fork_rng():
        program("reactnet.py")["main"](1, str(tmp_path / "reactnet.biper"), images_used=256)
    printed = capsys.readouterr().out
    assert "4 of 6 layers packed" in printed
    assert "of 500 test images are right" in printed


@pytest.mark.deep
def test_the_detector_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        program("detector.py")["main"](2)
    printed = capsys.readouterr().out
    assert "3 of 4 layers packed" in printed
    assert "overlap with the true box" in printed


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Serve a small network, and return the port."""
    file = tmp_path_factory.mktemp("served") / "small.biper"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), Sign(), Binary(8, 16, 3)),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3)),
        )
        model = torch.nn.Sequential(*layers).eval()
    metadata = biper_engine.Metadata(input_size=(3, 8, 8), class_names=("a", "b", "c"))
    example = torch.zeros(1, 3, 8, 8)
    engine = biper_engine.convert(model, example, unconverted="ignore", metadata=metadata)
    engine.save(file)
    with program("server.py")["Server"](("127.0.0.1", 0), str(file)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class Sign(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= 0, 1.0, -1.0)


class Binary(torch.nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.where(self.weight >= 0, 1.0, -1.0)
        return torch.nn.functional.conv2d(x, weight, self.bias)


def picture(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (grey, 255 - grey, 128)).save(file, "PNG")
    return file.getvalue()


def ask(port: int, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET" if body is None else "POST", "/", body, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def test_the_server_says_what_it_serves(port: int) -> None:
    status, values = ask(port)
    assert (status, values["input"]) == (200, [3, 8, 8])


def test_the_server_gives_each_client_its_own_answer(port: int) -> None:
    pictures = [picture(grey) for grey in range(0, 250, 25)]
    alone = [ask(port, body)[1]["all"] for body in pictures]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(port, body), pictures * 4))
    assert [status for status, _ in answers] == [200] * 40
    assert [values["all"] for _, values in answers] == alone * 4
    assert {values["class"] for _, values in answers} <= set("abc")


def test_the_server_refuses_what_is_no_image_or_too_large(port: int) -> None:
    status, values = ask(port, b"no image")
    assert status == 400
    assert "Cannot read an image from 'the request's body'" in values["error"]
    assert ask(port, b"x", **{"Content-Length": str(2**40)})[0] == 413
    assert ask(port, picture(0))[0] == 200


@pytest.mark.deep
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason='pip install "biper-engine[train]"')
    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text("utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("epochs=3", "epochs=1")
            exec(compile(source, "examples/digits.ipynb", "exec"), names)
    assert "18 of 20 layers packed" in capsys.readouterr().out

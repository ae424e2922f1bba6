"""The server as a process: where it listens, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason='pip install "biper-engine[serve]"')
pytest.importorskip("uvicorn", reason='pip install "biper-engine[serve]"')

import biper_engine.serving
from biper_engine.cli import main
from biper_engine.serving import Limits, open_classifier, serve
from biper_engine.serving.server import _url

from .test_app import picture


class Running:
    """A child process in which `biper serve` runs.

    Attributes:
        port: of the server.
        process: its number.
    """

    def __init__(self, log: Path, *words: object) -> None:
        self._log = log
        self.process = os.fork()
        if self.process == 0:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            os._exit(main(["serve", *map(str, words)]))
        while "Ctrl-C" not in self.said:
            time.sleep(0.01)
        self.port = int(self.said.partition("http://127.0.0.1:")[2].partition("/")[0])

    @property
    def said(self) -> str:
        """What it wrote to its log so far."""
        return self._log.read_text("utf-8") if self._log.exists() else ""

    def end(self, number: int) -> int:
        """Send a signal, and return the exit status."""
        os.kill(self.process, number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@contextmanager
def running(log: Path, *words: object) -> Iterator[Running]:
    found = Running(log, *words)
    try:
        yield found
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            found.end(signal.SIGKILL)


def post(port: int, body: bytes, *, pause: float = 0.0) -> int:
    """Send an image, with a pause in its middle, and return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:50])
    time.sleep(pause)
    connection.send(body[50:])
    answer = connection.getresponse()
    values = json.loads(answer.read())
    connection.close()
    assert ("images" in values) == (answer.status == 200)
    return answer.status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_requests_inside(
    network: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with running(tmp_path / "log", network, "--port", 0) as server, ThreadPoolExecutor(8) as pool:
        assert post(server.port, picture()) == 200
        inside = [pool.submit(post, server.port, picture(n), pause=0.3) for n in range(8)]
        time.sleep(0.1)
        assert server.end(number) == 0
        assert [each.result() for each in inside] == [200] * 8
        assert server.said.splitlines()[-1] == "Stopped."
    with pytest.raises(OSError, match="refused"):
        post(server.port, picture())


def test_headers_have_a_limit(network: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", network, "--port", 0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with suppress(BrokenPipeError, ConnectionResetError):  # it may close before all is sent
            connection.request("GET", "/", headers={"X-Long": "x" * 2_000_000})
            assert connection.getresponse().status == 400
        connection.close()
        assert post(server.port, picture()) == 200


def test_the_log_is_a_line_for_each_request(network: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", network, "--port", 0) as server:
        post(server.port, picture())
        post(server.port, b"no image" * 9)
        server.end(signal.SIGTERM)
        first, address, *lines, last = server.said.splitlines()
    assert first.startswith("net: ")
    assert address == f"http://127.0.0.1:{server.port}/ (Ctrl-C to stop)"
    assert [line.split(" ")[2:6] for line in lines] == [
        ["127.0.0.1", "POST", "/predict", "200"],
        ["127.0.0.1", "POST", "/predict", "400"],
    ]
    assert lines[0].endswith("net, 1 image, batch 1")
    assert last == "Stopped."


def test_a_port_in_use_is_said(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(network), "--port", str(port)]) == 1
    assert (
        f"Cannot listen on 127.0.0.1 port {port}: another program has this port. Pass another, or "
        "0 for a free one." in capsys.readouterr().err
    )


def test_an_address_of_no_machine_is_said(network: Path) -> None:
    with pytest.raises(OSError, match=r"There is no address 'no\.invalid' to listen on"):
        serve([open_classifier(network)], host="no.invalid")


def test_listening_on_every_network_is_said(network: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os._exit(main(["serve", str(network), "--host", "0.0.0.0", "--port", "0"]))
    while not log.exists() or "Ctrl-C" not in log.read_text("utf-8"):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    assert "whoever reaches this machine may use it, without a password" in log.read_text("utf-8")


def test_an_address_of_ipv6_has_brackets() -> None:
    assert _url("::1", 80) == "http://[::1]:80/"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.biper"], "gone.biper"),
        (["NET", "NET"], "Two files are called 'net'"),
        (["TWO"], "takes 2 inputs"),
        (["NET", "--mean", "1,2"], "--mean (=1,2) must be 3 numbers"),
    ],
)
def test_what_cannot_be_served_is_said(
    network: Path,
    two: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    files = {"NET": str(network), "TWO": str(two)}
    assert main(["serve", *(files.get(word, word) for word in words)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "image", "together"),
    [
        ([], 50, 100),
        (["--max-pixels", "80"], 80, 160),
        (["--max-pixels", "80", "--max-total-pixels", "90"], 80, 90),
    ],
)
def test_the_limits_of_pixels_are_millions(
    network: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], image: int, together: int
) -> None:
    asked: list[Limits] = []
    monkeypatch.setattr(
        biper_engine.serving, "serve", lambda *_, limits, **__: asked.append(limits)
    )
    assert main(["serve", str(network), *words]) == 0
    assert (asked[0].image_pixels, asked[0].request_pixels) == (image * 10**6, together * 10**6)


def test_a_missing_package_is_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"needs 'uvicorn'.*\"biper-engine\[serve\]\""):
        serve([open_classifier(network)])

"""Long runs against real servers: no request is lost; the page works in Chromium."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import serving

from . import chromium
from .conftest import noise_image

_NEEDED = ("aiohttp", "starlette", "uvicorn", "python_multipart", "prometheus_client")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.weekly,
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
]

REQUESTS, AT_ONCE = 10_000, 64


def serve(network: Path, log: Path, *options: str) -> Any:
    words = ["-c", serving.BIPER, "serve", str(network), "--port", "0", *options]
    return serving.server(words, log)


@pytest.mark.parametrize("where", ["here", "ray"])
def test_no_request_of_many_at_once_is_lost(network: Path, tmp_path: Path, where: str) -> None:
    options: tuple[str, ...] = ("--quiet",)
    if where == "ray":
        if find_spec("ray") is None:
            pytest.skip("no Ray; make test-weekly installs it")
        options = ("--quiet", "--replicas", "1", "--port", str(serving.free_port()))
    bodies = serving.pictures(20, 17)
    check = serving.compared_with(network, bodies)
    with serve(network, tmp_path / "log", *options) as url:
        found = serving.load(url, bodies, REQUESTS, AT_ONCE, check=check)
    assert found.problems == []
    assert len(found.latencies_ms) == REQUESTS
    print(f"{where}: {REQUESTS:,} requests, {AT_ONCE} at once: {found.told()}")


def test_a_busy_server_answers_all_that_it_accepted(network: Path, tmp_path: Path) -> None:
    bodies = serving.pictures(20, 17)
    check = serving.compared_with(network, bodies)
    program = "import os, sys, time; time.sleep(1); os.kill(int(sys.argv[1]), 15)"
    log = tmp_path / "log"
    with serve(network, log) as url:
        killer = subprocess.Popen([sys.executable, "-c", program, str(_newest_child())])
        found = serving.load(url, bodies, REQUESTS, AT_ONCE, check=check)
        killer.wait()
    answered = [line for line in log.read_text("utf-8").splitlines() if " POST /predict " in line]
    print(f"{len(answered):,} accepted, {len(found.latencies_ms):,} answered, then it ended")
    assert len(found.latencies_ms) == len(answered) > 0
    assert [line for line in answered if " POST /predict 200 " not in line] == []


def _newest_child() -> int:
    """Return the child of this process that was started last."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text("utf-8")
    return int(children.split()[-1])


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_page_works_with_files_drawings_and_keys(network: Path, tmp_path: Path) -> None:
    noise_image(3).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    classes = "document.querySelectorAll('#result li').length"
    with (
        serve(network, tmp_path / "log") as url,
        chromium.browser(tmp_path / "profile") as page,
    ):
        page.open(url.removesuffix("predict"), 375, 740, phone=True)
        page.wait_for("state.models.length")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.choose_file("#file", tmp_path / "photo.png")
        assert page.wait_for(classes) == 5
        assert page.evaluate("get('bytes').textContent") == f"{network.stat().st_size:,} bytes"
        assert page.evaluate("get('engine').textContent").endswith(" ms")
        page.choose_file("#file", tmp_path / "broken.png")
        page.wait_for("document.querySelectorAll('#result .wrong').length")
        assert "'broken.png': it is no image" in page.evaluate("get('result').textContent")
        assert [line for line in page.logged if "status of 400" not in line] == []
        page.logged.clear()

        page.open(url.removesuffix("predict"), 1100, 760)
        page.wait_for("state.models.length")
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == "tab-file"
        page.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "tab-draw"
        box = "canvas.getBoundingClientRect()"
        x, y, width = (page.evaluate(f"{box}.{side}") for side in ("left", "top", "width"))
        page.drag([(x + width * (0.3 + 0.04 * n), y + width * 0.5) for n in range(10)])
        assert page.wait_for(classes) == 5
        page.press("Tab")
        page.press("Enter")
        assert page.evaluate("get('result').textContent") == "Nothing is drawn."
        assert page.logged == []

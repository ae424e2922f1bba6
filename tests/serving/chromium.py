"""A headless Chromium, driven through its pipe for debugging: no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
    "--no-first-run --disable-extensions --remote-debugging-pipe about:blank"
)


class Browser:
    """One page of a browser.

    Attributes:
        logged: what the page wrote to its console, errors of its policy included.
    """

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = os.fdopen(to, "wb"), os.fdopen(of, "rb")
        self._number = 0
        self._rest = b""
        self.logged: list[str] = []
        (page,) = [
            one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        ]
        attached = {"targetId": page["targetId"], "flatten": True}
        self._session = self._call("Target.attachToTarget", **attached)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **words: Any) -> dict[str, Any]:
        """Call a method of the protocol for the page, and return its result."""
        return self._call(method, self._session, **words)

    def _call(self, method: str, session: str | None = None, **words: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": words}
        if session is not None:
            message["sessionId"] = session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (reply := self._receive()).get("id") != self._number:
            if reply.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.logged.append(json.dumps(reply["params"]))
        assert "error" not in reply, reply
        result: dict[str, Any] = reply["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._of.fileno(), 2**16)
            assert chunk, "Chromium ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        values: dict[str, Any] = json.loads(message)
        return values

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Return the value of an expression when it is true, within 20 seconds."""
        for _ in range(400):
            if value := self.evaluate(expression):
                return value
            time.sleep(0.05)
        raise AssertionError(f"{expression} did not become true; the page logged {self.logged}")

    def open(self, url: str, width: int, height: int, *, phone: bool = False) -> None:
        """Show an address in a window of a size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """Press a key of the keyboard, such as Tab or Enter."""
        code = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            words = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code}
            self("Input.dispatchKeyEvent", **words, **(text if kind == "keyDown" else {}))

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Move the mouse along points with its button down."""
        for number, (x, y) in enumerate(points):
            kind = "mouseMoved" if number else "mousePressed"
            at = {"x": x, "y": y, "button": "left", "buttons": 1}
            self("Input.dispatchMouseEvent", type=kind, clickCount=int(not number), **at)
        x, y = points[-1]
        at = {"x": x, "y": y, "button": "left", "buttons": 0, "clickCount": 1}
        self("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an input element."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def picture(self, path: Path) -> None:
        """Write what the window shows as PNG."""
        found = self("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """Close the pipe; the browser ends then."""
        self._to.close()
        self._of.close()


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile, and end it."""
    assert PROGRAM is not None
    its_in, to = os.pipe()
    of, its_out = os.pipe()
    command = f'exec "$0" "$@" 3<&{its_in} 4>&{its_out}'
    words = [PROGRAM, *_OPTIONS.split(), f"--user-data-dir={profile}"]
    with open(profile.with_name("chromium.log"), "wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", command, *words],
            pass_fds=(its_in, its_out),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    os.close(its_in)
    os.close(its_out)
    try:
        page = Browser(to, of)
        try:
            yield page
        finally:
            page.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()

"""Call an application of ASGI without a server: whole, slow, cut and concurrent requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def values(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of a refusal."""
        return str(self.values["error"])


async def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes | Sequence[bytes | float] = b"",
    kind: str | None = None,
    **headers: str,
) -> Reply:
    """Send a request; a body may be a list of chunks, in which a number is a pause in seconds."""
    path, _, query = path.partition("?")
    chunks = [body] if isinstance(body, bytes) else list(body)
    given = {**({"content-type": kind} if kind is not None else {}), **headers}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()],
        "client": ("192.0.2.7", 1234),
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
        "asgi": {"version": "3.0"},
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        while chunks:
            chunk = chunks.pop(0)
            if isinstance(chunk, bytes):
                return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}
            await asyncio.sleep(chunk)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    return Reply(
        start["status"],
        {k.decode().lower(): v.decode() for k, v in start["headers"]},
        b"".join(message.get("body", b"") for message in rest),
    )


def one(app: Any, *words: Any, **options: Any) -> Reply:
    """Send a single request; as `ask`."""
    return asyncio.run(ask(app, *words, **options))

"""Serve a classifier over HTTP, with Python's standard library.

    python examples/server.py digits.biper --port 8000
    curl --data-binary @7.png http://127.0.0.1:8000/

POST an image (PNG, JPEG or another that Pillow reads) to get its class; GET / says what is served.
Requests run in threads: an engine may be called from several at once. The file must say how its
images are prepared.
"""

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import biper_engine
from biper_engine.preprocessing import image_to_tensor, open_image

MOST_BYTES = 10 * 2**20


class Refused(Exception):
    """A request that cannot be answered, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], file: str) -> None:
        self.engine = biper_engine.load(file)
        if self.engine.metadata is None:
            raise SystemExit(f"'{file}' does not say how its images are prepared.")
        self.engine.warmup([(1, *self.engine.input_shape)])
        super().__init__(address, Handler)

    def classify(self, body: bytes) -> dict[str, Any]:
        metadata = self.engine.metadata
        try:
            image = image_to_tensor(open_image(body, "the request's body"), metadata)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        start = time.perf_counter()
        with torch.inference_mode():
            shares = self.engine(image[None]).softmax(1)[0].tolist()
        took = time.perf_counter() - start
        best = max(range(len(shares)), key=shares.__getitem__)
        name = metadata.class_names[best] if metadata.class_names else str(best)
        return {"class": name, "probability": shares[best], "all": shares, "ms": 1e3 * took}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds, for a client that sends nothing
    server: Server

    def do_GET(self) -> None:
        engine = self.server.engine
        self._answer(200, {"input": engine.input_shape, "runs": engine.execution})

    def do_POST(self) -> None:
        try:
            self._answer(200, self.server.classify(self._body()))
        except Refused as refused:
            self.close_connection = True  # the rest of the body was not read
            self._answer(refused.status, {"error": str(refused)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "Content-Length is missing.")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"The body has {length} bytes; {MOST_BYTES} are accepted.")
        return self.rfile.read(int(length))

    def _answer(self, status: int, values: dict[str, Any]) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with Server((arguments.host, arguments.port), arguments.file) as server:
        print(f"http://{arguments.host}:{server.server_address[1]}/", flush=True)
        server.serve_forever()

"""The application: answers as the engine gives them, and what hostile requests get."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason='pip install "biper-engine[serve]"')
pytest.importorskip("python_multipart", reason='pip install "biper-engine[serve]"')
pytest.importorskip("prometheus_client", reason='pip install "biper-engine[serve]"')

from biper_engine.serving import Classifier, Limits, create_app, open_classifier
from tests.images import images as noise
from tests.networks_by_hand import classifier as by_hand

from .asgi import Reply, ask, one
from .conftest import noise_image

SMALL = Limits(
    body_bytes=20_000, body_seconds=0.1, image_pixels=10_000, images=4, waiting=3, batch=4
)


@pytest.fixture(scope="module")
def served(network: Path) -> Classifier:
    return open_classifier(network)


@pytest.fixture(scope="module")
def app(served: Classifier) -> Any:
    return create_app([served], SMALL)


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise_image(seed).save(file, kind)
    return file.getvalue()


def wanted(served: Classifier, seed: int = 0) -> list[float]:
    return [float(v) for v in served(served.tensor(noise_image(seed))[None])[0]]


def logits_of(reply: Reply, image: int = 0) -> list[float]:
    top = reply.values["images"][image]["top"]
    return [entry["logit"] for entry in sorted(top, key=lambda entry: entry["index"])]


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    parts = [
        b'--xx\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n'
        % (name.encode(), contents)
        for name, contents in files
    ]
    return b"".join([*parts, b"--xx--\r\n"]), "multipart/form-data; boundary=xx"


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_an_image_gets_the_engines_classes(app: Any, served: Classifier, kind: str | None) -> None:
    reply = one(app, "POST", "/predict?top=10", picture(), kind)
    assert reply.status == 200
    assert logits_of(reply) == wanted(served)
    best = reply.values["images"][0]["top"][0]
    index = max(range(10), key=wanted(served).__getitem__)
    assert (best["index"], best["class"]) == (index, "abcdefghij"[index])
    assert reply.values["model"] == "net"
    assert reply.values["batch"] == 1
    assert reply.values["total_ms"] >= reply.values["engine_ms"] > 0


def test_a_form_has_several_images(app: Any, served: Classifier) -> None:
    body, kind = form(("a.png", picture(1)), ("ü ☃.png", picture(2)))
    reply = one(app, "POST", "/predict?top=10", body, kind)
    assert [row["image"] for row in reply.values["images"]] == ["a.png", "ü ☃.png"]
    assert [logits_of(reply, n) for n in (0, 1)] == [wanted(served, n) for n in (1, 2)]


@pytest.mark.parametrize("code", ["utf-7", "raw_unicode_escape"])
def test_a_name_that_is_no_text_is_escaped(app: Any, code: str) -> None:
    name = {"utf-7": "+2AA-.png", "raw_unicode_escape": "\\ud800.png"}[code]
    body, kind = form((name, picture()))
    reply = one(app, "POST", "/predict", body, f"{kind}; charset={code}")
    assert [row["image"] for row in reply.values["images"]] == ["\\ud800.png"]


def raw(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "data": base64.b64encode(tensor.contiguous().numpy().tobytes()).decode(),
    }


def post_json(app: Any, values: Any) -> Reply:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return one(app, "POST", "/predict?top=10", text, "application/json; charset=utf-8")


def test_json_has_inputs_raw_tensors_or_files(app: Any, served: Classifier) -> None:
    inputs = noise(2)
    expected = served(inputs).tolist()
    for values in ({"inputs": inputs.tolist()}, {"raw": raw(inputs)}):
        reply = post_json(app, values)
        assert [logits_of(reply, n) for n in (0, 1)] == expected
    assert logits_of(post_json(app, {"inputs": inputs[1].tolist()})) == expected[1]
    text = base64.b64encode(picture(3)).decode()
    assert logits_of(post_json(app, {"images": [text]})) == wanted(served, 3)


def test_raw_pixels_are_normalised(app: Any, served: Classifier) -> None:
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = served((pixels.float().div(255) - 0.5) / 0.2).tolist()
    assert logits_of(post_json(app, {"raw": raw(pixels)})) == expected[0]


def test_many_at_once_each_get_their_own(served: Classifier) -> None:
    app = create_app([served], Limits(batch=8))

    async def all_at_once() -> list[Reply]:
        bodies = [picture(seed) for seed in range(40)]
        return await asyncio.gather(
            *(ask(app, "POST", "/predict?top=10", body, "image/png") for body in bodies)
        )

    replies = asyncio.run(all_at_once())
    assert [logits_of(reply) for reply in replies] == [wanted(served, n) for n in range(40)]
    assert max(reply.values["batch"] for reply in replies) <= 8


def test_what_waits_for_a_busy_engine_becomes_one_batch(served: Classifier) -> None:
    app, entered, go = create_app([served], Limits(batch=8)), threading.Event(), threading.Event()
    batcher = app.routes[1].endpoint.__self__._batchers["net"]  # type: ignore[attr-defined]
    compute = batcher._compute

    def slow(inputs: list[torch.Tensor]) -> torch.Tensor:
        entered.set()
        assert go.wait(10)
        return compute(inputs)  # type: ignore[no-any-return]

    batcher._compute = slow

    async def ask_all() -> list[int]:
        tasks = [asyncio.create_task(ask(app, "POST", "/predict", picture(), "image/png"))]
        while not entered.is_set():
            await asyncio.sleep(0.001)
        rest = (ask(app, "POST", "/predict", picture(n), "image/png") for n in range(11))
        tasks += [asyncio.create_task(each) for each in rest]
        while len(batcher._waiting) < 11:
            await asyncio.sleep(0.001)
        go.set()
        return [reply.values["batch"] for reply in await asyncio.gather(*tasks)]

    assert sorted(asyncio.run(ask_all())) == [1, *[3] * 3, *[8] * 8]


def test_several_networks_are_asked_by_name(served: Classifier, tmp_path: Path) -> None:
    by_hand(7).save(tmp_path / "other.biper")
    app = create_app([served, open_classifier(tmp_path / "other.biper")])
    inputs = {"inputs": noise(1).tolist()}
    replies = {
        name: one(app, "POST", f"/predict?model={name}&top=10", json.dumps(inputs).encode(),
                  "application/json")
        for name in ("net", "other")
    }  # fmt: skip
    assert logits_of(replies["net"]) != logits_of(replies["other"])
    assert logits_of(replies["other"]) == by_hand(7)(noise(1))[0].tolist()
    unnamed = one(app, "POST", "/predict", picture(), "image/png")
    assert (unnamed.status, unnamed.error) == (
        400,
        "Say which network: /predict?model=NAME, one of net, other.",
    )
    unknown = one(app, "POST", "/predict?model=x", picture(), "image/png")
    assert unknown.status == 404
    assert [m["name"] for m in one(app, "GET", "/models").values["models"]] == ["net", "other"]
    with pytest.raises(ValueError, match="Two files are called 'net'"):
        create_app([served, served])
    with pytest.raises(ValueError, match="nothing to serve"):
        create_app([])


def test_a_network_that_does_not_say_how_takes_json_only(tmp_path: Path) -> None:
    by_hand(metadata=None).save(tmp_path / "bare.biper")
    app = create_app([open_classifier(tmp_path / "bare.biper")])
    assert post_json(app, {"inputs": noise(1).tolist()}).status == 200
    refused = one(app, "POST", "/predict", picture(), "image/png")
    assert refused.status == 400
    assert "'bare' does not say how its images are prepared. Send what it takes" in refused.error
    pixels = raw(torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert "start the server with --mean and --std" in post_json(app, {"raw": pixels}).error
    assert one(app, "GET", "/models").values["models"][0]["takes_images"] is False


def test_health_metrics_and_page(app: Any, served: Classifier) -> None:
    assert one(app, "GET", "/health/live").values == {"live": True}
    assert one(app, "GET", "/health/ready").values == {"live": True, "ready": True, "waiting": 0}
    one(app, "POST", "/predict", picture(), "image/png")
    text = one(app, "GET", "/metrics").body.decode()
    assert float(re.findall(r'^biper_requests_total{status="200"} (\S+)$', text, re.M)[0]) >= 1
    assert f'biper_model_bytes{{model="net",sha256="{served.sha256}"}}' in text
    page = one(app, "GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(rb"(?:src|href)=\"(?!data:)[^\"]*\"|https?://", page.body) == []
    assert "access-control-allow-origin" not in page.headers


# -- refusals -------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """Return the start of a PNG that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    sum_ = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + sum_ + b"\0\0\0\x09IDAT"


IMAGES: dict[str, tuple[bytes, str]] = {
    "no image": (b"hello", "it is no image of a known format"),
    "cut": (picture()[:200], "Cannot read an image from 'the request's body': "),
    "bomb": (png_header(60_000, 60_000), "Refusing the image 'the request's body': "),
    "large": (png_header(101, 100), "it has 101 x 100 pixels; 10,000 are accepted"),
    "no pixels": (png_header(0, 5), "Cannot read an image"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_bad_image_is_refused_in_words(app: Any, name: str) -> None:
    body, message = IMAGES[name]
    reply = one(app, "POST", "/predict", body, "image/png")
    assert reply.status == 400
    assert message in reply.error
    assert "0x" not in reply.error


def flat(width: int, height: int) -> bytes:
    """Return a PNG of one grey, a few bytes for many pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def in_form(files: list[bytes]) -> tuple[bytes, str]:
    return form(*((f"{number}.png", one) for number, one in enumerate(files)))


def in_json(files: list[bytes]) -> tuple[bytes, str]:
    texts = [base64.b64encode(one).decode() for one in files]
    return json.dumps({"images": texts}).encode(), "application/json"


@pytest.mark.parametrize(("pack", "name"), [(in_form, "3.png"), (in_json, "images[3]")])
def test_the_pixels_of_a_request_have_a_limit(
    served: Classifier, pack: Callable[[list[bytes]], tuple[bytes, str]], name: str
) -> None:
    app = create_app([served], replace(SMALL, request_pixels=30_000))
    full = [flat(100, 100), flat(100, 100), flat(100, 99), flat(10, 10)]
    assert one(app, "POST", "/predict", *pack(full)).status == 200
    # The last one is a header only, so that decoding it would be another refusal.
    reply = one(app, "POST", "/predict", *pack([*full[:3], png_header(10, 11)]))
    assert (reply.status, reply.error) == (
        413,
        f"With '{name}', the images of the request have more than the 30,000 pixels that are "
        "accepted. Send them in several requests.",
    )
    reply = one(app, "POST", "/predict", *pack([png_header(101, 100)]))
    assert (reply.status, "it has 101 x 100 pixels" in reply.error) == (400, True)
    less = create_app([served], replace(SMALL, request_pixels=99))
    assert one(less, "POST", "/predict", flat(10, 10), "image/png").status == 413
    assert one(app, "GET", "/models").values["limits"]["request_pixels"] == 30_000


def test_a_deep_image_is_refused(app: Any) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("I;16", (9, 9)).save(file, "PNG")
    reply = one(app, "POST", "/predict", file.getvalue(), "image/png")
    assert reply.status == 400
    assert "not 8 bits per channel" in reply.error
    body, kind = form(("a.png", picture()), ("deep.png", file.getvalue()))
    reply = one(app, "POST", "/predict", body, kind)
    assert reply.error.startswith("Cannot take 'deep.png': ")


def test_a_line_that_resizing_makes_huge_is_refused(served: Classifier) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (2_000_000, 1)).save(file, "BMP")
    reply = one(create_app([served]), "POST", "/predict", file.getvalue(), "image/bmp")
    assert reply.status == 400
    assert "would be resized to" in reply.error


NOT_JSON: dict[str, tuple[Any, str]] = {
    "empty": (b"{}", 'must have one of "inputs"'),
    "list": (b"[1]", 'must have one of "inputs"'),
    "broken": (b'{"inputs": [', "The body is no JSON"),
    "not utf-8": (b'{"inputs": "\xff"}', "The body is no JSON"),
    "nan": (b'{"inputs": [NaN]}', "NaN is no number of JSON"),
    "infinity": (b'{"inputs": [-Infinity]}', "Infinity is no number of JSON"),
    "overflow": (b'{"inputs": [[[1e400]]]}', "The input is [1, 1, 1, 1]; 'net' takes [N, 3, 8, 8]"),
    "digits": (b'{"inputs": [' + b"9" * 5000 + b"]}", "The body is no JSON"),
    "both": ({"inputs": [], "raw": {}}, "and nothing else"),
    "ragged": ({"inputs": [[1, 2], [3]]}, '"inputs" must be nested lists of numbers'),
    "texts": ({"inputs": [["1"]]}, '"inputs" must be nested lists of numbers'),
    "null": ({"inputs": [None]}, '"inputs" must be nested lists of numbers'),
    "long": ({"inputs": [10**400]}, '"inputs" must be nested lists of numbers'),
    "shape": ({"inputs": [[0.5] * 8] * 8}, "The input is [8, 8]; 'net' takes [N, 3, 8, 8]"),
    "none": ({"raw": {"shape": [0, 3, 8, 8], "dtype": "uint8", "data": ""}}, '"shape" must be'),
    "many": ({"images": [""] * 5}, "has 5 images; 1 to 4 are accepted"),
    "no images": ({"images": []}, "has 0 images; 1 to 4 are accepted"),
    "no list": ({"images": "x"}, '"images" must be a list'),
    "no base64": ({"images": ["%%%"]}, '"images"[0] is no base64'),
    "no file": ({"images": ["aGVsbG8="]}, "'images[0]': it is no image of a known format"),
    "raw keys": ({"raw": {"data": ""}}, '"raw" must have "shape", "dtype" and "data"'),
    "raw type": ({"raw": {"shape": [1], "dtype": "int64", "data": ""}}, "\"dtype\" (='int64')"),
    "raw kind": ({"raw": {"shape": [1], "dtype": [], "data": ""}}, '"dtype" (=[])'),
    "raw size": ({"raw": {"shape": [2], "dtype": "uint8", "data": "AA=="}}, "has 1 bytes; uint8"),
    "raw huge": ({"raw": {"shape": [2**62] * 8, "dtype": "uint8", "data": ""}}, "has 0 bytes"),
    "raw shape": ({"raw": {"shape": [1], "dtype": "uint8", "data": "AA=="}}, '"shape" (=[1])'),
    "raw bool": ({"raw": {"shape": [True], "dtype": "uint8", "data": "AA=="}}, '"shape" must be'),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_bad_json_is_refused_in_words(app: Any, name: str) -> None:
    values, message = NOT_JSON[name]
    reply = post_json(app, values)
    assert (reply.status, message in reply.error) == (400, True), reply.error


@pytest.mark.parametrize("key", ["inputs", "raw", "images", "x"])
def test_deep_json_is_refused_in_words(app: Any, key: str) -> None:
    """How deep lists may be depends on the version of Python: the decoder refuses them, or we."""
    body = f'{{"{key}": {"[" * 9000}{"]" * 9000}}}'.encode()
    reply = post_json(app, body)
    words = ("The body is no JSON: ", "The JSON must have ", f'"{key}" must ', f'"{key}"[0] must ')
    assert reply.status == 400
    assert reply.error.startswith(words)
    assert len(reply.error) < 300


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(app: Any, bad: float) -> None:
    inputs = noise(1)
    inputs[0, 1, 2, 3] = bad
    reply = post_json(app, {"raw": raw(inputs)})
    assert (reply.status, reply.error) == (
        400,
        "The input has values that are not finite numbers of float32.",
    )


def test_an_infinite_number_of_json_is_refused(app: Any) -> None:
    lists = noise(1).tolist()
    text = json.dumps({"inputs": lists}).replace(str(lists[0][0][0][0]), "1e39", 1)
    assert post_json(app, text.encode()).status == 400


@pytest.mark.parametrize(
    ("body", "kind", "status", "message"),
    [
        (b"", "image/png", 400, "The body is empty"),
        (b"", None, 400, "The body is empty"),
        (b"x", "text/html", 415, "The body is 'text/html', which is no image"),
        (b"x", "multipart/mixed; boundary=a", 415, "multipart/mixed"),
        (b"x" * 20_001, "image/png", 413, "larger than 20,000 bytes"),
        ([b"x" * 10_000] * 3, "image/png", 413, "larger than 20,000 bytes"),
        ([b"x" * 10, 5.0, b"y"], "image/png", 408, "did not come within 0.1 seconds: 10 bytes"),
        (b"x", "multipart/form-data", 400, "The form cannot be read"),
        (b"x", "multipart/form-data; boundary=xx", 400, "The form"),
        (form()[0], form()[1], 400, "The form has no file"),
        (form(*[("a", b"x")] * 5)[0], form()[1], 400, "The form cannot be read: Too many files"),
        (form(("a.png", b"x"))[0], form()[1], 400, "'a.png': it is no image of a known format"),
        (form(("a.png", b""))[0], form()[1], 400, "'a.png'"),
    ],
)
def test_a_bad_body_is_refused_in_words(
    app: Any, body: Any, kind: str | None, status: int, message: str
) -> None:
    reply = one(app, "POST", "/predict", body, kind)
    assert (reply.status, message in reply.error) == (status, True), reply.error


def test_a_declared_length_is_refused_before_it_is_kept(app: Any) -> None:
    reply = one(app, "POST", "/predict", b"x", "image/png", content_length=str(2**40))
    assert reply.status == 413


def test_a_client_that_goes_away_does_no_harm(app: Any) -> None:
    reply = one(app, "POST", "/predict", [b"x", 0.0], "image/png")
    assert reply.status == 400
    assert one(app, "POST", "/predict", picture(), "image/png").status == 200


@pytest.mark.parametrize("top", ["0", "-1", "x", "9" * 30])
def test_a_bad_count_of_classes_is_refused(app: Any, top: str) -> None:
    reply = one(app, "POST", f"/predict?top={top}", picture(), "image/png")
    assert reply.status == 400
    assert "must be a number of classes" in reply.error


def test_other_addresses_and_methods_say_what_there_is(app: Any) -> None:
    assert "POST an image to /predict" in one(app, "GET", "/x").error
    assert one(app, "GET", "/predict").status == 405
    assert one(app, "POST", "/models", b"x", "image/png").status == 405


def test_a_full_queue_says_when_to_come_again(app: Any) -> None:
    async def crowd() -> list[Reply]:
        slow = [b"x", 0.05, picture()]
        requests = [ask(app, "POST", "/predict", slow, "image/png") for _ in range(3)]
        tasks = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0.01)
        late = [await ask(app, "POST", "/predict", picture(), "image/png")]
        late.append(await ask(app, "GET", "/health/ready"))
        return [*late, *await asyncio.gather(*tasks)]

    busy, ready, *others = asyncio.run(crowd())
    assert (busy.status, busy.headers["retry-after"]) == (503, "1")
    assert "The server is busy: 3 requests wait" in busy.error
    assert (ready.status, ready.values["ready"]) == (503, False)
    assert {reply.status for reply in others} == {400}
    assert one(app, "POST", "/predict", picture(), "image/png").status == 200


def broken_app(served: Classifier, fails: Callable[[], object]) -> Any:
    app = create_app([served])
    batcher = app.routes[1].endpoint.__self__._batchers["net"]  # type: ignore[attr-defined]
    compute = batcher._compute

    def failing(inputs: list[torch.Tensor]) -> torch.Tensor:
        fails()
        return compute(inputs)  # type: ignore[no-any-return]

    batcher._compute = failing
    return app


def test_a_failing_engine_fails_its_requests_only(served: Classifier) -> None:
    failures = [RuntimeError("planted")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    app = broken_app(served, fail_once)
    with pytest.raises(RuntimeError, match="planted"):  # as servers of ASGI want it, for their log
        one(app, "POST", "/predict", picture(), "image/png")
    reply = one(app, "POST", "/predict?top=10", picture(), "image/png")
    assert logits_of(reply) == wanted(served)


def test_a_line_of_the_log_cannot_be_forged(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "biper_engine.serving"):
        one(app, "GET", "/x\n2026-01-01 00:00:00 root\x1b[31m")
        one(app, "POST", "/predict", b"hello", "image/png")
        one(app, "GET", "/health")
    first, second = caplog.messages
    assert first.startswith("192.0.2.7 GET /x\\n2026-01-01 00:00:00 root\\x1b[31m 404 ")
    assert re.fullmatch(r"192\.0\.2\.7 POST /predict 400 \d+\.\d ms Cannot read .*", second)

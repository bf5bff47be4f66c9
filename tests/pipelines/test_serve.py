"""A served model: pictures in and out over HTTP, and one clear line for everything that is refused."""

import asyncio
import io
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from ctmsr.errors import UserError
from ctmsr.image import decode, encode_png
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.serve.run import serving
from pipelines.serve.server import PAGE, Limits, Server
from pipelines.tracking.models import Version, find_version
from tests.support.registering import register_model, tiny_model

PICTURE = np.random.default_rng(1).integers(0, 256, (11, 19, 3), np.uint8)
LIMITS = Limits(max_pixels=2_000_000, timeout_s=60)


@pytest.fixture(scope="module")
def model() -> ConsistencyModel:
    return tiny_model()


@pytest.fixture(scope="module")
def version(model: ConsistencyModel, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A registered version of `model`."""
    uri = register_model(model, tmp_path_factory.mktemp("registry"))
    return find_version(uri, "models:/toy/1")


@pytest.fixture(scope="module")
def server(version: Version) -> Server:
    """What a replica runs, in this process."""
    return Server(version, LIMITS)


def request(body: bytes = b"", method: str = "POST", path: str = "/upscale", **headers: str) -> Request:
    """A request as an HTTP server would hand it over, in two parts."""
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [{"type": "http.request", "body": part, "more_body": i == 0} for i, part in enumerate(parts)]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    sent = {"host": "127.0.0.1:8000", **headers}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
    return Request(scope, receive)


def ask(server: Server, body: bytes = b"", **how: str) -> Response:
    return asyncio.run(server(request(body, **how)))


def told(response: Response) -> str:
    """The one line of a refusal."""
    text = bytes(response.body).decode()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.strip()


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_png_becomes_the_png_that_the_checkpoint_makes(server: Server, model: ConsistencyModel) -> None:
    response = ask(server, encode_png(PICTURE))
    assert (response.status_code, response.media_type) == (200, "image/png")
    made = decode(bytes(response.body), name="")
    assert np.array_equal(made, upscale(model, PICTURE, sigma_max=0.9))


def test_a_jpeg_goes_in_and_a_jpeg_comes_out_where_it_is_asked_for(server: Server) -> None:
    response = ask(server, encoded(Image.fromarray(PICTURE), "JPEG"), accept="image/jpeg")
    assert (response.status_code, response.media_type) == (200, "image/jpeg")
    with Image.open(io.BytesIO(bytes(response.body))) as image:
        assert (image.format, image.size) == ("JPEG", (4 * 19, 4 * 11))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"A recipe for bread.\n", 415, "This is not a picture: JPEG, PNG, WEBP, TIFF"),
        (b"", 415, "This is not a picture"),
        (encode_png(PICTURE)[:200], 422, "The picture is damaged or incomplete."),
        (encoded(Image.fromarray(PICTURE), "PDF"), 415, "This is not a picture"),
    ],
    ids=["text", "nothing", "half", "pdf"],
)
def test_what_is_no_picture_is_told(server: Server, body: bytes, status: int, message: str) -> None:
    response = ask(server, body)
    assert response.status_code == status
    assert message in told(response)


@pytest.mark.parametrize(
    ("side", "size"), [(10_000, "10000 x 10000 pixels, 100 megapixels"), (20_000, "170")]
)
def test_a_hundred_megapixels_are_refused_by_their_header(server: Server, side: int, size: str) -> None:
    body = encoded(Image.new("1", (side, side)), "PNG")
    started = time.monotonic()
    response = ask(server, body)
    assert time.monotonic() - started < 1
    assert response.status_code == 413
    assert size in told(response)
    assert "at most 2 megapixels are accepted. Make it smaller" in told(response)


def test_a_file_of_too_many_bytes_is_refused(version: Version) -> None:
    response = ask(Server(version, replace(LIMITS, max_bytes=100)), encode_png(PICTURE))
    assert response.status_code == 413
    assert told(response).endswith("at most 0 MB are accepted.")


def test_what_takes_too_long_is_told(version: Version) -> None:
    response = ask(Server(version, replace(LIMITS, timeout_s=0.001)), encode_png(PICTURE))
    assert response.status_code == 504
    assert told(response) == "It took longer than the limit of 0.001 s. Send a smaller picture."


def test_who_comes_when_many_wait_is_told_to_come_back(server: Server) -> None:
    async def all_at_once() -> list[Response]:
        return await asyncio.gather(*(server(request(encode_png(PICTURE))) for _ in range(12)))

    responses = asyncio.run(all_at_once())
    assert {response.status_code for response in responses} == {200, 503}
    busy = [response for response in responses if response.status_code == 503]
    assert len(busy) == 4
    assert "Try again" in told(busy[0])
    assert busy[0].headers["retry-after"] == "10"


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ({"path": "/etc"}, 404, "only a page"),
        ({"method": "GET"}, 405, "POST a picture file"),
        ({"method": "POST", "path": "/"}, 405, "use GET"),
        ({"host": "["}, 421, "This server is 127.0.0.1 or"),
        ({"host": "evil.example:8000"}, 421, "not 'evil.example:8000'"),
        ({"origin": "http://evil.example"}, 403, "other sites"),
    ],
)
def test_other_requests_are_refused(server: Server, how: dict[str, str], status: int, message: str) -> None:
    response = ask(server, encode_png(PICTURE), **how)
    assert response.status_code == status
    assert message in told(response)
    assert "access-control-allow-origin" not in response.headers


def test_its_own_page_may_use_it(server: Server) -> None:
    assert ask(server, encode_png(PICTURE), origin="http://127.0.0.1:8000").status_code == 200


def test_a_fault_of_the_server_is_not_told_to_the_client(version: Version) -> None:
    broken = Server(version, LIMITS)
    broken._model = None  # type: ignore[assignment]
    response = ask(broken, encode_png(PICTURE))
    assert response.status_code == 500
    assert told(response) == "The server failed on this picture; its log says why."


def test_the_page_is_whole_and_fetches_nothing_from_elsewhere(server: Server) -> None:
    response = ask(server, method="GET", path="/")
    page = bytes(response.body).decode()
    assert (response.status_code, response.media_type) == (200, "text/html")
    assert "toy version 1" in page
    assert "{{" not in page
    assert re.findall(r"https?://|src=|@import", PAGE.read_text()) == []
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.fixture(scope="module")
def url(version: Version, ray_session: None) -> Iterator[str]:
    """Ray Serve on a free port."""
    with serving(version, host="127.0.0.1", port=free_port(), limits=LIMITS) as url:
        yield url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ray_serves_the_page_and_pictures(url: str, model: ConsistencyModel) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert b"Upscale a picture" in answer.read()
    with urllib.request.urlopen(f"{url}/upscale", data=encode_png(PICTURE), timeout=60) as answer:
        made = decode(answer.read(), name="")
    assert np.array_equal(made, upscale(model, PICTURE, sigma_max=0.9))


def test_a_refusal_reaches_the_client_even_while_it_is_still_sending(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="413") as raised:
        urllib.request.urlopen(f"{url}/upscale", data=bytes(40 * 2**20), timeout=60)
    assert raised.value.read().decode() == "The file has 40 MB; at most 32 MB are accepted.\n"


def test_a_port_that_is_taken_is_told_at_once(version: Version) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1, port {port} .*--port"):
            serving(version, host="127.0.0.1", port=port, limits=LIMITS).__enter__()


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(version: Version) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipelines.serve", "--port", str(port)]
    command += ["--model", "models:/toy@champion", "--tracking-uri", version.tracking_uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line == f"models:/toy/1 is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as answer:
            assert answer.status == 200
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130

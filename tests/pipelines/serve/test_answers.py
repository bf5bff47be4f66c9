"""Answers to requests: a picture, or one clear line for everything that is refused."""

import asyncio
import io
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.responses import Response

from ctmsr.image import decode, encode_png
from ctmsr.image.encoding import SUFFIXES
from ctmsr.model.inference import upscale
from ctmsr.model.network import ConsistencyModel
from pipelines.serve.front import _KINDS, PAGE, Front
from pipelines.serve.limits import Limits, padded_pixels
from pipelines.serve.token import TokenSource
from pipelines.serve.upscaler import Made, Upscaler
from tests.support.serving import LIMITS, PICTURE, ask, encoded, front, request, told

TOKEN = "0123456789abcdef"


def test_a_png_becomes_the_png_that_the_checkpoint_makes(server: Front, model: ConsistencyModel) -> None:
    response = ask(server, encode_png(PICTURE))
    assert (response.status_code, response.media_type) == (200, "image/png")
    assert response.headers["x-model-version"] == "models:/toy/1"
    made = decode(bytes(response.body), name="")
    assert np.array_equal(made, upscale(model, PICTURE, sigma_max=0.9))


def test_a_jpeg_goes_in_and_a_jpeg_comes_out_where_it_is_asked_for(server: Front) -> None:
    response = ask(server, encoded(Image.fromarray(PICTURE), "JPEG"), accept="image/jpeg")
    assert (response.status_code, response.media_type) == (200, "image/jpeg")
    with Image.open(io.BytesIO(bytes(response.body))) as image:
        assert (image.format, image.size) == ("JPEG", (4 * 19, 4 * 11))


def test_the_front_knows_all_formats_that_can_be_written() -> None:
    assert set(SUFFIXES) == set(_KINDS)


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
def test_what_is_no_picture_is_told(server: Front, body: bytes, status: int, message: str) -> None:
    response = ask(server, body)
    assert response.status_code == status
    assert message in told(response)


# Pictures that cost much


@pytest.mark.parametrize(
    ("side", "size"), [(10_000, "10000 x 10000 pixels, 100 megapixels"), (20_000, "170")]
)
@pytest.mark.timed
def test_a_hundred_megapixels_are_refused_by_their_header(server: Front, side: int, size: str) -> None:
    body = encoded(Image.new("1", (side, side)), "PNG")
    started = time.monotonic()
    response = ask(server, body)
    assert time.monotonic() - started < 1
    assert response.status_code == 413
    assert size in told(response)
    assert "at most 2 megapixels are accepted. Make it smaller" in told(response)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_a_line_of_pixels_is_refused_for_its_padding(server: Front, size: tuple[int, int]) -> None:
    response = ask(server, encoded(Image.new("L", size), "PNG"))
    assert response.status_code == 413
    assert "which are padded to 12.8 megapixels; at most 2 megapixels" in told(response)


@given(st.floats(1e5, 1e8), st.floats(1, 14), st.floats(0.001, 1))
def test_no_ordinary_picture_is_refused_for_its_padding(
    max_pixels: float, aspect: float, part: float
) -> None:
    limits = Limits(max_pixels=round(max_pixels), timeout_s=1)
    width = max(1, int((part * max_pixels * aspect) ** 0.5))
    height = max(1, int((part * max_pixels / aspect) ** 0.5))
    assert padded_pixels(width, height) <= limits.max_padded_pixels


def test_a_file_of_too_many_bytes_is_refused(upscaler: Upscaler) -> None:
    response = ask(front(upscaler, replace(LIMITS, max_bytes=100)), encode_png(PICTURE))
    assert response.status_code == 413
    assert told(response).endswith("at most 0 MB are accepted.")


def test_what_takes_too_long_is_told(upscaler: Upscaler) -> None:
    response = ask(front(upscaler, replace(LIMITS, timeout_s=0.001)), encode_png(PICTURE))
    assert response.status_code == 504
    assert told(response) == "It took longer than the limit of 0.001 s. Send a smaller picture."


# Many at once


class Slow:
    """Stands for the upscaling of large pictures: goes on until it is told to end."""

    def __init__(self, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends = threading.Event()
        make = upscaler._make

        def slow(data: bytes, kind: str, seed: int, num_pixels: int) -> object:
            if num_pixels > 256**2:
                assert self.ends.wait(30)
                return Made(b"large", (), "", num_pixels)
            return make(data, kind, seed, num_pixels)

        monkeypatch.setattr(upscaler, "_make", slow)


def test_who_comes_when_many_wait_is_told_to_come_back(
    server: Front, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, large = Slow(upscaler, monkeypatch), encode_png(np.zeros((257, 257, 3), np.uint8))

    async def all_at_once() -> tuple[list[Response], Response]:
        many = [asyncio.create_task(server(request(large))) for _ in range(12)]
        while sum(task.done() for task in many) < 4:
            await asyncio.sleep(0.01)
        small = await server(request(encode_png(PICTURE)))
        slow.ends.set()
        return await asyncio.gather(*many), small

    responses, small = asyncio.run(all_at_once())
    assert small.status_code == 200  # it did not wait for the large ones
    assert {response.status_code for response in responses} == {200, 503}
    busy = [response for response in responses if response.status_code == 503]
    assert len(busy) == 4
    assert "Try again" in told(busy[0])
    assert busy[0].headers["retry-after"] == "10"


@pytest.mark.timed
def test_who_leaves_keeps_the_place_until_the_work_ends(
    server: Front, upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, large = Slow(upscaler, monkeypatch), encode_png(np.zeros((257, 257, 3), np.uint8))

    async def leave() -> Response:
        first = asyncio.create_task(server(request(large)))
        await asyncio.sleep(0.1)
        first.cancel()
        rest = [asyncio.create_task(server(request(large))) for _ in range(8)]
        done, _ = await asyncio.wait(rest, return_when=asyncio.FIRST_COMPLETED)
        slow.ends.set()
        await asyncio.wait(rest)
        return done.pop().result()

    assert asyncio.run(leave()).status_code == 503


# Other requests


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ({"path": "/etc"}, 404, "only a page"),
        ({"method": "GET"}, 405, "POST a picture file"),
        ({"method": "POST", "path": "/"}, 405, "use GET"),
        ({"host": "["}, 421, "This server is 127.0.0.1 or"),
        ({"host": "evil.example:8000"}, 421, "not 'evil.example:8000'"),
        ({"origin": "http://evil.example"}, 403, "other sites"),
        ({"query": "seed=abc"}, 400, "The seed is 'abc': only seed=N is known, with N from 0 to"),
        ({"query": "seed=-1"}, 400, "The seed is '-1'"),
        ({"query": "seed=9223372036854775808"}, 400, "The seed is '9223372036854775808'"),
        ({"query": "seed=%D9%A3"}, 400, "The seed is"),
        ({"query": "seed="}, 400, "The seed is ''"),
        ({"query": "seed"}, 400, "malformed"),
        ({"query": "seed=1&seed=2"}, 400, "only one seed=N"),
        ({"query": "seed=1&a=2&b=3"}, 400, "malformed"),
        ({"query": "sead=1"}, 400, "The query has 'sead'"),
    ],
)
def test_other_requests_are_refused(server: Front, how: dict[str, str], status: int, message: str) -> None:
    response = ask(server, encode_png(PICTURE), **how)
    assert response.status_code == status
    assert message in told(response)
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_a_seed_selects_the_details(server: Front, model: ConsistencyModel, seed: int) -> None:
    response = ask(server, encode_png(PICTURE), query=f"seed={seed}")
    made = decode(bytes(response.body), name="")
    assert np.array_equal(made, upscale(model, PICTURE, sigma_max=0.9, seed=seed))


def test_its_own_page_may_use_it(server: Front) -> None:
    assert ask(server, encode_png(PICTURE), origin="http://127.0.0.1:8000").status_code == 200


def test_the_page_is_whole_and_fetches_nothing_from_elsewhere(server: Front) -> None:
    response = ask(server, method="GET", path="/")
    page = bytes(response.body).decode()
    assert (response.status_code, response.media_type) == (200, "text/html")
    assert "toy version 1" in page
    assert "{{" not in page
    assert re.findall(r"https?://|src=|@import", PAGE.read_text()) == []
    assert "default-src 'none'" in response.headers["content-security-policy"]


# The token


@pytest.fixture(params=["file", "environment"])
def locked(
    request: pytest.FixtureRequest,
    upscaler: Upscaler,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Response]:
    """Asks a server that has a token."""
    path = tmp_path_factory.mktemp("secret") / "token"
    path.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("CTMSR_SERVE_TOKEN", TOKEN if request.param == "environment" else "")
    server = front(upscaler, token=TokenSource(str(path) if request.param == "file" else None))
    return lambda **how: ask(server, encode_png(PICTURE), **how)


def test_only_who_shows_the_token_is_served(
    locked: Callable[..., Response], caplog: pytest.LogCaptureFixture
) -> None:
    for shown in ("", TOKEN, "Bearer", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", f"Bearer {TOKEN}é"):
        response = locked(authorization=shown)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer ")
        assert told(response) == "This server needs its token: send `Authorization: Bearer TOKEN`."
    assert locked(authorization=f"Bearer {TOKEN}").status_code == 200
    assert TOKEN not in caplog.text


def test_the_page_needs_no_token(locked: Callable[..., Response]) -> None:
    assert locked(method="GET", path="/").status_code == 200


def test_a_mounted_token_may_change(upscaler: Upscaler, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("secret") / "token"
    path.write_text(TOKEN)
    server = front(upscaler, token=TokenSource(str(path)))
    path.write_text(TOKEN[::-1])
    assert ask(server, encode_png(PICTURE), authorization=f"Bearer {TOKEN}").status_code == 401
    assert ask(server, encode_png(PICTURE), authorization=f"Bearer {TOKEN[::-1]}").status_code == 200


# Faults of the server


def test_a_fault_of_the_server_is_told_to_its_log_and_not_to_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = front(None)
    logging.getLogger("ray.serve").propagate = True
    response = ask(broken, encode_png(PICTURE), **{"x-request-id": "my-request"})
    assert response.status_code == 500
    assert told(response) == "The server failed on this picture; its log says why."
    assert "request my-request" in caplog.text
    assert "AttributeError" in caplog.text


def test_a_model_that_changed_is_not_healthy(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(upscaler.check_health())
    off = replace(upscaler._loaded, sr_u8=255 - upscaler._loaded.sr_u8)
    monkeypatch.setattr(upscaler, "_loaded", off)
    with pytest.raises(RuntimeError, match=r"models:/toy/1 is off by \d+ levels"):
        asyncio.run(upscaler.check_health())

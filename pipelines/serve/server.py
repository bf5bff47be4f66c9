"""Answers requests to a served model: with the page, an upscaled picture, or one line that says why not.

    GET  /         the page
    POST /upscale  a PNG or JPEG file as the body; answers with a PNG, or a JPEG for `Accept: image/jpeg`

A picture's size is read from its header before any pixel is decoded. The model takes one picture at a time:
it would upscale a batch one by one anyway, so batching would only make the first picture wait.
"""

import asyncio
import html
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ctmsr.errors import PictureError
from ctmsr.image import decode
from ctmsr.model.device import choose_device

from ..tracking.released import Released

PAGE = Path(__file__).with_name("page.html")
FORMATS = ("JPEG", "PNG")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_MAX_WAITING = 8
"""Pictures that may wait for the model; further ones are asked to try again later."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Limits on requests."""

    max_pixels: int
    """Largest picture accepted."""
    timeout_s: float
    """From the first byte of a picture to the response."""
    max_bytes: int = 32 * 2**20
    """Largest file accepted."""
    hosts: frozenset[str] = LOOPBACK
    """Names that requests may use for this server; empty allows all. This stops DNS rebinding, where another
    site's name resolves to this server."""


def names_of(host: str) -> frozenset[str]:
    """The names of a server that listens on `host`; empty, that is any, if it listens on all addresses."""
    if host in LOOPBACK:
        return LOOPBACK
    return frozenset() if host in ("0.0.0.0", "::") else LOOPBACK | {host}


class Refusal(Exception):
    """A response without a picture: an HTTP status and one line that says what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The deployment: holds a model and answers requests."""

    def __init__(self, model: Released, limits: Limits) -> None:
        device = choose_device(model.device)
        if device.type == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)  # Ray sets it to one per worker
        self._model = model.load()
        self._limits = limits
        self._page = _page(model.uri, limits)
        self._model_thread = ThreadPoolExecutor(1)
        self._waiting = 0

    async def __call__(self, request: Request) -> Response:
        """Answers any request; unexpected errors go to the log, not to the client."""
        response: Response
        try:
            response = await self._answer(request)
        except Refusal as refusal:
            headers = {"Retry-After": "10"} if refusal.status == 503 else None
            response = PlainTextResponse(f"{refusal}\n", refusal.status, headers)
        except Exception:
            logger.exception("%s %s failed", request.method, request.scope["path"])
            response = PlainTextResponse("The server failed on this picture; its log says why.\n", 500)
        response.headers.update(_HEADERS)
        return response

    async def _answer(self, request: Request) -> Response:
        _check_source(request, self._limits.hosts)
        if request.scope["path"] == "/":
            if request.method not in ("GET", "HEAD"):
                raise Refusal(405, "This is a page: use GET. POST pictures to /upscale.")
            return Response(self._page, media_type="text/html")
        if request.scope["path"] != "/upscale":
            raise Refusal(404, "There is only a page at / and an upscaler at /upscale.")
        if request.method != "POST":
            raise Refusal(405, "POST a PNG or JPEG file to /upscale.")
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                data = await _body(request, self._limits.max_bytes)
                check_picture(data, self._limits.max_pixels)
                return await self._upscale(data, "JPEG" if _wants_jpeg(request) else "PNG")
        except TimeoutError as error:
            raise Refusal(
                504, f"It took longer than the limit of {self._limits.timeout_s:g} s. Send a smaller picture."
            ) from error

    async def _upscale(self, data: bytes, kind: str) -> Response:
        if self._waiting >= _MAX_WAITING:
            raise Refusal(503, f"{self._waiting} pictures are already waiting. Try again in a while.")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            made = await loop.run_in_executor(self._model_thread, self._make, data, kind)
        except PictureError as error:
            raise Refusal(
                422, "The picture is damaged or incomplete. Save it again, or send another."
            ) from error
        finally:
            self._waiting -= 1
        return Response(made, media_type=f"image/{kind.lower()}")

    def _make(self, data: bytes, kind: str) -> bytes:
        lq_u8 = decode(data, name="the picture")
        sr = Image.fromarray(self._model(lq_u8, 0))
        file = io.BytesIO()
        settings = {"compress_level": 1} if kind == "PNG" else {"quality": 95, "subsampling": 0}
        sr.save(file, kind, **settings)
        return file.getvalue()


def check_picture(data: bytes, max_pixels: int) -> None:
    """Checks a picture by its header alone.

    Raises:
        Refusal: It is neither JPEG nor PNG, or has more pixels than allowed.
    """
    most = f"at most {max_pixels / 1e6:g} megapixels are accepted. Make it smaller, or crop it."
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"The picture has more than 170 megapixels; {most}") from error
    except Exception as error:  # Pillow raises all sorts of errors on unknown data
        raise Refusal(415, "This is not a picture: only PNG and JPEG files are accepted.") from error
    if width * height > max_pixels:
        megapixels = width * height / 1e6
        raise Refusal(413, f"The picture has {width} x {height} pixels, {megapixels:.3g} megapixels; {most}")


async def _body(request: Request, max_bytes: int) -> bytes:
    """The whole body. One that is too large is still read, as a client that is cut off never sees why."""
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= max_bytes:
            data += chunk
        else:
            data.clear()
    if size > max_bytes:
        raise Refusal(
            413, f"The file has {size / 2**20:.0f} MB; at most {max_bytes / 2**20:.0f} MB are accepted."
        )
    return bytes(data)


def _check_source(request: Request, hosts: frozenset[str]) -> None:
    """Refuses requests from pages of other sites, and requests for a host name that is not this server's."""
    host = request.headers.get("host", "")
    if hosts and _name(host) not in hosts:
        raise Refusal(421, f"This server is {' or '.join(sorted(hosts))}, not {host!r}.")
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise Refusal(403, "Pages of other sites may not use this server.")


def _name(host: str) -> str | None:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _wants_jpeg(request: Request) -> bool:
    return "image/jpeg" in request.headers.get("accept", "")


def _page(model_uri: str, limits: Limits) -> str:
    text = PAGE.read_text(encoding="utf-8")
    known = {
        "MODEL": model_uri.removeprefix("models:/").replace("/", " version "),
        "MAX_BYTES": str(limits.max_bytes),
        "MEGAPIXELS": f"{limits.max_pixels / 1e6:g}",
    }
    for name, value in known.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))
    return text

"""The deployment that answers requests: with the page, an upscaled picture, or one line that says why not.

    GET  /         the page
    POST /upscale  a picture file as the body; answers with a PNG, or what `Accept` asks for: image/jpeg or
                   image/webp. `?seed=7` selects other details. The header X-Model-Version names the version
                   that made the picture, X-Warning says what of the file is not in it.

It is a process of its own, without torch and without a decoder, so that the page loads while all models work.
"""

import asyncio
import html
import logging
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from .guard import Uploads
from .limits import Limits, Refusal, is_request_id
from .metrics import Metrics
from .token import TokenSource

PAGE = Path(__file__).with_name("page.html")

_KINDS = ("png", "jpeg", "webp")
_MAX_SEED = 2**63 - 1
_LEFT = 499
"""In the metrics, the status of a client that left before its answer."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger("ray.serve")


class Front:
    """A replica."""

    def __init__(self, upscaler: Any, version: str, limits: Limits, token: TokenSource | None) -> None:
        """Takes a handle of the `Upscaler`, and the version that it starts with, for the page.

        Raises:
            UserError: There is no token where there should be one.
        """
        if token:
            token.read()
        self._upscaler, self._version, self._limits, self._token = upscaler, version, limits, token
        self._uploads = Uploads(limits.max_bytes)
        self._metrics = Metrics()

    async def __call__(self, request: Request) -> Response:
        """Answers any request; unexpected errors go to the log, not to the client."""
        started, status = time.monotonic(), _LEFT
        response: Response
        try:
            response = await self._response(request)
            status = response.status_code
        finally:
            self._metrics.answered(status, time.monotonic() - started)
        response.headers.update(_HEADERS)
        return response

    async def _response(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except Refusal as refusal:
            return _told(refusal)
        except ConnectionResetError as error:
            raise ClientDisconnect from error
        except (RayActorError, RayServeException):
            logger.exception("request %s: no replica answered", _request_id(request))
            return _told(Refusal(503, "The server is restarting. Try again in a while."))
        except Exception:
            logger.exception("request %s: %s failed", _request_id(request), request.method)
            return PlainTextResponse("The server failed on this picture; its log says why.\n", 500)

    async def _answer(self, request: Request) -> Response:
        _check_source(request, self._limits.hosts)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if path in ("", "/"):
            if request.method not in ("GET", "HEAD"):
                raise Refusal(405, "This is a page: use GET. POST pictures to /upscale.")
            return Response(self._page(), media_type="text/html")
        if path != "/upscale":
            raise Refusal(404, "There is only a page at / and an upscaler at /upscale.")
        if request.method != "POST":
            raise Refusal(405, "POST a picture file to /upscale.")
        if self._token and not self._token.accepts(request.headers.get("authorization", "")):
            raise Refusal(401, "This server needs its token: send `Authorization: Bearer TOKEN`.")
        seed = _seed(request.scope.get("query_string", b"").decode("latin-1"))
        return await self._upscaled(request, _wanted(request), seed)

    async def _upscaled(self, request: Request, kind: str, seed: int) -> Response:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                data = await self._uploads.read(request.scope, request.receive)
                with self._metrics.waiting():
                    made = await self._upscaler.upscale.remote(data, kind, seed)
        except TimeoutError as error:
            raise Refusal(
                504, f"It took longer than the limit of {self._limits.timeout_s:g} s. Send a smaller picture."
            ) from error
        if isinstance(made, Refusal):
            raise made
        self._version = made.version
        self._metrics.upscaled(made.num_pixels)
        headers = {"X-Model-Version": _header(made.version)}
        if made.warnings:
            headers["X-Warning"] = _header(" ".join(made.warnings))
        return Response(made.data, media_type=f"image/{kind}", headers=headers)

    def _page(self) -> str:
        text = PAGE.read_text(encoding="utf-8")
        known = {
            "MODEL": self._version.removeprefix("models:/").replace("/", " version "),
            "MAX_BYTES": str(self._limits.max_bytes),
            "MEGAPIXELS": f"{self._limits.max_pixels / 1e6:g}",
        }
        for name, value in known.items():
            text = text.replace(f"{{{{{name}}}}}", html.escape(value))
        return text


def _told(refusal: Refusal) -> Response:
    return PlainTextResponse(f"{refusal}\n", refusal.status, refusal.headers)


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


def _seed(query: str) -> int:
    """The seed of a query such as `seed=7`; 0 by default."""
    known = f"seed=N is known, with N from 0 to {_MAX_SEED}"
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=2)
    except ValueError as error:
        raise Refusal(400, f"The query is malformed: only {known}.") from error
    if not pairs:
        return 0
    name, value = pairs[0]
    if len(pairs) > 1 or name != "seed":
        raise Refusal(400, f"The query has {_header(pairs[-1][0])[:40]!r}: only one {known}.")
    if not re.fullmatch(r"[0-9]{1,19}", value) or int(value) > _MAX_SEED:
        raise Refusal(400, f"The seed is {_header(value)[:40]!r}: only {known}.")
    return int(value)


def _wanted(request: Request) -> str:
    """The format that the client asks for by name; of several, and of none, PNG."""
    accepted = request.headers.get("accept", "")
    named = [kind for kind in _KINDS if f"image/{kind}" in accepted]
    return named[0] if len(named) == 1 else "png"


def _request_id(request: Request) -> str:
    known = request.headers.get("x-request-id", "")
    return known if is_request_id(known) else "without id"


def _header(text: str) -> str:
    """A text as one line of ASCII, as HTTP headers must be."""
    return text.encode("ascii", "backslashreplace").decode().replace("\n", " ").replace("\r", " ")[:1000]

"""Stands before the application and keeps slow, large and unfinished requests away from it.

An ASGI middleware. Ray Serve runs it in its HTTP proxy, which otherwise reads a body of any size into memory,
hands a request over before its body has come, and waits for ever for a client that does not read its answer.
Ray imports `middlewares` there if `PROXY_ENV` is in the environment of the nodes. Where it is not, the
application still reads bodies by the same `Uploads`; the rest is left to a proxy in front.

When too much is under way, what has not moved for the longest time has to go. So whoever holds connections
open without sending displaces others of that kind, and nobody who sends.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import MAX_BYTES, Refusal, is_request_id, too_large

PROXY_ENV = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serve.guard:middlewares"}
"""Has Ray Serve's proxy run this middleware; read when a node's processes start."""

_UPLOADS, _UPLOAD_BYTES, _UPLOAD_S = 64, 256 * 2**20, 60.0
_DOWNLOADS, _DOWNLOAD_BYTES, _DOWNLOAD_S = 256, 2**30, 300.0
_PIECE_BYTES = 64 * 1024
_LINGER_BYTES, _LINGER_S = 48 * 2**20, 5.0
"""What is still read after a refusal: a client that is cut off while it sends may never see why."""
_RESERVED = {"x_request_timeout_seconds", "x_request_disconnect_disabled", "x_session_id"} | {
    "serve_multiplexed_model_id"
}
"""Headers by which anybody could lift Ray Serve's time limit or steer its routing, `-` written as `_`."""


@dataclass(eq=False)
class Transfer:
    """A body on its way, in one direction."""

    deadline: asyncio.Timeout
    num_bytes: int = 0
    """What of it is in memory."""
    gave_way: bool = False


class Transfers:
    """Bodies on their way, bounded in number, bytes and time."""

    def __init__(self, most: int, most_bytes: int, limit_s: float) -> None:
        self._most, self._most_bytes, self._limit_s = most, most_bytes, limit_s
        self._ongoing: dict[Transfer, None] = {}
        """The one that has not moved for the longest time comes first."""

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Transfer]:
        """A transfer for the duration of a `with` block.

        Raises:
            TimeoutError: It took too long, or has to give way; `gave_way` tells.
        """
        async with asyncio.timeout(self._limit_s) as deadline:
            transfer = Transfer(deadline)
            try:
                self.moved(transfer, 0)
                yield transfer
            finally:
                self._ongoing.pop(transfer, None)

    def moved(self, transfer: Transfer, num_bytes: int) -> None:
        """Notes that it has moved, and holds so many bytes now; others may have to give way to it."""
        if transfer.gave_way:  # its deadline stops it at its next wait
            return
        transfer.num_bytes = num_bytes
        self._ongoing.pop(transfer, None)
        self._ongoing[transfer] = None
        while len(self._ongoing) > 1 and self._is_full():
            idle = next(iter(self._ongoing))
            del self._ongoing[idle]
            if not idle.deadline.expired():
                idle.gave_way = True
                idle.deadline.reschedule(asyncio.get_running_loop().time())

    def _is_full(self) -> bool:
        num_bytes = sum(transfer.num_bytes for transfer in self._ongoing)
        return len(self._ongoing) > self._most or num_bytes > self._most_bytes


class Uploads:
    """Reads bodies of requests."""

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        *,
        most: int = _UPLOADS,
        most_bytes: int = _UPLOAD_BYTES,
        limit_s: float = _UPLOAD_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._transfers = Transfers(most, most_bytes, limit_s)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A whole body.

        Raises:
            Refusal: It is too large, comes too slowly, or has to give way to others.
            ConnectionResetError: The client has gone.
        """
        if int(_header(scope, b"content-length") or 0) > self._max_bytes:
            raise too_large(self._max_bytes)
        pieces: list[bytes] = []
        num_bytes = 0
        async with self._one() as transfer:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError("the client left before its request was complete")
                pieces.append(message.get("body", b""))
                num_bytes += len(pieces[-1])
                more = message.get("more_body", False)
                if num_bytes > self._max_bytes:
                    raise too_large(self._max_bytes)
                self._transfers.moved(transfer, num_bytes)
        # Joined once: copying large bodies was a fifth of what Ray Serve's proxy did under attack.
        return b"".join(pieces)

    @asynccontextmanager
    async def _one(self) -> AsyncIterator[Transfer]:
        transfer = None
        try:
            async with self._transfers.one() as transfer:
                yield transfer
        except TimeoutError as error:
            if transfer and transfer.gave_way:
                raise Refusal(503, "Too much is being sent at once. Try again in a while.") from error
            raise Refusal(408, "The request did not arrive in time. Send a smaller file.") from error


class Guard:
    """The middleware: hands on requests that are complete, and sends answers in pieces with a time limit."""

    def __init__(
        self,
        app: ASGIApp,
        uploads: Uploads | None = None,
        downloads: Transfers | None = None,
        refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app = app
        self._uploads = uploads or Uploads()
        self._downloads = downloads or Transfers(_DOWNLOADS, _DOWNLOAD_BYTES, _DOWNLOAD_S)
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": _cleaned(scope["headers"])}
        try:
            complete = _replayed(await self._uploads.read(scope, receive), receive)
        except ConnectionResetError:
            return
        except Refusal as refusal:
            self._refused(refusal.status)
            await _refuse(scope, receive, send, refusal)
            return
        await self._app(scope, complete, self._in_pieces(send))

    def _in_pieces(self, send: Send) -> Send:
        """`send` that waits for the client between pieces of a body, but not for ever."""

        async def paced(message: Message) -> None:
            body = memoryview(message.get("body", b""))
            if message["type"] != "http.response.body" or len(body) <= _PIECE_BYTES:
                await send(message)
                return
            async with self._downloads.one() as transfer:
                for start in range(0, len(body), _PIECE_BYTES):
                    stop = start + _PIECE_BYTES
                    self._downloads.moved(transfer, len(body) - start)
                    more = stop < len(body) or message.get("more_body", False)
                    await send({**message, "body": body[start:stop], "more_body": more})

        return paced


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy asks for."""
    from ray.serve import metrics

    refusals = metrics.Counter(
        "ctmsr_serve_refused_requests",
        description="Requests that were refused before their body was complete.",
        tag_keys=("status",),
    )
    return [Middleware(Guard, refused=lambda status: refusals.inc(tags={"status": str(status)}))]


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Refusal) -> None:
    """Answers while the client may be sending, reads on for a while, and closes the connection."""
    body = f"{refusal}\n".encode()
    headers = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(body)),
        "connection": "close",
        "x-content-type-options": "nosniff",
        "x-request-id": (_header(scope, b"x-request-id") or b"").decode(),
        **refusal.headers,
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if _header(scope, b"expect") is None:  # who waits for "100 Continue" has sent nothing, and is not told to
        await _linger(receive)
    await send({"type": "http.response.body", "body": b""})


async def _linger(receive: Receive) -> None:
    left = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            more = True
            while more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def _cleaned(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without what clients should not say to Ray Serve, and with a request id that may stand in a log."""
    kept = [(name, value) for name, value in headers if _plain(name) not in _RESERVED]
    ids = [value.decode("latin-1") for name, value in kept if name == b"x-request-id"]
    known = ids[0] if len(ids) == 1 and is_request_id(ids[0]) else str(uuid.uuid4())
    rest = [(name, value) for name, value in kept if name != b"x-request-id"]
    return [*rest, (b"x-request-id", known.encode())]


def _plain(name: bytes) -> str:
    return name.decode("latin-1").lower().replace("-", "_")


def _header(scope: Scope, wanted: bytes) -> Any:
    return next((value for name, value in scope["headers"] if name == wanted), None)

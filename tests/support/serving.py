"""A server's replicas in this process, and requests as an HTTP server would hand them over."""

import asyncio
import io
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from pipelines.serve.asked import Asked
from pipelines.serve.front import Front
from pipelines.serve.limits import Limits
from pipelines.serve.token import TokenSource
from pipelines.serve.upscaler import Upscaler
from pipelines.tracking.released import find_released

PICTURE = np.random.default_rng(1).integers(0, 256, (11, 19, 3), np.uint8)
LIMITS = Limits(max_pixels=2_000_000, timeout_s=60)


def upscaler(tracking_uri: str, model: str, limits: Limits = LIMITS, poll_s: float = 60) -> Upscaler:
    """The replica that holds a model."""
    found = find_released(model, tracking_uri)
    return Upscaler(Asked(model, tracking_uri, None), found, limits, poll_s)


def front(behind: Any, limits: Limits = LIMITS, token: TokenSource | None = None) -> Front:
    """The replica that answers, in front of an upscaler that it calls without Ray."""

    def remote(*arguments: Any) -> Coroutine:
        return behind.upscale(*arguments)

    handle = SimpleNamespace(upscale=SimpleNamespace(remote=remote))
    return Front(handle, "models:/toy/1", limits, token)


def request(
    body: bytes = b"", method: str = "POST", path: str = "/upscale", query: str = "", **headers: str
) -> Request:
    """A request whose body comes in two parts."""
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [{"type": "http.request", "body": part, "more_body": i == 0} for i, part in enumerate(parts)]

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    sent = {"host": "127.0.0.1:8000", **headers}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": raw,
        "query_string": query.encode(),
    }
    return Request(scope, receive)


def ask(server: Front, body: bytes = b"", **how: str) -> Response:
    """The answer to one request."""
    return asyncio.run(server(request(body, **how)))


def told(response: Response) -> str:
    """The one line of a refusal."""
    text = bytes(response.body).decode()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.strip()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

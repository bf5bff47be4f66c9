"""What a server accepts, and how it says no. Imports neither Ray nor torch, like all that the proxy runs."""

import re
from dataclasses import dataclass
from math import isqrt

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BYTES = 32 * 2**20
"""Largest file accepted."""
PADDING = 64
"""Sides of a picture are padded to a multiple of the network's, which is 64 for the published one."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """Limits on requests."""

    max_pixels: int
    """Largest picture accepted."""
    timeout_s: float
    """From the first byte of a picture to the response."""
    max_bytes: int = MAX_BYTES
    """Largest file accepted."""
    keeps_metadata: bool = True
    """Whether answers have the EXIF, XMP and resolution of the picture."""
    hosts: frozenset[str] = LOOPBACK
    """Names that requests may use for this server; empty allows all. This stops DNS rebinding, where another
    site's name resolves to this server."""

    @property
    def max_padded_pixels(self) -> int:
        """Largest padded picture accepted, with room for any that is up to 14 times as wide as high.

        A picture costs what the network computes. A line of 1 x 200 000 pixels is padded to 64 times as many.
        """
        return (isqrt(self.max_pixels) + 2 * PADDING) ** 2


class Refusal(Exception):
    """A response without a picture: an HTTP status and one line that says what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)  # both, so that it can be pickled
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        known = {401: {"WWW-Authenticate": 'Bearer realm="ctmsr"'}, 503: {"Retry-After": "10"}}
        return known.get(self.status, {})


def names_of(host: str) -> frozenset[str]:
    """The names of a server that listens on `host`; empty, that is any, if it listens on all addresses."""
    if host in LOOPBACK:
        return LOOPBACK
    return frozenset() if host in ("0.0.0.0", "::") else LOOPBACK | {host}


def padded_pixels(width: int, height: int) -> int:
    """What the network computes for a picture of this size."""
    return (width + -width % PADDING) * (height + -height % PADDING)


def is_request_id(text: str) -> bool:
    """Whether a client's request id may stand in a log line."""
    return _REQUEST_ID.fullmatch(text) is not None


def too_large(max_bytes: int) -> Refusal:
    """The refusal of a file of more bytes."""
    return Refusal(413, f"The file is too large: at most {max_bytes / 2**20:.0f} MB are accepted.")

"""A proxy in front of an S3 store that fails as networks and stores do; seeded, and counts its faults."""

import http.client
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

STALL_S = 2.0
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `upstream`, except for shares of requests: "slow_down" (503), "reset", "stall", "cut"."""

    daemon_threads = True

    def __init__(self, upstream: str, shares: Mapping[str, float], seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.counts: Counter[str] = Counter()
        """Requests by fault; "ok" means none, and "gone" that an end went away."""
        self.num_bytes = 0
        """Of bodies sent to the client."""
        self.next: list[str] = []
        """Faults of the next requests, before shares count again."""
        self._shares, self._draw, self._lock = dict(shares), random.Random(seed), threading.Lock()

    def change(self, shares: Mapping[str, float]) -> None:
        """Sets other shares, from the next request on."""
        with self._lock:
            self._shares = dict(shares)

    def handle_error(self, request: object, client_address: object) -> None:
        """Counts clients, or stores, that go away in the middle of a request; prints other errors."""
        if isinstance(sys.exception(), ConnectionError):
            self.counts["gone"] += 1
        else:
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def choose(self) -> str:
        """What to do to the next request."""
        with self._lock:
            if self.next:
                self.counts[self.next[0]] += 1
                return self.next.pop(0)
            draw, kind = self._draw.random(), "ok"
            for name, share in self._shares.items():
                if draw < share:
                    kind = name
                    break
                draw -= share
            self.counts[kind] += 1
            return kind


@contextmanager
def fault_proxy(upstream: str, shares: Mapping[str, float]) -> Iterator[FaultProxy]:
    """A running proxy."""
    proxy = FaultProxy(upstream, shares)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def log_message(self, *_: object) -> None:
        pass

    def _forward(self) -> None:
        num_bytes = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(num_bytes)
        if len(body) < num_bytes:
            raise ConnectionAbortedError("the client went away in the middle of its request")
        kind = self.server.choose()
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)  # close sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
            return
        if kind == "slow_down":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, SLOW_DOWN)
            return
        if kind == "stall":
            time.sleep(STALL_S)
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))  # Host too: it is signed
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        }
        is_cut = kind == "cut" and len(data) > 1
        if self.command == "HEAD":  # the size of what a GET would send
            data = b"\0" * int(answer.getheader("Content-Length") or 0)
        self._answer(answer.status, headers, data, data[: len(data) // 2] if is_cut else data)
        self.close_connection = is_cut

    def _answer(self, status: int, headers: Mapping[str, str], data: bytes, sent: bytes) -> None:
        """Sends headers for `data`, and `sent` as the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.num_bytes += len(sent)
            self.wfile.write(sent)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

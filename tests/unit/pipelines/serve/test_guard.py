"""What keeps slow, large and unfinished requests away, in a real HTTP server: the one that Ray Serve uses."""

import asyncio
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from pipelines.serve.guard import Guard, Transfers, Uploads
from pipelines.serve.limits import Refusal

pytestmark = pytest.mark.timed

MB = 2**20
HEAD = b"POST /upscale HTTP/1.1\r\nHost: 127.0.0.1\r\n"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Tells how many bytes came, or sends as many as the path says, and echoes its headers."""
    request = Request(scope, receive)
    path = request.url.path.strip("/")
    if path.isdigit():
        response = PlainTextResponse(bytes(int(path)))
    else:
        told = ",".join(sorted(request.headers))
        response = PlainTextResponse(f"{len(await request.body())} {told}")
        response.headers["x-request-id"] = request.headers["x-request-id"]
    await response(scope, receive, send)


@contextmanager
def serving(**settings: object) -> Iterator[int]:
    """A guarded server on a free port, which this yields."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        guard = Guard(application, **settings)  # type: ignore[arg-type]
        server = uvicorn.Server(uvicorn.Config(guard, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.force_exit = server.should_exit = True
            thread.join()


@contextmanager
def sent(port: int, *parts: bytes) -> Iterator[socket.socket]:
    """A connection on which these parts have been sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection, or has said all that it announced."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < length(data):
        piece = connection.recv(MB)
        if not piece:
            break
        data += piece
    return data


def length(data: bytes) -> int:
    named = [line for line in data.split(b"\r\n") if line.startswith(b"content-length: ")]
    return int(named[0].split()[1]) if named else 0


def status(connection: socket.socket) -> int:
    return int(answer(connection).split()[1])


def whole(body: bytes = b"abc", headers: bytes = b"") -> bytes:
    return HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_whole_request_passes_with_all_its_bytes() -> None:
    with serving() as port, sent(port, whole(bytes(3 * MB))) as connection:
        assert b"\r\n\r\n%d " % (3 * MB) in answer(connection)


def test_many_who_send_no_body_give_way_to_one_who_sends() -> None:
    with serving(uploads=Uploads(most=8)) as port, ExitStack() as stack:
        head = HEAD + b"Content-Length: 100\r\n\r\n"
        idle = [stack.enter_context(sent(port, head)) for _ in range(100)]
        started = time.monotonic()
        with sent(port, whole()) as connection:
            assert status(connection) == 200
        assert time.monotonic() - started < 1
        assert status(idle[0]) == 503


def test_large_bodies_in_progress_are_bounded_in_bytes() -> None:
    with serving(uploads=Uploads(most_bytes=4 * MB)) as port, ExitStack() as stack:
        head = HEAD + b"Content-Length: %d\r\n\r\n" % (2 * MB)
        large = [stack.enter_context(sent(port, head, bytes(2 * MB - 3))) for _ in range(3)]
        refused, _, _ = select.select(
            large, [], [], 10
        )  # any of them: the system orders what the server reads
        assert [status(connection) for connection in refused] == [503]
        with sent(port, whole()) as connection:
            assert status(connection) == 200
        for connection in set(large) - set(refused):
            connection.sendall(b"end")
            assert status(connection) == 200


def test_the_body_that_has_not_moved_for_the_longest_time_gives_way() -> None:
    async def read() -> list[bytes | BaseException]:
        uploads, bodies = Uploads(most_bytes=4), [asyncio.Queue[Message]() for _ in range(3)]
        scope = {"type": "http", "headers": []}
        tasks = [asyncio.create_task(uploads.read(scope, body.get)) for body in bodies]
        for number in (0, 1, 0, 2):
            bodies[number].put_nowait({"type": "http.request", "body": b"x", "more_body": True})
            await asyncio.sleep(0.01)
        for body in (
            bodies[2],
            bodies[1],
        ):  # the first displaces the second, which must not come back with more
            body.put_nowait({"type": "http.request", "body": b"x", "more_body": True})
        await asyncio.sleep(0.01)
        for body in bodies:
            body.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = asyncio.run(read())
    assert (first, third) == (b"xx", b"xx")
    assert isinstance(second, Refusal)
    assert second.status == 503


def test_a_byte_a_second_is_cut_off_at_the_deadline() -> None:
    head = HEAD + b"Content-Length: 100\r\n\r\n"
    with serving(uploads=Uploads(limit_s=0.5)) as port, sent(port, head) as connection:
        for _ in range(4):
            connection.sendall(b"x")
            time.sleep(0.1)
        assert status(connection) == 408


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_of_400_mb_is_refused_long_before_its_end(chunked: bool) -> None:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (400 * MB)
    piece = b"%x\r\n" % MB + bytes(MB) + b"\r\n" if chunked else bytes(MB)
    with serving(uploads=Uploads(4 * MB)) as port, sent(port, HEAD + framing + b"\r\n\r\n") as connection:
        assert num_taken(connection, piece) < 80


def num_taken(connection: socket.socket, piece: bytes) -> int:
    """How many of 400 pieces can be sent before the server closes the connection."""
    for number in range(400):
        try:
            connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            return number
    return 400


def test_who_sends_a_little_too_much_is_told_why() -> None:
    with serving(uploads=Uploads(MB)) as port, sent(port, whole(bytes(20 * MB))) as connection:
        told = answer(connection)
    assert told.startswith(b"HTTP/1.1 413 ")
    assert told.endswith(b"The file is too large: at most 1 MB are accepted.\n")


def test_who_waits_for_100_continue_is_refused_instead() -> None:
    with serving(uploads=Uploads(MB)) as port:
        head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (2 * MB)
        with sent(port, head) as connection:
            assert answer(connection).startswith(b"HTTP/1.1 413 ")


def test_who_does_not_read_the_answer_is_cut_off() -> None:
    get = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % (30 * MB)
    with serving(downloads=Transfers(8, 1000 * MB, 0.5)) as port, sent(port, get) as connection:
        time.sleep(1)
        assert len(answer(connection)) < 30 * MB


def test_unread_answers_are_bounded_in_bytes() -> None:
    get = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % (30 * MB)
    with serving(downloads=Transfers(8, 50 * MB, 60)) as port, ExitStack() as stack:
        first, second = (stack.enter_context(sent(port, get)) for _ in range(2))
        assert len(answer(second)) > 30 * MB
        assert len(answer(first)) < 30 * MB


def test_headers_that_steer_ray_are_dropped_and_a_request_id_is_kept() -> None:
    steering = b"X-Request-Timeout-Seconds: -1\r\nServe-Multiplexed-Model-Id: x\r\nx_session_id: 7\r\n"
    with serving() as port:
        with sent(port, whole(headers=steering + b"X-Request-Id: abc-1\r\n")) as connection:
            told = answer(connection)
        assert b"x-request-id: abc-1" in told
        assert b"\r\n\r\n3 content-length,host,x-request-id" in told
        with sent(port, whole(headers=b"X-Request-Id: a b\r\n")) as connection:
            assert b"a b" not in answer(connection)


def test_a_web_socket_is_refused() -> None:
    sent_messages = []

    async def send(message: dict) -> None:
        sent_messages.append(message)

    async def receive() -> dict:
        raise AssertionError("nothing should be read")

    asyncio.run(Guard(application)({"type": "websocket"}, receive, send))  # type: ignore[arg-type]
    assert sent_messages == [{"type": "websocket.close"}]

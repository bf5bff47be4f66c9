"""Clients that mean ill, all at once: `python -m tests.support.attackers PORT SECONDS`."""

import asyncio
import itertools
import struct
import sys
import zlib
from collections.abc import Awaitable, Callable

import numpy as np
from PIL import Image

from ctmsr.image import encode_png
from tests.support.serving import encoded

MB = 2**20
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def head(*headers: str) -> bytes:
    return "\r\n".join(["POST /upscale HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


def whole(body: bytes) -> bytes:
    return head(f"Content-Length: {len(body)}") + body


def texts() -> bytes:
    """A PNG with a thousand texts of a megabyte, which Pillow does not count."""
    packed = b"k\0\1\0\0\0" + zlib.compress(b"\xff" * 1_000_000, 9)
    chunk = (
        struct.pack(">I", len(packed)) + b"iTXt" + packed + struct.pack(">I", zlib.crc32(b"iTXt" + packed))
    )
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    return png[:33] + chunk * 1000 + png[33:]


LARGE = encode_png(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
BOMBS = [
    encoded(Image.new("L", (1, 200_000)), "PNG"),
    encoded(Image.new("L", (200_000, 1)), "PNG"),
    encoded(Image.new("1", (10_000, 10_000)), "PNG"),
    texts(),
    b"P2 1400 1400 255\n" + b"0 " * (1400 * 1400),
]
FULL = b"BM" + bytes(30 * MB)


async def no_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head("Content-Length: 1000"))
    await reader.read(MB)


async def slow_sender(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head("Content-Length: 1000"))
    while not reader.at_eof():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(1)


async def endless_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(head("Transfer-Encoding: chunked"))
    for _ in range(400):
        writer.write(b"%x\r\n" % MB + bytes(MB) + b"\r\n")
        await writer.drain()


async def slow_reader(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(LARGE))
    await reader.readexactly(1)
    await asyncio.sleep(20)


async def bombs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for body in itertools.cycle(BOMBS):
        writer.write(whole(body))
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n")


async def full(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(FULL))
    await writer.drain()
    await reader.read(MB)


ATTACKS: dict[Attack, int] = {
    no_body: 300,
    slow_sender: 50,
    endless_body: 3,
    slow_reader: 30,
    bombs: 3,
    full: 4,
}
"""How many connections of each kind there are at any time."""


async def again_and_again(attack: Attack, port: int, counts: dict[str, int]) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(1)
            continue
        counts[attack.__name__] = counts.get(attack.__name__, 0) + 1
        try:
            await attack(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the server closed the connection
        finally:
            writer.transport.abort()
        await asyncio.sleep(0.2)


async def all_at_once(port: int, seconds: float) -> dict[str, int]:
    counts: dict[str, int] = {}
    attacks = [
        asyncio.create_task(again_and_again(attack, port, counts))
        for attack, number in ATTACKS.items()
        for _ in range(number)
    ]
    await asyncio.sleep(seconds)
    for attack in attacks:
        attack.cancel()
    await asyncio.gather(*attacks, return_exceptions=True)
    return counts


if __name__ == "__main__":
    print("connections:", asyncio.run(all_at_once(int(sys.argv[1]), float(sys.argv[2]))))

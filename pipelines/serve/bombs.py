"""Finds pictures of few bytes that cost a decoder minutes, before a decoder sees them.

Pillow bounds what one text of a PNG unpacks to, but not how many there are, nor the scans of a JPEG, each of
which goes over all its pixels: 24 kB of empty scans take seconds. Comments it reads in Python, byte by byte.
"""

import re
import struct

from .limits import Refusal

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PACKED = (b"zTXt", b"iTXt", b"iCCP")
_SCAN = b"\xff\xda"  # in the data of a scan, another byte follows ff
_MAX_PACKED = 64
_MAX_PARTS = 20_000
_MAX_SCANS = 100
_GIF_EXTENSION = (
    b"\x00\x21"  # the end of a block and the start of the next; by chance, one in 65 kB of pixels
)
_PPM_COMMENTS = re.compile(rb"P[1-6](?:[\s\d]*#[^\r\n]*[\r\n]){101}")
_PPM_BLANKS = re.compile(rb"P[4-6][\s\d]{1000}")


def check_parts(data: bytes) -> None:
    """Counts the chunks of a PNG, the segments and scans of a JPEG, or the comments of a GIF or PPM.

    Raises:
        Refusal: There are more than any program writes.
    """
    if data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(b"GIF8"):
        _refuse_above(_MAX_PARTS, data.count(_GIF_EXTENSION), "blocks")
    elif _PPM_COMMENTS.match(data) or _PPM_BLANKS.match(data):
        raise _too_many(100, "comments or blanks")


def _check_png(data: bytes) -> None:
    num_parts = num_packed = 0
    place = len(_PNG)
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        num_parts += 1
        num_packed += kind in _PACKED
        _refuse_above(_MAX_PACKED, num_packed, "packed texts and profiles")
        _refuse_above(_MAX_PARTS, num_parts, "chunks")
        place += 12 + size


def _check_jpeg(data: bytes) -> None:
    _refuse_above(_MAX_SCANS, data.count(_SCAN), "scans")
    num_parts, place = 0, len(_JPEG)
    while place + 4 <= len(data) and data[place : place + 2] != _SCAN:
        if data[place] != 0xFF:
            return  # damaged, which the decoder will tell
        num_parts += 1
        _refuse_above(_MAX_PARTS, num_parts, "segments")
        # A segment begins with ff, any number of times.
        place += 1 if data[place + 1] == 0xFF else 2 + struct.unpack_from(">H", data, place + 2)[0]


def _refuse_above(most: int, number: int, what: str) -> None:
    if number > most:
        raise _too_many(most, what)


def _too_many(most: int, what: str) -> Refusal:
    return Refusal(413, f"The picture has more than {most} {what}. Save it again without metadata.")

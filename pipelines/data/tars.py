"""Tars of pictures, as WebDataset has them: what a tar contains, and its members by their bytes."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pyarrow import fs

from ctmsr.errors import PictureError

from ..infra.listing import is_image
from ..infra.storage import is_utf8, read_range

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a member's header, which comes right before its contents."""
_AHEAD = 8 * 2**20
"""Bytes of one request while a tar is read from beginning to end."""
_LONGEST_PLAIN = 100
"""Characters of a name that a header holds whole."""
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """A picture in a shard."""

    name: str
    """Identifies it in its shard."""
    offset: int
    length: int
    """Where it is: see `Wanted`."""
    data: bytes
    problem: str = ""
    """Why it cannot be used, after its path; empty if nothing is known against it."""
    reason: str = ""
    """The same in one word."""


class RangeReader(io.RawIOBase):
    """A file in storage of which every read is one request."""

    def __init__(self, file_system: fs.FileSystem, path: str, size: int) -> None:
        super().__init__()
        self._place, self._size, self._at = (file_system, path), size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = read_range(*self._place, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def pictures(file_system: fs.FileSystem, path: str, size: int) -> Iterator[Member | None]:
    """The pictures of a tar in their order; None for every other member, folders aside.

    Raises:
        PictureError: The tar is compressed, or damaged at this point; the members before are sound.
        DataError: It is gone or has changed.
        StoreError: The store denies access or does not respond.
    """
    file: BinaryIO = io.BufferedReader(RangeReader(file_system, path, size), _AHEAD)
    _refuse_compressed(file.read(6), path)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while info := tar.next():
                if not info.isdir():
                    yield _picture(info, file, size)
                tar.members.clear()  # type: ignore[attr-defined] # which would hold every header
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:  # it raises all of them at damage
        reason = "truncated" if "end of data" in str(error) or "truncated" in str(error) else "unreadable"
        raise PictureError(f"{path} is not a whole tar: {error}.", reason) from error
    file.seek(end)
    if file.read(_AHEAD).strip(b"\0"):  # tarfile takes whatever it cannot read for the end
        raise PictureError(f"{path} is damaged, or another tar is appended, at byte {end}.")


def _refuse_compressed(start: bytes, path: str) -> None:
    for mark, name in _COMPRESSIONS.items():
        if start.startswith(mark):
            raise PictureError(
                f"{path} is compressed with {name}, so that its pictures cannot be read one by one. Unpack "
                "it to a plain .tar: pictures are compressed already.",
                "compressed",
            )


def _picture(info: tarfile.TarInfo, file: BinaryIO, size: int) -> Member | None:
    if not info.isreg() or info.issparse() or not is_image(info.name):
        return None
    place = info.offset_data, info.size
    if not is_utf8(info.name):
        name = info.name.encode(errors="backslashreplace").decode()
        return Member(name, *place, b"", "has a name that is not UTF-8. Rename it.", "unreadable")
    file.seek(info.offset_data)
    data = file.read(min(info.size, max(0, size - info.offset_data)))
    if len(data) < info.size:
        return Member(info.name, *place, data, "is cut off: its tar ends early.", "truncated")
    return Member(info.name, *place, data)


def contents(span: bytes, at: int, size: int, name: str) -> bytes | None:
    """A member of a tar, or None if another one, or none, is there: the tar has changed.

    Args:
        span: Bytes of the tar.
        at: Where in `span` the contents begin; the header is before.
        size: Bytes of the contents.
        name: The member's.
    """
    try:
        header = tarfile.TarInfo.frombuf(span[at - BLOCK : at], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    is_plain = name.isascii() and len(name) <= _LONGEST_PLAIN  # others are in a header of their own
    if header.size != size or (is_plain and header.name != name):
        return None
    return span[at : at + size]

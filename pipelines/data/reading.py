"""Reads pictures from storage: objects, members of tars and rows of Parquet files, in few requests."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from ctmsr.errors import DataError, StoreError

from ..infra.storage import open_uri, read_bytes, read_range
from .parquet import SUFFIX, read_rows
from .tars import BLOCK, contents

_FETCH_THREADS = 8
_MAX_HOLE = 2**20
"""Most bytes between two members of a tar that come in one request."""
_MAX_REQUEST = 32 * 2**20
"""Most bytes of a request for several members."""

Files = list[tuple[str, bytes]]
"""Path and contents of a picture, and of its LR picture if there is one."""


@dataclass(frozen=True)
class Wanted:
    """A picture to read, and where it is. The fields are columns of an index's keys."""

    key: str
    """Path below the folder of the pictures."""
    lq_key: str | None = None
    """Path of the LR picture below theirs, for a pair."""
    shard: int = 0
    """Characters of the key that are the path of the shard; 0 for a file of its own."""
    offset: int = 0
    """Byte of the tar, or row group of the Parquet file, at which it is."""
    length: int = 0
    """Bytes in the tar, or number of the row within the row group."""

    @property
    def shard_key(self) -> str:
        return self.key[: self.shard]

    @property
    def end(self) -> int:
        return self.offset + self.length


Found = tuple[Wanted, Files | str]
"""A picture with its contents, or with a message that it cannot be read."""


@dataclass(frozen=True)
class Places:
    """The folders of a set of pictures, by URI."""

    folder: str
    lq_folder: str = ""


def wanted(columns: Mapping[str, np.ndarray], rows: Iterable[int]) -> list[Wanted]:
    """The pictures of some rows of a table of keys."""
    names = [name for name in Wanted.__dataclass_fields__ if name in columns]
    lists = {name: columns[name].tolist() for name in names}
    return [Wanted(**{name: lists[name][row] for name in names}) for row in rows]


def read_pictures(pictures: Sequence[Wanted], places: Places) -> Iterator[Found]:
    """Reads pictures, in an order that needs few requests.

    Raises:
        StoreError: The store fails, which is no fault of the pictures.
    """
    with ThreadPoolExecutor(_FETCH_THREADS) as pool:
        for found in pool.map(lambda request: request(places), _requests(pictures)):
            yield from found


Request = Callable[[Places], list[Found]]


def _requests(pictures: Sequence[Wanted]) -> list[Request]:
    requests: list[Request] = [partial(_read_object, picture) for picture in pictures if not picture.shard]
    shards: dict[str, list[Wanted]] = defaultdict(list)
    for picture in pictures:
        if picture.shard:
            shards[picture.shard_key].append(picture)
    for shard, some in shards.items():
        if shard.lower().endswith(SUFFIX):
            requests.append(partial(_read_rows, some))
        else:
            requests += [partial(_read_members, span) for span in spans(some)]
    return requests


def spans(pictures: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Members of a tar by request: neighbours come together, unless half of what is read would be in vain."""
    span: list[Wanted] = []
    num_bytes = 0
    for picture in sorted(pictures, key=lambda picture: picture.offset):
        num_bytes += picture.length + BLOCK
        length = picture.end - span[0].offset if span else 0
        if length > min(2 * num_bytes, _MAX_REQUEST) or (span and picture.offset - span[-1].end > _MAX_HOLE):
            yield span
            span, num_bytes = [], picture.length + BLOCK
        span.append(picture)
    yield span


def _read_object(picture: Wanted, places: Places) -> list[Found]:
    files = []
    for folder, name in ((places.folder, picture.key), (places.lq_folder, picture.lq_key)):
        if name is None:
            continue
        file_system, root = _open(folder)
        try:
            path = f"{root}/{name}"
            files.append((path, read_bytes(file_system, path)))
        except StoreError:
            raise  # which is no fault of the picture
        except DataError as error:
            return [(picture, str(error))]
    return [(picture, files)]


def _read_members(span: list[Wanted], places: Places) -> list[Found]:
    """Members of a tar; if they cannot be read together, each by itself."""
    file_system, root = _open(places.folder)
    first = span[0].offset - BLOCK
    try:
        data = read_range(file_system, f"{root}/{span[0].shard_key}", first, span[-1].end - first)
    except StoreError:
        raise
    except DataError as error:
        if len(span) == 1:
            return [(span[0], str(error))]
        return [found for picture in span for found in _read_members([picture], places)]
    return [(picture, _member(data, first, picture, f"{root}/{picture.key}")) for picture in span]


def _member(data: bytes, first: int, picture: Wanted, path: str) -> Files | str:
    name = picture.key[picture.shard + 1 :]
    file = contents(data, picture.offset - first, picture.length, name)
    if file is None:
        return f"{path} is not where it was: its tar has changed. Index the pictures again."
    return [(path, file)]


def _read_rows(pictures: list[Wanted], places: Places) -> list[Found]:
    """Rows of a Parquet file, every row group once."""
    file_system, root = _open(places.folder)
    path = f"{root}/{pictures[0].shard_key}"
    try:
        files = read_rows(file_system, path, {(picture.offset, picture.length) for picture in pictures})
    except StoreError:
        raise
    except DataError as error:
        return [(picture, str(error)) for picture in pictures]
    gone = f"is not where it was: {path} has changed. Index the pictures again."
    found: list[Found] = []
    for picture in pictures:
        name, data = f"{root}/{picture.key}", files.get((picture.offset, picture.length))
        found.append((picture, f"{name} {gone}" if data is None else [(name, data)]))
    return found


_open = lru_cache(maxsize=4)(open_uri)

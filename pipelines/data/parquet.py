"""Parquet files of pictures, as Hugging Face has them: a column of bytes, or of {bytes, path}.

A row's bytes cannot be found without its row group, so that to read a row is to read its column in the group.
"""

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ctmsr.errors import DataError, PictureError

from ..infra.storage import storage_errors
from .tars import Member, RangeReader

SUFFIX = ".parquet"
_AHEAD = 32 * 2**20
"""Most bytes of a request."""
_BATCH_ROWS = 16
"""Rows in memory at a time."""
_IMAGE = "image"


def pictures(file_system: fs.FileSystem, path: str, size: int) -> Iterator[Member | None]:
    """The pictures of a Parquet file by row; one None for a file that has no column of bytes.

    Raises:
        PictureError: The file is damaged, or has several columns of bytes.
        DataError: It is gone or has changed.
        StoreError: The store denies access or does not respond.
    """
    file, column = _open(file_system, path, size)
    if column is None:
        yield None
        return
    number = 0
    for group in range(file.num_row_groups):
        for row, data in enumerate(_values(file, path, group, column)):
            name = f"{number:08}"
            number += 1
            if data is None:
                problem = "has no bytes. Embed the files when you write the data set."
                yield Member(name, group, row, b"", problem, "unreadable")
            else:
                yield Member(name, group, row, data)


def read_rows(
    file_system: fs.FileSystem, path: str, places: Collection[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Some pictures of a Parquet file.

    Args:
        file_system: Where it is.
        path: The file.
        places: Row group of each picture, and its row in the group.

    Returns:
        The pictures that are there.

    Raises:
        DataError: The file is gone or has changed.
        StoreError: The store denies access or does not respond.
    """
    with storage_errors(path):
        info = file_system.get_file_info(path)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(path)
    file, column = _open(file_system, path, info.size)
    found = {}
    for group in sorted({group for group, _ in places}):
        rows = {row for number, row in places if number == group}
        if column is None or group >= file.num_row_groups:
            continue
        for row, data in enumerate(_values(file, path, group, column)):
            if row in rows and data is not None:
                found[group, row] = data
            if row == max(rows):
                break
    return found


def _open(file_system: fs.FileSystem, path: str, size: int) -> tuple[pq.ParquetFile, str | None]:
    """The file, and the path of its column of bytes."""
    try:
        file = pq.ParquetFile(RangeReader(file_system, path, size), buffer_size=_AHEAD)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    columns = {name: leaf for field in file.schema_arrow for name, leaf in _leaves(field)}
    if len(columns) > 1 and _IMAGE not in columns:
        raise PictureError(
            f"{path} has several columns of bytes: {', '.join(columns)}. Name the pictures' {_IMAGE!r}."
        )
    return file, columns.get(_IMAGE, next(iter(columns.values()), None))


def _leaves(field: pa.Field) -> Iterator[tuple[str, str]]:
    """Name of the field and path of its bytes, if it has any."""
    kind = field.type
    if _is_binary(kind):
        yield field.name, field.name
    elif pa.types.is_struct(kind) and any(one.name == "bytes" and _is_binary(one.type) for one in kind):
        yield field.name, f"{field.name}.bytes"


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _values(file: pq.ParquetFile, path: str, group: int, column: str) -> Iterator[bytes | None]:
    """The bytes of every row of a group."""
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
            values = batch.column(0)
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            for value in values:
                yield value.as_py()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DataError:
    text = " ".join(str(error).split())[:200]
    return PictureError(f"{path} is not a whole Parquet file: {text}.", "unreadable")

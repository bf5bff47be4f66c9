"""The files of a folder or bucket in order of key, and which of them are pictures.

A file that cannot be used, or a folder that cannot be read, is listed too, with the reason: what to do about
it is for the command to decide.
"""

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from botocore.exceptions import ClientError
from pyarrow import fs

from ctmsr.errors import DataError

from .invocation import printable
from .s3 import ATTEMPTS_TO_PROBE, list_objects, s3_client
from .storage import is_no_such_key, is_utf8, open_uri, storage_errors

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".avif", ".heic", ".heif"),
)
"""In lower case; names may have upper case. HEIC is listed even where it cannot be read, to be reported."""

SHARD_SUFFIXES = (".tar", ".parquet")
"""Files that hold pictures; in lower case."""
COMPRESSED_SUFFIXES = (".tgz", *(f".tar.{name}" for name in ("gz", "bz2", "xz", "zst")))
"""Files that would be shards, could their members be read by themselves."""


@dataclass(frozen=True)
class Listed:
    """A file as listed by its store."""

    key: str
    """Path below the folder; identifies the file in any store. In S3 it may be anything, even `/..//a`."""
    size: int = 0
    """Bytes."""
    etag: str = ""
    """Changes with the content: the store's ETag, or modification time and size."""
    problem: str = ""
    """Why it cannot be read. A file with a problem would be a picture by its name, or is a folder."""

    @property
    def is_image(self) -> bool:
        """Whether it is to be read as a picture, by its name alone."""
        return bool(self.problem) or is_image(self.key)

    @property
    def is_shard(self) -> bool:
        """Whether it is to be read as a file of pictures, by its name alone."""
        return self.key.lower().endswith(SHARD_SUFFIXES + COMPRESSED_SUFFIXES)


@dataclass(frozen=True)
class Images:
    """The pictures at a URI."""

    folder: str
    """URI or absolute path of the folder that contains them."""
    files: list[Listed]
    """At least one, in order of key."""
    num_others: int = 0
    """Files left out as their names do not end like a picture's."""


def list_images(uri: str) -> Images:
    """Every picture below a folder, or the single picture at the URI.

    A file that is named itself counts as a picture, whatever its suffix.

    Raises:
        DataError: There are no pictures, the folder or bucket does not exist, access is denied, or the store
            does not respond within about 15 seconds.
    """
    folder, single = _at(uri)
    if single:
        return Images(folder, [single])
    found = list(list_files(folder))
    files = [file for file in found if file.is_image]
    if not files:
        raise _no_image(uri, len(found), sum(file.is_shard for file in found))
    return Images(folder, files, len(found) - len(files))


def iter_images(uri: str, *, shards: bool = False) -> Iterator[Listed]:
    """The pictures below a folder, in order of key; a bucket of any size takes little memory.

    Args:
        uri: The folder.
        shards: Whether files of pictures count as well.

    Raises:
        DataError: `list_images` would raise, or the URI is that of a single picture.
    """
    folder, single = _at(uri)
    if single:
        raise DataError(f"{uri} is a single picture. Name a folder of pictures.")
    num_files, found = 0, False
    for num_files, file in enumerate(list_files(folder), 1):  # noqa: B007 # used after the loop
        if file.is_image or (shards and file.is_shard):
            found = True
            yield file
    if not found:
        raise _no_image(uri, num_files)


def list_files(uri: str) -> Iterator[Listed]:
    """Every file below a folder, in order of key; a bucket is listed one page at a time.

    Links to folders are followed, except to a folder above the link, whose files are listed already.

    Raises:
        DataError: The folder or bucket does not exist, or the store denies access or does not respond.
    """
    file_system, root = open_uri(uri)
    with storage_errors(uri):
        if isinstance(file_system, fs.S3FileSystem):
            yield from _in_s3(root)
        elif isinstance(file_system, fs.LocalFileSystem):
            yield from sorted(_in_folder(root), key=lambda file: file.key)
        else:
            infos = file_system.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=True))
            for info in sorted(infos, key=lambda info: info.path):
                if info.type == fs.FileType.File:
                    key = info.path.removeprefix(root).removeprefix("/")
                    yield Listed(key, info.size, _etag(info.mtime_ns, info.size))


def absolute(uri: str) -> str:
    """A URI without its trailing slash, or a local path made absolute; an empty string stays empty."""
    return uri.rstrip("/") if "://" in uri or not uri else open_uri(uri)[1]


def stem(key: str) -> str:
    """The key without its suffix, which the two pictures of a pair share."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + ((name.rpartition(".")[0] if is_image(name) else "") or name)


def is_image(key: str) -> bool:
    """Whether a name ends like a picture's."""
    return key.lower().endswith(IMAGE_SUFFIXES)


def _no_image(uri: str, num_others: int, num_shards: int = 0) -> DataError:
    """What to say of a folder without pictures."""
    shards = f"{num_shards} are shards, which `python -m pipelines.index {uri}` reads. " if num_shards else ""
    return DataError(
        f"no image under {uri} ({num_others} other files). {shards}Supported suffixes: "
        f"{', '.join(IMAGE_SUFFIXES)}. Check the path, or upload pictures there."
    )


def _at(uri: str) -> tuple[str, Listed | None]:
    """The folder at a URI; if it is that of a single file, its folder and the file."""
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    place = absolute(uri)
    with storage_errors(uri):
        if isinstance(file_system, fs.S3FileSystem):
            single = _s3_object(root, is_folder=uri.endswith("/"))
        else:
            info = file_system.get_file_info(root)
            if info.type == fs.FileType.Directory:
                return place, None
            if info.type == fs.FileType.NotFound and isinstance(file_system, fs.LocalFileSystem):
                raise FileNotFoundError(root)
            if info.type == fs.FileType.Unknown:
                raise DataError(f"{uri} is neither a file nor a folder. Name a picture or a folder.")
            single = Listed("", info.size, _etag(info.mtime_ns, info.size)) if info.is_file else None
    if single is None:
        return place, None
    folder = place.rpartition("/")[0].rstrip("/")  # in S3, further slashes belong to the key
    return folder or "/", Listed(place[len(folder) + 1 :], single.size, single.etag)


def _s3_object(path: str, *, is_folder: bool) -> Listed | None:
    """The object at a path, without its key; None for a folder.

    Args:
        path: Bucket and key.
        is_folder: Whether it has to be a folder.

    Raises:
        ClientError: Its bucket does not exist, or access is denied.
        BotoCoreError: The store does not respond.
    """
    bucket, _, key = path.partition("/")
    client = s3_client(attempts=ATTEMPTS_TO_PROBE)

    def head() -> Listed | None:
        try:
            said = client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if is_no_such_key(error) or error.response["Error"]["Code"] == "403":  # listing will tell why
                return None
            raise
        return Listed("", said["ContentLength"], said["ETag"].strip('"'))

    def has_files() -> bool:
        prefix = f"{key}/" if key else ""
        return "Contents" in client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)

    if is_folder or not is_image(key):
        return None if has_files() or is_folder or not key else head()
    if not (found := head()):
        has_files()  # raises if it cannot be listed
        return None
    with suppress(ClientError):  # the right to read may come without the right to list
        if has_files():
            logger.warning(
                "s3://%s is a picture and a folder; this takes the picture. For the folder, add a slash.",
                path,
            )
    return found


def _in_s3(root: str) -> Iterator[Listed]:
    # boto3, as pyarrow has no ETags, lists everything at once and changes some keys.
    bucket, _, folder = root.partition("/")
    prefix = f"{folder}/" if folder else ""
    for key, size, etag in list_objects(bucket, prefix):
        if not key.endswith("/"):  # which stands for a folder
            yield Listed(key.removeprefix(prefix), size, etag)


def _in_folder(root: str) -> Iterator[Listed]:
    """The files below a local folder, in no order."""
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [(root, ())]
    while todo:
        folder, above = todo.pop()
        try:
            status = os.stat(folder)
            inode = status.st_dev, status.st_ino
            if inode in above:
                logger.warning("left out %s: a link to a folder above it.", printable(folder))
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = entry.path.removeprefix(root).removeprefix("/")
                    if _is_folder(entry):
                        todo.append((entry.path, (*above, inode)))
                    else:
                        yield _local_file(entry, key)
        except OSError as error:
            if folder == root:
                raise
            key = _as_utf8(folder.removeprefix(root).removeprefix("/"))
            said = f"{_as_utf8(folder)} is a folder that cannot be listed: {error.strerror}."
            yield Listed(key, problem=f"{said} Allow reading it, or move it elsewhere.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _local_file(entry: os.DirEntry[str], key: str) -> Listed:
    name, problem, size, etag = _as_utf8(entry.path), "", 0, ""
    try:
        status = entry.stat()
        size, etag = status.st_size, _etag(status.st_mtime_ns, status.st_size)
        if not stat.S_ISREG(status.st_mode):
            problem = f"{name} is not a regular file. Remove it."
    except OSError as error:
        problem = (
            f"{name} is a link to a file that cannot be read: {error.strerror}. Mend or remove the link."
        )
    if not is_utf8(key):
        problem = f"{name} has a name that is not UTF-8. Rename it."
    return Listed(_as_utf8(key), size, etag, problem if is_image(key) else "")


def _as_utf8(name: str) -> str:
    r"""A name with bytes that are not UTF-8 written as `\udcXX`."""
    return name.encode(errors="backslashreplace").decode()


def _etag(mtime_ns: int, size: int) -> str:
    return f"{mtime_ns:x}-{size:x}"

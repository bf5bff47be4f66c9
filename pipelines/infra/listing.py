"""The files of a folder or bucket in order of key, and which of them are pictures."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from ctmsr.errors import DataError

from .storage import ATTEMPTS_TO_PROBE, file_infos, open_uri, storage_errors

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".avif", ".heic", ".heif"),
)
"""In lower case; names may have upper case. HEIC is listed even where it cannot be read, to be reported."""


@dataclass(frozen=True)
class ImageRef:
    """One picture in storage."""

    key: str
    """Path below the listed URI; identifies the picture in any store."""
    path: str
    """Path within its file system, for `read_bytes`."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Listed:
    """A file as listed by its store."""

    key: str
    """Path below the folder."""
    size: int
    etag: str
    """Changes with the content: the store's ETag, or modification time and size."""


def list_images(uri: str) -> tuple[ImageRef, ...]:
    """Every picture below a folder, or the single picture at the URI, sorted by key.

    Raises:
        DataError: There are no pictures, the folder or bucket does not exist, access is denied, or the store
            does not respond within about 15 seconds.
    """
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    with storage_errors(uri):
        infos = file_infos(file_system, root)
        if not infos:
            place = file_system.get_file_info(root)
            if place.type == fs.FileType.NotFound and isinstance(file_system, fs.LocalFileSystem):
                raise FileNotFoundError(root)
            infos = [place] if place.type == fs.FileType.File else []
    refs = tuple(
        ImageRef(info.path.removeprefix(root).lstrip("/") or info.base_name, info.path, info.size)
        for info in sorted(infos, key=lambda info: info.path)
        if info.path.lower().endswith(IMAGE_SUFFIXES)
    )
    if not refs:
        raise DataError(
            f"no image under {uri} ({len(infos)} other files). Supported suffixes: "
            f"{', '.join(IMAGE_SUFFIXES)}. Check the path, or upload pictures there."
        )
    return refs


def list_files(uri: str) -> Iterator[Listed]:
    """Every file below a folder, in order of key; a bucket is listed one page at a time.

    Raises:
        DataError: The store denies access or does not respond.
    """
    file_system, root = open_uri(uri)
    if not uri.startswith("s3://"):
        infos = file_system.get_file_info(fs.FileSelector(root, recursive=True))
        for info in sorted(infos, key=lambda info: info.path.encode()):
            if info.type == fs.FileType.File:
                key = info.path.removeprefix(root).lstrip("/")
                yield Listed(key, info.size, _etag(info))
        return
    bucket, _, folder = root.partition("/")  # boto3, as pyarrow has no ETags and lists everything at once
    prefix = f"{folder}/" if folder else ""
    try:
        for page in (
            boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        ):
            for entry in page.get("Contents", ()):
                yield Listed(entry["Key"].removeprefix(prefix), entry["Size"], entry["ETag"].strip('"'))
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"cannot list {uri}. The client reports: {error}") from error


def iter_images(uri: str) -> Iterator[Listed]:
    """The pictures among `list_files`.

    Raises:
        DataError: There are no pictures, or `list_images` raises.
    """
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    found = list_files(uri) if _is_folder(file_system, root) else iter(())
    images = (file for file in found if file.key.lower().endswith(IMAGE_SUFFIXES))
    some = list(islice(images, 1))
    if not some:
        list_images(uri)  # raises with the reason
        raise DataError(f"{uri} is a single picture. Name a folder of pictures.")
    yield from some
    yield from images


def pictures_at(uri: str) -> tuple[str, list[Listed]]:
    """The folder at a URI and the pictures below it; for a single picture, its folder and itself.

    Raises:
        DataError: There are no pictures, or `list_images` raises.
    """
    place = absolute(uri)
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    with suppress(OSError):
        info = file_system.get_file_info(root)
        if info.type == fs.FileType.File:
            place = place.rpartition("/")[0] or "/"
            listed = [Listed(info.base_name, info.size, _etag(info))]
        else:
            listed = list(list_files(place))
        files = [file for file in listed if file.key.lower().endswith(IMAGE_SUFFIXES)]
        if files:
            return place, files
    list_images(uri)  # raises with the reason
    raise DataError(f"{uri} changed while it was being listed. Run the same command again.")


def absolute(uri: str) -> str:
    """A URI without its trailing slash, or a local path made absolute; an empty string stays empty."""
    return uri.rstrip("/") if "://" in uri or not uri else open_uri(uri)[1]


def _etag(info: fs.FileInfo) -> str:
    return f"{info.mtime_ns:x}-{info.size:x}"


def _is_folder(file_system: fs.FileSystem, root: str) -> bool:
    try:
        return file_system.get_file_info(root).type == fs.FileType.Directory
    except OSError:
        return False  # `list_images` runs into it again and explains it

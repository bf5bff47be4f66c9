"""Files and folders by URI: s3://, gs://, file:// and local paths, with errors a user can act on.

Credentials and endpoints come from the standard environment variables: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
from botocore.exceptions import BotoCoreError, ClientError
from obstore.exceptions import BaseError
from pyarrow import fs

from ctmsr.config import check
from ctmsr.errors import DataError, StoreError

from . import s3

_PLACEHOLDER = "BUCKET"
"""Stands for a bucket in cluster/kubernetes."""

# Fragments of the clients' error messages and what they mean, in order of precedence.
_CAUSES = (
    (
        ("AWS Error NO_SUCH_BUCKET", "(NoSuchBucket)", "bucket does not exist"),
        "its bucket does not exist. Check the name and AWS_ENDPOINT_URL, or create the bucket",
    ),
    (
        (
            "AWS Error ACCESS_DENIED",
            "AWS Error INVALID_ACCESS_KEY_ID",
            "AWS Error SIGNATURE_DOES_NOT_MATCH",
            "(AccessDenied)",
            "(InvalidAccessKeyId)",
            "(SignatureDoesNotMatch)",
            "(403)",
            "ExpiredToken",
            "401 Unauthorized",  # obstore
            "403 Forbidden",
            "HTTP status 401",
            "HTTP status 403",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "OAuth2",
            "Permission denied",
        ),
        "access is denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (gs://: "
        "GOOGLE_APPLICATION_CREDENTIALS; local: the file permissions), and what they grant access to",
    ),
    (
        (
            "AWS Error NETWORK_CONNECTION",
            "AWS Error REQUEST_TIMEOUT",
            "endpoint URL",  # and so on: boto3 has a sentence for each way to fail
            "HTTP error: ",  # obstore, if there is no status
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
        ),
        "the store cannot be reached. Check AWS_ENDPOINT_URL and the network",
    ),
    (
        ("AWS Error RESOURCE_NOT_FOUND",),
        "it does not exist, or the endpoint is not an S3 store. Check the URI and AWS_ENDPOINT_URL",
    ),
)


def open_uri(uri: str, *, attempts: int = s3.ATTEMPTS_TO_TRANSFER) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the URI's path within it. Contacts no server.

    Args:
        uri: s3://bucket/path, gs://bucket/path, file:///path, or a local path, which may be relative or begin
            with `~`. Only file:/// has escapes: in the others, `%`, `#`, `?` and `+` are characters.
        attempts: How often a request to S3 is tried before it fails.

    Raises:
        DataError: The URI or AWS_ENDPOINT_URL is malformed, or the name is not UTF-8.
    """
    if "\0" in uri or not is_utf8(uri):
        raise DataError(f"the name {uri!r} contains bytes that are not UTF-8, or a zero byte. Rename it.")
    scheme, separator, path = uri.partition("://")
    if not separator and uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme == "file" and path.startswith("/"):
        return fs.LocalFileSystem(), os.path.abspath(unquote(path))
    path = path.strip("/")
    if path.partition("/")[0] == _PLACEHOLDER:
        raise DataError(
            f"{uri} names no bucket: {_PLACEHOLDER} stands for yours in the manifests of cluster/kubernetes. "
            f"Put its name there: sed 's/{_PLACEHOLDER}/my-bucket/g'."
        )
    if scheme == "s3" and path:
        return s3.file_system(attempts), path
    if scheme == "gs" and path:
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=10)), path
    raise DataError(
        f"{uri!r} is not a supported location: use s3://bucket/path, gs://bucket/path or a local path."
    )


def check_outlives_job(name: str, uri: str) -> None:
    """Rejects a relative path in a Ray job: it runs in a copy of its working directory that is deleted later.

    Args:
        name: The setting, for the message.
        uri: Where it would write.

    Raises:
        ConfigError: The path is relative and this is a job.
    """
    if "working_dir_files" not in Path.cwd().parts:  # where Ray puts these copies
        return
    path = uri.removeprefix("sqlite:///")
    check(
        "://" in path or os.path.isabs(os.path.expanduser(path)),
        f"{name}={uri} is a relative path, and this job runs in a copy of its working directory, which will "
        "be deleted. Use s3://bucket/folder, an MLflow server, or an absolute path shared by all nodes.",
    )


def read_bytes(file_system: fs.FileSystem, path: str) -> bytes:
    """The contents of a file; one request in S3.

    Raises:
        DataError: It does not exist, or its permissions forbid reading it.
        StoreError: The store denies access or does not respond.
    """
    with _reading_errors(path):
        if isinstance(file_system, fs.S3FileSystem):
            return s3.read_object(path)
        with file_system.open_input_file(path) as file:
            return file.read()


def read_range(file_system: fs.FileSystem, path: str, start: int, length: int) -> bytes:
    """`length` bytes of a file, from byte `start`; one request in S3.

    Raises:
        DataError: The file ends before, or `read_bytes` would raise.
        StoreError: The store denies access or does not respond.
    """
    if not length:
        return b""
    with _reading_errors(path):
        if isinstance(file_system, fs.S3FileSystem):
            data = s3.read_object(path, start, length)
        else:
            with file_system.open_input_file(path) as file:
                data = file.read_at(length, start)
    if len(data) < length:
        raise _ends_early(path, start + length)
    return data


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Writes a file atomically, creating folders as needed: readers see the old content or the new.

    Raises:
        DataError: The location is not writable or cannot be reached.
    """
    file_system, path = open_uri(uri)
    with storage_errors(uri):
        if not isinstance(file_system, fs.LocalFileSystem):
            with file_system.open_output_stream(path) as file:
                file.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{secrets.token_hex(8)}.part")  # short, as the name may be of full length
        try:
            beside.write_bytes(data)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def download_folder(uri: str, dest: Path) -> None:
    """Copies a folder and its contents to the local folder `dest`, which is created.

    Raises:
        DataError: The folder does not exist, is a file or cannot be read.
    """
    file_system, root = open_uri(uri)
    dest.mkdir(parents=True, exist_ok=True)
    with storage_errors(uri):
        if file_system.get_file_info(root).type == fs.FileType.File:
            raise DataError(f"{uri} is a file, not a folder. Name the folder that contains it.")
        fs.copy_files(root, str(dest), file_system, fs.LocalFileSystem())


def upload_folder(folder: Path, uri: str, *, last: str) -> None:
    """Copies the files of a local folder to the new folder `uri`, the file named `last` after all others.

    Raises:
        StoreError: The store denies access or does not respond.
    """
    file_system, root = open_uri(uri)
    with storage_errors(uri):
        file_system.create_dir(root)
        for path in sorted(folder.iterdir()):
            if path.name != last:
                fs.copy_files(str(path), f"{root}/{path.name}", fs.LocalFileSystem(), file_system)
    # Atomic, which a copy to a local folder is not.
    write_bytes(f"{uri}/{last}", (folder / last).read_bytes())


def delete_folder(uri: str, *, first: str | None = None) -> None:
    """Deletes a folder and its contents, the file named `first` before the others; it may be gone already.

    Raises:
        StoreError: The store denies access or does not respond.
    """
    file_system, root = open_uri(uri)
    with storage_errors(uri):
        try:
            if first:
                file_system.delete_file(f"{root}/{first}")
        except FileNotFoundError:
            pass  # the folder was never complete
        try:
            file_system.delete_dir(root)
        except FileNotFoundError:
            return


def list_sizes(uri: str) -> dict[PurePosixPath, int]:
    """Sizes in bytes of the files below a folder, by relative path; empty if there is no such folder.

    Raises:
        StoreError: The store denies access or does not respond.
    """
    file_system, root = open_uri(uri, attempts=s3.ATTEMPTS_TO_PROBE)
    with storage_errors(uri):
        files = file_infos(file_system, root)
    return {PurePosixPath(info.path).relative_to(root): info.size for info in files}


def is_utf8(name: str) -> bool:
    """Whether a name came as UTF-8; Python marks other bytes with characters that cannot be encoded again."""
    return name.isascii() or name == name.encode(errors="ignore").decode()


def file_infos(file_system: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """Files below `root`, at any depth; empty if there is no such folder."""
    try:
        infos = file_system.get_file_info(fs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [info for info in infos if info.type == fs.FileType.File]


def is_no_such_key(error: Exception) -> bool:
    """Whether S3 has answered boto3 that there is no such object."""
    return isinstance(error, ClientError) and error.response["Error"]["Code"] in ("404", "NoSuchKey")


def _ends_early(path: str, end: int) -> DataError:
    return DataError(f"{path} ends before byte {end}: it has changed. Index the pictures again.")


@contextmanager
def _reading_errors(path: str) -> Iterator[None]:
    """`storage_errors`, and what may be wrong with one local file; stores have no PermissionError."""
    with storage_errors(path):
        try:
            yield
        except PermissionError as error:
            raise DataError(f"{path} cannot be read: permission denied. Change its permissions.") from error


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turns the errors of file systems into a DataError or StoreError that says what to do about `place`."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, BotoCoreError, ClientError, BaseError) as error:
        if isinstance(error, FileNotFoundError) or is_no_such_key(error):
            raise DataError(f"{place} does not exist. Check the path.") from error
        text = " ".join(str(error).split())
        cause = next((cause for marks, cause in _CAUSES if any(mark in text for mark in marks)), "it failed")
        text = text.partition(" Debug source: ")[0]  # obstore repeats itself at length
        raise StoreError(f"cannot use {place}: {cause}. The client reports: {text[:300]}") from error

"""Files and folders by URI: s3://, gs://, file:// and local paths, with errors a user can act on.

Credentials and endpoints come from the standard environment variables: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS.
"""

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from ctmsr.config import check
from ctmsr.errors import DataError, StoreError

STORAGE_ENV = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
"""For every process that writes to S3: stores other than AWS reject the SDK's newer checksums with HTTP 411.

`open_uri` sets it in its own process. A process that unpickles a file system, such as a Ray Train worker, has
to start with it: `ray.init(runtime_env={"env_vars": STORAGE_ENV})`.
"""

# An attempt that gets no response takes the sum of the two, so three attempts stay below 15 s.
_CONNECT_TIMEOUT_S = 3
_SILENCE_TIMEOUT_S = 4
ATTEMPTS_TO_PROBE = 3
ATTEMPTS_TO_TRANSFER = 6
_making_client = threading.Lock()
"""boto3 can make only one client at a time."""

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


def open_uri(uri: str, *, attempts: int = ATTEMPTS_TO_TRANSFER) -> tuple[fs.FileSystem, str]:
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
        return _s3(attempts), path
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
    """The contents of a file.

    Raises:
        DataError: It does not exist, or its permissions forbid reading it.
        StoreError: The store denies access or does not respond.
    """
    with storage_errors(path):
        # pyarrow refuses these or resolves them; in S3 they are parts of a name like any other.
        if isinstance(file_system, fs.S3FileSystem) and {"", ".", ".."} & set(path.split("/")):
            bucket, _, key = path.partition("/")
            return _reader().get_object(Bucket=bucket, Key=key)["Body"].read()
        try:
            with file_system.open_input_file(path) as file:
                return file.read()
        except PermissionError as error:  # of one local file; a store that denies access has no such error
            raise DataError(f"{path} cannot be read: permission denied. Change its permissions.") from error


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
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            fs.copy_files(str(path), f"{root}/{path.name}", fs.LocalFileSystem(), file_system)


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
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    with storage_errors(uri):
        files = file_infos(file_system, root)
    return {PurePosixPath(info.path).relative_to(root): info.size for info in files}


def is_utf8(name: str) -> bool:
    """Whether a name came as UTF-8; Python marks other bytes with characters that cannot be encoded again."""
    return name.isascii() or name == name.encode(errors="ignore").decode()


def s3_client(*, attempts: int = ATTEMPTS_TO_TRANSFER) -> Any:
    """A boto3 client, for what pyarrow's file system does not offer; call it inside `storage_errors`."""
    import boto3  # takes a second, which --help should not wait for
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_SILENCE_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    with _making_client:
        session = boto3.Session(region_name=os.environ.get("AWS_REGION"))
        if session.get_credentials() is None:  # a public bucket
            config = config.merge(Config(signature_version=UNSIGNED))
        return session.client("s3", config=config)


_reader = lru_cache(maxsize=1)(s3_client)


def _s3(attempts: int) -> fs.S3FileSystem:
    for name, value in STORAGE_ENV.items():
        os.environ.setdefault(name, value)
    # S3FileSystem does not read AWS_ENDPOINT_URL.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "https://"
    scheme, separator, host = endpoint.partition("://")
    if scheme not in ("http", "https") or not separator:
        raise DataError(f"AWS_ENDPOINT_URL must be like http://host:9000 or https://host, got {endpoint!r}.")
    return fs.S3FileSystem(
        scheme=scheme,
        endpoint_override=host.rstrip("/") or None,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_SILENCE_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


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


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turns the errors of file systems into a DataError or StoreError that says what to do about `place`."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, BotoCoreError, ClientError) as error:
        if isinstance(error, FileNotFoundError) or is_no_such_key(error):
            raise DataError(f"{place} does not exist. Check the path.") from error
        text = " ".join(str(error).split())
        cause = next((cause for marks, cause in _CAUSES if any(mark in text for mark in marks)), "it failed")
        raise StoreError(f"cannot use {place}: {cause}. The client reports: {text[:300]}") from error

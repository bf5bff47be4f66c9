"""Files and folders by URI: s3://, gs://, file:// and local paths, with errors a user can act on.

Credentials and endpoints come from the standard variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from ctmsr.config import check
from ctmsr.errors import DataError, StoreError

STORAGE_ENV = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
"""What every process that writes to S3 needs: the SDK's newer checksums make other stores answer HTTP 411.

`open_uri` sets it where it is called. A process that unpickles a file system instead, such as a Ray Train
worker, must find it in its environment: `ray.init(runtime_env={"env_vars": STORAGE_ENV})`.
"""

# Seconds. An attempt that gets no byte at all takes the sum, so three attempts stay below 15 s.
_CONNECT_TIMEOUT_S = 3
_SILENCE_TIMEOUT_S = 4
ATTEMPTS_TO_PROBE = 3
_ATTEMPTS_TO_TRANSFER = 6

# What the clients write into an error, and what it means. Searched in this order.
_CAUSES = (
    (
        ("AWS Error NO_SUCH_BUCKET", "bucket does not exist"),
        "its bucket does not exist. Check the name and AWS_ENDPOINT_URL, or create the bucket",
    ),
    (
        (
            "AWS Error ACCESS_DENIED",
            "AWS Error INVALID_ACCESS_KEY_ID",
            "AWS Error SIGNATURE_DOES_NOT_MATCH",
            "ExpiredToken",
            "HTTP status 401",
            "HTTP status 403",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "OAuth2",
            "Permission denied",
        ),
        "access is refused. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (gs://: "
        "GOOGLE_APPLICATION_CREDENTIALS; local: the file mode), and that they may be used there",
    ),
    (
        ("AWS Error NETWORK_CONNECTION", "AWS Error REQUEST_TIMEOUT", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
        "the store cannot be reached. Check AWS_ENDPOINT_URL and the network",
    ),
    (
        ("AWS Error RESOURCE_NOT_FOUND",),
        "there is no such place, or what answers is not an S3 store. Check the URI and AWS_ENDPOINT_URL",
    ),
)


def open_uri(uri: str, *, attempts: int = _ATTEMPTS_TO_TRANSFER) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the path of the URI within it. Contacts no server.

    Args:
        uri: s3://bucket/path, gs://bucket/path, file:///path, or a local path, which may be relative.
        attempts: Requests to S3 before an error counts.

    Raises:
        DataError: The URI or AWS_ENDPOINT_URL has no usable form.
    """
    scheme, separator, path = uri.partition("://")
    if not separator and uri:
        return fs.LocalFileSystem(), os.path.abspath(uri)
    if scheme == "file" and path.startswith("/"):
        return fs.LocalFileSystem(), os.path.abspath(unquote(path))
    path = path.strip("/")
    if scheme == "s3" and path:
        return _s3(attempts), path
    if scheme == "gs" and path:
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=10)), path
    raise DataError(f"{uri!r} is no place for data: use s3://bucket/path, gs://bucket/path or a local path.")


def check_lasting(name: str, uri: str) -> None:
    """A job runs in a copy of its working directory, which Ray deletes some time after it.

    Args:
        name: Of the setting.
        uri: A place to write to.

    Raises:
        ConfigError: It is in there.
    """
    if "working_dir_files" not in Path.cwd().parts:  # where Ray puts such copies
        return
    path = uri.removeprefix("sqlite:///")
    check(
        "://" in path or os.path.isabs(path),
        f"{name}={uri} is a relative path, and this job runs in a copy of its working directory, which will "
        "be deleted. Name s3://bucket/folder, an MLflow server, or a full path that all nodes see.",
    )


def read_bytes(file_system: fs.FileSystem, path: str) -> bytes:
    """A whole file.

    Raises:
        DataError: It does not exist or cannot be read.
    """
    with explained(path), file_system.open_input_file(path) as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a whole file, making folders as needed; readers see the old content or the new, no part.

    Raises:
        DataError: The place is refused or cannot be reached.
    """
    file_system, path = open_uri(uri)
    with explained(uri):
        if not isinstance(file_system, fs.LocalFileSystem):
            with file_system.open_output_stream(path) as file:
                file.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def download_folder(uri: str, dest: Path) -> None:
    """Copies a folder with all it holds to the local folder `dest`, which is made.

    Raises:
        DataError: The folder does not exist, is a file or cannot be read.
    """
    file_system, root = open_uri(uri)
    dest.mkdir(parents=True, exist_ok=True)
    with explained(uri):
        if file_system.get_file_info(root).type == fs.FileType.File:
            raise DataError(f"{uri} is a file, where a folder is needed. Name the folder that holds it.")
        fs.copy_files(root, str(dest), file_system, fs.LocalFileSystem())


def upload_folder(folder: Path, uri: str, *, last: str) -> None:
    """Copies the files of a local folder to the new folder `uri`, and the one named `last` after all others.

    Raises:
        StoreError: The store refuses or does not answer.
    """
    file_system, root = open_uri(uri)
    with explained(uri):
        file_system.create_dir(root)
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == last, path.name)):
            fs.copy_files(str(path), f"{root}/{path.name}", fs.LocalFileSystem(), file_system)


def delete_folder(uri: str, *, first: str | None = None) -> None:
    """Deletes a folder with all it holds, the file named `first` before the others; one that is gone is fine.

    Raises:
        StoreError: The store refuses or does not answer.
    """
    file_system, root = open_uri(uri)
    with explained(uri):
        try:
            if first:
                file_system.delete_file(f"{root}/{first}")
        except FileNotFoundError:
            pass  # of a folder that was never complete
        try:
            file_system.delete_dir(root)
        except FileNotFoundError:
            return


def list_sizes(uri: str) -> dict[PurePosixPath, int]:
    """Bytes of every file below a folder by path relative to it; none if there is no such folder.

    Raises:
        StoreError: The store refuses or does not answer.
    """
    file_system, root = open_uri(uri, attempts=ATTEMPTS_TO_PROBE)
    with explained(uri):
        files = file_infos(file_system, root)
    return {PurePosixPath(info.path).relative_to(root): info.size for info in files}


def _s3(attempts: int) -> fs.S3FileSystem:
    for name, value in STORAGE_ENV.items():
        os.environ.setdefault(name, value)
    # The constructor does not read AWS_ENDPOINT_URL.
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
    """Files below `root`, at any depth; none if there is no such folder."""
    try:
        infos = file_system.get_file_info(fs.FileSelector(root, recursive=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [info for info in infos if info.type == fs.FileType.File]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """What the file systems raise as a DataError or StoreError that says what to do about `place`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{place} does not exist. Check the path.") from error
    except (OSError, pa.ArrowInvalid) as error:
        text = " ".join(str(error).split())
        cause = next((cause for marks, cause in _CAUSES if any(mark in text for mark in marks)), "it failed")
        raise StoreError(f"cannot use {place}: {cause}. The client said: {text[:300]}") from error

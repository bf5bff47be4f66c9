"""Three clients of S3 with the same endpoint, credentials, time limits and number of attempts.

pyarrow's is a file system like any other, boto3 does what that lacks, and obstore reads: it sends one request
for an object or a part of it, where pyarrow first asks for the size, and takes a third of boto3's CPU time.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeAlias

from botocore.exceptions import ClientError
from obstore.exceptions import BaseError
from pyarrow import fs

from ctmsr.errors import DataError, StoreError

from .hedging import Hedge

STORAGE_ENV = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
"""For every process that writes to S3: stores other than AWS reject the SDK's newer checksums with HTTP 411.

`file_system` sets it in its own process. A process that unpickles a file system, such as a Ray Train worker,
has to start with it: `ray.init(runtime_env={"env_vars": STORAGE_ENV})`.
"""

# An attempt that gets no response takes the sum of the two, so three attempts stay below 15 s.
_CONNECT_TIMEOUT_S = 3
_SILENCE_TIMEOUT_S = 4
ATTEMPTS_TO_PROBE = 3
ATTEMPTS_TO_TRANSFER = 6
_LISTING_THREADS = 4
_PAGE_KEYS = 1000
"""The most that stores return."""
_making_client = threading.Lock()
"""boto3 can make only one client at a time."""

Entry: TypeAlias = tuple[str, int, str]
"""Key, size in bytes and ETag of an object."""

_ENVIRONMENT = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
"""What a client of obstore depends on."""


def file_system(attempts: int) -> fs.S3FileSystem:
    """A pyarrow file system, which reads its credentials itself.

    Raises:
        DataError: AWS_ENDPOINT_URL is malformed.
    """
    for name, value in STORAGE_ENV.items():
        os.environ.setdefault(name, value)
    scheme, _, host = (_endpoint() or "https://").partition("://")
    return fs.S3FileSystem(
        scheme=scheme,
        endpoint_override=host or None,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_SILENCE_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def s3_client(*, attempts: int = ATTEMPTS_TO_TRANSFER) -> Any:
    """A boto3 client, for what pyarrow's file system does not offer; call it inside `storage_errors`."""
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_SILENCE_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    with _making_client:
        session = _session()
        if session.get_credentials() is None:  # a public bucket
            config = config.merge(Config(signature_version=UNSIGNED))
        return session.client("s3", config=config)


def read_object(path: str, start: int = 0, length: int | None = None) -> bytes:
    """An object, or a part of it, by one request; call it inside `storage_errors`.

    Args:
        path: Bucket and key. The key may be anything, even `/..//a`.
        start: First byte.
        length: Bytes to read, at least 1; fewer come if the object ends before. None for all of it.
    """
    bucket, _, key = path.partition("/")
    try:
        if _is_odd(key):
            part = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}
            return _reader().get_object(Bucket=bucket, Key=key, **part)["Body"].read()
        store = _store(bucket, *map(os.environ.get, _ENVIRONMENT))
        options = {} if length is None else {"range": (start, start + length)}
        answer = _hedge(store.get, key, options=options)  # the head of it; what is read of a second is little
        return bytes(answer.bytes())
    except (ClientError, BaseError) as error:
        if "InvalidRange" in str(error):  # it ends before `start`
            return b""
        raise


def list_objects(bucket: str, prefix: str) -> Iterator[Entry]:
    """The objects below a prefix, in order of key; call it inside `storage_errors`.

    A page of a thousand can only be asked for once the page before is there. So where there are folders, the
    pages of several are fetched at the same time. Only some pages are in memory.
    """
    client = s3_client()
    fetch = partial(_list_range, client, bucket, prefix)
    entries, rest = fetch("", None, max_pages=1)
    yield from entries
    if rest is None:
        return
    after = rest
    bounds = deque(bound for bound in _bounds(client, bucket, prefix) if bound > after)
    waiting: deque[tuple[Future[tuple[list[Entry], str | None]], str | None]] = deque()
    step, is_last = 1, False
    pool = ThreadPoolExecutor(_LISTING_THREADS, "list")
    try:
        while waiting or not is_last:
            while len(waiting) < 2 * _LISTING_THREADS and not is_last:
                some = [bounds.popleft() for _ in range(min(step, len(bounds)))]
                until, is_last = some[-1] if some else None, not some
                waiting.append((pool.submit(fetch, after, until), until))
                after = until or after
            future, until = waiting.popleft()
            entries, rest = future.result()
            if len(entries) < _PAGE_KEYS:  # as many folders at a time as fill a page or some
                step *= 2
            elif rest:
                step = max(1, step // 2)
            yield from entries
            while rest is not None:
                entries, rest = fetch(rest, until)
                yield from entries
    finally:
        pool.shutdown(cancel_futures=True)


def _list_range(
    client: Any, bucket: str, prefix: str, after: str, until: str | None, max_pages: int = 8
) -> tuple[list[Entry], str | None]:
    """The first pages of the objects after one key, up to another; and the last key, if there are more.

    Raises:
        StoreError: The store lists keys in no order, so that some would be missing.
    """
    found: list[Entry] = []
    for _ in range(max_pages):
        start = {"StartAfter": after} if after else {}
        page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=_PAGE_KEYS, **start)
        for entry in page.get("Contents", ()):
            if entry["Key"] <= after:
                raise StoreError(
                    f"s3://{bucket} lists {entry['Key']} after {after}: use a bucket with an order."
                )
            if until is not None and entry["Key"] > until:
                return found, None
            found.append((entry["Key"], entry["Size"], entry["ETag"].strip('"')))
        if not page["IsTruncated"]:
            return found, None
        after = page["Contents"][-1]["Key"]
    return found, after


def _bounds(client: Any, bucket: str, prefix: str) -> list[str]:
    """Up to a thousand folders below a prefix, in order: those of the first level that has several."""
    while True:
        page = client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/")
        folders = [folder["Prefix"] for folder in page.get("CommonPrefixes", ())]
        if len(folders) != 1 or "Contents" in page:
            return folders
        prefix = folders[0]


def _is_odd(key: str) -> bool:
    """Whether obstore refuses a key or reads another one: its keys are paths of printable names."""
    return not {"", ".", ".."}.isdisjoint(key.split("/")) or any(c < " " or c == "\x7f" for c in key)


@lru_cache(maxsize=16)
def _store(bucket: str, *_: str | None) -> Any:
    """A client of obstore; the other arguments are the variables that it depends on."""
    from obstore.auth.boto3 import Boto3CredentialProvider  # late, as it imports boto3
    from obstore.store import S3Store

    session = _session()
    options: dict[str, Any] = {"endpoint": endpoint} if (endpoint := _endpoint()) else {}
    if session.get_credentials() is None:  # a public bucket
        options["skip_signature"] = True
    else:  # boto3 renews what expires within 15 minutes, so it has to be asked more often than that
        options["credential_provider"] = Boto3CredentialProvider(session, ttl=timedelta(minutes=10))
    return S3Store(
        bucket,
        region=session.region_name or "us-east-1",
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
            "read_timeout": timedelta(seconds=_SILENCE_TIMEOUT_S),
            "timeout": timedelta(days=1),  # of a whole transfer, however large the object
        },
        retry_config={
            "max_retries": ATTEMPTS_TO_TRANSFER - 1,
            # at most 0.4 s before the first, on average 9 s before the last
            "backoff": {"init_backoff": timedelta(seconds=0.1), "base": 4},
        },
        **options,
    )


def _session() -> Any:
    import boto3  # takes a second, which --help should not wait for

    return boto3.Session(region_name=os.environ.get("AWS_REGION"))


def _endpoint() -> str:
    """The address of the store, without a slash at its end; empty for AWS. boto3 finds it by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, separator, host = endpoint.partition("://")
    if endpoint and (scheme not in ("http", "https") or not separator):
        raise DataError(f"AWS_ENDPOINT_URL must be like http://host:9000 or https://host, got {endpoint!r}.")
    return f"{scheme}://{host.rstrip('/')}" if host else ""


_reader = lru_cache(maxsize=1)(s3_client)
_hedge = Hedge()

"""The pictures of a run: a plain folder, or an index written by `python -m pipelines.index`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shlex import quote

import pyarrow as pa

from ctmsr.errors import DataError, StoreError

from ..infra.listing import absolute, list_images
from ..infra.storage import open_uri, read_bytes
from .keys import SHARD_COLUMNS, IndexKeys, Keys, ListedKeys
from .reading import Places

INDEX_SUFFIX = ".index"
SUMMARY_FILE = "summary.json"
INDEX_FORMAT = 2
"""The newest of an index, in its summary as "format": 1, or nothing, without shards and 2 with shards."""


@dataclass(frozen=True)
class Pictures:
    """A set of pictures in storage, in order of key."""

    uri: str
    """As given by the user."""
    keys: Keys
    """Paths below `folder`, which identify the pictures; for pairs, those below `lq_folder`, too."""
    folder: str
    """URI of the folder that contains them."""
    version: str
    """Hash of the set: of keys and sizes for a folder, of keys and contents for an index."""
    lq_folder: str = ""
    """URI of the folder of LR pictures; empty if LR is made by degradation."""
    scale: int | None = None
    """HR/LQ ratio of the LR pictures, if there are any."""
    num_others: int = 0
    """Files of the folder that are left out, as their names do not end like a picture's."""

    has_shards: bool = False
    """Whether all of them are in shards: tars or Parquet files."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def places(self) -> Places:
        return Places(self.folder, self.lq_folder)


@contextmanager
def about_setting(key: str) -> Iterator[None]:
    """Errors of the `with` block begin with the key that names the pictures, and end with how to set it."""
    try:
        yield
    except StoreError:
        raise
    except DataError as error:
        part = key.removeprefix("data.").partition("_")[0]
        raise DataError(f"{key}: {error} Set another: --set {key}=photos/{part}") from error


def find_pictures(uri: str) -> Pictures:
    """Lists a folder, or reads an index if the URI ends in `.index`.

    Raises:
        DataError: There are no pictures, the index is unfinished, or the store cannot be used.
    """
    if uri.rstrip("/").endswith(INDEX_SUFFIX):
        return _read_index(uri)
    found = list_images(uri)
    refuse_unusable(uri, [file.problem for file in found.files])
    version = _hash([f"{file.key} {file.size}" for file in found.files])
    keys = pa.table({"key": pa.array([file.key for file in found.files], pa.large_string())})
    return Pictures(uri, ListedKeys(keys), found.folder, version, num_others=found.num_others)


def refuse_unusable(uri: str, problems: Sequence[str], how: str = "listed") -> None:
    """Says what is wrong with pictures of a plain folder, and how to set them aside.

    Args:
        uri: The folder.
        problems: Of every picture looked at; empty for a good one.
        how: They were looked at.

    Raises:
        DataError: At least one of them has a problem.
    """
    if bad := [problem for problem in problems if problem]:
        raise DataError(
            f"{len(bad)} of {len(problems)} pictures {how} under {uri} are unusable. "
            f"{bad[0]} `python -m pipelines.index {quote(uri)}` finds all of them and sets them aside."
        )


def _read_index(uri: str) -> Pictures:
    file_system, root = open_uri(uri)
    root = root.rstrip("/")
    try:
        summary = json.loads(read_bytes(file_system, f"{root}/{SUMMARY_FILE}"))
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(
            f"{uri} is not an index, or its scan did not finish: it has no {SUMMARY_FILE}. "
            f"Run `python -m pipelines.index FOLDER --out {uri}`."
        ) from error
    if (found := summary.get("format", 1)) > INDEX_FORMAT:
        raise DataError(
            f"the index {uri} has format {found}, and this release reads up to {INDEX_FORMAT}: it was made "
            "by a newer release. Upgrade this one, or index the folder again under another name with --out."
        )
    num_in_shards = summary.get("in_shards", 0)
    names = ("key", *(["lq_key"] if summary["lq_uri"] else []), *(SHARD_COLUMNS if num_in_shards else ()))
    return Pictures(
        uri,
        # absolute, as tasks run in another working directory
        IndexKeys(absolute(uri), summary["version"], names, summary["pictures"]),
        summary["uri"],
        summary["version"],
        lq_folder=summary["lq_uri"],
        scale=summary["scale"],
        has_shards=num_in_shards == summary["pictures"],
    )


def _hash(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()

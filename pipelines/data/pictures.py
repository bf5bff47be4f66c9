"""The pictures of a run: a plain folder, or an index written by `python -m pipelines.index`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from ctmsr.errors import DataError

from ..infra.listing import list_images
from ..infra.storage import open_uri, read_bytes
from .keys import IndexKeys, Keys, ListedKeys

INDEX_SUFFIX = ".index"
SUMMARY_FILE = "summary.json"


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

    def __len__(self) -> int:
        return len(self.keys)


def find_pictures(uri: str) -> Pictures:
    """Lists a folder, or reads an index if the URI ends in `.index`.

    Raises:
        DataError: There are no pictures, the index is unfinished, or the store cannot be used.
    """
    if uri.rstrip("/").endswith(INDEX_SUFFIX):
        return _read_index(uri)
    refs = list_images(uri)
    _, path = open_uri(uri)
    folder = uri if "://" in uri else path  # absolute, as tasks run in another working directory
    if refs[0].path == path:  # the URI of a single picture
        folder = folder.removesuffix(refs[0].key)
    version = _hash([f"{ref.key} {ref.size}" for ref in refs])
    keys = pa.table({"key": pa.array([ref.key for ref in refs], pa.large_string())})
    return Pictures(uri, ListedKeys(keys), folder.rstrip("/"), version)


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
    names = ("key", "lq_key") if summary["lq_uri"] else ("key",)
    return Pictures(
        uri,
        IndexKeys(uri, summary["version"], names, summary["pictures"]),
        summary["uri"],
        summary["version"],
        lq_folder=summary["lq_uri"],
        scale=summary["scale"],
    )


def _hash(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()

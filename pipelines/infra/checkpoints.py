"""A run's checkpoints in storage: written in the background, all or nothing.

A checkpoint is a folder `checkpoint_<step>-<writer>` of the run, in the format of `ctmsr.model.checkpoint`,
whose checkpoint.json is uploaded last. Readers ignore a folder without it, or with a file of the wrong size.
Ray Train learns of each once it is stored, and deletes those that are neither the newest nor among the best.
"""

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs
from torch import Tensor

from ctmsr.errors import CheckpointError, DataError, StoreError
from ctmsr.model import checkpoint
from ctmsr.training.state import TrainState, state_tensors

from .storage import delete_folder, download_folder, list_sizes, open_uri, read_bytes, upload_folder

STARTER = "starter"
"""Accepted instead of a checkpoint's URI: the model included in the package, in pipelines/starter/."""

LPIPS_BY_PICTURE = "lpips_by_picture"
"""Key in `Stored.meta`: the LPIPS of each picture of data.val_uri; unnamed, as names would be released."""

_PREFIX = "checkpoint_"


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint in storage. Its files are verified when they are loaded."""

    uri: str
    config: dict[str, Any]
    """The config of the run, as JSON types."""
    meta: dict[str, Any]
    """Recorded by the writer: step and origin; "metrics" and more once it has been scored."""

    @property
    def step(self) -> int:
        """Optimizer updates completed; 0 for a converted checkpoint."""
        return int(self.meta.get("step", 0))


def newest(run_uri: str) -> Stored | None:
    """The newest complete checkpoint of a run; None if there is none yet.

    Raises:
        StoreError: The store denies access or does not respond.
    """
    return next(complete(run_uri), None)


def find(run_uri: str) -> Stored:
    """The newest complete checkpoint of a run.

    Raises:
        CheckpointError: The run has none.
        StoreError: The store denies access or does not respond.
    """
    found = newest(run_uri)
    if found is None:
        raise CheckpointError(
            f"there is no complete checkpoint under {run_uri}. Train first, or name its run: --set name=NAME"
            " (and storage_uri, if it is elsewhere)."
        )
    return found


def checkpoint_uri(name: str) -> str:
    """The URI of a checkpoint that may be called `starter`."""
    return str(Path(__file__).parents[1] / STARTER) if name == STARTER else name


@contextmanager
def fetched(uri: str) -> Iterator[Path]:
    """A local copy of the checkpoint at `uri`, or `starter`, for the duration of a `with` block.

    Raises:
        DataError: It cannot be downloaded.
        CheckpointError: Raised in the block; its message names `uri` instead of the copy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        download_folder(checkpoint_uri(uri), Path(scratch))
        try:
            yield Path(scratch)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(scratch, uri)) from error


class CheckpointWriter:
    """Writes the checkpoints of one run in a background thread, one at a time."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri.rstrip("/")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.stored_at = time.time()
        """When the newest checkpoint was complete, in seconds since the epoch; at first, now."""

    def save(
        self, state: TrainState, config: dict[str, Any], meta: dict[str, Any]
    ) -> tuple[str, Future[None]]:
        """Copies the state to host memory and returns, after waiting for the previous write to finish.

        Returns:
            The name of the checkpoint's folder, and what ends once the checkpoint is complete in storage.

        Raises:
            StoreError: The previous checkpoint could not be written.
        """
        self.wait()
        # A unique folder: a stale writer on a disconnected node must not write into the same one.
        name = f"{_PREFIX}{meta['step']:09d}-{secrets.token_hex(4)}"
        ema = _copied(state.ema_model.state_dict())
        rest = _copied(state_tensors(state))
        self._writing = self._pool.submit(self._write, name, ema, rest, config, meta)
        return name, self._writing

    def wait(self) -> None:
        """Waits until the last checkpoint is in storage.

        Raises:
            StoreError: It could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(
        self,
        name: str,
        ema: dict[str, Tensor],
        rest: dict[str, Tensor],
        config: dict[str, Any],
        meta: dict[str, Any],
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, name)
            try:
                checkpoint.save(folder, model=ema, config=config, meta=meta, train_state=rest)
            except OSError as error:
                raise StoreError(
                    f"the checkpoint of step {meta['step']} cannot be written to {scratch}: {error}. "
                    "Free some space there, or point TMPDIR to a larger disk."
                ) from error
            upload_folder(folder, f"{self._run_uri}/{name}", last=checkpoint.MANIFEST_FILE)
        self.stored_at = time.time()
        self._delete_remains(name)

    def _delete_remains(self, newest_folder: str) -> None:
        """Deletes what writers left behind that were lost before their checkpoint was complete."""
        stored = {one.uri.rpartition("/")[2] for one in complete(self._run_uri)}
        for folder in _folders(self._run_uri):
            if folder not in stored and folder < newest_folder:
                delete_folder(f"{self._run_uri}/{folder}", first=checkpoint.MANIFEST_FILE)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _folders(run_uri: str) -> dict[str, dict[str, int]]:
    """Files and their sizes by checkpoint folder, complete or not, newest first."""
    folders: dict[str, dict[str, int]] = {}
    for path, size in list_sizes(run_uri).items():
        if len(path.parts) == 2 and path.parts[0].startswith(_PREFIX):
            folders.setdefault(path.parts[0], {})[path.parts[1]] = size
    return dict(sorted(folders.items(), reverse=True))


def complete(run_uri: str) -> Iterator[Stored]:
    """Complete checkpoints of a run, newest first.

    Raises:
        StoreError: The store denies access or does not respond.
        CheckpointError: A newer release wrote one.
    """
    file_system, root = open_uri(run_uri)
    for folder, sizes in _folders(run_uri).items():
        if checkpoint.MANIFEST_FILE not in sizes:
            continue
        try:
            data = read_bytes(file_system, str(PurePosixPath(root, folder, checkpoint.MANIFEST_FILE)))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                continue  # deleted since it was listed
            raise
        manifest = json.loads(data)
        checkpoint.check_format(f"{run_uri.rstrip('/')}/{folder}", manifest)
        if all(sizes.get(name) == entry["bytes"] for name, entry in manifest["files"].items()):
            meta = manifest["meta"] | _scores(file_system, PurePosixPath(root, folder), sizes)
            yield Stored(f"{run_uri.rstrip('/')}/{folder}", manifest["config"], meta)


def _scores(file_system: fs.FileSystem, folder: PurePosixPath, sizes: dict[str, int]) -> dict[str, Any]:
    if checkpoint.SCORES_FILE not in sizes:
        return {}
    try:
        scores: dict[str, Any] = json.loads(read_bytes(file_system, str(folder / checkpoint.SCORES_FILE)))
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}  # deleted since it was listed
        raise
    return scores

"""Upscales one picture from storage into storage, unless that has been done already.

A file written here records in a note what it was made from: the picture's key and etag, the version of the
model, the seed and the settings of the format. The note is part of the file, which a store shows in full or
not at all. So after any crash the files themselves tell what is done: there is no separate list to keep in
sync, and nothing is done twice.
"""

import json
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ctmsr.errors import DataError, StoreError
from ctmsr.image import read
from ctmsr.image.encoding import NOTE_BYTES, SUFFIXES, FileFormat, encode, has_note
from ctmsr.image.enlarging import enlarge
from ctmsr.model.inference import is_out_of_memory

from ..infra.exit_status import one_line
from ..infra.storage import open_uri, read_bytes, write_bytes
from ..tracking.released import Released, Upscale


@dataclass(frozen=True)
class Picture:
    """One picture to upscale."""

    folder: str
    """URI or absolute path of the folder that was searched."""
    key: str
    """Path below it."""
    etag: str
    """Changes with the content."""
    target: str
    """Path below the output folder of the result, without `_x4` and the suffix."""
    problem: str = ""
    """Why it cannot be read, if that is known already."""


@dataclass(frozen=True)
class Settings:
    """What the results depend on besides the pictures, and where they go."""

    model: Released
    seed: int
    output: str
    """URI or absolute path of a folder."""
    file_format: FileFormat = field(default_factory=FileFormat)


@dataclass(frozen=True)
class Outcome:
    """The outcome for one picture."""

    path: str
    """Of the picture, within its file system."""
    result: str = ""
    """URI of the upscaled picture; empty if there is a problem."""
    existed: bool = False
    """Whether an earlier run had made the result."""
    problem: str = ""
    """Why there is no result."""
    warnings: str = ""
    """What of the picture is not in the result; a line each."""
    seconds: float = 0.0


class Upscaler:
    """Upscales pictures with one version of a model, which it loads for the first picture.

    Several threads may share it: they read, decode, encode and write in parallel, and take turns with the
    model.
    """

    def __init__(self, settings: Settings, num_threads: int | None = None) -> None:
        """`num_threads` is for torch, in the whole process; None leaves it as it is."""
        if num_threads:
            torch.set_num_threads(num_threads)
        self._settings = settings
        self._turn = threading.RLock()
        self._upscale: Upscale | None = None
        self._scale = 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A Picture to an Outcome, both as rows of Ray Data."""
        return asdict(self.upscale(Picture(**row)))

    def upscale(self, picture: Picture) -> Outcome:
        """Writes `<output>/<target>_x<scale>` and the suffix atomically, unless it is there already.

        Raises:
            StoreError: A store fails. A defect of the picture is a problem in the outcome instead.
            TrackingError: The model cannot be fetched or loaded.
        """
        started = time.monotonic()
        file_system, root = _open(picture.folder)
        path = f"{root}/{picture.key}"
        if picture.problem:
            return Outcome(path, problem=picture.problem)
        self._load()
        file_format = self._settings.file_format
        name = f"{picture.target}_x{self._scale}{SUFFIXES[file_format.kind]}"
        uri, note = f"{self._settings.output}/{name}", self._note(picture)
        if _has_note(self._settings.output, name, note):
            return Outcome(path, uri, existed=True)
        try:
            lq = read(read_bytes(file_system, path), name=path)
            warnings = lq.warnings + file_format.check(lq, self._scale, path)
        except StoreError:
            raise
        except DataError as error:  # damaged, or deleted since it was listed
            return Outcome(path, problem=str(error))
        try:
            sr = enlarge(lq, self._predict)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Outcome(path, problem=_too_large(path, lq.pixels, error))
        write_bytes(uri, encode(sr, file_format, note))
        return Outcome(path, uri, warnings="\n".join(warnings), seconds=time.monotonic() - started)

    def _load(self) -> None:
        if self._scale:
            return  # without the lock, so that reading goes on while the model is busy
        with self._turn:
            if not self._scale:
                self._upscale = self._settings.model.load()
                self._scale = len(self._predict(np.zeros((8, 8, 3), np.uint8))) // 8

    def _predict(self, lq: np.ndarray) -> np.ndarray:
        assert self._upscale is not None
        with self._turn:
            return self._upscale(lq, self._settings.seed)

    def _note(self, picture: Picture) -> str:
        """JSON in ASCII."""
        model = self._settings.model
        return json.dumps(
            {
                "picture": picture.key,
                "etag": picture.etag,
                "model": model.uri,
                "files": model.source,
                "seed": self._settings.seed,
                **asdict(self._settings.file_format),
            }
        )


def _too_large(path: str, lq: np.ndarray, error: BaseException) -> str:
    height, width = lq.shape[:2]
    return (
        f"{path} needs more memory than there is ({width}x{height} pixels; {one_line(error)}). "
        "Split it, or upscale it on another machine."
    )


def _has_note(folder: str, name: str, note: str) -> bool:
    """Whether there is a file of this name with this note."""
    file_system, root = _open(folder)
    size = NOTE_BYTES + len(note)
    try:
        with file_system.open_input_file(f"{root}/{name}") as file:
            if has_note(file.read(size), note):
                return True
            file.seek(max(0, file.size() - size))
            return has_note(file.read(size), note)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(
            f"cannot use {folder}/{name}. Check --output. The client reports: {error}"
        ) from error


_open = lru_cache(maxsize=16)(open_uri)

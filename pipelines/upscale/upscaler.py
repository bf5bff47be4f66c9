"""Upscales one picture from storage into storage, unless that has been done already.

A PNG written here records in a text chunk what it was made from: the picture's key and etag, the version of
the model and the seed. The record is part of the file, which a store shows in full or not at all. So after
any crash the files themselves tell what is done: there is no separate list to keep in sync, and nothing is
done twice.
"""

import io
import json
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ctmsr.errors import DataError, StoreError
from ctmsr.image import decode

from ..infra.storage import open_uri, read_bytes, write_bytes
from ..tracking.released import Released, Upscale

NOTE = "ctmsr-ray"
"""Keyword of the text chunk."""

_COMPRESS_LEVEL = 1
"""Of zlib. Pillow's default, 6, takes three times as long on a photograph and saves a tenth."""
_HEAD_BYTES = 512
"""Size of a PNG's header and of what surrounds its text chunk, generously."""


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
    """Path below the output folder of the result, without `_x4.png`."""
    problem: str = ""
    """Why it cannot be read, if that is known already."""


@dataclass(frozen=True)
class Settings:
    """What the results depend on besides the pictures, and where they go."""

    model: Released
    seed: int
    output: str
    """URI or absolute path of a folder."""


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
        """Writes `<output>/<target>_x<scale>.png` atomically, unless it is there already.

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
        name = f"{picture.target}_x{self._scale}.png"
        uri, note = f"{self._settings.output}/{name}", self._note(picture)
        if _has_note(self._settings.output, name, note):
            return Outcome(path, uri, existed=True)
        try:
            lq_u8 = decode(read_bytes(file_system, path), name=path)
        except StoreError:
            raise
        except DataError as error:  # damaged, or deleted since it was listed
            return Outcome(path, problem=str(error))
        write_bytes(uri, encode(self._predict(lq_u8), note))
        return Outcome(path, uri, seconds=time.monotonic() - started)

    def _load(self) -> None:
        if self._scale:
            return  # without the lock, so that reading goes on while the model is busy
        with self._turn:
            if not self._scale:
                self._upscale = self._settings.model.load()
                self._scale = len(self._predict(np.zeros((8, 8, 3), np.uint8))) // 8

    def _predict(self, lq_u8: np.ndarray) -> np.ndarray:
        assert self._upscale is not None
        with self._turn:
            return self._upscale(lq_u8, self._settings.seed)

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
            }
        )


def encode(sr_u8: np.ndarray, note: str) -> bytes:
    """A PNG file of a uint8 (height, width, 3) picture, with an ASCII note before the pixels."""
    text = PngInfo()
    text.add_text(NOTE, note)
    file = io.BytesIO()
    Image.fromarray(sr_u8).save(file, "PNG", pnginfo=text, compress_level=_COMPRESS_LEVEL)
    return file.getvalue()


def _has_note(folder: str, name: str, note: str) -> bool:
    """Whether there is a PNG of this name with this note."""
    file_system, root = _open(folder)
    wanted = f"{NOTE}\0{note}".encode()
    try:
        with file_system.open_input_file(f"{root}/{name}") as file:
            return wanted in file.read(_HEAD_BYTES + len(wanted))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(
            f"cannot use {folder}/{name}. Check --output. The client reports: {error}"
        ) from error


_open = lru_cache(maxsize=16)(open_uri)

"""One picture from storage, upscaled into storage, unless that is done already.

A PNG written here says in a text chunk of what it was made: the picture's key and etag, the version of the
model, the seed. The text comes and goes with the file, which a store shows whole or not at all. So after any
crash it is known what is done, there is no list to keep in step with the files, and nothing is made twice.
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
"""Of zlib. 6, Pillow's own choice, takes three times as long on a photograph and saves a tenth."""
_HEAD_BYTES = 512
"""Of a PNG, before and around its text chunk."""


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


@dataclass(frozen=True)
class Making:
    """What the results depend on besides the pictures, and where they go."""

    model: Released
    seed: int
    output: str
    """URI or absolute path of a folder."""


@dataclass(frozen=True)
class Outcome:
    """What became of a picture."""

    path: str
    """In its file system."""
    result: str = ""
    """URI of the upscaled picture; none if there is a problem."""
    was_there: bool = False
    problem: str = ""
    seconds: float = 0.0


class Upscaler:
    """Makes pictures with one version of a model, which it loads when the first one comes.

    Several threads may share it: they read, decode, encode and write side by side, and take turns at the
    model.
    """

    def __init__(self, making: Making, num_threads: int | None = None) -> None:
        """`num_threads` is torch's, for the whole process; None leaves it."""
        if num_threads:
            torch.set_num_threads(num_threads)
        self._making = making
        self._turn = threading.RLock()
        self._upscale: Upscale | None = None
        self._scale = 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A Picture to an Outcome, both as rows of Ray Data."""
        return asdict(self.upscale(Picture(**row)))

    def upscale(self, picture: Picture) -> Outcome:
        """Writes `<output>/<target>_x<scale>.png`, whole or not at all, unless it is there.

        Raises:
            StoreError: A store fails. That is no defect of the picture, which has a problem in its outcome.
            TrackingError: The model cannot be fetched or loaded.
        """
        started = time.monotonic()
        self._load()
        file_system, root = _open(picture.folder)
        path = f"{root}/{picture.key}"
        name = f"{picture.target}_x{self._scale}.png"
        uri, note = f"{self._making.output}/{name}", self._note(picture)
        if _says(self._making.output, name, note):
            return Outcome(path, uri, was_there=True)
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
            return  # without waiting for a turn: reading goes on while the model is busy
        with self._turn:
            if not self._scale:
                self._upscale = self._making.model.load()
                self._scale = len(self._predict(np.zeros((8, 8, 3), np.uint8))) // 8

    def _predict(self, lq_u8: np.ndarray) -> np.ndarray:
        assert self._upscale is not None
        with self._turn:
            return self._upscale(lq_u8, self._making.seed)

    def _note(self, picture: Picture) -> str:
        """In ASCII."""
        model = self._making.model
        return json.dumps(
            {
                "picture": picture.key,
                "etag": picture.etag,
                "model": model.uri,
                "files": model.source,
                "seed": self._making.seed,
            }
        )


def encode(sr_u8: np.ndarray, note: str) -> bytes:
    """A PNG file of a uint8 (height, width, 3) picture, that holds a note in ASCII before the pixels."""
    text = PngInfo()
    text.add_text(NOTE, note)
    file = io.BytesIO()
    Image.fromarray(sr_u8).save(file, "PNG", pnginfo=text, compress_level=_COMPRESS_LEVEL)
    return file.getvalue()


def _says(folder: str, name: str, note: str) -> bool:
    """Whether there is a PNG with this note."""
    file_system, root = _open(folder)
    wanted = f"{NOTE}\0{note}".encode()
    try:
        with file_system.open_input_file(f"{root}/{name}") as file:
            return wanted in file.read(_HEAD_BYTES + len(wanted))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(f"cannot use {folder}/{name}. Check --output. The client said: {error}") from error


_open = lru_cache(maxsize=16)(open_uri)

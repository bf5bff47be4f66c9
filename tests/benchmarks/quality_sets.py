"""The pictures of the quality table: public test sets, and realistically degraded held-out photographs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctmsr.degradation.recipe import degrade
from ctmsr.errors import DataError
from ctmsr.image import center_crop, decode
from ctmsr.rng import sample_rng
from pipelines.config.presets import small

from .local_feed import SUFFIXES
from .peers import SCALE

TESTSETS = ("Set5", "Set14", "BSD100")
"""Whole pictures, and their LR pictures by Matlab's antialiased bicubic."""
PHOTOS = ("val", "test")
PHOTO_PX = 512
DRAWS = 2
"""Degradations per photograph."""


@dataclass(frozen=True)
class Sample:
    """A picture and its LR version."""

    key: str
    """Such as "Set5/img_001", or "test/0008.1" for the second degradation of a photograph."""
    hr_u8: np.ndarray
    lq_u8: np.ndarray


def read_testset(folder: Path) -> Iterator[Sample]:
    """The pairs of `folder`/HR and `folder`/LRx4, which share their names.

    Raises:
        DataError: A picture is missing or damaged, or HR is not four times as large.
    """
    for path in _pictures(folder / "HR"):
        hr_u8, lq_u8 = (_read(place / path.name) for place in (folder / "HR", folder / f"LRx{SCALE}"))
        if hr_u8.shape[:2] != tuple(SCALE * side for side in lq_u8.shape[:2]):
            raise DataError(f"{path} has the shape {hr_u8.shape}, and its LR picture {lq_u8.shape}.")
        yield Sample(f"{folder.name}/{path.stem}", hr_u8, lq_u8)


def read_photos(folder: Path) -> Iterator[Sample]:
    """The middle PHOTO_PX of every photograph, degraded in DRAWS ways that depend only on its name.

    Raises:
        DataError: There are none, or one is damaged.
    """
    for path in _pictures(folder):
        hr_u8 = center_crop(_read(path), PHOTO_PX, name=str(path))
        for draw in range(DRAWS):
            rng = sample_rng(draw, 0, path.stem, "quality table")
            lq_u8 = degrade(hr_u8, scale=SCALE, config=small().degradation, rng=rng)
            yield Sample(f"{folder.name}/{path.stem}.{draw}", hr_u8, lq_u8)


def read_set(name: str, testsets: Path, photos: Path) -> Iterator[Sample]:
    """The set with a name from TESTSETS or PHOTOS."""
    return read_testset(testsets / name) if name in TESTSETS else read_photos(photos / name)


def _pictures(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no picture. Name the folders with --testsets and --photos.")
    return paths


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} is missing: the two pictures of a pair share their name.")
    return decode(path.read_bytes(), name=str(path))

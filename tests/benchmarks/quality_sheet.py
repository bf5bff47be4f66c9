"""What the rows of the quality table look like: the same crops of held-out photographs, side by side.

A row keeps its crops as a strip, one below the other, so that a sheet needs no row to be computed again.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ctmsr.image import decode
from ctmsr.metrics.scoring import stack

from .peers import SCALE, Made
from .quality_sets import Sample

CROP_PX = 128
ZOOM = 2
LABEL_PX = 28
SHEET = {
    "test/0035.0": (180, 100),
    "test/0063.0": (250, 190),
    "test/0081.0": (150, 240),
    "test/0090.0": (190, 190),
    "test/0127.0": (280, 120),
    "test/0137.0": (40, 230),
}
"""Top and left of the crop in HR, by the key of the picture."""


def strip(shown: Sequence[tuple[Sample, Made]]) -> np.ndarray:
    """The crops of one row, uint8 (CROP_PX · number, CROP_PX, 3)."""
    return np.vstack([_crop(sample.key, made.sr_u8) for sample, made in shown])


def write_strip(path: Path, strip_u8: np.ndarray) -> None:
    """As JPEG without chroma subsampling, of a quality that hides nothing."""
    Image.fromarray(strip_u8).save(path, quality=95, subsampling=0)


def sheet(folder: Path, names: Sequence[str], shown: Sequence[Sample]) -> Path:
    """Writes the sheet of the rows that have a strip, between LR and HR; returns its path."""
    small = [
        cv2.resize(sample.lq_u8, None, fx=SCALE, fy=SCALE, interpolation=cv2.INTER_NEAREST)
        for sample in shown
    ]
    columns = {"LR": np.vstack([_crop(s.key, lq_u8) for s, lq_u8 in zip(shown, small, strict=True)])}
    for name in names:
        path = folder / f"quality-{name}.jpg"
        if path.exists():
            columns[name] = decode(path.read_bytes(), name=str(path))
    columns["HR"] = np.vstack([_crop(sample.key, sample.hr_u8) for sample in shown])
    target = folder / "quality.jpg"
    Image.fromarray(np.hstack([_labelled(*column) for column in columns.items()])).save(target, quality=88)
    return target


def _crop(key: str, image_u8: np.ndarray) -> np.ndarray:
    top, left = SHEET[key]
    return image_u8[top : top + CROP_PX, left : left + CROP_PX]


def _labelled(name: str, column_u8: np.ndarray) -> np.ndarray:
    zoomed = cv2.resize(column_u8, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_NEAREST)
    label = Image.new("RGB", (ZOOM * CROP_PX, LABEL_PX), "white")
    ImageDraw.Draw(label).text((6, 4), name, "black", ImageFont.load_default(18))
    return stack([np.array(label), zoomed])

"""Held-out sets to evaluate on: HR pictures that are degraded, or LR pictures with or without a reference."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ctmsr.config import check, to_dict
from ctmsr.errors import DataError
from ctmsr.image import decode

from ..config.run_config import DataConfig, RunConfig
from ..infra.listing import Images, list_images, stem
from ..infra.storage import open_uri, read_bytes
from .pictures import Pictures, about_setting, find_pictures, refuse_unusable
from .stream import check_images, val_samples


def whole_pictures(lq: Images, hr: Images | None, *, scale: int) -> Iterator[dict[str, Any]]:
    """Uncropped LR pictures, each with its HR picture if `hr` is given; loads one pair at a time.

    Yields:
        Rows of "key", "lq" and "hr" (uint8 HWC; None without a reference), in the order of `lq`.

    Raises:
        DataError: A picture cannot be read, or HR is not `scale` times as large as LR.
    """
    hr_keys = {stem(file.key): file.key for file in hr.files} if hr else {}
    for file in lq.files:
        lq_u8, lq_path = _read(lq.folder, file.key)
        hr_u8 = None
        if hr and (key := hr_keys.get(stem(file.key))):
            hr_u8, path = _read(hr.folder, key)
            (height, width), (lq_height, lq_width) = hr_u8.shape[:2], lq_u8.shape[:2]
            if (height, width) != (scale * lq_height, scale * lq_width):
                raise DataError(
                    f"{path} is {width}x{height} pixels and its LR picture {lq_path} "
                    f"{lq_width}x{lq_height}, not {scale} times smaller. Crop it, or remove the pair."
                )
        yield {"key": file.key, "lq": lq_u8, "hr": hr_u8}


def _read(folder: str, key: str) -> tuple[np.ndarray, str]:
    """A picture, and its path for messages."""
    file_system, root = open_uri(folder)
    path = f"{root}/{key}"
    return decode(read_bytes(file_system, path), name=path), path


def check_pairs(lq: Images, hr: Images) -> None:
    """Checks that every LR picture has exactly one HR picture.

    Raises:
        DataError: One has none, or two pictures of a folder share a stem.
    """
    for images in (lq, hr):
        stems = Counter(stem(file.key) for file in images.files)
        if twice := sorted(key for key, number in stems.items() if number > 1):
            raise DataError(
                f"{images.folder} has two pictures {twice[0]}.*, so pairs are ambiguous. Rename one."
            )
    known = {stem(file.key) for file in hr.files}
    if alone := [file.key for file in lq.files if stem(file.key) not in known]:
        raise DataError(
            f"{len(alone)} of {len(lq.files)} pictures under {lq.folder} have no HR picture of the same name "
            f"under {hr.folder}: {', '.join(alone[:3])}. Rename them, or set data.test_uri= to score without "
            "references."
        )


@dataclass(frozen=True)
class HeldOut:
    """The pictures of an evaluation, listed and checked before anything expensive starts."""

    data: DataConfig
    pictures: Pictures | None
    """HR pictures of data.test_uri that are degraded; None if there are LR pictures."""
    lq: Images | None = None
    """LR pictures of data.test_lq_uri."""
    hr: Images | None = None
    """Their HR references, from data.test_uri."""

    def rows(self, trained: RunConfig) -> Iterable[Mapping[str, Any]]:
        """Key, lq and hr of every sample, for a model trained with the config `trained`."""
        scale = trained.network.scale
        if self.lq:
            return whole_pictures(self.lq, self.hr, scale=scale)
        assert self.pictures is not None
        return val_samples(
            self.pictures,
            hr_crop_size=self.data.eval_crop_size,
            num_draws=self.data.eval_draws,
            scale=scale,
            degradation=trained.degradation,
        )

    def version(self, trained: RunConfig) -> str:
        """Hash of the pictures, and of how they are cropped and, for the config `trained`, degraded."""
        d = self.data
        if self.lq:
            images = [self.lq, *([self.hr] if self.hr else [])]
            parts: dict[str, Any] = {
                "pictures": [[f"{file.key} {file.size}" for file in one.files] for one in images],
                "crop": d.eval_crop_border,
            }
        else:
            assert self.pictures is not None
            parts = {
                "pictures": self.pictures.version,
                "crop": [d.eval_crop_size, d.eval_draws, d.eval_crop_border],
                "scale": trained.network.scale,
                "degradation": to_dict(trained.degradation),
            }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def protocol(self) -> str:
        """What the scores mean, in one line."""
        d = self.data
        if self.lq:
            what = f"whole pictures of {d.test_lq_uri}" + (f" against {d.test_uri}" if self.hr else "")
        else:
            what = f"centre {d.eval_crop_size} px of {d.test_uri}, degraded in {d.eval_draws} ways"
        border = f"{d.eval_crop_border} px of border cropped"
        return f"{what}; PSNR, SSIM and NIQE on Y, {border}; LPIPS-alex 0.1 and DISTS on RGB"


def of_val(data: DataConfig) -> DataConfig:
    """The same, with data.val_uri as the set to evaluate on."""
    return replace(data, test_uri=data.val_uri, test_lq_uri="")


def find_held_out(data: DataConfig) -> HeldOut:
    """Lists the pictures of data.test_uri and data.test_lq_uri.

    Raises:
        DataError: There are no pictures, one cannot be read, or pairs do not match.
    """
    check(
        bool(data.test_uri or data.test_lq_uri),
        "set data.test_uri, data.test_lq_uri or both: there is nothing to evaluate on.",
    )
    if not data.test_lq_uri:
        with about_setting("data.test_uri"):
            pictures = find_pictures(data.test_uri)
        check_images(pictures, hr_crop_size=data.eval_crop_size)
        return HeldOut(data, pictures)
    hr = None
    if data.test_uri:
        with about_setting("data.test_uri"):
            hr = _listed(data.test_uri)
    with about_setting("data.test_lq_uri"):
        lq = _listed(data.test_lq_uri)
    if hr:
        check_pairs(lq, hr)
    return HeldOut(data, None, lq, hr)


def _listed(uri: str) -> Images:
    found = list_images(uri)
    refuse_unusable(uri, [file.problem for file in found.files])
    return found

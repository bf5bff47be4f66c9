"""Held-out sets to evaluate on: HR pictures that are degraded, or LR pictures with or without a reference."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ctmsr.config import check
from ctmsr.errors import DataError
from ctmsr.image import decode

from ..config.run_config import DataConfig, RunConfig
from ..infra.listing import ImageRef, list_images
from ..infra.storage import open_uri, read_bytes
from .pictures import Pictures, find_pictures
from .stream import check_images, val_samples


def whole_pictures(
    lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef], *, scale: int
) -> Iterator[dict[str, Any]]:
    """Uncropped LR pictures, each with its HR picture if `hr_refs` are given; loads one pair at a time.

    Yields:
        Rows of "key", "lq" and "hr" (uint8 HWC; None without a reference), in the order of `lq_refs`.

    Raises:
        DataError: A picture cannot be read, or HR is not `scale` times as large as LR.
    """
    (lq_system, _), (hr_system, _) = open_uri(lq_uri), open_uri(hr_uri or lq_uri)
    hr_paths = {pair_key(ref): ref.path for ref in hr_refs}
    for ref in lq_refs:
        lq_u8 = decode(read_bytes(lq_system, ref.path), name=ref.path)
        hr_u8 = None
        if path := hr_paths.get(pair_key(ref)):
            hr_u8 = decode(read_bytes(hr_system, path), name=path)
            (height, width), (lq_height, lq_width) = hr_u8.shape[:2], lq_u8.shape[:2]
            if (height, width) != (scale * lq_height, scale * lq_width):
                raise DataError(
                    f"{path} is {width}x{height} pixels and its LR picture {ref.path} "
                    f"{lq_width}x{lq_height}, not {scale} times smaller. Crop it, or remove the pair."
                )
        yield {"key": ref.key, "lq": lq_u8, "hr": hr_u8}


def check_pairs(lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef]) -> None:
    """Checks that every LR picture has exactly one HR picture.

    Raises:
        DataError: One has none, or two pictures of a folder share a key.
    """
    for uri, refs in ((lq_uri, lq_refs), (hr_uri, hr_refs)):
        keys = [pair_key(ref) for ref in refs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise DataError(f"{uri} has two pictures {twice[0]}.*, so pairs are ambiguous. Rename one.")
    known = {pair_key(ref) for ref in hr_refs}
    if alone := [ref.key for ref in lq_refs if pair_key(ref) not in known]:
        raise DataError(
            f"{len(alone)} of {len(lq_refs)} pictures under {lq_uri} have no HR picture of the same name "
            f"under {hr_uri}: {', '.join(alone[:3])}. Rename them, or set data.test_uri= to score without "
            "references."
        )


def pair_key(ref: ImageRef) -> str:
    """The key without its suffix, which the two pictures of a pair share."""
    return str(PurePosixPath(ref.key).with_suffix(""))


@dataclass(frozen=True)
class HeldOut:
    """The pictures of an evaluation, listed and checked before anything expensive starts."""

    data: DataConfig
    pictures: Pictures | None
    """HR pictures of data.test_uri that are degraded; None if there are LR pictures."""
    refs: tuple[ImageRef, ...] = ()
    """HR references of `lq_refs`, from data.test_uri."""
    lq_refs: tuple[ImageRef, ...] = ()
    """LR pictures of data.test_lq_uri."""

    def rows(self, trained: RunConfig) -> Iterable[Mapping[str, Any]]:
        """Key, lq and hr of every sample, for a model trained with the config `trained`."""
        scale = trained.network.scale
        if self.pictures is None:
            return whole_pictures(
                self.data.test_lq_uri, self.lq_refs, self.data.test_uri, self.refs, scale=scale
            )
        return val_samples(
            self.pictures,
            hr_crop_size=self.data.eval_crop_size,
            num_draws=self.data.eval_draws,
            scale=scale,
            degradation=trained.degradation,
        ).iter_rows()

    @property
    def protocol(self) -> str:
        """What the scores mean, in one line."""
        d = self.data
        if self.lq_refs:
            what = f"whole pictures of {d.test_lq_uri}" + (f" against {d.test_uri}" if self.refs else "")
        else:
            what = f"centre {d.eval_crop_size} px of {d.test_uri}, degraded in {d.eval_draws} ways"
        border = f"{d.eval_crop_border} px of border cropped"
        return f"{what}; PSNR, SSIM and NIQE on Y, {border}; LPIPS-alex 0.1 on RGB"


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
        pictures = find_pictures(data.test_uri)
        check_images(pictures, hr_crop_size=data.eval_crop_size)
        return HeldOut(data, pictures)
    refs = list_images(data.test_uri) if data.test_uri else ()
    lq_refs = list_images(data.test_lq_uri)
    if refs:
        check_pairs(data.test_lq_uri, lq_refs, data.test_uri, refs)
    return HeldOut(data, None, refs, lq_refs)

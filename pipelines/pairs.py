"""Whole pictures to evaluate on: LR pictures as they are, each with its HR picture where there is one."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from ctmsr.errors import DataError
from ctmsr.image import decode

from .storage import ImageRef, open_uri, read_bytes


def whole_pictures(
    lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef], *, scale: int
) -> Iterator[dict[str, Any]]:
    """LR pictures as they are, each with its HR picture where `hr_refs` are given; one pair in memory.

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
                    f"{lq_width}x{lq_height}, not {scale} times less. Crop it, or leave the pair out."
                )
        yield {"key": ref.key, "lq": lq_u8, "hr": hr_u8}


def check_pairs(lq_uri: str, lq_refs: Sequence[ImageRef], hr_uri: str, hr_refs: Sequence[ImageRef]) -> None:
    """Every LR picture needs exactly one HR picture.

    Raises:
        DataError: One has none, or two pictures of a folder have one key.
    """
    for uri, refs in ((lq_uri, lq_refs), (hr_uri, hr_refs)):
        keys = [pair_key(ref) for ref in refs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise DataError(f"{uri} holds two pictures {twice[0]}.*, so pairs are unclear. Rename one.")
    known = {pair_key(ref) for ref in hr_refs}
    if alone := [ref.key for ref in lq_refs if pair_key(ref) not in known]:
        raise DataError(
            f"{len(alone)} of {len(lq_refs)} pictures under {lq_uri} have no HR picture of their name under "
            f"{hr_uri}: {', '.join(alone[:3])}. Name pairs alike, or set data.test_uri= to score without."
        )


def pair_key(ref: ImageRef) -> str:
    """What the two pictures of a pair have in common: the key without its suffix."""
    return str(PurePosixPath(ref.key).with_suffix(""))

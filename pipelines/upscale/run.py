"""Lists the pictures to upscale, and upscales a few of them in this process."""

import hashlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ctmsr.errors import DataError

from ..infra.invocation import printable
from ..infra.listing import absolute, list_images, stem
from ..infra.progress import Bar, Screen, counted
from .upscaler import Outcome, Picture, Settings, Upscaler

FEW = 16
"""So few pictures are done before a cluster would have started and its workers loaded the model."""

_PART_BYTES = 240
"""Longest name of a result or of a folder of results, without `_x4.png`: file systems allow 255 bytes."""
_PATH_BYTES = {True: 1000, False: 4000}
"""Longest path of a result, in a store (S3 allows 1024 bytes) and on disk."""


def find_pictures(inputs: list[str], output: str) -> list[Picture]:
    """Lists the inputs; folders inside an input folder are kept in the output.

    Raises:
        DataError: An input contains no picture, two pictures would get the same name, a path would be too
            long, or the output is inside an input, so that the next run would upscale this one's results.
    """
    sources: dict[str, Picture] = {}
    num_others = 0
    folds_case = _folds_case(output)
    for uri in inputs:
        found = list_images(uri)
        num_others += found.num_others
        if found.folder == absolute(uri) and f"{output}/".startswith(f"{found.folder}/"):
            raise DataError(
                f"--output {output} is inside the input {found.folder}. Choose a location outside it."
            )
        for file in found.files:
            picture = Picture(found.folder, file.key, file.etag, target_of(file.key), file.problem)
            name = unicodedata.normalize("NFC", picture.target).casefold() if folds_case else picture.target
            other = sources.setdefault(name, picture)
            if other is not picture:
                raise DataError(
                    f"{other.folder}/{other.key} and {found.folder}/{file.key} would both become "
                    f"{output}/{picture.target}_x*. Rename one, or use two output folders."
                )
            if len(f"{output}/{picture.target}".encode()) > (limit := _PATH_BYTES["://" in output]):
                raise DataError(
                    f"the result of {found.folder}/{file.key} would have a path of more than {limit} "
                    "bytes. Choose a shorter --output, or name a folder inside the input."
                )
    if num_others:
        files = counted(num_others, "other file")
        print(
            f"left out: {files}, by the name's end. To upscale one anyway, name the file itself.", flush=True
        )
    return list(sources.values())


def target_of(key: str) -> str:
    """Path of a picture's result below the output folder, without `_x4.png`: its own, without the suffix.

    Keys in S3 may have empty parts and dots, which would lead out of the output folder; they are left out.
    A part too long for a file system is cut, and ends in its hash.
    """
    return "/".join(_short(part) for part in stem(key).split("/") if part not in ("", ".", ".."))


def _short(part: str) -> str:
    data = part.encode()
    if len(data) <= _PART_BYTES:
        return part
    digest = hashlib.blake2b(data, digest_size=6).hexdigest()
    return f"{data[: _PART_BYTES - 1 - len(digest)].decode(errors='ignore')}-{digest}"


def _folds_case(folder: str) -> bool:
    """Whether a local folder is on a file system for which `A.png` and `a.png` are one file."""
    place = Path(folder)
    if "://" in folder or not place.name:
        return False
    other = place.with_name(place.name.swapcase())
    if not place.exists() or place == other:
        return _folds_case(str(place.parent))
    return other.exists() and other.samefile(place)


def upscale_few(pictures: list[Picture], settings: Settings) -> Iterator[Outcome]:
    """Upscales the pictures in this process, one after the other, printing a line for each."""
    upscaler = Upscaler(settings)
    with Screen() as screen:
        for number, picture in enumerate(pictures, 1):
            if screen.is_live:
                label = printable(f"upscaling {picture.key.rpartition('/')[2]}")
                screen.show(Bar(label, number - 1, len(pictures), (f"{number} of {len(pictures)}",)))
            outcome = upscaler.upscale(picture)
            screen.end()
            if not outcome.problem:
                took = "done before" if outcome.existed else f"{outcome.seconds:.1f} s"
                screen.say(f"[{number}/{len(pictures)}] {outcome.path} -> {outcome.result} ({took})")
            yield outcome

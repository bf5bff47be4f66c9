"""Lists the pictures to upscale, and upscales a few of them in this process."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from ctmsr.errors import DataError

from ..infra.listing import absolute, pictures_at
from .upscaler import Outcome, Picture, Settings, Upscaler

FEW = 16
"""So few pictures are done before a cluster would have started and its workers loaded the model."""


def find_pictures(inputs: list[str], output: str) -> list[Picture]:
    """Lists the inputs; folders inside an input folder are kept in the output.

    Raises:
        DataError: An input contains no picture, two pictures would get the same name, or the output is inside
            an input, so that the next run would upscale the results of this one.
    """
    sources: dict[str, Picture] = {}
    for uri in inputs:
        folder, files = pictures_at(uri)
        if folder == absolute(uri) and f"{output}/".startswith(f"{folder}/"):
            raise DataError(f"--output {output} is inside the input {folder}. Choose a location outside it.")
        for file in files:
            picture = Picture(folder, file.key, file.etag, str(PurePosixPath(file.key).with_suffix("")))
            other = sources.setdefault(picture.target, picture)
            if other is not picture:
                raise DataError(
                    f"{other.folder}/{other.key} and {folder}/{file.key} would both become "
                    f"{output}/{picture.target}_x*. Rename one, or use two output folders."
                )
    return list(sources.values())


def upscale_few(pictures: list[Picture], settings: Settings) -> Iterator[Outcome]:
    """Upscales the pictures in this process, one after the other, printing a line for each."""
    upscaler = Upscaler(settings)
    for number, picture in enumerate(pictures, 1):
        outcome = upscaler.upscale(picture)
        if not outcome.problem:
            took = "done before" if outcome.existed else f"{outcome.seconds:.1f} s"
            print(f"[{number}/{len(pictures)}] {outcome.path} -> {outcome.result} ({took})", flush=True)
        yield outcome

"""Which pictures to upscale, and a few of them upscaled in this process."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from ctmsr.errors import DataError

from ..infra.listing import absolute, pictures_at
from .upscaler import Making, Outcome, Picture, Upscaler

FEW = 16
"""Pictures that are done before a cluster has started and its workers have loaded the model."""


def find_pictures(inputs: list[str], output: str) -> list[Picture]:
    """Lists the inputs; folders inside an input folder are kept in the output.

    Raises:
        DataError: An input holds no picture, two pictures would get the same name, or the output is inside an
            input, so that the next run would upscale what this one has made.
    """
    sources: dict[str, Picture] = {}
    for uri in inputs:
        folder, files = pictures_at(uri)
        if folder == absolute(uri) and f"{output}/".startswith(f"{folder}/"):
            raise DataError(f"--output {output} is inside the input {folder}. Name a place beside it.")
        for file in files:
            picture = Picture(folder, file.key, file.etag, str(PurePosixPath(file.key).with_suffix("")))
            other = sources.setdefault(picture.target, picture)
            if other is not picture:
                raise DataError(
                    f"{other.folder}/{other.key} and {folder}/{file.key} would both become "
                    f"{output}/{picture.target}_x*.png. Rename one, or upscale them into two folders."
                )
    return list(sources.values())


def upscale_few(pictures: list[Picture], making: Making) -> Iterator[Outcome]:
    """Makes them here, one after the other, with a line for each."""
    upscaler = Upscaler(making)
    for number, picture in enumerate(pictures, 1):
        outcome = upscaler.upscale(picture)
        if not outcome.problem:
            took = "done before" if outcome.was_there else f"{outcome.seconds:.1f} s"
            print(f"[{number}/{len(pictures)}] {outcome.path} -> {outcome.result} ({took})", flush=True)
        yield outcome

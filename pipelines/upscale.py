"""Upscales pictures with a registered model: `python -m pipelines.upscale photo.jpg --output upscaled`.

Up to 16 pictures are done in this process, which needs no cluster. More go through Ray, in which every GPU,
or without GPUs every core, has a worker that holds the model.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath

from pyarrow import fs

from ctmsr.errors import DataError

from .command import run
from .config import RunConfig
from .scan import Listed, list_files
from .storage import IMAGE_SUFFIXES, check_lasting, list_images, open_uri
from .tracking import preflight
from .upscaler import Making, Outcome, Picture, Upscaler, find_version

EXAMPLES = """\
examples:
  one photo, with the newest released model:
    python -m pipelines.upscale photo.jpg --output upscaled
  a bucket of any size, with version 3 of the model from a team's server; RAY_ADDRESS names a cluster:
    python -m pipelines.upscale s3://bucket/small --output s3://bucket/large \\
        --model models:/ctmsr-x4/3 --tracking-uri http://mlflow:5000
  another take on the invented detail:
    python -m pipelines.upscale photo.jpg --output take2 --seed 2

The same command again continues one that stopped: a picture is made again only if it has changed, or for
another version of the model or another seed.
The model comes with its own Python code, which runs here: name only a registry you trust.
Exit status: 0 all done; 1 some pictures could not be read, the others are done; 2 no picture, model or place
to write to."""

_FEW = 16
"""Pictures that are done before a cluster has started and its workers have loaded the model."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.upscale",
        description="Upscale pictures with a model from the MLflow registry; NAME.jpg becomes NAME_x4.png.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, or folder of pictures; path or URI"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="path or URI; made if there is none"
    )
    champion = f"models:/{RunConfig.model_name}@champion"
    parser.add_argument("--model", default=champion, help="default %(default)s")
    parser.add_argument(
        "--tracking-uri", default=RunConfig.tracking_uri, help="MLflow with the model; default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="picks the invented detail; default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Upscales every input; a picture that cannot be read is named, and the others are still done."""
    arguments = build_parser().parse_args(argv)
    check_lasting("--output", arguments.output)
    output = _absolute(arguments.output)
    pictures = find_pictures(arguments.inputs, output)
    version = find_version(preflight(arguments.tracking_uri), arguments.model)
    making = Making(version, arguments.seed, output)
    if len(pictures) <= _FEW:
        outcomes = upscale_few(pictures, making)
    else:
        from .upscale_many import upscale_many  # Ray takes seconds to import

        outcomes = upscale_many(pictures, making)
    num_bad = 0
    for outcome in outcomes:
        if outcome.problem:
            num_bad += 1
            print(f"error: {outcome.problem}", file=sys.stderr, flush=True)
    if num_bad:
        print(f"error: {num_bad} of {len(pictures)} pictures could not be read.", file=sys.stderr)
    return 1 if num_bad else 0


def find_pictures(inputs: list[str], output: str) -> list[Picture]:
    """Lists the inputs; folders inside an input folder are kept in the output.

    Raises:
        DataError: An input holds no picture, two pictures would get the same name, or the output is inside an
            input, so that the next run would upscale what this one has made.
    """
    sources: dict[str, Picture] = {}
    for uri in inputs:
        folder, files = _list(uri)
        if folder == _absolute(uri) and f"{output}/".startswith(f"{folder}/"):
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


def _list(uri: str) -> tuple[str, list[Listed]]:
    """The pictures below a folder, and the folder; or the one picture that the URI names, and its folder."""
    place = _absolute(uri)
    file_system, root = open_uri(uri, attempts=3)
    with suppress(OSError):
        info = file_system.get_file_info(root)
        if info.type == fs.FileType.File:
            place = place.rpartition("/")[0] or "/"
            listed = [Listed(info.base_name, info.size, f"{info.mtime_ns:x}-{info.size:x}")]
        else:
            listed = list(list_files(place))
        files = [file for file in listed if file.key.lower().endswith(IMAGE_SUFFIXES)]
        if files:
            return place, files
    list_images(uri)  # raises, and says why
    raise DataError(f"{uri} has changed while it was being listed. Give the same command again.")


def upscale_few(pictures: list[Picture], making: Making) -> Iterator[Outcome]:
    """Makes them here, one after the other, with a line for each."""
    upscaler = Upscaler(making)
    for number, picture in enumerate(pictures, 1):
        outcome = upscaler.upscale(picture)
        if not outcome.problem:
            took = "done before" if outcome.was_there else f"{outcome.seconds:.1f} s"
            print(f"[{number}/{len(pictures)}] {outcome.path} -> {outcome.result} ({took})", flush=True)
        yield outcome


def _absolute(uri: str) -> str:
    return uri.rstrip("/") if "://" in uri else open_uri(uri)[1]


if __name__ == "__main__":
    run(main)

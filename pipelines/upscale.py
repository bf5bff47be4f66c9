"""Upscales pictures with a registered model: `python -m pipelines.upscale photo.jpg --output upscaled`."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from mlflow.pyfunc import PyFuncModel
from pyarrow.fs import FileSystem

from ctmsr.errors import DataError
from ctmsr.image import decode, encode_png

from .command import run
from .config import RunConfig
from .register import load_model
from .storage import list_images, open_uri, read_bytes, write_bytes
from .tracking import preflight

EXAMPLES = """\
examples:
  one photo, with the newest released model:
    python -m pipelines.upscale photo.jpg --output upscaled
  a folder in object storage, with version 3 of the model, from a team's server:
    python -m pipelines.upscale s3://bucket/small --output s3://bucket/large \\
        --model models:/ctmsr-x4/3 --tracking-uri http://mlflow:5000
  another take on the invented detail:
    python -m pipelines.upscale photo.jpg --output take2 --seed 2

The model comes with its own Python code, which runs here: name only a registry you trust.
Exit status: 0 all done; 1 some pictures could not be read, the others are done; 2 no picture, model or place
to write to."""


@dataclass(frozen=True)
class Picture:
    """One picture to upscale."""

    file_system: FileSystem
    path: str
    target: str
    """Where the result goes, without `_x4.png`."""


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
    pictures = find_pictures(arguments.inputs, arguments.output)
    model = load_model(preflight(arguments.tracking_uri), arguments.model)
    num_bad = 0
    for number, picture in enumerate(pictures, 1):
        started = time.monotonic()
        try:
            lq_u8 = decode(read_bytes(picture.file_system, picture.path), name=picture.path)
        except DataError as error:
            num_bad += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        written = upscale_one(model, lq_u8, picture.target, arguments.seed)
        took = time.monotonic() - started
        print(f"[{number}/{len(pictures)}] {picture.path} -> {written} ({took:.1f} s)", flush=True)
    if num_bad:
        print(f"error: {num_bad} of {len(pictures)} pictures could not be read.", file=sys.stderr)
    return 1 if num_bad else 0


def find_pictures(inputs: list[str], output: str) -> list[Picture]:
    """Lists the inputs; folders inside an input folder are kept in the output.

    Raises:
        DataError: An input holds no picture, or two pictures would get the same name.
    """
    sources: dict[str, Picture] = {}
    for uri in inputs:
        file_system, _ = open_uri(uri)
        for image in list_images(uri):
            target = f"{output.rstrip('/')}/{PurePosixPath(image.key).with_suffix('')}"
            if target in sources:
                raise DataError(
                    f"{sources[target].path} and {image.path} would both become {target}_x*.png. "
                    "Rename one, or upscale them into two folders."
                )
            sources[target] = Picture(file_system, image.path, target)
    return list(sources.values())


def upscale_one(model: PyFuncModel, lq_u8: np.ndarray, target: str, seed: int) -> str:
    """Writes the upscaled picture as `<target>_x<scale>.png`; returns its URI."""
    sr_u8 = np.asarray(model.predict(lq_u8[None], params={"seed": seed}))[0]
    uri = f"{target}_x{len(sr_u8) // len(lq_u8)}.png"
    write_bytes(uri, encode_png(sr_u8))
    return uri


if __name__ == "__main__":
    run(main)

"""Upscale pictures with a registered model: `python -m pipelines.upscale photo.jpg`.

Up to 16 pictures are upscaled in this process, without a cluster. More go through Ray, with a worker on every
GPU or, if there are none, on every core.
"""

import argparse
import sys

from ..config.command_line import add_device_option, add_model_options
from ..infra.exit_status import run
from ..infra.invocation import command_parser, printable

EXAMPLES = """\
examples:
  one photo, with the champion of the registry, or the starter model if there is none yet:
    python -m pipelines.upscale photo.jpg
  a bucket of any size, with version 3 of the model from a team's server; RAY_ADDRESS names a cluster:
    python -m pipelines.upscale s3://bucket/small --output s3://bucket/large \\
        --model models:/ctmsr-x4/3 --tracking-uri http://mlflow:5000
  another take on the invented detail:
    python -m pipelines.upscale photo.jpg --output take2 --seed 2

Run the same command again to resume one that stopped: a picture is upscaled again only if it has changed, or
if the model's version or the seed has.
A registered model comes with its own Python code, which runs here: use only registries you trust.
Exit status: 0 all done; 1 some pictures could not be read, the others are done; 2 there was no picture, no
model or no place to write to."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = "Upscale pictures in one network call each; NAME.jpg becomes NAME_x4.png."
    parser = command_parser("upscale", summary, EXAMPLES)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, or folder of pictures; path or URI"
    )
    parser.add_argument(
        "--output", default=".", metavar="FOLDER", help="path or URI; default: the current folder"
    )
    add_model_options(parser)
    add_device_option(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="selects the invented detail; default %(default)s"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Upscales every input; pictures that cannot be read are reported, and the others still done."""
    arguments = build_parser().parse_args(argv)
    # Imported late: torch takes seconds, and --help or a bad option should not wait for it.
    from ctmsr.model.device import choose_device, device_title

    from ..infra.listing import absolute
    from ..infra.storage import check_outlives_job
    from ..tracking.released import find_released
    from .run import FEW, find_pictures, upscale_few
    from .upscaler import Settings

    check_outlives_job("--output", arguments.output)
    output = absolute(arguments.output)
    pictures = find_pictures(arguments.inputs, output)
    model = find_released(arguments.model, arguments.tracking_uri, arguments.device)
    settings = Settings(model, arguments.seed, output)
    if len(pictures) <= FEW:
        print(f"computing on {device_title(choose_device(arguments.device))}", flush=True)
        outcomes = upscale_few(pictures, settings)
    else:
        from .on_ray import upscale_many  # Ray takes seconds to import

        outcomes = upscale_many(pictures, settings)
    num_bad = 0
    for outcome in outcomes:
        if outcome.problem:
            num_bad += 1
            print(f"error: {printable(outcome.problem)}", file=sys.stderr, flush=True)
    if num_bad:
        print(f"error: {num_bad} of {len(pictures)} pictures could not be read.", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    run(main)

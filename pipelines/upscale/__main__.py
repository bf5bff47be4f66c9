"""Upscales pictures with a registered model: `python -m pipelines.upscale photo.jpg --output upscaled`.

Up to 16 pictures are done in this process, which needs no cluster. More go through Ray, in which every GPU,
or without GPUs every core, has a worker that holds the model.
"""

import argparse
import sys

from ..config.command_line import add_model_options
from ..infra.exit_status import run
from ..infra.invocation import command_parser

EXAMPLES = """\
examples:
  one photo, with the champion of the registry, or the starter model where there is none yet:
    python -m pipelines.upscale photo.jpg --output upscaled
  a bucket of any size, with version 3 of the model from a team's server; RAY_ADDRESS names a cluster:
    python -m pipelines.upscale s3://bucket/small --output s3://bucket/large \\
        --model models:/ctmsr-x4/3 --tracking-uri http://mlflow:5000
  another take on the invented detail:
    python -m pipelines.upscale photo.jpg --output take2 --seed 2

The same command again continues one that stopped: a picture is made again only if it has changed, or for
another version of the model or another seed.
A registered model comes with its own Python code, which runs here: name only a registry you trust.
Exit status: 0 all done; 1 some pictures could not be read, the others are done; 2 no picture, model or place
to write to."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = "Upscale pictures in one network call each; NAME.jpg becomes NAME_x4.png."
    parser = command_parser("upscale", summary, EXAMPLES)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, or folder of pictures; path or URI"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="path or URI; made if there is none"
    )
    add_model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="picks the invented detail; default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Upscales every input; a picture that cannot be read is named, and the others are still done."""
    arguments = build_parser().parse_args(argv)
    # torch takes seconds to import, which --help and a mistake in the options do not wait for.
    from ..infra.listing import absolute
    from ..infra.storage import check_outlives_job
    from ..tracking.released import find_released
    from .run import FEW, find_pictures, upscale_few
    from .upscaler import Making

    check_outlives_job("--output", arguments.output)
    output = absolute(arguments.output)
    pictures = find_pictures(arguments.inputs, output)
    model = find_released(arguments.model, arguments.tracking_uri)
    making = Making(model, arguments.seed, output)
    if len(pictures) <= FEW:
        outcomes = upscale_few(pictures, making)
    else:
        from .on_ray import upscale_many  # Ray takes seconds to import

        outcomes = upscale_many(pictures, making)
    num_bad = 0
    for outcome in outcomes:
        if outcome.problem:
            num_bad += 1
            print(f"error: {outcome.problem}", file=sys.stderr, flush=True)
    if num_bad:
        print(f"error: {num_bad} of {len(pictures)} pictures could not be read.", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    run(main)

"""Index a folder of pictures: `python -m pipelines.index s3://bucket/photos`.

Every picture is fetched, hashed and decoded once. Pictures that training cannot use are set aside with the
reason; nothing is deleted. An index is a folder:

    index-VERSION.parquet       usable pictures: key, size, etag, width, height, format, sha256
    quarantine-VERSION.parquet  the others, with status and detail
    summary.json                version, counts and reasons; written last, so the files it names are complete
    parts/                      results of the scan by chunk of the listing; existing ones are reused
"""

import argparse
import json
import shlex

from ctmsr.config import check

from ..infra.exit_status import run
from ..infra.invocation import command_parser

EXAMPLES = """\
examples:
  a bucket of any size; run it again to resume an interrupted scan or to add new pictures:
    python -m pipelines.index s3://bucket/photos
  HR pictures with LR counterparts, which training then uses instead of degrading:
    python -m pipelines.index s3://bucket/hr --lq s3://bucket/lr --out s3://bucket/pairs.index

reasons for quarantine:
  unreadable  damaged, or access is denied    truncated   the file ends early
  too-small   a side below --min-side         bomb        too many pixels to decode safely
  mode        no fixed white level            duplicate   same bytes as another picture, which is kept
  missing-lq  no LR picture of the same name  bad-lq      LR picture unreadable or of the wrong size
  gone        deleted during the scan"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = "Check every picture in a folder and write an index of those fit for training."
    parser = command_parser("index", summary, EXAMPLES)
    parser.add_argument("uri", metavar="FOLDER", help="path or URI; searched recursively")
    parser.add_argument("--out", metavar="URI", help="the index, ending in .index; default FOLDER.index")
    parser.add_argument("--lq", default="", metavar="FOLDER", help="LR pictures with the same names")
    parser.add_argument(
        "--min-side", type=int, default=32, metavar="PX", help="shortest side allowed; default %(default)s"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ..data.pictures import INDEX_SUFFIX
    from ..infra.cluster import ray_cluster
    from ..infra.listing import absolute, iter_images
    from ..infra.storage import check_outlives_job, write_bytes
    from .run import build_index
    from .scan import Settings

    out = (arguments.out or arguments.uri.rstrip("/") + INDEX_SUFFIX).rstrip("/")
    check_outlives_job("--out", out)
    check(out.endswith(INDEX_SUFFIX), f"--out must end in {INDEX_SUFFIX}, got {out!r}.")
    check(arguments.min_side >= 1, f"--min-side must be at least 1, got {arguments.min_side}.")
    settings = Settings(absolute(arguments.uri), absolute(arguments.lq), arguments.min_side)
    inside = absolute(out).startswith(f"{settings.uri}/")
    check(not inside, f"--out {out} is inside the folder it indexes. Choose a location outside it.")
    for uri in filter(None, (settings.uri, settings.lq_uri)):
        next(iter_images(uri))  # raises if there are none
    write_bytes(f"{out}/scan.json", json.dumps(vars(settings)).encode())  # raises if it is not writable
    with ray_cluster():
        summary = build_index(settings, absolute(out))
    quarantined = sum(summary["quarantined"].values())
    print(
        f"{summary['pictures']} pictures indexed, {quarantined} quarantined, {summary['ignored']} other files"
    )
    for reason, number in summary["quarantined"].items():
        print(f"  {reason:<12}{number}")
    print(f"written: {out}  version {summary['version']}")
    print(f"next: python -m pipelines.train --set {shlex.quote(f'data.train_uri={out}')}")
    return 0


if __name__ == "__main__":
    run(main)

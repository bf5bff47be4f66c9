"""Index a folder of pictures: `python -m pipelines.index s3://bucket/photos`.

Every picture is fetched, hashed and decoded once. What training cannot use is set aside with the reason, and
nothing is deleted. An index is a folder:

    index-VERSION.parquet       the good pictures: key, size, etag, width, height, format, sha256
    quarantine-VERSION.parquet  the others, with status and detail
    summary.json                version, counts and reasons; written last, so it names complete files
    parts/                      the scan itself, by chunks of the listing: what is there is not scanned again
"""

import argparse
import json

from ctmsr.config import check

from ..data.pictures import INDEX_SUFFIX
from ..infra.cluster import ray_cluster
from ..infra.exit_status import run
from ..infra.listing import absolute, iter_images
from ..infra.storage import check_lasting, write_bytes
from .run import build_index
from .scan import Settings

EXAMPLES = """\
examples:
  a bucket, of any size; the same command again continues a scan that stopped, or adds what is new:
    python -m pipelines.index s3://bucket/photos
  pictures that have LR versions of their own, which training then uses instead of degrading:
    python -m pipelines.index s3://bucket/hr --lq s3://bucket/lr --out s3://bucket/pairs.index

reasons for the quarantine:
  unreadable  no picture, or damaged          truncated   the file ends too early
  too-small   a side below --min-side         bomb        more pixels than can be decoded safely
  mode        no fixed white level            duplicate   the same bytes as another, which stays
  missing-lq  no LR picture of its name       bad-lq      LR is unreadable or of another size
  gone        deleted during the scan"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.index",
        description="Look once at every picture of a folder, and write an index of those fit for training.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("uri", metavar="FOLDER", help="path or URI; searched at any depth")
    parser.add_argument("--out", metavar="URI", help="the index, ending in .index; default FOLDER.index")
    parser.add_argument("--lq", default="", metavar="FOLDER", help="LR pictures of the same names")
    parser.add_argument("--min-side", type=int, default=32, metavar="PX", help="default %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    out = (arguments.out or arguments.uri.rstrip("/") + INDEX_SUFFIX).rstrip("/")
    check_lasting("--out", out)
    check(out.endswith(INDEX_SUFFIX), f"--out must end in {INDEX_SUFFIX}, got {out!r}.")
    check(arguments.min_side >= 1, f"--min-side must be at least 1, got {arguments.min_side}.")
    settings = Settings(absolute(arguments.uri), absolute(arguments.lq), arguments.min_side)
    inside = absolute(out).startswith(f"{settings.uri}/")
    check(not inside, f"--out {out} is inside the folder it indexes. Name a place beside it.")
    for uri in filter(None, (settings.uri, settings.lq_uri)):
        next(iter_images(uri))  # raises where there is none
    write_bytes(f"{out}/scan.json", json.dumps(vars(settings)).encode())  # raises where it is refused
    with ray_cluster():
        summary = build_index(settings, absolute(out))
    quarantined = sum(summary["quarantined"].values())
    print(
        f"{summary['pictures']} pictures indexed, {quarantined} quarantined, {summary['ignored']} other files"
    )
    for reason, number in summary["quarantined"].items():
        print(f"  {reason:<12}{number}")
    print(f"written: {out}  version {summary['version']}")
    print(f"next: python -m pipelines.train --set data.train_uri={out}")
    return 0


if __name__ == "__main__":
    run(main)

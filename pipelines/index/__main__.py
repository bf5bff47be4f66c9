"""Index a folder of pictures: `python -m pipelines.index s3://bucket/photos`.

Every picture is fetched, hashed and decoded once, those in tars too. Pictures that training cannot use are
set aside with the reason; nothing is deleted. An index is a folder:

    index-VERSION.parquet       usable pictures: key, size, etag, width, height, format, sha256
    quarantine-VERSION.parquet  the others, with status and detail
    summary.json                version, counts and reasons; written last, so the files it names are complete
    parts/                      results of the scan by chunk of the listing; existing ones are reused
"""

import argparse
import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctmsr.config import check

from ..infra.exit_status import run
from ..infra.invocation import command_parser

if TYPE_CHECKING:
    from .scan import Settings

EXAMPLES = """\
examples:
  a bucket of any size; run it again to resume an interrupted scan or to add new pictures:
    python -m pipelines.index s3://bucket/photos
  HR pictures with LR counterparts, which training then uses instead of degrading:
    python -m pipelines.index s3://bucket/hr --lq s3://bucket/lr --out s3://bucket/pairs.index
  pictures from the web, without banners, pictures out of focus and what is there in several sizes:
    python -m pipelines.index s3://bucket/web --max-aspect 3 --min-detail 0.2 --near-duplicates 2
  photographs that many runs train on, in tars of about 256 MB; run it again to resume it:
    python -m pipelines.index s3://bucket/photos --pack s3://bucket/tars

reasons for quarantine:
  unreadable  damaged, or access is denied    truncated   the file ends early
  too-small   a side below --min-side         bomb        too many pixels to decode safely
  mode        no fixed white level            duplicate   same bytes as another picture, which is kept
  missing-lq  no LR picture of the same name  bad-lq      LR picture unreadable or of the wrong size
  gone        deleted during the scan         too-narrow  more than --max-aspect
  no-detail   less than --min-detail          near-duplicate  looks like a larger one, which is kept
  compressed  a tar whose members cannot be read one by one"""


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
    parser.add_argument(
        "--max-aspect", type=float, default=0, metavar="RATIO", help="longest side over shortest; default any"
    )
    parser.add_argument(
        "--min-detail",
        type=float,
        default=0,
        metavar="FRACTION",
        help="part of the picture that has to be neither flat nor blurred; default %(default)s",
    )
    parser.add_argument(
        "--near-duplicates",
        type=int,
        metavar="BITS",
        help="keep the largest of pictures that look alike: whose 64-bit hashes differ in at most BITS bits, "
        "0 to 6; default all",
    )
    parser.add_argument("--pack", metavar="URI", help="write the usable pictures into tars below this folder")
    parser.add_argument(
        "--tar-mb", type=float, default=256, metavar="MB", help="size of a tar, about; default %(default)s"
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
    from .pack import pack
    from .run import build_index

    out = (arguments.out or arguments.uri.rstrip("/") + INDEX_SUFFIX).rstrip("/")
    check_outlives_job("--out", out)
    check(out.endswith(INDEX_SUFFIX), f"--out must end in {INDEX_SUFFIX}, got {out!r}.")
    settings = _settings(arguments)
    if arguments.pack:
        _check_pack(arguments)
    for name, place in (("--out", out), ("--pack", arguments.pack)):
        inside = place and f"{absolute(place)}/".startswith(f"{settings.uri}/")
        check(not inside, f"{name} {place} is inside the folder it indexes. Choose a location outside it.")
    for uri in filter(None, (settings.uri, settings.lq_uri)):
        next(iter_images(uri, shards=not settings.lq_uri))  # raises if there are none
    write_bytes(f"{out}/scan.json", json.dumps(vars(settings)).encode())  # raises if it is not writable
    with ray_cluster():
        summary = build_index(settings, absolute(out))
        if arguments.pack:
            _report(summary, out)
            tars = absolute(arguments.pack)
            size = int(1e6 * arguments.tar_mb)
            summary = pack(absolute(out), tars, shard_bytes=size, min_side=settings.min_side)
            out = arguments.pack.rstrip("/") + INDEX_SUFFIX
    _report(summary, out)
    print(f"next: python -m pipelines.train --set {shlex.quote(f'data.train_uri={out}')}")
    return 0


def _report(summary: Mapping[str, Any], out: str) -> None:
    quarantined = sum(summary["quarantined"].values())
    print(
        f"{summary['pictures']} pictures indexed, {quarantined} quarantined, {summary['ignored']} other files"
    )
    for reason, number in summary["quarantined"].items():
        print(f"  {reason:<16}{number}")
    print(f"written: {out}  version {summary['version']}")


def _check_pack(arguments: argparse.Namespace) -> None:
    from ..data.pictures import INDEX_SUFFIX
    from ..infra.storage import check_outlives_job

    check_outlives_job("--pack", arguments.pack)
    check(
        not arguments.lq, "--pack writes no pairs: leave out --lq, or train on pairs as files of their own."
    )
    check(arguments.tar_mb > 0, f"--tar-mb must be above 0, got {arguments.tar_mb}.")
    check(
        not arguments.pack.rstrip("/").endswith(INDEX_SUFFIX),
        f"--pack is a folder for tars, whose index will be beside it; got {arguments.pack!r}. Leave out "
        f"{INDEX_SUFFIX}.",
    )


def _settings(arguments: argparse.Namespace) -> "Settings":
    from ..infra.listing import absolute
    from .near import MAX_DISTANCE
    from .scan import Settings

    min_side, max_aspect = arguments.min_side, arguments.max_aspect
    min_detail, bits = arguments.min_detail, arguments.near_duplicates
    check(min_side >= 1, f"--min-side must be at least 1, got {min_side}.")
    check(
        not max_aspect or max_aspect >= 1,
        f"--max-aspect must be at least 1, or 0 for any, got {max_aspect:g}.",
    )
    check(0 <= min_detail <= 1, f"--min-detail must be from 0 to 1, got {min_detail:g}.")
    check(
        bits is None or 0 <= bits <= MAX_DISTANCE,
        f"--near-duplicates must be from 0 to {MAX_DISTANCE} bits, got {bits}.",
    )
    return Settings(absolute(arguments.uri), absolute(arguments.lq), min_side, max_aspect, min_detail, bits)


if __name__ == "__main__":
    run(main)

"""Serve a registered model over HTTP, with a page to drop pictures on: `python -m pipelines.serve`.

Ray Serve runs up to a replica of the model on every GPU of the cluster, or a single one if there are no GPUs.
"""

import argparse
import os
import signal
import sys
import threading

from ctmsr.config import check

from ..config.command_line import add_device_option, add_model_options
from ..infra.exit_status import run
from ..infra.invocation import command_parser

EXAMPLES = """\
examples:
  the champion of the registry, on this machine only; then open http://127.0.0.1:8000
    python -m pipelines.serve
  without the page:
    curl --data-binary @photo.jpg http://127.0.0.1:8000/upscale > photo_x4.png
    curl --data-binary @photo.jpg -H 'Accept: image/jpeg' http://127.0.0.1:8000/upscale > photo_x4.jpg

Anyone who can reach the port can upscale, unless there is a token that clients must show: in the environment
as CTMSR_SERVE_TOKEN, or in a file. Before you set another --host, put a proxy with TLS in front, and a login
or a token. A registered model comes with its own Python code, which runs here: use registries you trust."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("serve", "Serve a model over HTTP, with a page to drop pictures on.", EXAMPLES)
    add_model_options(parser)
    add_device_option(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default %(default)s, this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="default %(default)s")
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=2.0,
        metavar="N",
        help="largest picture accepted; default %(default)s",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="time limit for one picture; default %(default)s",
    )
    parser.add_argument(
        "--strip-metadata", action="store_true", help="leave out EXIF, XMP and resolution of the pictures"
    )
    parser.add_argument(
        "--token-file", metavar="PATH", help="file with the token that clients must show; default: none"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serves until it is interrupted."""
    arguments = build_parser().parse_args(argv)
    check(arguments.max_megapixels > 0, f"--max-megapixels must be above 0, got {arguments.max_megapixels}.")
    check(arguments.timeout > 0, f"--timeout must be above 0, got {arguments.timeout}.")
    check(0 < arguments.port < 65536, f"--port must be from 1 to 65535, got {arguments.port}.")
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from .application import Arguments, find
    from .limits import LOOPBACK, names_of
    from .run import serving
    from .token import TOKEN_ENV

    if arguments.host not in LOOPBACK and not (arguments.token_file or os.environ.get(TOKEN_ENV)):
        open_to_all = f"warning: anyone who reaches port {arguments.port} can upscale."
        print(f"{open_to_all} Set {TOKEN_ENV}, or --token-file.", file=sys.stderr)
    served = Arguments(
        model=arguments.model,
        tracking_uri=arguments.tracking_uri,
        device=arguments.device,
        max_megapixels=arguments.max_megapixels,
        timeout=arguments.timeout,
        strip_metadata=arguments.strip_metadata,
        hosts=",".join(sorted(names_of(arguments.host))) or "*",
        token_file=os.path.abspath(arguments.token_file) if arguments.token_file else None,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain `kill` cleans up like Ctrl-C
    found = find(served)
    with serving(served, found, host=arguments.host, port=arguments.port) as url:
        print(f"{found.uri} is at {url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    run(main)

"""Serve a registered model over HTTP, with a page to drop pictures on: `python -m pipelines.serve`.

Ray Serve runs a replica of the model on every GPU of the cluster, or a single one if there are no GPUs.
"""

import argparse
import signal
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

Anyone who can reach the port can upscale: there is no password. Before you set another --host, put a proxy
with TLS and a login in front. A registered model comes with its own Python code, which runs here: use only
registries you trust."""


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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serves until it is interrupted."""
    arguments = build_parser().parse_args(argv)
    check(arguments.max_megapixels > 0, f"--max-megapixels must be above 0, got {arguments.max_megapixels}.")
    check(arguments.timeout > 0, f"--timeout must be above 0, got {arguments.timeout}.")
    check(0 < arguments.port < 65536, f"--port must be from 1 to 65535, got {arguments.port}.")
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ..tracking.released import find_released
    from .run import serving
    from .server import Limits, names_of

    model = find_released(arguments.model, arguments.tracking_uri, arguments.device)
    limits = Limits(round(arguments.max_megapixels * 1e6), arguments.timeout, hosts=names_of(arguments.host))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain `kill` cleans up like Ctrl-C
    with serving(model, host=arguments.host, port=arguments.port, limits=limits) as url:
        print(f"{model.uri} is at {url} (Ctrl-C stops it)", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    run(main)

"""Run the whole system on real photographs, on this machine: `make demo`.

Starts an S3 server on loopback, uploads photographs that ship with scikit-image and scikit-learn, then just
calls the other pipelines: tune, train, evaluate, register and, in a new process, upscale. The starter model
is fine-tuned; for comparison, the same network is also trained from scratch for as many steps.
"""

import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from ctmsr.errors import UserError

from ..infra.exit_status import run
from ..infra.invocation import as_typed, command_parser

_NEEDED = ("moto", "sklearn")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("demo", __doc__ or "")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="emptied first; default %(default)s"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"the demo needs {' and '.join(missing)}. Run pip install '.[demo]' in the clone.")
    # Imported late: Ray, torch and MLflow take seconds, and --help should not wait for them.
    from ..tune.space import check_space
    from .bucket import s3_server, upload_photos
    from .run import demo_config, run_pipelines

    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain `kill` cleans up like Ctrl-C
    shutil.rmtree(arguments.output, ignore_errors=True)
    config = demo_config(arguments.output, arguments.overrides)
    check_space(config)
    with s3_server():
        upload_photos()
        picture = run_pipelines(config, arguments.output)
    print(f"\npicture    {picture}  (bicubic | from scratch | fine-tuned | HR)")
    print(f"took       {time.monotonic() - started:.0f} s")
    folder = ".venv/bin/" if sys.executable == str(Path(".venv/bin/python").absolute()) else ""
    print(as_typed(_NEXT.format(folder=folder, tracking_uri=config.tracking_uri)))
    return 0


_NEXT = """
next, with your own pictures:
  {folder}python -m pipelines.upscale PHOTO --output upscaled --tracking-uri {tracking_uri}
  {folder}python -m pipelines.train --set name=mine --set data.train_uri=FOLDER --set data.val_uri=FOLDER
  {folder}mlflow ui --backend-store-uri {tracking_uri}"""


if __name__ == "__main__":
    run(main)

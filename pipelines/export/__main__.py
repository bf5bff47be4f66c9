"""Export a model for other programs: `python -m pipelines.export MODEL --to onnx`."""

import argparse
from pathlib import Path

from ..config.defaults import TRACKING_URI
from ..infra.exit_status import run
from ..infra.invocation import command_parser
from .formats import FORMATS

EXAMPLES = """\
examples:
  the champion for ONNX Runtime, on any device and from any language:
    python -m pipelines.export models:/ctmsr-x4@champion --to onnx
  the starter model for ComfyUI and chaiNNer:
    python -m pipelines.export starter --to spandrel --output starter.safetensors
  a checkpoint as a folder for the Hugging Face Hub, which `init_uri` takes, too:
    python -m pipelines.export runs/first/checkpoint_... --to hf --output first-x4

The library that it is for reads the export back. It is kept only if that gives the same pictures as torch."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:<10}{form.text}" for name, form in FORMATS.items())
    summary = "Export a model for other programs."
    parser = command_parser("export", summary, f"formats:\n{listed}\n\n{EXAMPLES}")
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="models:/NAME@ALIAS or models:/NAME/VERSION in the registry, starter, or a checkpoint's URI",
    )
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="the format")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="new file or folder; default: RUN-xSCALE and the format's suffix, in the current folder",
    )
    parser.add_argument(
        "--tracking-uri", default=TRACKING_URI, help="MLflow with the model; default %(default)s"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes the export and says where it is."""
    arguments = build_parser().parse_args(argv)
    FORMATS[arguments.to].check_packages(arguments.to)
    # Imported late: torch takes seconds, and --help or a bad option should not wait for it.
    from .run import export
    from .source import TOLERANCE

    path, difference = export(arguments.model, arguments.to, arguments.output, arguments.tracking_uri)
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    print(
        f"written: {path} ({size / 1e6:.1f} MB; differs from torch by {difference:.1g} of the range of "
        f"pictures at most, {TOLERANCE:g} is allowed)"
    )
    return 0


if __name__ == "__main__":
    run(main)

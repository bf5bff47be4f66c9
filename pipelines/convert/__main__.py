"""Convert the authors' `.pth` into a checkpoint, or a checkpoint into a `.pth`."""

from pathlib import Path

from ctmsr.errors import ConfigError

from ..config.command_line import config_parser, print_config, resolve
from ..infra.exit_status import run

EXAMPLES = """\
  turn the published x4 model into a checkpoint for evaluate and register:
    python -m pipelines.convert CTMSR.pth runs/published-x4
  turn a trained model into a file for the authors' code:
    python -m pipelines.convert s3://bucket/runs/mine/checkpoint_... mine.pth"""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("convert", __doc__ or "", EXAMPLES)
    parser.set_defaults(preset="published")
    parser.add_argument("source", help="FILE.pth, or path or URI of a checkpoint folder")
    parser.add_argument("target", type=Path, help="the new checkpoint folder, or the new FILE.pth")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    importing, exporting = (str(name).endswith(".pth") for name in (arguments.source, arguments.target))
    if importing == exporting:
        raise ConfigError(
            f"one of source and target must be a .pth file, got {arguments.source} and {arguments.target}."
        )
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ..infra.checkpoints import fetched
    from .run import export_pth, import_pth

    if importing:
        import_pth(Path(arguments.source), arguments.target, config)
        print(
            f"next: python -m pipelines.evaluate --checkpoint {arguments.target} --set data.test_uri=FOLDER"
        )
    else:
        with fetched(arguments.source) as folder:
            export_pth(folder, arguments.target)
    print(f"written: {arguments.target}")
    return 0


if __name__ == "__main__":
    run(main)

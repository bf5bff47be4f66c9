"""Convert the authors' `.pth` into a checkpoint, or a checkpoint into a `.pth`."""

from pathlib import Path

from ctmsr.config import to_dict
from ctmsr.errors import CheckpointError, ConfigError
from ctmsr.model import checkpoint
from ctmsr.model.checkpoint import CURRENT_WEIGHTS
from ctmsr.model.network import ConsistencyModel
from ctmsr.model.published import read_pth, write_pth

from .config.command_line import config_parser, print_config, resolve
from .config.run_config import RunConfig
from .infra.checkpoints import fetched
from .infra.exit_status import run

EXAMPLES = """\
  the published x4 model becomes a checkpoint, which evaluate and register take:
    python -m pipelines.convert CTMSR.pth runs/published-x4
  a trained model for the authors' code:
    python -m pipelines.convert s3://bucket/runs/mine/checkpoint_... mine.pth"""


def import_pth(source: Path, folder: Path, config: RunConfig) -> None:
    """Makes a checkpoint of the authors' file: `params_ema` is what is released, `params` goes beside it.

    Raises:
        CheckpointError: `source` is not a checkpoint of `config.network`, or `folder` holds something.
    """
    weights = read_pth(source, ConsistencyModel(config.network).state_dict())
    checkpoint.save(
        folder,
        model=weights["params_ema"],
        config=to_dict(config),
        meta={"converted_from": source.name},
        train_state={f"{CURRENT_WEIGHTS}{name}": value for name, value in weights["params"].items()},
    )


def export_pth(folder: Path, target: Path) -> None:
    """Writes a checkpoint as the authors' file; one without a training state gives its EMA weights twice.

    Raises:
        CheckpointError: The checkpoint does not read, or `target` exists.
    """
    if target.exists():
        raise CheckpointError(
            f"{target} already exists, and a checkpoint is never overwritten. Name another."
        )
    model, manifest = checkpoint.load_model(folder)
    ema = params = model.state_dict()
    if checkpoint.TRAIN_STATE_FILE in manifest.files:
        state = checkpoint.load_train_state(folder)
        params = {name: state[f"{CURRENT_WEIGHTS}{name}"] for name in ema}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_pth(target, params, ema)


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

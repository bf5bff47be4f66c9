"""Register a checkpoint as a version of an MLflow model: `python -m pipelines.register --help`.

The uploaded model is loaded back from MLflow and must produce the same bytes as its checkpoint. Then it,
bicubic and the champion are scored on the same pictures, data.val_uri, and the gate gives it the alias
`champion` or `challenger`. A champion must not be worse than bicubic, and must beat any champion before it.
"""

import argparse
from typing import TYPE_CHECKING

from ctmsr.config import from_dict, override, to_dict

from ..config.command_line import config_parser, print_config, resolve
from ..infra.exit_status import run

if TYPE_CHECKING:  # imports torch, Ray and MLflow, which takes seconds; --help should not wait for it
    from ctmsr.model.checkpoint import Manifest

    from ..config.run_config import RunConfig
    from .promotion import Decision

EXAMPLES = """\
  the newest checkpoint of a run, compared with the champion on the run's data.val_uri:
    python -m pipelines.register --set name=first
  any checkpoint, in a team's registry, compared on the team's pictures and degradation:
    python -m pipelines.register --checkpoint s3://bucket/runs/first/checkpoint_... --config gate.json \\
        --tracking-uri http://mlflow:5000
  go back to the previous champion:
    python -m pipelines.register --rollback --tracking-uri http://mlflow:5000

Without --config, the settings are those that the checkpoint was trained with, changed by --set."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("register", __doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", metavar="URI", help="default: the newest of the run")
    parser.add_argument(
        "--rollback", action="store_true", help="register nothing; go back to the previous champion"
    )
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    return _roll_back(config) if arguments.rollback else _register(arguments, config)


def _register(arguments: argparse.Namespace, config: "RunConfig") -> int:
    from ctmsr.model import checkpoint

    from ..infra.checkpoints import fetched, find
    from ..infra.cluster import ray_cluster
    from ..tracking.runs import preflight
    from .comparison import find_comparison
    from .run import register

    if arguments.tracking_uri:
        preflight(config.tracking_uri)  # before looking for a checkpoint and fetching it
    checkpoint_uri = arguments.checkpoint or find(config.run_uri).uri
    with fetched(checkpoint_uri) as folder:
        manifest = checkpoint.read_manifest(folder)
        if not arguments.config:
            config = _as_trained(manifest, arguments.overrides, arguments.tracking_uri)
        tracking_uri = preflight(config.tracking_uri)
        comparison = find_comparison(config)
        metrics = manifest.meta.get("metrics", {})  # converted checkpoints have none
        with ray_cluster():
            decision = register(
                folder,
                tracking_uri=tracking_uri,
                model_name=config.model_name,
                run_id=None,
                metrics={f"val_{name}": value for name, value in metrics.items()},
                tags={"checkpoint": checkpoint_uri},
                rule=config.register,
                comparison=comparison,
            )
    _print_outcome(config, decision, checkpoint_uri)
    return 0


def _as_trained(manifest: "Manifest", overrides: list[str], tracking_uri: str | None) -> "RunConfig":
    """The config that a checkpoint was trained with, changed by the options of the command line."""
    from ..config.run_config import RunConfig

    overrides = [*overrides, *([f"tracking_uri={tracking_uri}"] if tracking_uri else [])]
    return from_dict(RunConfig, override(to_dict(from_dict(RunConfig, manifest.config)), overrides))


def _print_outcome(config: "RunConfig", decision: "Decision", checkpoint_uri: str) -> None:
    from .promotion import CHALLENGER, CHAMPION

    alias = CHAMPION if decision.is_promoted else CHALLENGER
    print(f"models:/{config.model_name}@{alias} is version {decision.version}, from {checkpoint_uri}")
    print(f"{'promoted' if decision.is_promoted else 'not promoted'}: {decision.reason}.")
    options = f"--tracking-uri {config.tracking_uri}"
    if decision.champion is None:
        print(f"{config.model_name} has no champion: upscale and serve keep using the starter model.")
        options += f" --model models:/{config.model_name}@{CHALLENGER}"
    elif decision.champion != decision.version:
        print(f"models:/{config.model_name}@{CHAMPION} is version {decision.champion}")
    print(f"next: python -m pipelines.upscale PHOTO --output upscaled {options}")


def _roll_back(config: "RunConfig") -> int:
    from ..tracking.runs import preflight
    from .promotion import CHAMPION, rollback

    rolled_back, champion = rollback(preflight(config.tracking_uri), config.model_name)
    versions = ", ".join(map(str, rolled_back))
    print(f"models:/{config.model_name}@{CHAMPION} is version {champion}; rolled back: version {versions}")
    return 0


if __name__ == "__main__":
    run(main)

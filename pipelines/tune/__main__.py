"""Search for a noise schedule with Ray Tune; a trial is a training run: `python -m pipelines.tune --help`."""

from ..config.command_line import config_parser, print_config, resolve
from ..infra.exit_status import run

EXAMPLES = """\
  three short trials on this machine:
    python -m pipelines.tune --set name=first --set data.train_uri=photos/train --set data.val_uri=photos/val
  then train with the best schedule, which is the run's own if no other is better on the pictures:
    python -m pipelines.train --config runs/first-tune/best.json
  forty trials that learn from the scores of earlier ones, four at a time, on the cluster of RAY_ADDRESS:
    python -m pipelines.tune --preset published --set tune.method=tpe --set tune.num_trials=40 \\
        --set tune.max_concurrent=4 --set name=wide --set storage_uri=s3://bucket/runs \\
        --set data.train_uri=s3://bucket/train --set data.val_uri=s3://bucket/val --tracking-uri http://mlflow:5000

Run the same command again to resume a search: finished trials are kept, others resume from their newest
checkpoint, and failed ones are tried again. --fresh starts over."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("tune", __doc__ or "", EXAMPLES)
    parser.add_argument("--fresh", action="store_true", help="delete what the search has done and start over")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ..infra.cluster import ray_cluster
    from ..infra.progress import progress_line
    from .run import check_search, search
    from .space import check_space
    from .verdict import too_few

    if arguments.dry_run:
        check_space(config)
        return print_config(config)
    inputs = check_search(config, fresh=arguments.fresh)
    if inputs.start:
        print(inputs.start)
    if warning := too_few(len(inputs.val)):
        print(warning)
    with ray_cluster(), progress_line() as progress:
        found = search(config, inputs, progress, fresh=arguments.fresh)
    print(found.report)
    print(f"best config and plots: {found.config_uri.rpartition('/')[0]}")
    print(f"next: python -m pipelines.train --config {found.config_uri}")
    return 0


if __name__ == "__main__":
    run(main)

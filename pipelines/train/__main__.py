"""Train a model, CT then DTM, on Ray Train workers: `python -m pipelines.train --help`."""

from ..config.command_line import config_parser, print_config, resolve
from ..infra.exit_status import run

EXAMPLES = """\
  a small model from a folder of photos, on this machine:
    python -m pipelines.train --set name=first --set data.train_uri=photos/train --set data.val_uri=photos/val
  the published run, from a bucket, on the cluster of RAY_ADDRESS:
    python -m pipelines.train --preset published --set storage_uri=s3://bucket/runs \\
        --set data.train_uri=s3://bucket/train --set data.val_uri=s3://bucket/val --tracking-uri http://mlflow:5000

  DTM alone, from a checkpoint of another run or of pipelines.convert:
    python -m pipelines.train --preset published --set name=dtm --set init_uri=runs/published-x4 \\
        --set optim.ct_steps=0 --set schedule.s0=3 \\
        --set data.train_uri=photos/train --set data.val_uri=photos/val

Run the same command again to resume a run, whatever stopped it; --fresh starts over."""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("train", __doc__ or "", EXAMPLES)
    parser.add_argument("--fresh", action="store_true", help="delete what the run has done and start over")
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ..infra.cluster import ray_cluster
    from ..infra.progress import progress_line
    from .run import check_inputs, train

    inputs = check_inputs(config, fresh=arguments.fresh)
    if inputs.start:
        print(inputs.start, flush=True)
    with ray_cluster(), progress_line() as progress:
        outcome = train(config, inputs, progress, fresh=arguments.fresh)
    print(f"checkpoint: {outcome.checkpoint_uri}")
    print(f"next: python -m pipelines.evaluate --checkpoint {outcome.checkpoint_uri}")
    return 0


if __name__ == "__main__":
    run(main)

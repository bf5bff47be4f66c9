"""Evaluate a checkpoint against bicubic on held-out pictures: `python -m pipelines.evaluate --help`."""

from ctmsr.metrics.pyiqa_scores import PYIQA_NAMES, check_pyiqa

from ..config.command_line import add_device_option, config_parser, print_config, resolve
from ..infra.exit_status import run

EXAMPLES = """\
  the newest checkpoint of a run, on data.test_uri:
    python -m pipelines.evaluate --set name=first --set data.test_uri=photos/test
  any checkpoint, on uncropped LR/HR pairs as in most benchmarks:
    python -m pipelines.evaluate --checkpoint s3://bucket/runs/first/checkpoint_... \\
        --set data.test_uri=RealSR/HR --set data.test_lq_uri=RealSR/LR
  on pictures without a reference, by NIQE, in smaller tiles to save memory:
    python -m pipelines.evaluate --set name=first --set data.test_uri= --set data.test_lq_uri=RealSet65 \\
        --set inference.tile=128"""


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = config_parser("evaluate", __doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", metavar="URI", help="default: the newest of the run")
    parser.add_argument(
        "--also",
        nargs="+",
        choices=PYIQA_NAMES,
        default=[],
        help="further scores, by an installed pyiqa, whose licence forbids commercial use",
    )
    add_device_option(parser)
    arguments = parser.parse_args(argv)
    config = resolve(arguments)
    if arguments.dry_run:
        return print_config(config)
    if arguments.also:
        check_pyiqa()
    # Imported late: Ray and torch take seconds, and --help or a bad option should not wait for them.
    from ctmsr.metrics.scoring import table

    from ..data.held_out import find_held_out
    from ..infra.checkpoints import find
    from ..infra.cluster import ray_cluster
    from .run import evaluate, log_scores, write_report

    checkpoint_uri = arguments.checkpoint or find(config.run_uri).uri
    held_out = find_held_out(config.data)
    overrides = [text for text in arguments.overrides if text.startswith("inference.")]
    with ray_cluster():
        evaluation = evaluate(config, checkpoint_uri, held_out, overrides, arguments.also, arguments.device)
    print(table({"ours": evaluation}))
    print(f"protocol: {held_out.protocol}")
    print(f"written: {write_report(config, checkpoint_uri, held_out, evaluation)}")
    log_scores(config, checkpoint_uri, held_out, evaluation)
    return 0


if __name__ == "__main__":
    run(main)

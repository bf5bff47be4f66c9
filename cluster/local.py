"""Runs several Ray nodes on this machine, to try out a cluster: `python -m cluster.local --help`.

Every node has its own loopback address, from 127.0.0.2 on, and all processes authenticate with the same
token. `up` generates it in a file that only its owner can read; nodes and commands are given the path.
The dashboard with its job server listens on loopback. Ray's other ports listen on all interfaces: those that
accept commands require the token, those that serve metrics do not. If that is too open, use a firewall.

Nodes inherit the environment of the shell that ran `up`, and jobs and their workers inherit that of their
node. So export secrets such as AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and MLFLOW_TRACKING_PASSWORD before
`up`, and put them nowhere else. What is in `--runtime-env-json`, `--metadata-json` or the command of a job is
not secret: Ray stores it with the job and shows it in its logs, in `ray job list` and on the dashboard.
"""

import argparse
import os
from pathlib import Path

from pipelines.infra.exit_status import run

from .local_nodes import Cluster, client_env, down, load, log_path, nodes, processes, up

EXAMPLES = """\
examples:
  two nodes; export the lines it prints, then submit a job:
    python -m cluster.local up
    ray job submit --working-dir . -- python -m pipelines.train --dry-run
  three nodes of four CPUs each:
    python -m cluster.local up --nodes 3 --cpus 4
  show the cluster, and end it:
    python -m cluster.local status
    python -m cluster.local down

A node's CPUs are only what Ray counts; all nodes share this machine's cores. The first node has the GPUs.
Export secrets such as AWS_SECRET_ACCESS_KEY before `up`, which passes its environment on to every job. Do not
put them in a job's command or --runtime-env-json, which Ray shows to everyone with access.
A job runs in a copy of its working directory, which is deleted with the cluster: use s3://... or absolute
paths."""


def _print_cluster(cluster: Cluster) -> None:
    addresses = ", ".join(cluster.pids)
    print(f"{len(cluster.pids)} nodes of {cluster.cpus} CPUs are up: {addresses}")
    print(f"dashboard: {cluster.dashboard_url}  logs: {cluster.ray_folder}/*/session_latest/logs")
    print("\nin every shell that uses it:\n")
    print("unset RAY_AUTH_TOKEN")  # of another cluster; it would take precedence over the path
    for name, value in client_env(cluster).items():
        print(f"export {name}={value}")
    print("\nthen, for example:\n")
    print("ray job submit --working-dir . -- python -m pipelines.train --dry-run")


def _print_status(folder: Path) -> int:
    cluster = load(folder)
    if cluster is None or not processes(cluster):
        print(f"no cluster is up in {folder.absolute()}. Start one: python -m cluster.local up")
        return 1
    alive = nodes(cluster)
    for node in alive:
        print(f"{node.address}  alive  {node.cpus} CPUs  pid {cluster.pids.get(node.address)}")
    for address in cluster.pids.keys() - {node.address for node in alive}:
        print(f"{address}  dead   log: {log_path(cluster, address)}")
    total = sum(node.cpus for node in alive)
    print(f"{len(alive)} of {len(cluster.pids)} nodes alive, {total} CPUs")
    print(f"RAY_ADDRESS={cluster.address}  RAY_API_SERVER_ADDRESS={cluster.dashboard_url}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local",
        description="Start and stop a Ray cluster of several nodes on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|status|down")
    start = commands.add_parser("up", help="start the nodes and print what to export")
    start.add_argument("--nodes", type=int, default=2, metavar="N", help="default %(default)s")
    cores = max(2, os.cpu_count() or 1)
    start.add_argument("--cpus", type=int, default=cores, metavar="N", help="per node; default %(default)s")
    start.add_argument("--port", type=int, default=6479, help="port of RAY_ADDRESS; default %(default)s")
    start.add_argument("--dashboard-port", type=int, default=8365, metavar="PORT", help="default %(default)s")
    others = [
        commands.add_parser(
            "status", help="show nodes, CPUs and addresses; exit status 1 if there is no cluster"
        ),
        commands.add_parser("down", help="stop the nodes and everything that runs on them"),
    ]
    for command in (start, *others):
        command.add_argument(
            "--folder",
            type=Path,
            default=Path("runs/cluster"),
            help="the cluster's folder; default %(default)s",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "status":
        return _print_status(arguments.folder)
    if arguments.command == "down":
        num_nodes = down(arguments.folder)
        none = f"no cluster is up in {arguments.folder.absolute()}."
        print(f"{num_nodes} nodes ended." if num_nodes else none)
        return 0
    cluster = up(
        arguments.folder,
        num_nodes=arguments.nodes,
        cpus=arguments.cpus,
        port=arguments.port,
        dashboard_port=arguments.dashboard_port,
    )
    _print_cluster(cluster)
    return 0


if __name__ == "__main__":
    run(main)

"""Every command in the documents: run as it stands, or marked with what it needs and checked by its parser.

Blocks without a `# needs ...` line are run by bash in a folder that is like a reader's: photographs, and the
repository's `.venv`. The commands of README.md run first, and each document goes on where they ended.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image
from ray.scripts.scripts import cli as ray_cli

from ctmsr.image import decode
from pipelines.config.command_line import resolve
from tests.support.child import Child
from tests.support.commands import command_module
from tests.support.markdown import SHELL, Block, blocks, documents
from tests.support.repository import ROOT
from tests.support.servers.ray_nodes import free_port

README = ROOT / "README.md"
TINY = (
    "init_uri=starter",
    "optim.lr=1e-5",
    "data.eval_crop_size=64",
    "data.eval_draws=1",
    "train.global_batch_size=4",
    "train.checkpoint_every_steps=2",
    "optim.ct_steps=3",
    "optim.dtm_steps=1",
    "tune.num_trials=1",
    "tune.ct_steps=2",
)
SERVERS = {"mlflow ui": 5000, "python -m pipelines.serve": 8000}
"""Commands that run until they are interrupted, and the port that each takes by default."""
RUN = (*SHELL, "python")
LIMIT_S = 600
ALL = [block for path in documents() for block in blocks(path)]
COMMANDS = [pytest.param(block, id=block.where) for block in ALL if block.language in SHELL]
DOCUMENTS = [path for path in documents() if path.parent.name == "docs"]
"""Those whose blocks are run after those of README.md. The others are for contributors and for operators."""


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def is_typed(path: Path) -> bool:
    """Whether there is something in a document to run."""
    return any(not block.needs and block.language in RUN for block in blocks(path))


class Parsed(Exception):
    """Instead of what a command does: the arguments that it was given were taken."""


def check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `python -m module` parse its arguments with its own parser, and stops it there."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
        found = parse(self, argv)
        if hasattr(found, "overrides") and not getattr(found, "config", None):
            resolve(found)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            command_module(module).main()


def check_click(command: click.Command, name: str, arguments: list[str]) -> None:
    """Has the parsers of a command and of its subcommand take their arguments, and runs neither."""
    if isinstance(command, click.Group):
        chosen = command.commands.get(arguments[0])
        assert chosen is not None, f"{name} has no command {arguments[0]}"
        check_click(chosen, arguments[0], arguments[1:])
    else:
        command.make_context(name, list(arguments), resilient_parsing=False)


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a command can be checked without what it needs: options, config keys, files and targets.

    Raises:
        AssertionError: It would be refused.
    """
    words = shlex.split(re.sub(r"[<>|&;]", " ; ", command))
    words = words[: words.index(";")] if ";" in words else words
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    words = [word for word in words if word != "$PLACES"]
    match words:
        case ["make", *targets]:
            assert set(targets) <= make_targets(), command
        case [python, "-m", "pytest", *options] if python.endswith("python"):
            for path in options:
                assert path.startswith("-") or not path.startswith("tests") or (ROOT / path).exists(), command
        case [python, "-m", module, *arguments] if python.endswith("python") and is_ours(module):
            check_module(module, arguments, monkeypatch)
        case ["ray", *arguments]:
            entry = arguments.index("--") if "--" in arguments else len(arguments)
            check_click(ray_cli, "ray", arguments[:entry] + (["--", "true"] if "--" in arguments else []))
            if arguments[entry + 1 :]:
                check_command(shlex.join(arguments[entry + 1 :]), monkeypatch)
        case _:
            return


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("pipelines", "cluster", "tests")


@pytest.mark.parametrize("block", COMMANDS)
def test_commands_are_well_formed(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.where}: {done.stderr}"
    assert block.commands, f"{block.where} has no command"
    for command in block.commands:
        check_command(command, monkeypatch)


@pytest.mark.parametrize("block", COMMANDS)
def test_commands_are_run_or_say_what_they_need(block: Block) -> None:
    is_run = block.path == README or block.path in DOCUMENTS
    only_make = all(command.startswith("make ") for command in block.commands)
    assert is_run or block.needs or only_make, f"{block.where} is not run. Begin it with `# needs ...`."


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("make dmeo", AssertionError),
        ("python -m pipelines.train --set netwrok.scale=4", ValueError),
        ("python -m pipelines.train --preset publisht", ValueError),
        ("python -m pipelines.index --ot x", SystemExit),
        ("python -m pipelines.trian", ModuleNotFoundError),
        ("python -m pytest tests/unit/test_nothing.py", AssertionError),
        ("ray job submit --adress x -- true", click.ClickException),
        ("ray job sumbit -- true", AssertionError),
        ("ray job submit -- python -m pipelines.tune --fersh", SystemExit),
        ("RAY_ADDRESS=x python -m pipelines.serve --prot 1 > log", SystemExit),
    ],
)
def test_a_wrong_command_is_found(
    command: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error):
        check_command(command, monkeypatch)


class Reader:
    """Somebody who types what a document says, in a folder of photographs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._env = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))
        }
        self._env |= {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        typed = [command for block in blocks(README) for command in block.commands]
        self._exports = [command for command in typed if command.startswith(("source ", "export "))]
        tiny = " ".join(f"--set {setting}" for setting in TINY)
        first = ["set -euo pipefail", f"cd {folder}", *self._exports]
        self._start = [*first, f'export PLACES="$PLACES {tiny}"']

    def follow(self, path: Path) -> str:
        """Types all commands that a document does not mark, in their order; returns what was printed.

        Raises:
            RuntimeError: One of them failed, or they took too long.
        """
        ports = {str(port): str(free_port()) for port in SERVERS.values()}
        script = [*self._start, *self._script(path, ports)]
        with Child(["bash", "-c", "\n".join(script)], self._env, self.folder / f"{path.stem}.log") as shell:
            status = shell.wait_until(shell.status, "end", timeout_s=LIMIT_S)
            if status:
                raise RuntimeError(f"a command of {path.name} ended with {status}. {shell.log_tail()}")
            return shell.printed()

    def _script(self, path: Path, ports: dict[str, str]) -> Iterator[str]:
        """Servers go to the background, to free ports, and are ended at the end of the document."""
        for block in blocks(path):
            if block.needs or block.language not in RUN:
                continue
            if block.language == "python":
                yield f"python -c {shlex.quote(block.text)}"
                continue
            for command in block.commands:
                if command in self._exports or command.startswith("make "):
                    continue
                yield f"echo {shlex.quote(f'$ {command}')}"
                server = next((name for name in SERVERS if command.startswith(name)), None)
                if server:
                    yield in_background(command, ports[str(SERVERS[server])])
                else:
                    yield re.sub(
                        r"(?<=127\.0\.0\.1:)(\d+)", lambda port: ports.get(port[1], port[1]), command
                    )
        yield 'for job in $(jobs -p); do kill "$job"; wait "$job" || true; done'


def in_background(command: str, port: str) -> str:
    """Starts a server at a port, and waits until it answers."""
    return "\n".join(
        [
            f"{command} --port {port} &",
            f"until curl --silent --fail --output reply http://127.0.0.1:{port}/",
            "do kill -0 $! || exit 1; sleep 0.5; done",
        ]
    )


@pytest.fixture(scope="module")
def reader(photos: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Has followed README.md."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / ".venv").symlink_to(sys.prefix)
    parts = dict.fromkeys(photos, "train") | {"rocket.png": "val", "chelsea.png": "test"}
    for name, part in parts.items():
        place = folder / "photos" / part / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(photos[name])
    pixels = decode(photos["coffee.png"], name="coffee.png")[:32, :48]
    Image.fromarray(pixels).save(folder / "photo.jpg", quality=95)
    there = Reader(folder)
    (folder / "printed").write_text(there.follow(README))
    return there


@pytest.mark.slow
def test_the_readme_leads_from_photographs_to_an_upscaled_one(reader: Reader) -> None:
    printed = (reader.folder / "printed").read_text()
    assert "best config and plots: runs/first-tune" in printed
    assert "models:/ctmsr-x4@champion is version 1" in printed
    assert "promoted: " in printed
    assert re.search(r"^bicubic .*\nours ", printed, re.MULTILINE)
    upscaled = decode((reader.folder / "upscaled/photo_x4.png").read_bytes(), name="photo_x4.png")
    assert upscaled.shape == (4 * 32, 4 * 48, 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if is_typed(path)], ids=lambda path: path.stem)
def test_what_the_other_documents_say_to_type_works(reader: Reader, path: Path) -> None:
    printed = reader.follow(path)
    assert "Traceback" not in printed
    assert "error: " not in printed


@pytest.mark.slow
def test_a_failing_command_fails_a_document(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text("```sh\npython -m pipelines.upscale no.jpg --output upscaled\n```\n")
    with pytest.raises(RuntimeError, match=r"(?s)a command of wrong.md ended with 2.*no.jpg does not exist"):
        reader.follow(path)

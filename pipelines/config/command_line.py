"""Options shared by the commands: from a preset, file and `--set` to a RunConfig, and `--dry-run`."""

import argparse
import json

from ctmsr.config import describe, flatten, from_dict, override, to_dict
from ctmsr.errors import ConfigError, DataError

from ..infra.storage import open_uri, read_bytes
from .presets import PRESETS
from .run_config import RunConfig


def config_parser(module: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that make up a RunConfig."""
    presets = "\n".join(
        f"  {name:<12}{(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{module}",
        description=summary,
        epilog=f"presets:\n{presets}\n\nexamples:\n{examples}\n\n--keys explains every key that --set takes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="small", help=f"one of {', '.join(PRESETS)}; default %(default)s")
    parser.add_argument("--config", metavar="URI", help="a resolved config (JSON) instead of a preset")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="may be repeated"
    )
    parser.add_argument("--tracking-uri", help="MLflow: a server's address, or sqlite:///file.db")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--keys", action=_PrintKeys, nargs=0, help="print every config key and stop")
    return parser


def resolve(arguments: argparse.Namespace) -> RunConfig:
    """The RunConfig described by the arguments of a `config_parser`.

    Raises:
        ConfigError: The preset is unknown, the file unreadable, or a key or value invalid.
    """
    if arguments.config:
        data = _read_json(arguments.config)
    elif arguments.preset in PRESETS:
        data = to_dict(PRESETS[arguments.preset]())
    else:
        raise ConfigError(f"unknown preset {arguments.preset!r}. Presets: {', '.join(PRESETS)}.")
    overrides = list(arguments.overrides)
    if arguments.tracking_uri:
        overrides.append(f"tracking_uri={arguments.tracking_uri}")
    return from_dict(RunConfig, override(to_dict(from_dict(RunConfig, data)), overrides))


def print_config(config: RunConfig) -> int:
    """Prints the resolved config as JSON, ready for `--config`; returns exit status 0."""
    print(json.dumps(to_dict(config), indent=2))
    return 0


def _read_json(uri: str) -> dict:
    try:
        file_system, path = open_uri(uri)
        return json.loads(read_bytes(file_system, path))
    except (DataError, ValueError) as error:
        raise ConfigError(f"--config {uri} is not a readable JSON file: {error}") from error


class _PrintKeys(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        defaults = flatten(to_dict(RunConfig()))
        for path, text in describe(RunConfig):
            print(f"{path} = {json.dumps(defaults[path])}\n    {text}")
        parser.exit()

"""Options shared by the commands; turns a preset or file and `--set` into a RunConfig."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ctmsr.config import describe, flatten, from_dict, override, to_dict
from ctmsr.errors import ConfigError, DataError

from ..infra.invocation import command_parser
from ..infra.storage import open_uri, read_bytes
from . import docstrings
from .defaults import DEVICES, MODEL_NAME, TRACKING_URI

if TYPE_CHECKING:  # imports torch, which takes seconds; --help should not wait for it
    from .run_config import RunConfig


def config_parser(module: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that make up a RunConfig."""
    presets = docstrings.of_functions(Path(__file__).with_name("presets.py"))
    listed = "\n".join(f"  {name:<12}{text}" for name, text in presets.items())
    parser = command_parser(
        module,
        summary,
        f"presets:\n{listed}\n\nexamples:\n{examples}\n\n--keys explains every key that --set takes",
    )
    parser.add_argument("--preset", default="small", help=f"one of {', '.join(presets)}; default %(default)s")
    parser.add_argument("--config", metavar="URI", help="a resolved config (JSON) instead of a preset")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="may be repeated"
    )
    parser.add_argument("--tracking-uri", help="MLflow: a server's address, or sqlite:///file.db")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--keys", action="store_true", help="explain every key of the resolved config and stop"
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--tracking-uri` of the commands that use a released model."""
    parser.add_argument(
        "--model",
        help="models:/NAME@ALIAS or models:/NAME/VERSION in the registry, starter, or a checkpoint's URI; "
        f"default: models:/{MODEL_NAME}@champion, or starter if there is no champion",
    )
    parser.add_argument(
        "--tracking-uri", default=TRACKING_URI, help="MLflow with the model; default %(default)s"
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device` of the commands that run a model."""
    parser.add_argument(
        "--device",
        choices=DEVICES,
        help="where to compute: NVIDIA's GPUs, AMD's, Apple's or none; default: the first that works",
    )


def resolve(arguments: argparse.Namespace) -> "RunConfig":
    """The RunConfig that `config_parser`'s arguments describe; `--keys` explains it and ends the process.

    Raises:
        ConfigError: The preset is unknown, the file unreadable, or a key or value invalid.
    """
    from .presets import PRESETS
    from .run_config import RunConfig

    if arguments.config:
        data = _read_json(arguments.config)
    elif arguments.preset in PRESETS:
        data = to_dict(PRESETS[arguments.preset]())
    else:
        raise ConfigError(f"unknown preset {arguments.preset!r}. Presets: {', '.join(PRESETS)}.")
    overrides = list(arguments.overrides)
    if arguments.tracking_uri:
        overrides.append(f"tracking_uri={arguments.tracking_uri}")
    stored = to_dict(from_dict(RunConfig, data))
    data = override(stored, overrides)
    config = from_dict(RunConfig, data)
    if unused := sorted(flatten(data).keys() - flatten(stored).keys()):
        raise ConfigError(f"config key {unused[0]} is of an earlier release. --keys lists those of this one.")
    if arguments.keys:
        _print_keys(config)
        raise SystemExit(0)
    return config


def print_config(config: "RunConfig") -> int:
    """Prints the resolved config as JSON, ready for `--config`; returns exit status 0."""
    print(json.dumps(to_dict(config), indent=2))
    return 0


def _print_keys(config: "RunConfig") -> None:
    values = flatten(to_dict(config))
    for path, text in describe(type(config)):
        print(f"{path} = {json.dumps(values[path])}\n    {text}")


def _read_json(uri: str) -> dict:
    try:
        file_system, path = open_uri(uri)
        return json.loads(read_bytes(file_system, path))
    except (DataError, ValueError) as error:
        raise ConfigError(f"--config {uri} is not a readable JSON file: {error}") from error

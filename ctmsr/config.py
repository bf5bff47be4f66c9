"""Strict loading of frozen dataclasses from plain dicts, dumping them, and the help text of their fields.

The dataclasses are the single source of a run's settings. Presets, files, `--set` and Tune trials all pass
through `from_dict`, so none of them can set a value that another would reject.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from .errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Builds the dataclass `cls` from a plain dict of JSON types.

    Args:
        cls: A dataclass whose fields are scalars, literals, tuples, optionals or other dataclasses.
        data: Values by field name; missing keys get the field's default. Names in `cls.REMOVED`, fields of
            earlier releases, are ignored.
        where: Dotted path of `cls` in the whole config, for messages.

    Raises:
        ConfigError: A key is unknown (a similar one is suggested), or a value has the wrong type or range.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'config'} must be a table of keys, got {data!r}.")
    hints = typing.get_type_hints(cls)
    data = {key: value for key, value in data.items() if key not in getattr(cls, "REMOVED", ())}
    for key in data:
        if key not in hints:
            raise ConfigError(_unknown_key(f"{where}.{key}" if where else key, key, list(hints)))
    if missing := sorted(_required(cls) - set(data)):
        raise ConfigError(f"{where or 'config'} lacks {', '.join(missing)}. Give each a value.")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in data.items()
    }
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON types: `from_dict(type(config), to_dict(config)) == config`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `data` with `["schedule.noise_rho=3", ...]` applied.

    Values are JSON or plain text; a list needs no brackets.

    Raises:
        ConfigError: An assignment has no `=`, or its path runs through something that is not a section.
    """
    result = json.loads(json.dumps(data))
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set takes key=value, such as schedule.noise_rho=3, got {assignment!r}.")
        *sections, key = path.split(".")
        node = result
        for section in sections:
            if not isinstance(node.get(section), dict):
                known = [k for k, v in node.items() if isinstance(v, dict)]
                raise ConfigError(_unknown_key(path, section, known))
            node = node[section]
        if isinstance(node.get(key), dict):
            raise ConfigError(f"{path} is a section, not a value. Set one of: {', '.join(node[key])}.")
        before, value = node.get(key), _parse(text)
        if isinstance(before, str) and isinstance(value, int | float):
            value = text  # such as a folder called 2024
        elif isinstance(before, list) and not isinstance(value, list):
            value = _parse(f"[{text}]")  # 1,2,3 is [1, 2, 3]
            if not isinstance(value, list):
                value = [part.strip() for part in text.split(",")]
        node[key] = value
    return result


def flatten(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def describe(cls: type, where: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, help text) for every field; the text is the string literal below the field."""
    source = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(source, ast.ClassDef)
    hints = typing.get_type_hints(cls)
    for statement, following in zip(source.body, [*source.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        name = statement.target.id
        path = f"{where}.{name}" if where else name
        if dataclasses.is_dataclass(hints[name]):
            yield from describe(hints[name], path)
        elif isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            yield path, str(following.value.value)


def check(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition` holds; for `__post_init__` methods."""
    if not condition:
        raise ConfigError(message)


def _required(cls: Any) -> set[str]:
    """Names of the fields without a default."""
    none = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if f.default is none and f.default_factory is none}


def _unknown_key(path: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
    return f"unknown config key {path}. {hint}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` converted to the type `hint`: ints are accepted as floats and lists as tuples, nothing else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    if origin in (Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _convert(inner[0], value, path)
    if origin is Literal:
        if any(type(a) is type(value) and a == value for a in arguments):  # True and 4.0 equal integers
            return value
        raise ConfigError(f"{path} must be one of {', '.join(map(repr, arguments))}, got {value!r}.")
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_convert(kind, v, f"{path}[{i}]") for i, (kind, v) in enumerate(pairs))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        check(math.isfinite(value), f"{path} must be a finite number, got {value!r}.")
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise ConfigError(f"{path} must be {_type_name(hint)}, got {value!r}.")


def _type_name(hint: Any) -> str:
    if hint in (names := {int: "an integer", float: "a number", bool: "true or false", str: "text"}):
        return names[hint]
    kind, *others = typing.get_args(hint)  # of a tuple
    many, example = {
        int: ("integers", ("1", "2", "3")),
        float: ("numbers", ("0.5", "1.5", "2.5")),
        str: ("words", ("a", "b", "c")),
    }[kind]
    if others == [Ellipsis]:
        return f"{many}, such as {','.join(example)}"
    return f"{1 + len(others)} {many}, such as {','.join(example[: 1 + len(others)])}"

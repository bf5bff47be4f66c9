"""The strict loader: what it accepts, what it refuses and in which words, and the texts of the fields."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from ctmsr.config import describe, flatten, from_dict, override, to_dict
from ctmsr.errors import ConfigError
from pipelines.config.presets import PRESETS
from pipelines.config.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Oven:
    degrees: float = 180.0
    """Heat of the oven, in degrees."""
    fan: bool = False
    """Whether the fan turns."""
    rack: Literal[1, 2] = 1
    """Rack, from below."""


@dataclass(frozen=True, kw_only=True)
class Cake:
    name: str
    """Name of the cake."""
    eggs: int = 3
    """Eggs in the dough."""
    minutes: tuple[float, float] = (40.0, 50.0)
    """Shortest and longest baking time, in minutes."""
    layers: tuple[int, ...] = (1,)
    """Sheets of each layer."""
    icing: str | None = None
    """Icing, if there is any."""
    oven: Oven = field(default_factory=Oven)


def test_missing_keys_take_the_defaults() -> None:
    assert from_dict(Cake, {"name": "plain"}) == Cake(name="plain")


def test_nested_values_tuples_and_optionals() -> None:
    data = {
        "name": "rich",
        "minutes": [30, 35.5],
        "layers": [1, 2, 3],
        "icing": "lemon",
        "oven": {"degrees": 200, "fan": True, "rack": 2},
    }
    expected = Cake(
        name="rich",
        minutes=(30.0, 35.5),
        layers=(1, 2, 3),
        icing="lemon",
        oven=Oven(degrees=200.0, fan=True, rack=2),
    )
    cake = from_dict(Cake, data)
    assert cake == expected
    assert type(cake.oven.degrees) is float
    assert from_dict(Cake, data | {"icing": None}).icing is None
    assert from_dict(Cake, data | {"layers": []}).layers == ()
    assert from_dict(Cake, {"name": "x", "oven": expected.oven}).oven is expected.oven


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "egs": 2}, "unknown config key egs. Did you mean eggs?"),
        ({"name": "x", "oven": {"degree": 2}}, "unknown config key oven.degree. Did you mean degrees?"),
        ({"name": "x", "oven": {"zzz": 2}}, "unknown config key oven.zzz. Known here: degrees, fan, rack."),
        ({}, "config lacks name. Give each a value."),
        ([], "config must be a table of keys, got []."),
        ({"name": "x", "oven": 3}, "oven must be a table of keys, got 3."),
        ({"name": 3}, "name must be text, got 3."),
        ({"name": None}, "name must be text, got None."),
        ({"name": "x", "icing": 3}, "icing must be text, got 3."),
        ({"name": "x", "eggs": 3.0}, "eggs must be an integer, got 3.0."),
        ({"name": "x", "eggs": True}, "eggs must be an integer, got True."),
        ({"name": "x", "eggs": "3"}, "eggs must be an integer, got '3'."),
        ({"name": "x", "minutes": [1]}, "minutes must be 2 numbers, such as 0.5,1.5, got [1]."),
        ({"name": "x", "minutes": "12"}, "minutes must be 2 numbers, such as 0.5,1.5, got '12'."),
        ({"name": "x", "minutes": [1, "2"]}, "minutes[1] must be a number, got '2'."),
        ({"name": "x", "layers": 3}, "layers must be integers, such as 1,2,3, got 3."),
        ({"name": "x", "layers": [1, 2.5]}, "layers[1] must be an integer, got 2.5."),
        ({"name": "x", "oven": {"degrees": True}}, "oven.degrees must be a number, got True."),
        ({"name": "x", "oven": {"fan": 1}}, "oven.fan must be true or false, got 1."),
        ({"name": "x", "oven": {"rack": 3}}, "oven.rack must be one of 1, 2, got 3."),
        ({"name": "x", "oven": {"rack": True}}, "oven.rack must be one of 1, 2, got True."),
        ({"name": "x", "oven": {"rack": 2.0}}, "oven.rack must be one of 1, 2, got 2.0."),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        from_dict(Cake, data)


def test_override_reaches_into_sections_and_leaves_its_input_alone() -> None:
    data = to_dict(Cake(name="x"))
    changed = override(
        data, ["oven.degrees=210", "icing=sugar = glaze", "layers=[2, 1]", "eggs=4", "oven.fan=true"]
    )
    assert from_dict(Cake, changed) == Cake(
        name="x", icing="sugar = glaze", layers=(2, 1), eggs=4, oven=Oven(degrees=210.0, fan=True)
    )
    assert data == to_dict(Cake(name="x"))


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    data = {"name": "x", "icing": "sugar", "eggs": 1}
    changed = override(data, ["name=2024", "icing=true", "eggs=2"])
    assert changed == {"name": "2024", "icing": "true", "eggs": 2}


@pytest.mark.parametrize("text", ["2,1", "[2, 1]", " 2 , 1"])
def test_a_list_needs_no_brackets(text: str) -> None:
    assert override({"layers": [1, 2, 3]}, [f"layers={text}"]) == {"layers": [2, 1]}
    assert override({"layers": [1, 2, 3]}, ["layers=4"]) == {"layers": [4]}
    assert override({"layers": [1, 2, 3]}, ["layers=[]"]) == {"layers": []}
    assert override({"layers": []}, ["layers=up, down.*"]) == {"layers": ["up", "down.*"]}


def test_override_can_unset_an_optional() -> None:
    assert override({"icing": "sugar"}, ["icing=null"]) == {"icing": None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("eggs", "--set takes key=value, such as schedule.noise_rho=3, got 'eggs'."),
        ("=3", "--set takes key=value, such as schedule.noise_rho=3, got '=3'."),
        ("ovn.degrees=3", "unknown config key ovn.degrees. Did you mean oven?"),
        ("eggs.size=3", "unknown config key eggs.size. Known here: oven."),
        ("oven=3", "oven is a section, not a value. Set one of: degrees, fan, rack."),
    ],
)
def test_override_refusals(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        override(to_dict(Cake(name="x")), [assignment])


def test_a_misspelt_value_of_an_override_is_the_loaders_to_refuse() -> None:
    with pytest.raises(ConfigError, match=r"unknown config key oven\.degreees\. Did you mean degrees\?"):
        from_dict(Cake, override(to_dict(Cake(name="x")), ["oven.degreees=3"]))


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_describe_yields_the_text_below_each_field() -> None:
    assert dict(describe(Oven, "oven")) == {
        "oven.degrees": "Heat of the oven, in degrees.",
        "oven.fan": "Whether the fan turns.",
        "oven.rack": "Rack, from below.",
    }


def test_every_setting_of_a_run_is_described() -> None:
    texts = dict(describe(RunConfig))
    assert texts.keys() == flatten(to_dict(RunConfig())).keys()
    assert all(text.strip() and "\n" not in text for text in texts.values())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_survive_a_plain_dict(preset: Callable[[], RunConfig]) -> None:
    assert from_dict(RunConfig, to_dict(preset())) == preset()


@pytest.mark.parametrize("preset", ["one_gpu", "node", "nodes"])
def test_the_published_run_is_the_same_on_any_machines(preset: str) -> None:
    run, published = PRESETS[preset](), PRESETS["published"]()
    spread = {"num_workers", "min_workers"}
    kept = {name: value for name, value in to_dict(run.train).items() if name not in spread}
    assert kept.items() <= to_dict(published.train).items()
    assert replace(run, train=published.train) == published
    assert published.train.global_batch_size % run.train.num_workers == 0  # no worker waits for another

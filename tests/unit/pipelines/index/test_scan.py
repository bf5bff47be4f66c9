"""Which results of a scan can be used again."""

from dataclasses import replace

import pytest

from pipelines.index.scan import Settings, part_name
from pipelines.infra.listing import Listed

CHUNK = [Listed("a.png", 3, "e"), Listed("b/c.png", 4, "f")]
SETTINGS = Settings("/photos", "", 32)


def test_parts_from_before_there_were_filters_stay_valid() -> None:
    assert part_name(CHUNK, {}, SETTINGS) == "5217a27538450884c99a2d4036dee16b"
    pair = {"a": Listed("a.jpg", 1, "g")}
    assert part_name(CHUNK[:1], pair, Settings("/photos", "/lr", 64)) == "d4022a0004db9eef284a15f69c799efc"


@pytest.mark.parametrize(
    "settings",
    [
        replace(SETTINGS, max_aspect=3),
        replace(SETTINGS, min_detail=0.1),
        replace(SETTINGS, near_duplicates=0),
    ],
)
def test_a_filter_makes_other_parts(settings: Settings) -> None:
    assert part_name(CHUNK, {}, settings) != part_name(CHUNK, {}, SETTINGS)

"""The index that is written from the results of a scan, however these are cut."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctmsr.errors import DataError
from pipelines.data.keys import index_file
from pipelines.index import merge as merging
from pipelines.index.merge import merge
from pipelines.index.scan import SCHEMA, Settings, write_table

KEYS = ("a.png", "b c.png", 'q"uote.png', "back\\slash.png", "caf\u00e9.png", "tab\t.png", "z/\U0001f600.png")


def row(key: str, content: str | None = None, **changes: Any) -> dict[str, Any]:
    """A usable picture of 40 x 30 pixels, with its own content unless told otherwise."""
    sha256 = hashlib.sha256((content or key).encode()).hexdigest()
    usual = {"size": 9, "etag": "e", "width": 40, "height": 30, "format": "PNG", "status": "ok", "detail": ""}
    return {"key": key, "sha256": sha256} | usual | changes


def merged(folder: Path, rows: list[dict[str, Any]], cuts: tuple[int, ...] = (), **settings: Any) -> Any:
    """The summary, and the rows set aside by key."""
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        parts.append(str(folder / f"{start}-{stop}.parquet"))
        write_table(pa.Table.from_pylist(rows[start:stop], SCHEMA), parts[-1])
    found = merge(parts, Settings(str(folder), settings.pop("lq_uri", ""), 32, **settings), str(folder), 0)
    bad = pq.read_table(folder / f"quarantine-{found['version']}.parquet").to_pylist()
    return found, {one["key"]: (one["status"], one["detail"]) for one in bad}


def test_the_version_is_the_hash_of_keys_and_contents(tmp_path: Path) -> None:
    rows = [row(key) for key in sorted(KEYS, key=str.encode)]
    found, bad = merged(tmp_path, rows)
    digest = hashlib.blake2b(digest_size=8)
    for one in rows:
        digest.update(json.dumps((one["key"], one["sha256"])).encode())
    assert found["version"] == digest.hexdigest()
    assert bad == {}
    assert (found["pictures"], found["bytes"], found["pixels"]) == (7, 63, 7 * 1200)
    table = pq.read_table(tmp_path / index_file(found["version"]))
    assert table.column_names == ["key", "size", "etag", "width", "height", "format", "sha256"]
    assert table["key"].to_pylist() == [one["key"] for one in rows]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_cuts_change_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    contents = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20))
    is_bad = data.draw(st.lists(st.booleans(), min_size=len(contents), max_size=len(contents)))
    rows = [
        row(
            f"{number:02}.png",
            content,
            **({"status": "truncated", "detail": "t", "sha256": None} if bad else {}),
        )
        for number, (content, bad) in enumerate(zip(contents, is_bad, strict=True))
    ]
    if all(is_bad):
        rows.append(row("z.png"))
    some = st.lists(st.integers(1, len(rows) - 1), unique=True, max_size=3) if len(rows) > 1 else st.just([])
    cuts = tuple(sorted(data.draw(some)))
    at_once = data.draw(st.integers(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_PARTS_AT_ONCE", at_once)
        found, bad = merged(tmp_path_factory.mktemp("cut"), rows, cuts)
    whole, same = merged(tmp_path_factory.mktemp("whole"), rows)
    assert (found["version"], found["quarantined"], bad) == (whole["version"], whole["quarantined"], same)
    firsts = {
        content: number for number, content in reversed(list(enumerate(contents))) if not is_bad[number]
    }
    for number, content in enumerate(contents):
        key = f"{number:02}.png"
        if is_bad[number]:
            assert bad[key] == ("truncated", "t")
        elif firsts[content] == number:
            assert key not in bad
        else:
            assert bad[key] == ("duplicate", f"{key} has the same bytes as {firsts[content]:02}.png.")


def test_the_largest_of_those_that_look_alike_is_kept(tmp_path: Path) -> None:
    rows = [
        row("a.png", look=0b0000),
        row("b.png", look=0b0001, width=80),
        row("c.png", look=0b0111, width=80),  # alike b, not alike d
        row("d.png", look=0b0111 << 40, width=80),
        row("e.png", look=0b0111 << 40, status="truncated", detail="t", width=800),
    ]
    found, bad = merged(tmp_path, rows, near_duplicates=2)
    assert bad == {
        "a.png": ("near-duplicate", "a.png looks like b.png."),
        "c.png": ("near-duplicate", "c.png looks like b.png."),
        "e.png": ("truncated", "t"),
    }
    assert found["quarantined"] == {"near-duplicate": 2, "truncated": 1}
    kept, bad = merged(tmp_path, rows)
    assert list(bad) == ["e.png"]
    assert kept["pictures"] == 4


def test_a_part_of_an_earlier_release(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, [row("a.png"), row("b.png")])
    for part in tmp_path.glob("*-*.parquet"):
        if part.name.startswith("0-"):
            write_table(pq.read_table(part).drop_columns(["look"]), str(part))
    again = merge([str(tmp_path / "0-2.parquet")], Settings(str(tmp_path), "", 32), str(tmp_path), 2)
    assert again["version"] == found["version"]


def test_pairs_of_another_scale_are_set_aside(tmp_path: Path) -> None:
    pairs = [
        row(f"{number}.png", lq_key=f"{number}.jpg", lq_sha256="0" * 64, scale=scale)
        for number, scale in enumerate((2, 4, 4))
    ]
    found, bad = merged(tmp_path, pairs, lq_uri="lr")
    assert found["scale"] == 4
    assert bad == {"0.png": ("bad-lq", "0.png is a pair of scale 2; most are of scale 4.")}


def test_no_usable_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 1 pictures under .* are usable: \{'truncated': 1\}"):
        merged(tmp_path, [row("a.png", status="truncated", detail="t", sha256=None)])
    assert not (tmp_path / "summary.json").exists()


def test_parts_of_before_there_were_long_strings_and_shards_are_read(tmp_path: Path) -> None:
    names = [name for name in SCHEMA.names if name not in ("look", "shard", "offset", "length")]
    early = pa.schema(
        [
            (n, pa.string() if pa.types.is_large_string(SCHEMA.field(n).type) else SCHEMA.field(n).type)
            for n in names
        ]
    )
    tables = [
        pa.Table.from_pylist([row(key)], schema) for key, schema in (("a.png", early), ("b.png", SCHEMA))
    ]
    parts = [str(tmp_path / f"{number}.parquet") for number in range(2)]
    for table, part in zip(tables, parts, strict=True):
        write_table(table, part)
    found = merge(parts, Settings(str(tmp_path), "", 32), str(tmp_path), 0)
    assert (found["pictures"], found["format"]) == (2, 1)

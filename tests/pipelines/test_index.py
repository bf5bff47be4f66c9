"""The index: what it keeps, what it sets aside and why, and that a scan is never begun anew."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ctmsr.errors import DataError, UserError
from ctmsr.image import encode_png
from pipelines.data.pictures import find_pictures
from pipelines.index.__main__ import main as index
from pipelines.infra.storage import write_bytes
from tests.conftest import S3
from tests.support.child import Child
from tests.support.keys import keys_of
from tests.support.malformed import Corpus, bad, good
from tests.support.repository import ROOT

pytestmark = pytest.mark.usefixtures("ray_session")


def fill(uri: str, corpus: Corpus) -> None:
    for key, (data, _) in corpus.items():
        write_bytes(f"{uri}/{key}", data)


def quarantine(out: Path) -> dict[str, str]:
    """Status by key."""
    version = json.loads((out / "summary.json").read_text())["version"]
    table = pq.read_table(out / f"quarantine-{version}.parquet")
    assert all(table["detail"].to_pylist())
    return dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True))


def check_corpus(folder: Path, corpus: Corpus) -> None:
    fill(str(folder), corpus)
    assert index([str(folder)]) == 0
    found = quarantine(Path(f"{folder}.index"))
    wrong = {
        key: found.get(key, "ok")
        for key, (_, right) in corpus.items()
        if (found.get(key, "ok") not in right) == bool(right)
    }
    assert wrong == {}
    assert keys_of(find_pictures(f"{folder}.index")) == sorted(set(corpus) - set(found))
    assert all(key.startswith("bad/") for key in found)


def test_the_good_are_kept_and_the_bad_set_aside_with_the_right_reason(tmp_path: Path) -> None:
    check_corpus(tmp_path / "photos", good(24, seed=0) | bad(72, seed=1))


def test_in_a_terminal_the_command_s_own_lines_are_all_there_is(tmp_path: Path) -> None:
    fill(f"{tmp_path}/photos", good(5, seed=0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "pipelines.index", f"{tmp_path}/photos"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    starts = dict.fromkeys(line.split()[0] for line in ended.stdout.splitlines())
    assert list(starts) == [
        "starting",
        "scanned",
        "5",
        "written:",
        "next:",
    ]  # a slow machine is told twice that it scans


@pytest.mark.slow
def test_five_hundred_bad_among_five_hundred_good(tmp_path: Path) -> None:
    check_corpus(tmp_path / "photos", good(500, seed=2) | bad(500, seed=3))


def test_a_scan_goes_on_where_it_stopped_and_sees_what_is_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.index.scan._CHUNK_KEYS", 3)
    corpus, folder = good(24, seed=4), tmp_path / "photos"
    fill(str(folder), corpus)
    assert index([str(folder)]) == 0
    before = find_pictures(f"{folder}.index")
    parts = sorted(Path(f"{folder}.index/parts").iterdir())
    assert len(parts) > 2
    assert "scanned 24 pictures" in capsys.readouterr().out

    parts[0].unlink()  # as if the scan had been killed before its last chunk
    Path(f"{folder}.index/summary.json").unlink()
    with pytest.raises(
        DataError, match=r"photos\.index is not an index, or its scan did not finish.*pipelines\.index"
    ):
        find_pictures(f"{folder}.index")
    assert index([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "scanned 24 pictures" not in said
    assert "scanned before" in said
    assert find_pictures(f"{folder}.index").version == before.version

    assert index([str(folder)]) == 0
    assert "scanned 0 pictures" in capsys.readouterr().out
    (new,) = good(1, seed=5).values()
    write_bytes(f"{folder}/good/zzz.jpg", new[0])
    assert index([str(folder)]) == 0
    assert "scanned 24 pictures" not in capsys.readouterr().out
    grown = find_pictures(f"{folder}.index")
    assert len(grown) == len(before) + 1
    assert grown.version != before.version


@pytest.mark.slow
def test_a_scan_killed_twice_ends_with_the_same_index(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(2500):
        pixels = draw.integers(0, 256, (96, 96, 3), np.uint8)
        write_bytes(f"{tmp_path}/photos/{number % 7}/{number}.png", encode_png(pixels))
    killed, whole = tmp_path / "killed.index", tmp_path / "whole.index"
    command = [
        sys.executable,
        "-m",
        "pipelines.index",
        f"{tmp_path}/photos",
        "--near-duplicates",
        "0",
        "--out",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    num_parts = 0
    for _ in range(2):
        with Child([*command, str(killed)], environment, tmp_path / "log") as scan:
            while len(list(killed.glob("parts/*.parquet"))) <= num_parts:
                assert scan.status() is None, scan.printed()
                time.sleep(0.02)
        assert not (killed / "summary.json").exists()
        num_parts = len(list(killed.glob("parts/*.parquet")))
    assert index([f"{tmp_path}/photos", "--near-duplicates", "0", "--out", str(killed)]) == 0
    assert len(list(killed.glob("parts/*.parquet"))) > num_parts
    assert index([f"{tmp_path}/photos", "--near-duplicates", "0", "--out", str(whole)]) == 0
    assert find_pictures(str(killed)).version == find_pictures(str(whole)).version
    assert quarantine(killed) == quarantine(whole)


def test_a_bucket_gives_the_index_of_a_folder_and_trains_as_one(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = good(8, seed=6) | bad(3, seed=7)
    fill(str(tmp_path / "photos"), corpus)
    bucket = s3.make_bucket("indexed", {f"photos/{key}": data for key, (data, _) in corpus.items()})
    s3.client.put_object(Bucket="indexed", Key="photos/notes.txt", Body=b"1")
    assert index([str(tmp_path / "photos")]) == 0
    assert index([f"{bucket}/photos"]) == 0
    printed = capsys.readouterr().out
    assert "8 pictures indexed, 3 quarantined, 1 other files" in printed
    assert "next: python -m pipelines.train --set data.train_uri=s3://indexed/photos.index" in printed
    here, there = find_pictures(str(tmp_path / "photos.index")), find_pictures(f"{bucket}/photos.index")
    assert here.version == there.version
    assert keys_of(there) == keys_of(here)
    assert there.folder == f"{bucket}/photos"


def test_the_same_bytes_count_once(tmp_path: Path) -> None:
    (data, _), (other, _) = good(2, seed=8).values()
    fill(str(tmp_path / "photos"), {"b.jpg": (data, set()), "a.jpg": (data, set()), "c.jpg": (other, set())})
    assert index([str(tmp_path / "photos")]) == 0
    assert quarantine(tmp_path / "photos.index") == {"b.jpg": "duplicate"}


def test_what_is_narrow_flat_or_there_in_another_size_is_set_aside_where_asked(tmp_path: Path) -> None:
    import skimage.data

    photo, folder = skimage.data.astronaut(), tmp_path / "photos"
    half = np.array(Image.fromarray(photo).resize((256, 256), Image.Resampling.LANCZOS))
    files = {
        "large.png": photo,
        "half.png": half,
        "banner.png": photo[:100, :400],
        "sky.png": np.full((200, 200, 3), (90, 160, 250), np.uint8),
        "other.png": skimage.data.chelsea(),
    }
    for name, pixels in files.items():
        write_bytes(f"{folder}/{name}", encode_png(pixels))
    out = tmp_path / "photos.index"
    assert index([str(folder)]) == 0
    assert quarantine(out) == {}
    assert index([str(folder), "--max-aspect", "3", "--min-detail", "0.1", "--near-duplicates", "4"]) == 0
    wrong = {"banner.png": "too-narrow", "half.png": "near-duplicate", "sky.png": "no-detail"}
    assert quarantine(out) == wrong
    parts = set((out / "parts").iterdir())
    assert index([str(folder), "--max-aspect", "3", "--min-detail", "0.1", "--near-duplicates", "0"]) == 0
    assert set((out / "parts").iterdir()) == parts  # the distance is no part of what was scanned
    with pytest.raises(UserError, match="--near-duplicates must be from 0 to 6 bits, got 7"):
        index([str(folder), "--near-duplicates", "7"])


def test_pairs_are_checked_and_their_scale_is_told(tmp_path: Path, photos: dict[str, bytes]) -> None:
    import skimage.data

    photo = skimage.data.astronaut()
    for i, name in enumerate("abcd"):
        write_bytes(f"{tmp_path}/hr/{name}.png", encode_png(photo[: 128 + 4 * i, :96]))
        write_bytes(f"{tmp_path}/lr/{name}.jpg", encode_png(photo[: 32 + i, :24]))
    write_bytes(f"{tmp_path}/lr/b.jpg", encode_png(photo[:40, :40]))
    (tmp_path / "lr/c.jpg").write_bytes(b"no picture")
    (tmp_path / "lr/d.jpg").unlink()
    out = f"{tmp_path}/pairs.index"
    assert index([f"{tmp_path}/hr", "--lq", f"{tmp_path}/lr", "--out", out]) == 0
    assert quarantine(Path(out)) == {"b.png": "bad-lq", "c.png": "bad-lq", "d.png": "missing-lq"}
    pairs = find_pictures(out)
    assert pairs.keys.take(np.arange(1)).to_pylist() == [{"key": "a.png", "lq_key": "a.jpg"}]
    assert (len(pairs), pairs.scale) == (1, 4)


def test_what_cannot_be_indexed_is_told(s3: S3, tmp_path: Path, photos: dict[str, bytes]) -> None:
    fill(str(tmp_path / "bad"), bad(3, seed=9))
    with pytest.raises(DataError, match=r"none of the 3 pictures under .*bad are usable: \{'"):
        index([str(tmp_path / "bad")])
    assert not (tmp_path / "bad.index/summary.json").exists()
    with pytest.raises(UserError, match=r"--out must end in \.index, got"):
        index([str(tmp_path / "bad"), "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="is inside the folder it indexes"):
        index([str(tmp_path / "bad"), "--out", str(tmp_path / "bad/x.index")])
    with pytest.raises(DataError, match="does not exist"):
        index([str(tmp_path / "absent")])
    with pytest.raises(DataError, match="its bucket does not exist"):
        index(["s3://no-such-bucket/photos"])


def test_the_corpus_holds_every_reason() -> None:
    reasons = Counter(reason for _, right in bad(72, seed=1).values() for reason in right)
    assert set(reasons) == {"unreadable", "truncated", "bomb", "too-small", "mode"}

"""The quality table on two small pictures, by bicubic and a network that has learned nothing."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctmsr.config import to_dict
from ctmsr.errors import DataError, UserError
from ctmsr.image import decode, encode_png
from ctmsr.metrics.full_reference import psnr_y
from ctmsr.model import checkpoint
from ctmsr.model.inference import InferenceConfig, upscale
from ctmsr.model.schedule import ScheduleConfig
from tests.benchmarks.peers import Bench, Made, load_bicubic
from tests.benchmarks.quality import fill, main
from tests.benchmarks.quality_sets import PHOTO_PX, Sample, read_photos, read_testset
from tests.benchmarks.quality_sheet import CROP_PX, LABEL_PX, SHEET, ZOOM, sheet, strip, write_strip
from tests.support.tiny import NETWORK, filled_model


@pytest.fixture
def testsets(photos: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder with Set5, of two pictures of 128x96 px."""
    for name, data in list(photos.items())[:2]:
        hr = Image.fromarray(decode(data, name=name))
        for folder, picture in (("HR", hr), ("LRx4", hr.resize((32, 24), Image.Resampling.BICUBIC))):
            (tmp_path / "testsets/Set5" / folder).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / "testsets/Set5" / folder / name)
    return tmp_path / "testsets"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint."""
    parts = {"network": NETWORK, "schedule": ScheduleConfig(), "inference": InferenceConfig()}
    config = {name: to_dict(part) for name, part in parts.items()}
    checkpoint.save(tmp_path / "tiny", model=filled_model().state_dict(), config=config, meta={})
    return tmp_path / "tiny"


def test_a_checkpoint_stands_beside_bicubic(
    testsets: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--testsets", str(testsets), "--sets", "Set5", "--out", str(tmp_path)]
    assert main(options) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed[:3]] == ["Set5", "bicubic", "tiny"]
    rows = {name: json.loads((tmp_path / f"quality-{name}.json").read_text()) for name in ("bicubic", "tiny")}
    network, manifest = checkpoint.load_model(model)
    assert rows["tiny"]["about"]["parameters"] == sum(p.numel() for p in network.parameters())
    for sample in read_testset(testsets / "Set5"):
        sr_u8 = upscale(network, sample.lq_u8, sigma_max=manifest.config["schedule"]["sigma_max"])
        expected = psnr_y(sr_u8, sample.hr_u8, crop_border=4)
        assert rows["tiny"][sample.key]["psnr_y"] == pytest.approx(expected, abs=0.01)
        assert rows["tiny"][sample.key]["peak_mib"] > 100
        assert rows["bicubic"][sample.key]["lpips"] < rows["tiny"][sample.key]["lpips"]
        assert "niqe" not in rows["bicubic"][sample.key]  # too small
    mean = np.mean([scores["psnr_y"] for key, scores in rows["bicubic"].items() if key != "about"])
    assert float(printed[1][1]) == pytest.approx(mean, abs=0.006)


def test_what_is_known_is_not_computed_again(testsets: Path, tmp_path: Path) -> None:
    path = tmp_path / "quality-bicubic.json"
    first, second = read_testset(testsets / "Set5")
    with Bench(load_bicubic) as bench:
        fill(path, bench, [first])
        row = json.loads(path.read_text())
        row[first.key]["psnr_y"] = 1.0
        path.write_text(json.dumps(row))
        fill(path, bench, [first, second])
        assert json.loads(path.read_text())[first.key]["psnr_y"] == 1
        assert json.loads(path.read_text())[second.key]["psnr_y"] > 15
        row["about"]["version"] = "another"
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"quality-bicubic\.json is of another, and this is Pillow"):
            fill(path, bench, [second])


def test_a_peer_that_is_not_installed_is_named() -> None:
    load: Any = partial(import_module, "a_peer_of_this_name")
    with pytest.raises(UserError, match=r"'a_peer_of_this_name'. tests/benchmarks/peers\.txt says how"):
        Bench(load)


def test_photographs_are_degraded_alike_each_time_and_in_two_ways(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTO_PX + 8, PHOTO_PX + 4, 3), np.uint8)
    (tmp_path / "0001.png").write_bytes(encode_png(pixels))
    (tmp_path / "0001.txt").touch()
    one, two = read_photos(tmp_path)
    assert (one.key, two.key) == (f"{tmp_path.name}/0001.0", f"{tmp_path.name}/0001.1")
    np.testing.assert_array_equal(one.hr_u8, pixels[4:-4, 2:-2])
    assert (one.lq_u8 != two.lq_u8).any()
    for again, before in zip(read_photos(tmp_path), (one, two), strict=True):
        np.testing.assert_array_equal(again.lq_u8, before.lq_u8)


def test_pairs_that_do_not_match_are_refused(testsets: Path) -> None:
    path = next((testsets / "Set5/LRx4").iterdir())
    Image.new("RGB", (31, 24)).save(path)
    with pytest.raises(DataError, match=rf"{path.name} has the shape \(96, 128, 3\), .* \(24, 31, 3\)"):
        list(read_testset(testsets / "Set5"))
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        list(read_testset(testsets / "Set5"))
    with pytest.raises(DataError, match="holds no picture"):
        list(read_testset(testsets / "Set14"))


def test_the_sheet_shows_the_same_place_of_every_row(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((PHOTO_PX, PHOTO_PX)))
    shown = [Sample(key, pixels, pixels[::4, ::4]) for key in SHEET]
    write_strip(tmp_path / "quality-b.jpg", strip([(s, Made(pixels, 0, 0)) for s in shown]))
    found = decode(sheet(tmp_path, ["a", "b"], shown).read_bytes(), name="sheet")
    side = ZOOM * CROP_PX
    assert found.shape == (LABEL_PX + len(SHEET) * side, 3 * side, 3)  # no strip of "a"
    top, left = SHEET[shown[1].key]
    hr_u8 = found[LABEL_PX + side : LABEL_PX + 2 * side, 2 * side :][::ZOOM, ::ZOOM]
    expected = pixels[top : top + CROP_PX, left : left + CROP_PX].astype(float)
    of_row, of_hr = (found[LABEL_PX:, k * side : (k + 1) * side].astype(float) for k in (1, 2))
    # JPEG's error is about 2; another place would differ by 70
    assert np.abs(hr_u8 - expected).mean() < 5
    assert np.abs(of_row - of_hr).mean() < 5

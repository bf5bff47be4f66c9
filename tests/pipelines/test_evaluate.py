"""Evaluation of pairs and of pictures without a reference; what the network has learned is no matter."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ctmsr.config import to_dict
from ctmsr.errors import DataError, UserError
from ctmsr.image import decode, encode_png
from ctmsr.metrics.dists import dists, load_dists
from ctmsr.metrics.full_reference import psnr_y
from ctmsr.metrics.niqe import niqe
from ctmsr.metrics.scoring import bicubic, table
from ctmsr.model import checkpoint
from ctmsr.model.network import ConsistencyModel
from pipelines.config.run_config import RunConfig
from pipelines.data.held_out import find_held_out
from pipelines.evaluate.__main__ import main
from pipelines.evaluate.run import evaluate
from tests.support.runs import run_config


@dataclass(frozen=True)
class Untrained:
    """A checkpoint of a network as it is drawn."""

    config: RunConfig
    checkpoint_uri: str
    options: list[str]
    """For a command line: the config, from a file."""


@pytest.fixture(scope="module")
def untrained(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Untrained:
    folder = tmp_path_factory.mktemp("untrained")
    config = run_config("none", folder)
    state = ConsistencyModel(config.network).state_dict()
    checkpoint.save(folder / "checkpoint", model=state, config=to_dict(config), meta={"step": 0})
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return Untrained(config, str(folder / "checkpoint"), ["--config", str(folder / "config.json")])


@pytest.fixture
def pairs(photos: dict[str, bytes], tmp_path: Path) -> dict[str, np.ndarray]:
    """Two HR pictures of unequal sizes below tmp_path/hr, and a quarter as large below tmp_path/lr."""
    pictures = {}
    for number, (name, data) in enumerate(list(photos.items())[:2]):
        hr_u8 = decode(data, name=name)[: 96 - 8 * number, : 120 - 16 * number]
        pictures[Path(name).stem] = hr_u8
        lq_u8 = hr_u8.reshape(len(hr_u8) // 4, 4, -1, 4, 3).mean((1, 3)).round().astype(np.uint8)
        for folder, file, picture in (("hr", f"{Path(name).stem}.png", hr_u8), ("lr", name, lq_u8)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / file).write_bytes(encode_png(picture))
    return pictures


def test_evaluate_takes_pairs_of_whole_pictures(
    untrained: Untrained, pairs: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"data.test_uri={tmp_path}/hr", f"data.test_lq_uri={tmp_path}/lr", "data.eval_crop_border=4"]
    options = [*untrained.options, *(part for place in places for part in ("--set", place))]
    options += ["--set", f"storage_uri={tmp_path}", "--checkpoint", untrained.checkpoint_uri]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert f"protocol: whole pictures of {tmp_path}/lr against {tmp_path}/hr; PSNR, SSIM and NIQE" in printed
    with (tmp_path / "first/evaluation/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["key"]).stem for row in rows] == sorted(pairs)
    net = load_dists()
    for row in rows:
        lq_u8 = decode((tmp_path / "lr" / row["key"]).read_bytes(), name="lr")
        bicubic_u8, hr_u8 = bicubic(lq_u8, 4), pairs[Path(row["key"]).stem]
        assert float(row["bicubic_psnr_y"]) == pytest.approx(psnr_y(bicubic_u8, hr_u8, crop_border=4))
        assert float(row["bicubic_dists"]) == pytest.approx(dists(bicubic_u8, hr_u8, net), abs=1e-5)
    means = json.loads((tmp_path / "first/evaluation/scores.json").read_text())["means"]
    assert means["ssim_y"] == pytest.approx(np.mean([float(row["ssim_y"]) for row in rows]))
    assert decode((tmp_path / "first/evaluation/grid.png").read_bytes(), name="grid").shape == (184, 480, 3)


def test_evaluate_scores_pictures_without_a_reference(
    untrained: Untrained, photos: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(photos["coffee.png"])  # 128x96 becomes 512x384: 20 blocks of NIQE
    data = replace(untrained.config.data, test_uri="", test_lq_uri=str(tmp_path))
    evaluation = evaluate(untrained.config, untrained.checkpoint_uri, find_held_out(data))
    assert evaluation.means.keys() == {"niqe", "bicubic_niqe"}
    assert evaluation.means["bicubic_niqe"] == pytest.approx(
        niqe(bicubic(decode(photos["coffee.png"], name="x"), 4))
    )
    held = evaluate(
        untrained.config, untrained.checkpoint_uri, find_held_out(data), ["inference.colour_hold_px=2"]
    )
    assert held.means["bicubic_niqe"] == evaluation.means["bicubic_niqe"]
    assert held.means["niqe"] != evaluation.means["niqe"]
    assert table({"ours": evaluation}).splitlines()[0].split() == [
        "NIQE",
        "mean",
        "of",
        "1",
        "held-out",
        "samples",
    ]


def test_pairs_that_do_not_match_are_named(
    untrained: Untrained, pairs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    data = replace(untrained.config.data, test_uri=f"{tmp_path}/hr", test_lq_uri=f"{tmp_path}/lr")
    first = sorted(pairs)[0]
    (tmp_path / "hr" / f"{first}.png").write_bytes(encode_png(pairs[first][:-4]))
    held_out = find_held_out(data)
    with pytest.raises(
        UserError, match=rf"hr/{first}\.png is 120x92 pixels and its LR picture .* not 4 times smaller"
    ):
        evaluate(untrained.config, untrained.checkpoint_uri, held_out)
    (tmp_path / "hr" / f"{first}.png").rename(tmp_path / "hr" / "other.png")
    with pytest.raises(DataError, match=rf"1 of 2 pictures under .*lr have no HR picture .*: {first}\.png"):
        find_held_out(data)
    (tmp_path / "lr" / f"{first}.jpg").touch()
    with pytest.raises(DataError, match=rf"has two pictures {first}\.\*"):
        find_held_out(data)
    with pytest.raises(UserError, match="or both: there is nothing to evaluate on"):
        find_held_out(replace(data, test_uri="", test_lq_uri=""))

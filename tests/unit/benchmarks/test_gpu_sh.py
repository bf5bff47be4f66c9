"""The command for a GPU, every part of it in its smallest size on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data

from ctmsr.image import encode_png
from tests.benchmarks.kit import pack
from tests.support.repository import ROOT

PHOTOS = {"train": ("astronaut", "coffee"), "val": ("chelsea",), "test": ("rocket",)}
PARTS = ("tests", "parity", "steps", "curves", "inference", "ablation", "train", "compiled")


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command with `folder`/kit, /photos and /out."""
    paths = [word for name in ("kit", "photos", "out") for word in (f"--{name}", str(folder / name))]
    return subprocess.run(
        ["bash", "tests/benchmarks/gpu.sh", *paths, *options],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_part_is_run_once_and_one_that_fails_is_told(tmp_path: Path) -> None:
    first = run(tmp_path, "--smoke", "parity", "steps")  # there is no kit, which only `steps` needs
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1] == "failed: steps"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "parity.done",
        "parity.json",
        "parity.txt",
        "steps.txt",
    }
    assert "kit/backbones" in (tmp_path / "out/steps.txt").read_text()
    errors = json.loads((tmp_path / "out/parity.json").read_text())["errors"]
    assert max(errors["tiny, float32"].values()) < 1e-4 < max(errors["tiny, bf16"].values()) < 0.2
    again = run(tmp_path, "--smoke", "parity")
    assert (again.returncode, again.stdout) == (0, "== parity: done before\n")


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    unknown = run(tmp_path, "speed")
    assert unknown.returncode == 2
    assert unknown.stderr == f"error: no part speed, there are: {' '.join(PARTS)}\n"
    nothing = subprocess.run(
        ["bash", "tests/benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert nothing.returncode == 2
    assert "--kit, --photos and --out are needed" in nothing.stderr


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    for folder, names in PHOTOS.items():
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for name in names:
            picture = getattr(skimage.data, name)()
            (tmp_path / "photos" / folder / f"{name}.png").write_bytes(encode_png(picture))
    pack(tmp_path / "photos", [], tmp_path / "kit", 60)
    found = run(tmp_path, "--smoke")
    assert found.returncode == 0, found.stdout + found.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{part}.{suffix}" for part in PARTS for suffix in ("done", "txt")} <= made
    assert {"parity.json", "steps.json", "curves.json", "inference.json", "ablation.json"} <= made
    assert {"training.json", "sheet.jpg", "checkpoint", "compiled.json"} <= made
    steps = json.loads((tmp_path / "out/steps.json").read_text())
    assert {len(form["losses"]) for form in steps["forms"].values()} == {2}

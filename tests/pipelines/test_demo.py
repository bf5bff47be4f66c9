"""`make demo` as a user meets it: it ends well, also when interrupted, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from ctmsr.image import decode
from tests.support.repository import ROOT

TINY = {
    "tune.ct_steps": 4,
    "optim.ct_steps": 3,
    "train.checkpoint_every_steps": 2,
    "data.eval_crop_size": 64,
}

pytestmark = pytest.mark.slow


def start(output: Path, marker: str, **settings: int) -> subprocess.Popen[str]:
    """The demo with next to no training, in a process group of its own, its environment marked."""
    overrides = [
        argument for key, value in (TINY | settings).items() for argument in ("--set", f"{key}={value}")
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.demo", "--output", str(output), *overrides],
        cwd=ROOT,
        env=os.environ | {"CTMSR_TEST_MARKER": marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(marker: str) -> list[str]:
    """Command lines of living processes that inherited the marker."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_until_gone(marker: str, timeout_s: float = 20) -> list[str]:
    """What is left of the marked processes after a moment to end."""
    deadline = time.monotonic() + timeout_s
    while (left := left_behind(marker)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_demo_ends_with_a_picture_and_a_table(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    demo = start(tmp_path, marker)
    text, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, text
    for command in ("tune", "train", "evaluate", "register", "upscale"):
        assert f"python -m pipelines.{command}:" in text
    assert "warning" not in text.lower()
    lines = text.splitlines()
    for row in ("bicubic ", "from scratch ", "fine-tuned "):
        assert any(line.startswith(row) for line in lines)
    picture = decode((tmp_path / "comparison.png").read_bytes(), name="comparison.png")
    assert picture.shape == (3 * 64, 4 * 64, 3)
    panels = [panel for row in np.split(picture, 3) for panel in np.split(row, 4, axis=1)]
    assert len({panel.tobytes() for panel in panels}) == 12
    assert wait_until_gone(marker) == []


@pytest.mark.parametrize("stage", ["trial-", "from-scratch"])
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, stage: str) -> None:
    marker = uuid.uuid4().hex
    demo = start(tmp_path, marker, **{"optim.ct_steps": 300})
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(stage) and "loss" in line:  # workers are training
            break
    os.killpg(demo.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    text, _ = demo.communicate(timeout=90)
    assert demo.returncode == 130, text
    assert "Traceback" not in text
    assert wait_until_gone(marker) == []

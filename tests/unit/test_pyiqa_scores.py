"""Scores by somebody else's package: asked for as it wants to be, and refused where it is not there.

A stand-in takes its place: the real one is for non-commercial use alone, and downloads its networks.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from ctmsr.errors import UserError
from ctmsr.metrics import pyiqa_scores
from ctmsr.metrics.perceptual import load_lpips
from ctmsr.metrics.scoring import METRICS, OWN_METRICS, bicubic, score

STAND_IN = """
def create_metric(name, device):
    def compute(images):
        assert images.ndim == 4 and images.shape[1] == 3 and 0 <= images.min() and images.max() <= 1
        return {"clipiqa": 1, "musiq": 100}[name] * images[:, :1].mean(dim=(2, 3))
    return compute
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyiqa.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    monkeypatch.setattr(pyiqa_scores, "_network", pyiqa_scores._network.__wrapped__)


def test_pictures_go_there_as_rgb_between_0_and_1(stand_in: None) -> None:
    lq_u8 = skimage.data.chelsea()[:40, :48].copy()
    lq_u8[:4, :4], lq_u8[-4:, -4:] = 0, 255
    rows = [{"key": "a", "lq": lq_u8, "hr": None}]
    found = score(
        lambda lq_u8: np.repeat(np.repeat(lq_u8, 4, 0), 4, 1),
        rows,
        scale=4,
        lpips=load_lpips("alex"),
        metrics=["clipiqa", "musiq"],
    ).means
    red = lq_u8[..., 0].mean() / 255
    assert (found["clipiqa"], found["musiq"]) == pytest.approx((red, 100 * red), rel=1e-5)
    assert found["bicubic_musiq"] == pytest.approx(100 * bicubic(lq_u8, 4)[..., 0].mean() / 255, rel=1e-5)


def test_what_needs_it_is_refused_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyiqa_scores, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"clipiqa and musiq need pyiqa, .* forbids commercial"):
        pyiqa_scores.check_pyiqa()
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="which is not installed"):
        pyiqa_scores.pyiqa_score("musiq", picture, torch.device("cpu"))
    assert set(METRICS) - set(OWN_METRICS) == set(pyiqa_scores.PYIQA_NAMES)

"""Scores of upscaled pictures next to those of bicubic, and a grid that shows them.

Shared by the evaluation of a checkpoint, the validation during training and the comparison of a registered
model with the champion. To add a metric, write a function and a line in `METRICS`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

from ..image.ranges import to_tensor, to_u8, upsample
from .dists import Dists, dists
from .full_reference import lpips_alex, psnr_y, ssim_y
from .niqe import MIN_SIDE_PX, niqe
from .perceptual import Lpips
from .pyiqa_scores import PYIQA_NAMES, pyiqa_score

MAX_GRID_ROWS = 8
GRID_PX = 256
"""Largest side of a picture in the grid; of larger ones the middle is shown."""


@dataclass(frozen=True)
class Pair:
    """An upscaled picture and its reference, with everything that the metrics need."""

    sr_u8: np.ndarray
    hr_u8: Any
    """uint8 HWC; None if there is no reference."""
    lpips: Lpips
    """LPIPS-alex."""
    crop_border: int = 0
    """Pixels cut from every side for PSNR, SSIM and NIQE."""
    dists: Dists | None = None
    """Only DISTS needs it."""


@dataclass(frozen=True)
class Metric:
    """One column of a table of scores."""

    title: str
    compute: Callable[[Pair], float | None]
    """The score; None if the pair is too small for it."""
    rises: bool
    """Whether higher is better."""
    digits: int = 4
    needs_reference: bool = True


def _dists(pair: Pair) -> float:
    assert pair.dists is not None, "the metric dists needs the argument dists"
    return dists(pair.sr_u8, pair.hr_u8, pair.dists)


def _niqe(pair: Pair) -> float | None:
    large_enough = min(pair.sr_u8.shape[:2]) >= MIN_SIDE_PX + 2 * pair.crop_border
    return niqe(pair.sr_u8, crop_border=pair.crop_border) if large_enough else None


def _pyiqa(name: str, pair: Pair) -> float:
    return pyiqa_score(name, pair.sr_u8, pair.lpips.shift.device)


METRICS = {
    "psnr_y": Metric(
        "PSNR-Y dB", lambda p: psnr_y(p.sr_u8, p.hr_u8, crop_border=p.crop_border), rises=True, digits=2
    ),
    "ssim_y": Metric("SSIM-Y", lambda p: ssim_y(p.sr_u8, p.hr_u8, crop_border=p.crop_border), rises=True),
    "lpips": Metric("LPIPS", lambda p: lpips_alex(p.sr_u8, p.hr_u8, p.lpips), rises=False),
    "dists": Metric("DISTS", _dists, rises=False),
    "niqe": Metric("NIQE", _niqe, rises=False, needs_reference=False),
    "clipiqa": Metric("CLIPIQA", partial(_pyiqa, "clipiqa"), rises=True, needs_reference=False),
    "musiq": Metric("MUSIQ", partial(_pyiqa, "musiq"), rises=True, digits=2, needs_reference=False),
}
"""Every metric, by the name of its score."""
OWN_METRICS = tuple(name for name in METRICS if name not in PYIQA_NAMES)
"""Metrics that need no extra package."""
REFERENCE_METRICS = ("psnr_y", "ssim_y", "lpips")
"""Metrics reported during training and compared with the champion. DISTS is not included: with VGG16 on the
whole picture it costs twenty times as much as LPIPS."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and of bicubic on each picture, and a grid that shows them."""

    rows: list[dict[str, Any]]
    """One per picture: its key, its scores by name, and those of bicubic as bicubic_*."""
    grid_u8: np.ndarray
    """LR | bicubic | ours | HR, one row per picture, uint8 HWC."""
    samples_u8: tuple[np.ndarray, ...] = ()
    """The rows of the grid, each of its own size; those of the first few of `rows`."""

    @property
    def means(self) -> dict[str, float]:
        """Mean of every score over the pictures that have it."""
        names = {name: None for row in self.rows for name in row if name != "key"}  # in order
        return {name: float(np.mean([row[name] for row in self.rows if name in row])) for name in names}

    def by_picture(self, name: str) -> list[float]:
        """A score of each picture, in order: the mean over its draws, which share a key."""
        draws: dict[str, list[float]] = {}
        for row in self.rows:
            draws.setdefault(row["key"], []).append(row[name])
        return [float(np.mean(scores)) for scores in draws.values()]


def score(
    upscale: Callable[[np.ndarray], np.ndarray],
    rows: Iterable[Mapping[str, Any]],
    *,
    scale: int,
    lpips: Lpips,
    dists: Dists | None = None,
    crop_border: int = 0,
    metrics: Sequence[str] = REFERENCE_METRICS,
) -> Evaluation:
    """Upscales every row's "lq" and compares the result with its "hr".

    Args:
        upscale: uint8 (h, w, 3) to uint8 (scale·h, scale·w, 3).
        rows: With "key", "hr" and "lq" (uint8 HWC); "hr" is None if there is no reference.
        scale: HR/LQ ratio.
        lpips: LPIPS-alex, on any device.
        dists: DISTS, on any device, if `metrics` names it.
        crop_border: Pixels cut from every side for PSNR, SSIM and NIQE.
        metrics: Names in `METRICS`; a picture gets those that can be computed for it.
    """
    table: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    for row in rows:
        hr_u8, lq_u8 = row["hr"], row["lq"]
        images = {"": upscale(lq_u8), "bicubic_": bicubic(lq_u8, scale)}
        scores: dict[str, Any] = {"key": str(row["key"])}
        for prefix, sr_u8 in images.items():
            pair = Pair(sr_u8, hr_u8, lpips, crop_border, dists)
            for name in metrics:
                metric = METRICS[name]
                if hr_u8 is None and metric.needs_reference:
                    continue
                if (value := metric.compute(pair)) is not None:
                    scores[prefix + name] = value
        table.append(scores)
        if len(pictures) < MAX_GRID_ROWS:
            pictures.append(side_by_side(hr_u8, lq_u8, images[""]))
    return Evaluation(table, stack(pictures), tuple(pictures))


def bicubic(lq_u8: np.ndarray, scale: int) -> np.ndarray:
    """The baseline: uint8 HWC, enlarged by `scale`."""
    return to_u8(upsample(to_tensor(lq_u8[None]), scale))[0]


def side_by_side(hr_u8: np.ndarray | None, lq_u8: np.ndarray, sr_u8: np.ndarray) -> np.ndarray:
    """LR | bicubic | ours | HR, if there is one, at HR size: the middle GRID_PX of each."""
    height, width = sr_u8.shape[:2]
    blocky = cv2.resize(lq_u8, (width, height), interpolation=cv2.INTER_NEAREST)
    panels = [blocky, bicubic(lq_u8, height // len(lq_u8)), sr_u8, *([] if hr_u8 is None else [hr_u8])]
    top, left = (max(0, side - GRID_PX) // 2 for side in (height, width))
    return np.hstack([panel[top : top + GRID_PX, left : left + GRID_PX] for panel in panels])


def stack(rows_u8: list[np.ndarray]) -> np.ndarray:
    """Pictures of any width below each other, on black."""
    width = max(row.shape[1] for row in rows_u8)
    return np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows_u8])


def table(evaluations: Mapping[str, Evaluation]) -> str:
    """A text table of mean scores: bicubic, then each model by name, on the same samples."""
    num_samples = len(next(iter(evaluations.values())).rows)
    means = {name: one.means for name, one in evaluations.items()}
    return score_table(means, f"mean of {num_samples} held-out samples")


def score_table(means: Mapping[str, Mapping[str, float]], of_what: str) -> str:
    """A text table of the means of `Evaluation`: bicubic, then each model by name."""
    first = next(iter(means.values()))
    shown = {name: metric for name, metric in METRICS.items() if name in first}
    width = max(10, *(len(name) + 2 for name in means))
    header = "".join(f"{metric.title:>11}" for metric in shown.values())
    lines = [f"{'':{width}}{header}   {of_what}"]
    baseline = {name: first[f"bicubic_{name}"] for name in shown}
    for title, own in {"bicubic": baseline, **means}.items():
        scores = "".join(f"{own[name]:>11.{metric.digits}f}" for name, metric in shown.items())
        lines.append(f"{title:{width}}{scores}")
    return "\n".join(lines)

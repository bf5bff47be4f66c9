"""Scores by picture, of rows that are draws."""

import numpy as np

from ctmsr.metrics.scoring import Evaluation


def test_draws_of_a_picture_count_as_one() -> None:
    scores = {"b.png": (0.25, 0.75), "a.png": (0.0, 0.5), "c.png": (1.0,)}
    rows = [{"key": key, "lpips": one} for key, draws in scores.items() for one in draws]
    evaluation = Evaluation(rows, np.zeros((1, 1, 3), np.uint8))
    assert evaluation.by_picture("lpips") == [0.5, 0.25, 1.0]  # in the order of the pictures
    assert evaluation.means == {"lpips": 0.5}

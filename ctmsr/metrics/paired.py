"""Decides whether one model is better than another on the same pictures, or whether they cannot tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

MIN_PICTURES = 5
"""With fewer, the spread of the differences is too uncertain for a meaningful interval."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A confidence interval of the mean difference in a score, over all pictures of this kind."""

    mean: float
    half_width: float
    """The interval is mean ± half_width."""
    num_pictures: int

    @property
    def holds_zero(self) -> bool:
        """Whether there may be no difference at all; true for NaN, too."""
        return not abs(self.mean) > self.half_width


def paired_interval(differences: Sequence[float], *, num_compared: int = 1) -> Interval | None:
    """Student's t interval of a mean over pictures: mean ± t·s/√n, at CONFIDENCE.

    The best of several models looks better than it is, as chance helped to select it. So the interval is
    widened for the number of comparisons (Bonferroni). It covers the choice of pictures for these two models,
    not the variation between training seeds.

    Args:
        differences: For each picture, the score of one model minus that of the other. Several draws of a
            picture are not independent: pass their mean.
        num_compared: Number of models that the one was selected from, at least 1.

    Returns:
        The interval; None for fewer than MIN_PICTURES differences.
    """
    number = len(differences)
    if number < MIN_PICTURES:
        return None
    mean = math.fsum(differences) / number
    variance = math.fsum((one - mean) ** 2 for one in differences) / (number - 1)
    quantile = float(stdtrit(number - 1, 1 - (1 - CONFIDENCE) / (2 * num_compared)))
    return Interval(mean, quantile * math.sqrt(variance / number), number)

"""Whether one model is better than another on the same pictures, or whether the pictures cannot tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

MIN_PICTURES = 5
"""With fewer, the spread of the differences is itself unknown, and an interval means little."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Where the mean difference in a score would be on any number of such pictures."""

    mean: float
    half_width: float
    """Half of the interval's length; it reaches as far to both sides of the mean."""
    num_pictures: int

    @property
    def holds_zero(self) -> bool:
        """Whether there may be no difference at all; of numbers that are none, too."""
        return not abs(self.mean) > self.half_width


def paired_interval(differences: Sequence[float], *, num_compared: int = 1) -> Interval | None:
    """Student's t interval of a mean over pictures: mean ± t·s/√n, at CONFIDENCE.

    The best of several is better than it deserves: chance has helped to pick it. So the confidence is shared
    out among the comparisons (Bonferroni). The interval is over pictures, of the two models that there are:
    what another seed would have trained is not in it.

    Args:
        differences: A picture's score by one model minus its score by the other. Draws of one picture are
            not independent: give their mean.
        num_compared: How many models the one has been picked from, at least 1.

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

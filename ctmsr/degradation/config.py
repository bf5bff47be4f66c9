"""Which degradations are applied, how often and how strongly; the defaults are the published values.

The recipe is Real-ESRGAN's (Wang et al. 2021, arXiv:2107.10833), the values those published for CTMSR.
"""

import math
from dataclasses import dataclass, fields

from ..config import check

# Smallest blur width, exponent, cut-off and resize factor: below it formulas divide by nearly 0.
_MIN_POSITIVE = 0.01


def _check_probability(name: str, value: float) -> None:
    check(0 <= value <= 1, f"degradation.{name} must be a probability in [0, 1], got {value}.")


def _check_kernel_side(name: str, value: int) -> None:
    check(value >= 3 and value % 2 == 1, f"degradation.{name} must be odd and at least 3, got {value}.")


def _check_range(
    name: str, value: tuple[float, float], lowest: float, highest: float = math.inf, *, around_1: bool = False
) -> None:
    low, high = value
    inside = lowest <= low <= high <= highest and math.isfinite(high) and (low <= 1 <= high or not around_1)
    need = f"low <= {'1 <= ' if around_1 else ''}high within [{lowest:g}, {highest:g}]"
    check(inside, f"degradation.{name} must be a pair {need}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class BlurKinds:
    """How often each kind of blur kernel is drawn; the six probabilities sum to 1."""

    iso: float = 0.45
    """Gaussian, equally wide in all directions."""
    aniso: float = 0.25
    """Gaussian with two widths, rotated."""
    generalized_iso: float = 0.12
    """Gaussian with a shape exponent."""
    generalized_aniso: float = 0.03
    """The same with two widths, rotated."""
    plateau_iso: float = 0.12
    """Flat-topped kernel with a shape exponent."""
    plateau_aniso: float = 0.03
    """The same with two widths, rotated."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_probability(f"<stage>.blur_kinds.{field.name}", getattr(self, field.name))
        total = sum(getattr(self, field.name) for field in fields(self))
        check(
            abs(total - 1) < 1e-6,
            f"degradation.<stage>.blur_kinds must sum to 1, got {total:g}. Rescale the six probabilities.",
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One round of blur -> resize -> noise -> JPEG.

    No defaults: a partial stage2 would silently inherit stage1's values.
    """

    prob: float
    """Probability that the stage is applied at all."""
    blur_prob: float
    """Probability of a blur within the stage."""
    max_blur_kernel_px: int
    """Largest kernel side, odd; sides are uniform over 3, 5 ... this. Higher allows wider blurs."""
    blur_kinds: BlurKinds = BlurKinds()
    """Probabilities of the kernel kinds."""
    blur_sigma_px: tuple[float, float]
    """Range of the blur width in pixels; higher is blurrier."""
    generalized_beta: tuple[float, float]
    """Range, around 1, of generalized kernels' exponent; below or above 1 is drawn at even odds."""
    plateau_beta: tuple[float, float]
    """Range, around 1, of plateau kernels' exponent; drawn likewise."""
    sinc_prob: float
    """Probability that the blur is a sinc filter instead; higher gives more ringing."""
    sinc_cutoff_rad: tuple[float, float]
    """Range of the sinc cut-off in radians per pixel, for kernels under 13 px; lower is blurrier."""
    sinc_cutoff_large_rad: tuple[float, float]
    """The same for kernels of 13 px and more, which can cut lower."""
    resize_up_prob: float
    """Probability of enlarging."""
    resize_down_prob: float
    """Probability of shrinking; the rest keeps the base size."""
    resize_range: tuple[float, float]
    """Smallest and largest factor on the base size (stage1: the HR crop; stage2: HR / scale)."""
    gaussian_prob: float
    """Probability that the noise is Gaussian; otherwise it is Poisson."""
    noise_std: tuple[float, float]
    """Range of the Gaussian noise's standard deviation in [0, 1] units; higher is noisier."""
    poisson_scale: tuple[float, float]
    """Range of the factor on the Poisson noise; higher is noisier."""
    grey_prob: float
    """Probability that the channels share one noise."""
    jpeg_prob: float
    """Probability of a JPEG round trip at the end of the stage."""
    jpeg_quality: tuple[float, float]
    """Range of the JPEG quality, 1 to 100, rounded to an integer after the draw; lower has more artefacts."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "prob" or field.name.endswith("_prob"):
                _check_probability(f"<stage>.{field.name}", getattr(self, field.name))
        moved = self.resize_up_prob + self.resize_down_prob
        check(
            moved < 1 + 1e-6,
            f"degradation.<stage>.resize_up_prob + resize_down_prob must be at most 1, got {moved:g}.",
        )
        _check_kernel_side("<stage>.max_blur_kernel_px", self.max_blur_kernel_px)
        _check_range("<stage>.blur_sigma_px", self.blur_sigma_px, _MIN_POSITIVE)
        for name in ("generalized_beta", "plateau_beta", "resize_range"):
            _check_range(f"<stage>.{name}", getattr(self, name), _MIN_POSITIVE, around_1=True)
        for name in ("sinc_cutoff_rad", "sinc_cutoff_large_rad"):
            _check_range(f"<stage>.{name}", getattr(self, name), _MIN_POSITIVE, math.pi)
        _check_range("<stage>.noise_std", self.noise_std, 0, 1)
        _check_range("<stage>.poisson_scale", self.poisson_scale, 0)
        _check_range("<stage>.jpeg_quality", self.jpeg_quality, 1, 100)


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """The whole degradation; the defaults are the published values."""

    stage1: StageConfig = StageConfig(
        prob=1.0,
        blur_prob=1.0,
        max_blur_kernel_px=19,
        blur_sigma_px=(0.2, 3.0),
        generalized_beta=(0.5, 4.0),
        plateau_beta=(1.0, 2.0),
        sinc_prob=0.1,
        sinc_cutoff_rad=(math.pi / 3, math.pi),
        sinc_cutoff_large_rad=(math.pi / 5, math.pi),
        resize_up_prob=0.2,
        resize_down_prob=0.7,
        resize_range=(0.15, 1.5),
        gaussian_prob=0.5,
        noise_std=(1 / 255, 30 / 255),
        poisson_scale=(0.05, 3.0),
        grey_prob=0.4,
        jpeg_prob=1.0,
        jpeg_quality=(30.0, 95.0),
    )
    """First round, on the HR crop."""
    stage2: StageConfig = StageConfig(
        prob=0.5,
        blur_prob=0.8,
        max_blur_kernel_px=13,
        blur_sigma_px=(0.2, 1.5),
        generalized_beta=(0.5, 4.0),
        plateau_beta=(1.0, 2.0),
        sinc_prob=0.1,
        sinc_cutoff_rad=(math.pi / 3, math.pi),
        sinc_cutoff_large_rad=(math.pi / 5, math.pi),
        resize_up_prob=0.3,
        resize_down_prob=0.4,
        resize_range=(0.3, 1.2),
        gaussian_prob=0.5,
        noise_std=(1 / 255, 25 / 255),
        poisson_scale=(0.05, 2.5),
        grey_prob=0.4,
        jpeg_prob=0.0,
        jpeg_quality=(30.0, 95.0),
    )
    """Second round; its JPEG is the final one below."""
    final_sinc_prob: float = 0.8
    """Probability of the last sinc filter; higher gives more ringing."""
    final_max_sinc_kernel_px: int = 13
    """Largest side of its kernel, odd; sides are uniform over 3, 5 ... this."""
    final_sinc_cutoff_rad: tuple[float, float] = (math.pi / 3, math.pi)
    """Range of its cut-off in radians per pixel; lower is blurrier."""
    final_jpeg_quality: tuple[float, float] = (30.0, 95.0)
    """Range of the last JPEG's quality, 1 to 100; lower has more artefacts."""
    final_jpeg_last_prob: float = 0.5
    """Probability of resize -> sinc -> JPEG; otherwise JPEG -> resize -> sinc."""

    def __post_init__(self) -> None:
        for name in ("final_sinc_prob", "final_jpeg_last_prob"):
            _check_probability(name, getattr(self, name))
        _check_kernel_side("final_max_sinc_kernel_px", self.final_max_sinc_kernel_px)
        _check_range("final_sinc_cutoff_rad", self.final_sinc_cutoff_rad, _MIN_POSITIVE, math.pi)
        _check_range("final_jpeg_quality", self.final_jpeg_quality, 1, 100)

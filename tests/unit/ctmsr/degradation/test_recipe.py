"""With ranges closed to a point the pipeline equals its operations in order; open, it follows its odds."""

from dataclasses import fields, replace
from typing import Any, get_args

import cv2
import numpy as np
import pytest
from skimage import data

from ctmsr.degradation import ops
from ctmsr.degradation import recipe as degradation
from ctmsr.degradation.config import BlurKinds, DegradationConfig, StageConfig
from ctmsr.degradation.recipe import degrade
from ctmsr.errors import ConfigError
from ctmsr.rng import sample_rng

PUBLISHED = DegradationConfig()
HR_U8 = data.astronaut()[:64, 192:256]
HR = ops.unit_from_u8(HR_U8)
KINDS = [field.name for field in fields(BlurKinds)]
MODES: tuple[ops.ResizeMode, ...] = get_args(ops.ResizeMode)

QUIET_STAGE = replace(
    PUBLISHED.stage1,
    blur_prob=0.0,
    resize_up_prob=0.0,
    resize_down_prob=0.0,
    gaussian_prob=0.0,
    poisson_scale=(0.0, 0.0),
    jpeg_prob=0.0,
)
OFF_STAGE = replace(QUIET_STAGE, prob=0.0)


def quiet(
    stage1: StageConfig = OFF_STAGE, stage2: StageConfig = OFF_STAGE, **final: Any
) -> DegradationConfig:
    """Nothing random is left but the resize modes: JPEG of quality 50 after the final resize, no sinc."""
    fixed = DegradationConfig(
        stage1=stage1,
        stage2=stage2,
        final_sinc_prob=0.0,
        final_jpeg_quality=(50.0, 50.0),
        final_jpeg_last_prob=1.0,
        final_max_sinc_kernel_px=3,
        final_sinc_cutoff_rad=(2.0, 2.0),
    )
    return replace(fixed, **final)


def only(kind: str) -> BlurKinds:
    return BlurKinds(**{name: float(name == kind) for name in KINDS})


def outcomes(config: DegradationConfig, num_draws: int = 12) -> set[bytes]:
    return {
        degrade(HR_U8, scale=4, config=config, rng=np.random.default_rng(seed)).tobytes()
        for seed in range(num_draws)
    }


def as_bytes(images: list[np.ndarray]) -> set[bytes]:
    return {ops.u8_from_unit(image).tobytes() for image in images}


SMALL = [ops.resize(HR, (16, 16), mode) for mode in MODES]


def test_jpeg_last_is_resize_then_jpeg() -> None:
    assert outcomes(quiet()) == as_bytes([ops.jpeg(small, 50) for small in SMALL])


def test_jpeg_first_is_jpeg_then_resize() -> None:
    expected = [ops.resize(ops.jpeg(HR, 50), (16, 16), mode) for mode in MODES]
    assert outcomes(quiet(final_jpeg_last_prob=0.0)) == as_bytes(expected)


def test_final_sinc_comes_after_the_resize() -> None:
    kernel = ops.sinc_kernel(3, 2.0)
    expected = [ops.jpeg(ops.blur(small, kernel), 50) for small in SMALL]
    assert outcomes(quiet(final_sinc_prob=1.0)) == as_bytes(expected)


def test_stage1_blurs_then_compresses_at_hr_size() -> None:
    stage = replace(
        QUIET_STAGE,
        blur_prob=1.0,
        max_blur_kernel_px=3,
        sinc_prob=0.0,
        blur_sigma_px=(0.8, 0.8),
        blur_kinds=only("iso"),
        jpeg_prob=1.0,
        jpeg_quality=(40.0, 40.0),
    )
    stage1 = ops.jpeg(ops.blur(HR, ops.gaussian_kernel(3, (0.8, 0.8))), 40)
    expected = [ops.jpeg(ops.resize(stage1, (16, 16), mode), 50) for mode in MODES]
    assert outcomes(quiet(stage1=stage)) == as_bytes(expected)


def test_stage2_resizes_relative_to_the_lq_size() -> None:
    """At factor 1 stage2 itself reaches the LQ size, so JPEG first no longer means JPEG at HR size."""
    expected = [ops.jpeg(small, 50) for small in SMALL]
    assert outcomes(quiet(stage2=QUIET_STAGE, final_jpeg_last_prob=0.0)) == as_bytes(expected)


def test_stages_run_in_order_on_each_others_output() -> None:
    stage1 = replace(QUIET_STAGE, jpeg_prob=1.0, jpeg_quality=(10.0, 10.0))
    expected = [ops.jpeg(ops.resize(ops.jpeg(HR, 10), (16, 16), mode), 50) for mode in MODES]
    assert outcomes(quiet(stage1=stage1, stage2=QUIET_STAGE)) == as_bytes(expected)


@pytest.mark.parametrize("gaussian_prob", [0.0, 1.0])
@pytest.mark.parametrize("grey_prob", [0.0, 1.0])
def test_grey_probability_decides_whether_channels_share_the_noise(
    gaussian_prob: float, grey_prob: float
) -> None:
    stage = replace(
        QUIET_STAGE,
        gaussian_prob=gaussian_prob,
        grey_prob=grey_prob,
        noise_std=(0.1, 0.1),
        poisson_scale=(0.1, 0.1),
    )
    flat_u8 = np.full((64, 64, 3), 128, np.uint8)
    config = quiet(stage1=stage, final_jpeg_last_prob=0.0, final_jpeg_quality=(100.0, 100.0))
    lq_u8 = degrade(flat_u8, scale=4, config=config, rng=np.random.default_rng(0)).astype(float)
    assert lq_u8.std() > 1
    spread = (lq_u8 - lq_u8.mean(axis=2, keepdims=True)).std()
    assert (spread < 1) == (grey_prob == 1)


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(64, 64, 4), (512, 512, 4), (96, 64, 2), (66, 192, 3), (256, 256, 4)]
)
def test_lq_is_exactly_hr_over_scale(height: int, width: int, scale: int) -> None:
    hr_u8 = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for seed in range(5):
        lq_u8 = degrade(hr_u8, scale=scale, config=PUBLISHED, rng=np.random.default_rng(seed))
        assert lq_u8.shape == (height // scale, width // scale, 3)
        assert lq_u8.dtype == np.uint8


def test_lq_is_hr_over_scale_when_the_crop_is_tiny_and_the_shrinking_extreme() -> None:
    tiny_stage = replace(PUBLISHED.stage1, resize_up_prob=0.0, resize_down_prob=1.0, resize_range=(0.01, 1.0))
    config = replace(PUBLISHED, stage1=tiny_stage, stage2=replace(PUBLISHED.stage2, prob=1.0))
    for seed in range(20):
        lq_u8 = degrade(HR_U8[:8, :12], scale=4, config=config, rng=np.random.default_rng(seed))
        assert lq_u8.shape == (2, 3, 3)


def test_a_crop_that_scale_does_not_divide_is_refused() -> None:
    match = r"^the sides of the 64x62 HR crop are not multiples of scale \(4\)"
    with pytest.raises(ConfigError, match=match):
        degrade(HR_U8[:62], scale=4, config=PUBLISHED, rng=np.random.default_rng(0))


def test_bytes_depend_on_seed_epoch_and_key_alone() -> None:
    def lq_bytes(seed: int, epoch: int, key: str) -> bytes:
        rng = sample_rng(seed, epoch, key, "degrade")
        return degrade(HR_U8, scale=4, config=PUBLISHED, rng=rng).tobytes()

    first = lq_bytes(0, 0, "a.png")
    np.random.seed(1)  # global state must not matter
    assert lq_bytes(0, 0, "a.png") == first
    others = {lq_bytes(1, 0, "a.png"), lq_bytes(0, 1, "a.png"), lq_bytes(0, 0, "b.png")}
    assert len(others | {first}) == 4


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    num_threads = cv2.getNumThreads()
    try:
        results = []
        for count in (1, 4):
            cv2.setNumThreads(count)
            results.append(outcomes(PUBLISHED))
    finally:
        cv2.setNumThreads(num_threads)
    assert results[0] == results[1]


def test_the_crop_is_left_as_it_was() -> None:
    hr_u8 = HR_U8.copy()
    hr_u8.flags.writeable = False
    degrade(hr_u8, scale=4, config=PUBLISHED, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(hr_u8, HR_U8)


def test_sizes_are_drawn_with_the_published_odds() -> None:
    rng, num_draws = np.random.default_rng(0), 4000
    sides = [degradation._draw_size((1000, 500), PUBLISHED.stage1, rng) for _ in range(num_draws)]
    heights = np.array(sides)[:, 0]
    assert (heights > 1000).mean() == pytest.approx(0.2, abs=0.03)
    assert (heights < 1000).mean() == pytest.approx(0.7, abs=0.03)
    assert heights.min() >= 150
    assert heights.max() < 1500
    assert heights[heights < 1000].mean() == pytest.approx(575, abs=15)  # uniform over [150, 1000]
    assert all(width == height // 2 or width == (height + 1) // 2 for height, width in sides)


def test_kernel_sides_are_uniform_over_the_odd_numbers() -> None:
    rng = np.random.default_rng(0)
    sides, counts = np.unique(
        [degradation._draw_kernel_side(19, rng) for _ in range(4500)], return_counts=True
    )
    assert sides.tolist() == [3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert np.abs(counts - 500).max() < 100


@pytest.mark.parametrize(("beta_range", "mean"), [((0.5, 4.0), 1.625), ((1.0, 2.0), 1.25)])
def test_betas_fall_on_both_sides_of_1_at_even_odds(beta_range: tuple[float, float], mean: float) -> None:
    rng = np.random.default_rng(0)
    betas = np.array([degradation._draw_beta(beta_range, rng) for _ in range(4000)])
    assert (betas > 1).mean() == pytest.approx(0.5, abs=0.03)
    assert betas.mean() == pytest.approx(mean, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_kernel_is_what_its_name_says(kind: str) -> None:
    stage = replace(PUBLISHED.stage1, sinc_prob=0.0, blur_kinds=only(kind), blur_sigma_px=(2.0, 3.0))
    rng = np.random.default_rng(0)
    kernels = [kernel for _ in range(80) if len(kernel := degradation._draw_kernel(stage, rng)) >= 9]
    is_round = [np.allclose(kernel, kernel.T, atol=1e-7) for kernel in kernels]
    assert all(is_round) if not kind.endswith("aniso") else not any(is_round)
    # The logarithm of a Gaussian falls quadratically: twice as far out, four times as much.
    centers = [(kernel, len(kernel) // 2) for kernel in kernels if kernel.min() > 0]
    falls = [np.log(kernel[c, c] / kernel[c, [c + 2, c + 4]]) for kernel, c in centers]
    is_gaussian = np.isclose([far / near for near, far in falls], 4, rtol=1e-3)
    assert is_gaussian.all() if kind in ("iso", "aniso") else is_gaussian.mean() < 0.1


@pytest.mark.parametrize("sinc_prob", [0.0, 1.0])
def test_sinc_probability_decides_the_kernel(sinc_prob: float) -> None:
    stage = replace(PUBLISHED.stage1, sinc_prob=sinc_prob)
    rng = np.random.default_rng(0)
    kernels = [kernel for _ in range(60) if len(kernel := degradation._draw_kernel(stage, rng)) >= 7]
    assert all((kernel.min() < 0) == (sinc_prob == 1) for kernel in kernels)


def test_large_sinc_kernels_have_their_own_cutoffs() -> None:
    stage = replace(
        PUBLISHED.stage1, sinc_prob=1.0, sinc_cutoff_rad=(2.0, 2.0), sinc_cutoff_large_rad=(1.0, 1.0)
    )
    rng = np.random.default_rng(0)
    for kernel in [degradation._draw_kernel(stage, rng) for _ in range(60)]:
        side = len(kernel)
        np.testing.assert_array_equal(kernel, ops.sinc_kernel(side, 2.0 if side < 13 else 1.0))

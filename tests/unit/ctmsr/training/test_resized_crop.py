"""Random crops for LPIPS: the pixels they hold, where they fall, what they depend on, and their gradient."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ctmsr.errors import ConfigError
from ctmsr.training.losses import LossConfig
from ctmsr.training.resized_crop import Box, cropped, lpips_size, random_box, resized_crop
from tests.support.fixture_inputs import tensor

A = tensor("crop", (3, 3, 64, 64))
HALF = LossConfig(lpips_crop=0.5)
ZOOMED = LossConfig(lpips_crop=0.5, lpips_zoom=2.0)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


def test_a_box_of_the_final_side_is_a_plain_cut() -> None:
    found = resized_crop(A, [Box(0, 0, 32), Box(32, 7, 32), Box(5, 31, 32)], 32)
    expected = [A[0, :, :32, :32], A[1, :, 32:, 7:39], A[2, :, 5:37, 31:63]]
    assert torch.equal(found, torch.stack(expected))


def test_a_larger_box_is_shrunk_and_a_smaller_one_enlarged_to_the_same_picture() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    for box in (Box(0, 0, 64), Box(8, 16, 24)):
        found = resized_crop(ramp, [box], 32)[0, 0, 16]
        # Pixel centres: place x of the result lies at left + (x + 0.5) side / 32 - 0.5 of the picture.
        places = box.left + (torch.arange(32) + 0.5) * box.side / 32 - 0.5
        expected = -1 + 2 * places / 63
        torch.testing.assert_close(found[4:-4], expected[4:-4], atol=1e-3, rtol=0)


def test_the_gradient_falls_inside_the_boxes_and_is_that_of_finite_differences() -> None:
    boxes = [Box(2, 3, 8), Box(1, 4, 6)]
    small = tensor("small", (2, 3, 12, 12)).double()

    def loss(images: Tensor) -> Tensor:
        return squared_distance(resized_crop(images, boxes, 8), torch.zeros(1, dtype=torch.float64))

    images = small.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (images,))
    loss(images).sum().backward()
    assert images.grad is not None
    touched = images.grad.abs().sum(dim=1) > 0
    for box, where in zip(boxes, touched, strict=True):
        inside = torch.zeros(12, 12, dtype=torch.bool)
        inside[box.top : box.top + box.side, box.left : box.left + box.side] = True
        assert torch.equal(where, inside)


@pytest.mark.parametrize("zoom", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_boxes_lie_inside_and_cover_places_and_sides(size: int, zoom: float) -> None:
    rng = np.random.default_rng(0)
    boxes = [random_box(rng, 64, size, zoom) for _ in range(2000)]
    sides = [box.side for box in boxes]
    low, high = size / zoom, min(size * zoom, 64)
    assert min(sides) == pytest.approx(low, abs=1)
    assert max(sides) == pytest.approx(high, abs=1)
    assert np.mean(np.log(sides)) == pytest.approx(np.log(low * high) / 2, abs=0.05)  # log-uniform
    for box in boxes:
        assert 0 <= box.top <= 64 - box.side
        assert 0 <= box.left <= 64 - box.side
    smallest = [box for box in boxes if box.side <= low * 1.2 and box.side < 64]
    for place in ("top", "left"):
        seen = [getattr(box, place) / (64 - box.side) for box in smallest]
        assert not seen or (min(seen) < 0.1 and max(seen) > 0.9 and abs(np.mean(seen) - 0.5) < 0.1)


def crop_seen(config: LossConfig, samples: list[int], seed: int = 0) -> Tensor:
    """What a distance is given of A."""
    seen = []

    def watch(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return squared_distance(a, b)

    rows = torch.tensor(samples) % 3
    cropped(watch, config, seed=seed, samples=samples, hr_size=64)(A[rows], A[rows])
    ((a, b),) = seen
    assert torch.equal(a, b), "the two pictures are cropped alike"
    return a


@pytest.mark.parametrize("config", [HALF, ZOOMED])
def test_a_crop_belongs_to_its_sample_not_to_its_batch(config: LossConfig) -> None:
    whole = crop_seen(config, [3, 4, 5, 6])
    assert whole.shape == (4, 3, 32, 32)
    assert torch.equal(crop_seen(config, [4, 5]), whole[1:3])
    assert torch.equal(crop_seen(config, [6, 3]), whole[[3, 0]])
    assert not torch.equal(whole[0], whole[3])  # of the same picture, another crop
    assert not torch.equal(crop_seen(config, [3], seed=1), whole[:1])


def test_without_crop_and_zoom_the_distance_is_itself() -> None:
    assert cropped(squared_distance, LossConfig(), seed=0, samples=[1], hr_size=64) is squared_distance


def test_a_crop_too_small_for_lpips_is_refused() -> None:
    assert lpips_size(HALF, 64) == 32
    message = r"loss.lpips_crop=0.5 leaves 31 of 62 pixels, and LPIPS needs 32. Raise it"
    with pytest.raises(ConfigError, match=message):
        lpips_size(HALF, 62)

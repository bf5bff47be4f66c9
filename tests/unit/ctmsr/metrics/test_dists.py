"""DISTS against the authors' package, its pooling and its statistics against forms worked out here."""

import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from ctmsr.metrics.dists import Dists, dists, load_dists
from tests.support.fixture_inputs import tensor


@pytest.fixture(scope="module")
def net() -> Dists:
    return load_dists()


def test_random_pictures_get_the_known_answers(net: Dists) -> None:
    # Computed with DISTS-pytorch 0.1 on the same VGG16.
    draws = np.random.RandomState(123).rand(2, 3, 3, 100, 100).astype(np.float32)
    a, b = torch.from_numpy(draws * 2 - 1)
    known = torch.tensor([0.1993096, 0.1959180, 0.1719752])
    with torch.no_grad():
        torch.testing.assert_close(net(a, b), known, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("photo", "expected"), [("astronaut", 0.2057939), ("chelsea", 0.2859665), ("rocket", 0.3054837)]
)
def test_photographs_against_their_bicubic_enlargement_too(photo: str, expected: float, net: Dists) -> None:
    hr_u8 = getattr(skimage.data, photo)()
    height, width = (side // 4 * 4 for side in hr_u8.shape[:2])
    picture = Image.fromarray(hr_u8[:height, :width])
    small = picture.resize((width // 4, height // 4), Image.Resampling.BICUBIC)
    sr_u8 = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    cut = slice(50, 147), slice(30, 163)
    found = dists(sr_u8[cut], np.array(picture)[cut], net)
    assert found == pytest.approx(expected, abs=1e-4)
    assert dists(np.array(picture)[cut], sr_u8[cut], net) == pytest.approx(found, abs=1e-6)


def test_equal_pictures_are_at_distance_zero(net: Dists) -> None:
    images = tensor("equal", (2, 3, 40, 48))
    assert net(images, images).tolist() == [0, 0]


def test_another_sample_of_a_texture_is_nearer_than_no_texture(net: Dists) -> None:
    # What DISTS is for: grain against other grain is nearer than grain against its mean.
    grain, other = (0.3 * tensor(name, (1, 3, 96, 96)) for name in ("grain", "other"))
    assert net(grain, other) < 0.5 * net(grain, torch.zeros_like(grain))


def test_pooling_is_the_root_of_weighted_squares(net: Dists) -> None:
    h = tensor("pool", (1, 2, 9, 7)).relu()
    pooled = net._pool(h)
    assert pooled.shape == (1, 2, 5, 4)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = math.sqrt((weights * h[0, 1, 3:6, 1:4].numpy() ** 2).sum())
    assert pooled[0, 1, 2, 1].item() == pytest.approx(expected, rel=1e-5)


def tiny_dists() -> Dists:
    """The same arithmetic with random weights of VGG's shapes, but few channels."""
    channels = {0: (3, 4)} | dict.fromkeys((2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (4, 4))
    backbone: dict[str, Tensor] = {}
    for layer, (inside, outside) in channels.items():
        backbone[f"features.{layer}.weight"] = tensor(f"w{layer}", (outside, inside, 3, 3)) / 3
        backbone[f"features.{layer}.bias"] = tensor(f"b{layer}", (outside,))
    weights = {name: tensor(name, (3 + 5 * 4,)).abs() for name in ("alpha", "beta")}
    return Dists(backbone, weights)


def test_the_statistics_of_the_picture_itself_in_closed_form() -> None:
    # Without the stages: b = a / 2 + 0.2 in [0, 1] gives both similarities by hand.
    net = tiny_dists()
    net.alpha[3:], net.beta[3:] = 0, 0
    a = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    b = a / 2 + 0.2
    mean, var = a.mean(dim=(2, 3))[0], a.var(dim=(2, 3), correction=0)[0]
    texture = (2 * mean * (mean / 2 + 0.2) + 1e-6) / (mean**2 + (mean / 2 + 0.2) ** 2 + 1e-6)
    structure = (var + 1e-6) / (1.25 * var + 1e-6)
    expected = (net.alpha[:3] * (1 - texture) + net.beta[:3] * (1 - structure)).sum()
    assert net(2 * a - 1, 2 * b - 1).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    net = tiny_dists().double()
    a, b = (tensor(name, (1, 3, 16, 16)).double() for name in ("a", "b"))
    a.requires_grad_()
    net(a, b).sum().backward()
    direction, step = tensor("direction", (1, 3, 16, 16)).double(), 1e-6
    with torch.no_grad():
        ahead, behind = (net(a + sign * step * direction, b).item() for sign in (1, -1))
    assert a.grad is not None
    assert (a.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_the_weights_sum_to_one_and_nothing_is_trained(net: Dists) -> None:
    assert net.alpha.shape == net.beta.shape == (1475,)
    assert (net.alpha.sum() + net.beta.sum()).item() == pytest.approx(1, abs=1e-5)
    assert (net.alpha >= 0).all()
    assert (net.beta >= 0).all()
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.train().training


def test_images_that_do_not_match_are_refused(net: Dists) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"must have the same shape, got \(31, 32, 3\) and \(32, 32, 3\)"):
        dists(image[:31], image, net)
    with pytest.raises(ValueError, match="must be uint8 HWC RGB, got float64"):
        dists(image / 255, image, net)

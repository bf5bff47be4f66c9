"""The trajectory at both ends and between, and the scalings of the consistency function."""

import math

import torch

from ctmsr.model.trajectory import expand, preconditioning, trajectory_point
from tests.support.fixture_inputs import tensor

SHAPE = (2, 3, 4, 5)
X_0, Y_0, NOISE = (tensor(name, SHAPE) for name in ("x_0", "y_0", "noise"))


def test_the_clean_end_is_the_hr_image() -> None:
    zero = torch.tensor(0.0)
    assert torch.equal(trajectory_point(X_0, Y_0, NOISE, zero, zero), X_0)


def test_the_noisy_end_is_the_noisy_lr_image() -> None:
    point = trajectory_point(X_0, Y_0, NOISE, torch.tensor(1.0), torch.tensor(0.7))
    torch.testing.assert_close(point, Y_0 + 0.7 * NOISE)


def test_each_image_has_its_own_levels() -> None:
    alpha, sigma = torch.tensor([0.25, 0.5]), torch.tensor([0.1, 2.0])
    together = trajectory_point(X_0, Y_0, NOISE, alpha, sigma)
    torch.testing.assert_close(together[0], 0.75 * X_0[0] + 0.25 * Y_0[0] + 0.1 * NOISE[0])
    torch.testing.assert_close(together[1], 0.5 * X_0[1] + 0.5 * Y_0[1] + 2.0 * NOISE[1])


def test_scalings_at_a_level_worked_out_by_hand() -> None:
    # sigma / 0.1 = 0.5 = sigma_data, so c_skip = 1/2 and c_out = sqrt(1/2).
    c_skip, c_out, c_noise = preconditioning(torch.tensor(0.05))
    torch.testing.assert_close(c_skip, torch.tensor(0.5))
    torch.testing.assert_close(c_out, torch.tensor(math.sqrt(0.5)))
    torch.testing.assert_close(c_noise, torch.tensor(math.log(0.052) / 4))


def test_boundary_condition_is_exact() -> None:
    c_skip, c_out, c_noise = preconditioning(torch.zeros(3))
    assert torch.equal(c_skip, torch.ones(3))
    assert torch.equal(c_out, torch.zeros(3))
    assert torch.isfinite(c_noise).all()


def test_skip_and_output_share_the_variance() -> None:
    c_skip, c_out, _ = preconditioning(torch.linspace(0, 10, 50))
    torch.testing.assert_close(c_skip + c_out**2, torch.ones(50))


def test_expand_scales_images() -> None:
    assert expand(torch.tensor([2.0, 3.0]), X_0).shape == (2, 1, 1, 1)
    assert expand(torch.tensor(2.0), X_0).shape == (1, 1, 1, 1)

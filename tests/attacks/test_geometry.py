"""Balls: what lies in them, what is nearest, and what is drawn from them."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_advbayes.attacks.geometry import BALLS, SIZES

EPS = 0.3


def ball(norm, rows=50, clip=(0.0, 1.0)):
    return BALLS[norm](torch.rand(rows, 2, 3), EPS, clip)


@pytest.mark.parametrize("norm", BALLS)
def test_restricted_points_are_in_the_ball_and_the_range_and_stay_where_they_are(norm):
    inside = ball(norm)
    x = inside.restrict(inside.center + torch.randn(50, 2, 3))
    assert (SIZES[norm](x - inside.center) <= EPS * (1 + 1e-6)).all() and 0 <= x.min() and x.max() <= 1
    torch.testing.assert_close(inside.restrict(x), x, rtol=0, atol=1e-7 if norm == "l2" else 0.0)
    near = inside.center + 1e-3 * (0.5 - inside.center)
    assert torch.equal(inside.restrict(near), near)


@pytest.mark.parametrize("norm", BALLS)
def test_without_a_range_the_restricted_point_is_the_nearest(norm):
    inside = ball(norm, clip=None)
    far = inside.center + torch.randn(50, 2, 3)
    nearest = inside.restrict(far)
    for _ in range(200):
        assert (SIZES["l2"](far - nearest) <= SIZES["l2"](far - inside.random()) + 1e-6).all()
    torch.testing.assert_close(SIZES[norm](nearest - inside.center), SIZES[norm](far - inside.center).clamp(max=EPS))


@pytest.mark.parametrize("norm", BALLS)
def test_the_steepest_step_is_of_size_1_at_any_scale_and_none_without_a_gradient(norm):
    gradient = torch.randn(4, 2, 3) * torch.tensor([1.0, 1e-30, 1e20, 0.0]).view(4, 1, 1)
    step = BALLS[norm].steepest(gradient)
    torch.testing.assert_close(SIZES[norm](step), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    dual = gradient.flatten(1).abs().sum(1) if norm == "linf" else gradient.flatten(1).double().norm(dim=1).float()
    torch.testing.assert_close((step * gradient).flatten(1).sum(1), dual)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, 1e-44), (torch.float16, 1e-7), (torch.bfloat16, 1e-39)])
def test_gradients_below_the_normal_numbers_make_a_full_step_too(dtype, smallest):
    gradient = (torch.randn(50, 6).sign() * smallest).to(dtype)
    assert (gradient != 0).all()
    torch.testing.assert_close(SIZES["l2"](BALLS["l2"].steepest(gradient)).float(), torch.ones(50), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_random_points_are_uniform_in_the_ball():
    rows = 20_000
    flat = BALLS["linf"](torch.zeros(rows, 3), EPS, None).random() / EPS
    assert abs(float(flat.square().mean()) - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / (3 * rows))
    round_ = BALLS["l2"](torch.zeros(rows, 3), EPS, None).random() / EPS
    # r^3 is uniform on [0, 1], and no direction is preferred
    volume = SIZES["l2"](round_) ** 3
    assert abs(float(volume.mean()) - 1 / 2) < 4 * math.sqrt(1 / 12 / rows)
    assert abs(float(volume.square().mean()) - 1 / 3) < 4 * math.sqrt((1 / 5 - 1 / 9) / rows)
    assert (round_.mean(0).abs() < 4 * math.sqrt(1 / 5 / rows)).all()

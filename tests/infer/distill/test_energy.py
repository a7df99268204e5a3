from __future__ import annotations

import pytest
import torch

from pyro_advbayes.infer.distill import energy
from pyro_advbayes.infer.distill.energy import energy_loss


def test_the_loss_is_the_unbiased_estimate_of_its_definition():
    made, real = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    between = sum((a - b).norm() for a in made for b in real) / 20
    within = sum((made[i] - made[j]).norm() for i in range(5) for j in range(5) if i != j) / 20
    assert float(energy_loss(made, real)) == pytest.approx(float(2 * between - within))


def test_long_rows_have_the_loss_and_gradient_of_short_ones(monkeypatch):
    made, real = torch.randn(6, 40).double().requires_grad_(), torch.randn(5, 40).double()
    exact = energy_loss(made, real)
    (slope,) = torch.autograd.grad(exact, made)
    monkeypatch.setattr(energy, "SHORT", 10)
    loss = energy_loss(made, real)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(torch.autograd.grad(loss, made)[0], slope)


def test_points_that_coincide_have_no_gradient_towards_each_other_and_no_nan(monkeypatch):
    for short in (64, 1):
        monkeypatch.setattr(energy, "SHORT", short)
        made = torch.ones(4, 3, requires_grad=True)
        energy_loss(made, torch.zeros(2, 3)).backward()
        torch.testing.assert_close(made.grad, torch.full((4, 3), 2 / 4 / 3**0.5))  # away from the real ones


def test_the_slope_of_a_clamp_where_it_begins_does_not_matter(monkeypatch):
    """PyTorch has had 0 and 1 there."""
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda values, least: torch.where(values >= least, values, least))
    test_points_that_coincide_have_no_gradient_towards_each_other_and_no_nan(monkeypatch)


def test_its_mean_over_batches_is_smallest_for_the_law_itself():
    real = torch.randn(4000, 2)
    loss = {scale: float(energy_loss(scale * torch.randn(4000, 2), real)) for scale in (0.8, 1.0, 1.25)}
    assert loss[1.0] < min(loss[0.8], loss[1.25])

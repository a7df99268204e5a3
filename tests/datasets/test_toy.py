from __future__ import annotations

import pyro
import pytest
import torch

from pyro_advbayes.datasets import two_gaussians, two_moons


@pytest.mark.parametrize("toy", [two_moons, two_gaussians], ids=lambda toy: toy.__name__)
def test_toy_data_follow_the_global_seed_or_their_own(toy):
    pyro.set_rng_seed(1)
    first, second = toy(50), toy(50)
    pyro.set_rng_seed(1)
    assert torch.equal(toy(50).x, first.x)
    assert not torch.equal(first.x, second.x)
    own = toy(50, seed=3)
    assert torch.equal(own.x, toy(50, seed=3).x)
    assert not torch.equal(own.x, toy(50, seed=4).x)
    state = torch.get_rng_state()
    toy(50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("toy", [two_moons, two_gaussians], ids=lambda toy: toy.__name__)
def test_toy_data_are_float32_inputs_and_int64_labels(toy):
    torch.set_default_dtype(torch.float64)
    x, y = toy(20)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.shape == (len(y), 2)
    assert y.unique().tolist() == [0, 1]


def test_two_moons_lie_on_two_half_circles():
    x, y = two_moons(201, noise=0.0, seed=0)
    assert len(x) == 201
    upper, lower = x[y == 0], x[y == 1]
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(len(upper)))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5])).norm(dim=1), torch.ones(len(lower)))


def test_noise_of_two_moons_is_a_standard_deviation():
    n = 40_000
    upper = two_moons(n, noise=0.05, seed=0)
    radius = upper.x[upper.y == 0].norm(dim=1)
    # To first order the radius has the noise's standard deviation; its sample value has an error of 0.05 / sqrt(2 n/2).
    assert abs(radius.std().item() - 0.05) < 4 * 0.05 / n**0.5 + 0.05**3


def test_two_gaussians_have_the_papers_means_and_covariance():
    n = 20_000
    x, y = two_gaussians(n, seed=0)
    for label, mean in [(0, -2.0), (1, 2.0)]:
        cloud = x[y == label]
        assert len(cloud) == n
        assert (cloud.mean(0) - mean).abs().max() < 4 * (0.3 / n) ** 0.5
        error = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).mul(0.3**2 / n).sqrt()  # of a sample covariance
        assert ((cloud.T.cov() - 0.3 * torch.eye(2)).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: two_moons(1), "num_data"),
        (lambda: two_moons(10, noise=-0.1), "noise"),
        (lambda: two_moons(10, noise=float("nan")), "noise"),
        (lambda: two_gaussians(0), "num_per_class"),
    ],
)
def test_bad_toy_arguments_are_named(call, culprit):
    with pytest.raises(ValueError, match=culprit):
        call()

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from models.linear_regression import LinearRegression

NUM, FEATURES = 9, 3


@pytest.fixture
def model() -> LinearRegression:
    return LinearRegression(FEATURES, prior_scale=1.5, noise_scale=0.3).double()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(NUM, FEATURES, dtype=torch.float64)
    return x, x.sum(-1) + 0.5 + 0.3 * torch.randn(NUM, dtype=torch.float64)


def log_joint(model: LinearRegression, theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log p(theta, y | x) as Pyro sees it."""
    values = {"net.weight": theta[None, :-1], "net.bias": theta[-1:]}
    return pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(x, y).log_prob_sum()


def log_evidence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """log p(y | x): the weights integrated out, the observations are Gaussian with the kernel of their features."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], -1)
    covariance = 1.5**2 * design @ design.T + 0.3**2 * torch.eye(len(x), dtype=x.dtype)
    return dist.MultivariateNormal(torch.zeros(len(x), dtype=x.dtype), covariance).log_prob(y)


def test_joint_over_exact_posterior_is_the_evidence_at_every_weight(model, data):
    posterior = model.exact_posterior(*data)
    for theta in 2 * torch.randn(5, FEATURES + 1, dtype=torch.float64):
        ratio = log_joint(model, theta, *data) - posterior.log_prob(theta)
        torch.testing.assert_close(ratio, log_evidence(*data))


def test_exact_posterior_is_where_the_model_has_its_mode_and_curvature(model, data):
    posterior = model.exact_posterior(*data)
    theta = posterior.mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint(model, theta, *data), theta)
    assert gradient.abs().max() < 1e-9
    hessian = torch.autograd.functional.hessian(lambda theta: log_joint(model, theta, *data), theta)
    torch.testing.assert_close(torch.linalg.inv(-hessian), posterior.covariance_matrix)


def test_exact_predictive_is_the_ratio_of_evidences(model, data):
    x, y = data
    x_new = torch.randn(4, FEATURES, dtype=torch.float64)
    predictive = model.exact_predictive(x, y, x_new)
    assert predictive.batch_shape == (4,)
    for y_new in (-1.0, 0.0, 2.0):
        y_new = torch.full((4,), y_new, dtype=torch.float64)
        ratios = [log_evidence(torch.cat([x, x_new[i : i + 1]]), torch.cat([y, y_new[i : i + 1]])) - log_evidence(x, y) for i in range(4)]
        torch.testing.assert_close(predictive.log_prob(y_new), torch.stack(ratios))


def test_without_data_the_exact_posterior_is_the_prior(model):
    posterior = model.exact_posterior(torch.zeros(0, FEATURES), torch.zeros(0))
    assert torch.equal(posterior.mean, torch.zeros(FEATURES + 1))
    torch.testing.assert_close(posterior.covariance_matrix, 1.5**2 * torch.eye(FEATURES + 1))


def test_a_drawn_observation_has_the_mean_returned_and_the_known_noise(model):
    x = torch.randn(2000, FEATURES, dtype=torch.float64)
    trace = pyro.poutine.trace(model).get_trace(x)
    site = trace.nodes["obs"]
    mean = trace.nodes["_RETURN"]["value"]
    residual = (site["value"] - mean) / 0.3
    assert mean.shape == residual.shape == (2000,)
    assert residual.mean().abs() < 4 / math.sqrt(2000)
    assert (residual.square().mean() - 1).abs() < 4 * math.sqrt(2 / 2000)
    assert [(frame.name, frame.size) for frame in site["cond_indep_stack"]] == [("data", 2000)]

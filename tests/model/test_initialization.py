"""Where chains start."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_sample, init_to_uniform, init_to_value
from torch import nn

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.model.initialization import init_to_fan_in
from tests.small_models import data, regression


def draws(fn, count=500, name="net.site"):
    site = {"fn": fn, "name": name, "type": "sample", "is_observed": False, "value": None}
    return torch.stack([init_to_fan_in(site) for _ in range(count)])


@pytest.mark.parametrize(
    "fn,mean,scale",
    [
        (dist.Normal(torch.zeros(2, 25), 1.0).to_event(2), 0.0, 0.2),
        (dist.Normal(torch.zeros(2, 5, 5), 1.0).to_event(3), 0.0, 0.2),
        (dist.Normal(torch.zeros(16), 1.0).to_event(1), 0.0, 0.25),
        (dist.Normal(torch.tensor(3.0), 1.0), 3.0, 1.0),
        (dist.Normal(torch.full((2, 25), -2.0), 0.01).to_event(2), -2.0, 0.01),
        (dist.StudentT(1.0, torch.zeros(2, 25), 1.0).to_event(2), 0.0, 0.2),
        (dist.Cauchy(torch.zeros(2, 25), 1.0).to_event(2), 0.0, 0.2),
        (dist.MultivariateNormal(torch.ones(4), 0.04 * torch.eye(4)), 1.0, 0.2),
        (dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 3.0]), 1.0)), 1.0, 1.0),
    ],
    ids=["matrix", "convolution", "bias", "number", "narrow prior", "StudentT", "Cauchy", "MultivariateNormal", "mixture"],
)
def test_real_sites_start_at_their_priors_mean_with_the_scale_of_their_fan_in(fn, mean, scale):
    values = draws(fn)
    assert values.shape == (500, *fn.shape())
    error = scale / values.numel() ** 0.5
    assert abs(values.mean() - mean) < 5 * error
    assert abs(values.std() - scale) < 5 * error


@pytest.mark.parametrize(
    "fn,mean,most",
    [
        (dist.Normal(torch.tensor(3.0), 10.0), 3.0, 2.0),
        (dist.Normal(torch.full((20,), -1.0), 0.5).to_event(1), -1.0, 0.5),
        (dist.Cauchy(torch.zeros(3), 1.0).to_event(1), 0.0, 2.0),
    ],
    ids=["number", "narrow prior", "Cauchy"],
)
def test_sites_that_are_no_weights_start_up_to_two_from_their_priors_mean(fn, mean, most):
    values = draws(fn, name="site") - mean
    assert values.abs().max() <= most
    error = most / values.numel() ** 0.5
    assert abs(values.mean()) < 3 * error and abs(values.std() - most / 3**0.5) < 3 * error
    assert draws(dist.Normal(torch.zeros(400), 1.0).to_event(1), 20, name="site").std() < 0.06, "as many weights are a layer's"


@pytest.mark.parametrize(
    "fn",
    [dist.HalfCauchy(torch.ones(3)), dist.Beta(torch.ones(3), 1.0), dist.Dirichlet(torch.ones(3)), dist.LKJCholesky(3, 1.0)],
)
def test_constrained_sites_start_inside_their_support(fn):
    values = draws(fn, 200)
    assert fn.support.check(values).all() and len(torch.unique(values, dim=0)) == 200


def test_starts_have_the_dtype_of_their_site():
    assert draws(dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1), 1).dtype == torch.float64


def test_a_wide_network_starts_with_small_logits():
    """A start drawn from a unit-normal prior would give logits of standard deviation 400 or so."""
    model = mlp((784, 400, 400, 10))
    potential = ab.Potential(model, (torch.rand(20, 784), torch.zeros(20, dtype=torch.long)), num_chains=2, backend="handlers")
    values = {name: value[0] for name, value in potential.constrain(potential.init()).items()}
    assert 0.01 < pyro.poutine.condition(model, values)(torch.rand(20, 784)).std() < 5


@pytest.mark.parametrize("strategy", [init_to_fan_in, init_to_uniform, init_to_sample])
def test_every_chain_starts_elsewhere(strategy):
    state = ab.Potential(regression, data(), num_chains=3, backend="handlers", init_strategy=strategy).init()
    assert state.shape == (3, 5) and (state[0] - state[1]).abs().min() > 0 and (state[1] - state[2]).abs().min() > 0


def test_chains_start_from_trained_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    values = {f"net.{name}": value.detach() for name, value in net.named_parameters()}
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    kernel = ab.SGLD(mlp((4, 5, 3)), 1e-12, 0.0, backend="handlers", init_strategy=init_to_value(values=values))
    mcmc = ab.SGMCMC(kernel, 1, 0, 2, disable_progbar=True)
    mcmc.run(x, y)
    for name, value in mcmc.get_samples(group_by_chain=True).items():
        torch.testing.assert_close(value[:, 0], values[name].expand(2, *values[name].shape), rtol=0, atol=1e-6)


def test_sites_without_a_trained_value_start_by_the_fallback():
    strategy = init_to_value(values={"b": torch.tensor(-99.0)}, fallback=init_to_mean)
    potential = ab.Potential(regression, data(), num_chains=2, backend="handlers", init_strategy=strategy)
    values = potential.constrain(potential.init())
    torch.testing.assert_close(values["b"], torch.full((2,), -99.0))
    torch.testing.assert_close(values["w"], torch.zeros(2, 3))

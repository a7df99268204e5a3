"""The whole stack, from bayesianize through a kernel to Predictive, against exact posteriors and against Pyro's NUTS."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from models.linear_regression import LinearRegression
from models.logistic_regression import LogisticRegression
from tests.infer.mcmc.harness import CASES, assert_mean, closed_form

CHAINS = 1000


@pytest.fixture
def regression():
    model = LinearRegression(2, prior_scale=1.0, noise_scale=0.5)
    x = torch.randn(60, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    y = x @ torch.tensor([0.7, -0.4]) + 0.3 + 0.5 * torch.randn(60)
    return model, x, y


def weights(mcmc):
    """The last draw of every chain, in the order of the exact posterior, ``[chains, 3]``."""
    samples = mcmc.get_samples(group_by_chain=True)
    return torch.cat([samples["net.weight"][:, -1].flatten(1), samples["net.bias"][:, -1]], dim=1).double()


@pytest.mark.parametrize("name", CASES)
def test_linear_regression_on_full_data_has_the_exact_posterior_but_for_the_step(name, regression):
    model, x, y = regression
    exact = model.exact_posterior(x.double(), y.double())
    case, precision = CASES[name], exact.precision_matrix
    kernel = case.kernel(model, step_size=case.step_size(0.2, 1.0, precision), num_steps_per_sample=20)
    mcmc = ab.SGMCMC(kernel, 10, 40, CHAINS, disable_progbar=True)
    mcmc.run(x, y)
    rates = case.rates(kernel, kernel.step_size(0))
    covariance = closed_form(case, precision, rates, 1.0, case.taken(kernel, rates))
    centred = weights(mcmc) - exact.mean
    # each chain through the square root of its own covariance: V differs between chains
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), centred.unsqueeze(-1), upper=False).squeeze(-1)
    assert_mean(white, 0.0, f"{name}: mean")
    assert_mean(white.unsqueeze(-1) * white.unsqueeze(-2), torch.eye(3, dtype=torch.float64), f"{name}: covariance")


@pytest.mark.parametrize("how", ["batch_size", "loader"])
@pytest.mark.parametrize("kernel", [ab.SGLD, ab.SGAdaLD, ab.SGHMC])
def test_linear_regression_from_minibatches_has_the_exact_predictions(kernel, how, regression):
    """The automatic step allows 10 % of the temperature for its own error and 10 % for the minibatch's, in any direction."""
    model, x, y = regression
    kernel = kernel(model, batch_size=20 if how == "batch_size" else None, num_steps_per_sample=25)
    mcmc = ab.SGMCMC(kernel, 6, 40, CHAINS, disable_progbar=True)
    if how == "loader":  # every chain sees the same batches: a new one at every step, long enough to average them out
        mcmc.run(DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True))
    else:
        mcmc.run(x, y)
    exact = model.exact_posterior(x.double(), y.double())
    ratio = (weights(mcmc) - exact.mean).square().mean(0) / exact.variance
    assert (ratio > 0.8).all() and (ratio < 1.25).all(), ratio

    x_new = torch.linspace(-3, 3, 7).unsqueeze(-1) * torch.tensor([1.0, -1.0])
    samples = {name: value[:, -1] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    predicted = torch.cat([ab.Predictive(model, samples)(x_new)["obs"] for _ in range(4)]).double()
    law = model.exact_predictive(x, y, x_new)
    standard = (predicted - law.mean) / law.stddev
    if how == "batch_size":
        assert (standard.mean(0).abs() < 4.5 / CHAINS**0.5).all(), standard.mean(0)
    # a chi-squared variable's standard error, with a share of the variance that is common to the four predictions of a draw
    assert ((standard.var(0) - 1).abs() < 0.15).all(), standard.var(0)


def test_logistic_regression_agrees_with_nuts_in_function_space():
    x = torch.randn(40, 2)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([1.5, -1.0])))
    model, points = LogisticRegression(2), 2.0 * torch.randn(8, 2)
    nuts = MCMC(NUTS(model, jit_compile=False), num_samples=600, warmup_steps=200, disable_progbar=True)
    nuts.run(x, y)
    assert_same_functions(model, nuts.get_samples(), ab.SGLD(model, num_steps_per_sample=20), (x, y), points)
    assert_same_functions(model, nuts.get_samples(), ab.SGHMC(model, num_steps_per_sample=20, batch_size=20), (x, y), points)


class Curve(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.net = ab.nn.bayesianize(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), prior=dist.Normal(0.0, 1.0))

    def forward(self, x, y=None):
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)
        return mean


def metropolis(x, y, chains=1000, updates=6000):
    """Random-walk Metropolis on the network above, written out: exact, and with modes that do not depend on one chain's luck."""

    def log_density(w):
        hidden = torch.tanh(x[:, 0, None] * w[:, None, :4] + w[:, None, 4:8])
        mean = (hidden * w[:, None, 8:12]).sum(-1) + w[:, 12:]
        return -0.5 * w.square().sum(1) - (y - mean).square().sum(1) / (2 * 0.3**2)

    w = torch.randn(chains, 13)
    density = log_density(w)
    scale = torch.full((chains, 1), 0.1)
    for i in range(updates):
        proposed = w + scale * torch.randn_like(w)
        new = log_density(proposed)
        accepted = torch.rand(chains).log() < new - density
        w[accepted], density[accepted] = proposed[accepted], new[accepted]
        if i < updates // 2:  # each chain's own scale, towards an acceptance of a quarter
            scale = scale * (1.0 + 0.02 * (accepted[:, None].float() - 0.25))
    return {"net.0.weight": w[:, :4, None], "net.0.bias": w[:, 4:8], "net.2.weight": w[:, None, 8:12], "net.2.bias": w[:, 12:]}


def test_a_small_network_agrees_with_metropolis_in_function_space():
    x = torch.linspace(-2, 2, 16).unsqueeze(-1)
    y = torch.sin(2 * x).squeeze(-1) + 0.3 * torch.randn(16)
    model, points = Curve(), torch.linspace(-3, 3, 7).unsqueeze(-1)
    assert_same_functions(model, metropolis(x, y), ab.SGHMC(model, num_steps_per_sample=40), (x, y), points, warmup=60)


def assert_same_functions(model, reference, kernel, data, points, warmup=40):
    """
    Mean and spread of the function over 300 independent chains against draws of a reference, whose standard errors come from their
    effective sample size; beside them the spread may be wider by the 5 % that the automatic step allows.
    """
    mcmc = ab.SGMCMC(kernel, 5, warmup, 300, disable_progbar=True)
    mcmc.run(*data)
    ours = {name: value[:, -1] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    f = ab.Predictive(model, ours, return_sites=["_RETURN"])(points)["_RETURN"].double()
    g = ab.Predictive(model, reference, return_sites=["_RETURN"])(points)["_RETURN"].double()
    size = pyro.ops.stats.effective_sample_size(g.unsqueeze(0), chain_dim=0, sample_dim=1).clamp_max(len(g))
    error = (f.var(0) / len(f) + g.var(0) / size).sqrt()
    assert ((f.mean(0) - g.mean(0)).abs() < 4.5 * error).all(), (f.mean(0) - g.mean(0)) / error
    log_ratio = (f.std(0) / g.std(0)).log()
    assert (log_ratio.abs() < 0.05 + 4.5 * (0.5 / len(f) + 0.5 / size).sqrt()).all(), log_ratio

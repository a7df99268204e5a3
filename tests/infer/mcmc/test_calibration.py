"""
Simulation-based calibration (Talts et al., 2018) of every kernel: with parameters drawn from the prior and data from the model, the rank
of a parameter among draws from its posterior is uniform.

A simulation is one of 2500 columns of one model (logistic regression on 10 rows, slope and intercept), each with data of its own, and its
7 draws are the last states of 7 chains, so that they are independent. Every test therefore compares 5000 ranks of 8 values with the
uniform law, by a chi-squared test at the level 1e-3. What that can see is in ``test_the_test_sees_...``: posteriors whose standard
deviation is wrong by 10 % either way, or whose mean is off by 0.1 standard deviations, are rejected with a probability of over 90 %.
"""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_advbayes as ab

ROWS, COLUMNS, CHAINS, LEVEL = 10, 2500, 7, 1e-3
X = torch.linspace(-1.6, 1.6, ROWS)

# Steps at which the discretisation changes a variance by 2 % at most: the posterior precisions lie between 1 and 3.5
KERNELS = {
    "SGLD": partial(ab.SGLD, step_size=0.012),
    "SGAdaLD": partial(ab.SGAdaLD, step_size=0.13),
    "SGHMC": partial(ab.SGHMC, step_size=0.012, friction=0.2),
    "SGHMC-adaptive": partial(ab.SGHMC, step_size=0.15, friction=0.2, adaptive=True),
    # found in warm-up, to the same accuracy
    "SGLD-auto": partial(ab.SGLD, auto_share=0.02),
    "SGAdaLD-auto": partial(ab.SGAdaLD, auto_share=0.02),
    "SGHMC-auto": partial(ab.SGHMC, friction=0.2, auto_share=0.02),
    "SGHMC-adaptive-auto": partial(ab.SGHMC, friction=0.2, adaptive=True, auto_share=0.02),
}


def model(x, y=None):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(COLUMNS, 2), 1.0).to_event(2))
    logits = theta[:, 0] + x.unsqueeze(-1) * theta[:, 1]
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def p_value(ranks):
    """Of the chi-squared test of ranks 0 to CHAINS against the uniform law."""
    counts = torch.bincount(ranks.flatten().long(), minlength=CHAINS + 1).double()
    expected = ranks.numel() / (CHAINS + 1)
    return float(stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), CHAINS))


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("name", KERNELS)
def test_ranks_are_uniform(name, batch_size):
    truth = torch.randn(COLUMNS, 2)
    y = torch.bernoulli(torch.sigmoid(truth[:, 0] + X.unsqueeze(-1) * truth[:, 1]))
    kernel = KERNELS[name](model, batch_size=batch_size, num_steps_per_sample=30)
    mcmc = ab.SGMCMC(kernel, 16, 16 if kernel.automatic else 8, CHAINS, disable_progbar=True)
    mcmc.run(X, y)
    last = mcmc.get_samples(group_by_chain=True)["theta"][:, -1]
    heat = mcmc.diagnostics()["T_eff"]["theta"]
    assert heat < 1.05, f"minibatch noise alone changes the temperature to {heat}"
    found = p_value((last < truth).sum(0))
    assert found > LEVEL, f"{name}: p = {found:.2g}"


@pytest.mark.parametrize(("scale", "shift"), [(0.9, 0.0), (1.1, 0.0), (1.0, 0.1)])
def test_the_test_sees_what_it_says_it_sees(scale, shift):
    """By simulation, with draws that are exact but for the error: at least 90 of 100 data sets like the above are rejected."""
    rejected = 0
    for _ in range(100):
        truth = torch.randn(COLUMNS, 2)
        draws = scale * torch.randn(CHAINS, COLUMNS, 2) + shift
        rejected += p_value((draws < truth).sum(0)) < LEVEL
    assert rejected >= 90, rejected


def test_exact_draws_pass():
    values = [p_value((torch.randn(CHAINS, COLUMNS, 2) < torch.randn(COLUMNS, 2)).sum(0)) for _ in range(200)]
    assert min(values) > 1e-5 and stats.kstest(values, "uniform").pvalue > 1e-3

"""
Posteriors with known moments, each as a user would first write it down. Where moments are exact, a seed draws the data too; the data
of the other cases are fixed, since NUTS runs once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models.linear_regression import LinearRegression
from models.logistic_regression import LogisticRegression
from pyro_advbayes.nn import bayesianize
from tests.benchmarks.trust_references import (
    Moments,
    Quadrature,
    Target,
    gaussian_moments,
    linear_predictor_target,
    log_grid,
    nuts_moments,
    unknown_noise,
)


@dataclass(frozen=True)
class Problem:
    """A model, its arguments, and the posterior moments of every site."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    moments: dict[str, Moments]


@dataclass(frozen=True)
class Case:
    """
    A first run.

    :ivar make: seed to problem.
    :ivar batch_size: None for full data.
    :ivar loader: whether a shuffling ``DataLoader`` cuts the batches.
    """

    make: Callable[[int], Problem]
    batch_size: int | None = None
    loader: bool = False
    num_chains: int = 4

    def run_arguments(self, problem: Problem) -> tuple[Any, ...]:
        """What goes to ``SGMCMC.run``."""
        if self.loader:
            return (DataLoader(TensorDataset(*problem.args), batch_size=self.batch_size, shuffle=True),)
        return problem.args


# ----------------------------------------------------------------------------------------------------------- linear regression


def linear(
    num_data: int, num_features: int, seed: int, noise: float = 0.5, loc: float = 0.0, scale: Any = 1.0, prior: float = 1.0
) -> Problem:
    """Known noise, so that the posterior is Gaussian. ``loc`` and ``scale`` are those of the inputs."""
    torch.manual_seed(1000 + seed)
    x = loc + torch.as_tensor(scale) * torch.randn(num_data, num_features)
    y = x @ (torch.randn(num_features) / torch.as_tensor(scale)) + 0.3 + noise * torch.randn(num_data)
    model = LinearRegression(num_features, prior_scale=prior, noise_scale=noise)
    law = model.exact_posterior(x.double(), y.double())
    whole = gaussian_moments(law.mean, law.variance)
    parts = {"net.weight": (slice(0, num_features), (1, num_features)), "net.bias": (slice(num_features, None), (1,))}
    moments = {name: Moments(*(part[at].reshape(shape) for part in whole[:3])) for name, (at, shape) in parts.items()}
    return Problem(model, (x, y), moments)


def own_units(seed: int) -> Problem:
    """Inputs with scales 1 to 100: the posterior precision has condition number 1e4."""
    return linear(200, 4, seed, noise=1.0, scale=torch.logspace(0, 2, 4))


def far_from_zero(seed: int) -> Problem:
    """One input around 100 with standard deviation 15, not centred."""
    return linear(100, 1, seed, noise=1.0, loc=100.0, scale=15.0, prior=10.0)


def collinear(seed: int) -> Problem:
    """Five inputs that are one but for 1 %, vague priors, unknown noise."""
    torch.manual_seed(1000 + seed)
    x = torch.randn(100, 1) + 0.01 * torch.randn(100, 5)
    y = x.sum(-1) + 0.3 + 0.5 * torch.randn(100)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(5), 1000.0).to_event(1))
        bias = pyro.sample("bias", dist.Normal(0.0, 1000.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(100.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight + bias, sigma), obs=y)

    sigma = log_grid(0.2, 2.0, 800)
    known = unknown_noise(torch.cat([x, torch.ones(100, 1)], -1), y, 1000.0, dist.HalfNormal(100.0), sigma)
    weights = known.linear(torch.eye(6, dtype=torch.float64).unsqueeze(0))
    moments = {
        "weight": Moments(*(part[:5] for part in weights[:3])),
        "bias": Moments(*(part[5] for part in weights[:3])),
        "sigma": known.scale(sigma),
    }
    return Problem(model, (x, y), moments)


def plain_gaussian(seed: int) -> Problem:
    """The mean of 1000 numbers of known spread."""
    torch.manual_seed(1000 + seed)
    y = 1.5 + torch.randn(1000)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    precision = torch.tensor(1000 + 0.01, dtype=torch.float64)
    return Problem(model, (y,), {"mean": gaussian_moments(y.double().sum() / precision, 1.0 / precision)})


# ------------------------------------------------------------------------------------------------- generalised linear models


class PoissonRegression(PyroModule):
    """y_n ~ Poisson(exp(w·x_n + b)), with w and b ~ Normal(0, 1)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(num_features, 1), prior=dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        log_rate = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Poisson(log_rate.exp()), obs=y)
        return log_rate


def logistic_data(num_data: int, num_features: int) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Model and data."""
    torch.manual_seed(1000)
    x = torch.randn(num_data, num_features)
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(num_features) + 0.3))
    return LogisticRegression(num_features), (x, y)


def poisson_data(num_data: int, num_features: int) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Model and data; the largest counts are 30 to 50."""
    torch.manual_seed(1000)
    x = torch.randn(num_data, num_features)
    y = torch.poisson((0.7 * x @ torch.randn(num_features) + 0.5).exp())
    return PoissonRegression(num_features), (x, y)


FIXED = {  # the data sets that NUTS has to run on
    "logistic 100x3": partial(logistic_data, 100, 3),
    "logistic 100x10": partial(logistic_data, 100, 10),
    "poisson 100x3": partial(poisson_data, 100, 3),
    "poisson 100x10": partial(poisson_data, 100, 10),
}


def _target(key: str) -> Target:
    return linear_predictor_target(key.split()[0], *FIXED[key]()[1])


TARGETS = {key: partial(_target, key) for key in FIXED}


def against_nuts(key: str, seed: int) -> Problem:
    """One of the fixed data sets."""
    model, args = FIXED[key]()
    return Problem(model, args, nuts_moments(key))


# ------------------------------------------------------------------------------------------------------------- hierarchical models

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def eight_schools(centred: bool, seed: int) -> Problem:
    """Rubin (1981), with mu ~ Normal(0, 5) and tau ~ HalfCauchy(5)."""
    y, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    def model(errors: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        if centred:
            theta = pyro.sample("theta", dist.Normal(mu, tau).expand([8]).to_event(1))
        else:
            theta = mu + tau * pyro.sample("eta", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        with pyro.plate("schools", 8):
            pyro.sample("obs", dist.Normal(theta, errors), obs=y)

    tau = log_grid(1e-5, 1e4, 4000)
    ones, eye = torch.ones(len(tau), 8, 1, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    effects = torch.cat([ones, tau.reshape(-1, 1, 1) * eye], -1)  # theta from mu and eta
    precision = torch.tensor([1 / 25.0, *[1.0] * 8], dtype=torch.float64)
    log_weight = dist.HalfCauchy(5.0).log_prob(tau) + tau.log()
    known = Quadrature(effects / errors.double().unsqueeze(-1), (y / errors).double().expand(len(tau), 8), precision, log_weight)
    scores = torch.eye(9, dtype=torch.float64)
    mean, sd, kurtosis, _ = known.linear(scores[:1].unsqueeze(0))
    moments = {"mu": Moments(mean[0], sd[0], kurtosis[0]), "tau": known.scale(tau)}
    moments |= {"theta": known.linear(effects)} if centred else {"eta": known.linear(scores[1:].unsqueeze(0))}
    return Problem(model, (errors, y), moments)


def varying_intercept(seed: int) -> Problem:
    """Ten groups of ten rows, an intercept each, one slope, both scales unknown."""
    torch.manual_seed(1000 + seed)
    group = torch.arange(10).repeat_interleave(10)
    x, level = torch.randn(100), 1.0 + 0.7 * torch.randn(10)
    y = level[group] + 0.5 * x + 0.6 * torch.randn(100)

    def model(group: Tensor, x: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        level = pyro.sample("level", dist.Normal(mu, tau).expand([10]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(level[group] + slope * x, sigma), obs=y)

    tau, sigma = (t.flatten() for t in torch.meshgrid(log_grid(1e-3, 8.0, 160), log_grid(0.3, 1.2, 60), indexing="ij"))
    levels = torch.cat([torch.ones(len(tau), 10, 1).double(), torch.zeros(len(tau), 10, 1).double()], -1)
    levels = torch.cat([levels, tau.reshape(-1, 1, 1) * torch.eye(10, dtype=torch.float64)], -1)  # from mu, slope and scores
    design = levels[:, group].clone()
    design[..., 1] = x.double()
    log_weight = dist.HalfNormal(1.0).log_prob(tau) + dist.HalfNormal(1.0).log_prob(sigma) + tau.log() + (1 - 100) * sigma.log()
    precision = torch.tensor([1 / 25.0, *[1.0] * 11], dtype=torch.float64)
    known = Quadrature(design / sigma.reshape(-1, 1, 1), y.double() / sigma.unsqueeze(-1), precision, log_weight)
    both = known.linear(torch.eye(12, dtype=torch.float64)[:2].unsqueeze(0))
    moments = {name: Moments(*(part[i] for part in both[:3])) for i, name in enumerate(("mu", "slope"))}
    moments |= {"tau": known.scale(tau), "sigma": known.scale(sigma), "level": known.linear(levels)}
    return Problem(model, (group, x, y), moments)


# ------------------------------------------------------------------------------------------------------------------------ table


def _cases() -> dict[str, Case]:
    cases = {}
    for features in (3, 10, 20):
        for ratio in (1, 4, 10, 20):
            cases[f"linear 200x{features} N/B={ratio}"] = Case(partial(linear, 200, features), None if ratio == 1 else 200 // ratio)
    cases["linear 100x10 N/B=10"] = Case(partial(linear, 100, 10), 10)
    cases["linear 40x3 loader N/B=5"] = Case(partial(linear, 40, 3), 8, loader=True)
    for key in FIXED:
        for ratio in (1, 4, 10, 20):
            cases[f"{key} N/B={ratio}"] = Case(partial(against_nuts, key), None if ratio == 1 else 100 // ratio)
    cases["eight schools non-centred"] = Case(partial(eight_schools, False))
    cases["eight schools centred"] = Case(partial(eight_schools, True))
    cases["varying intercept N/B=1"] = Case(varying_intercept)
    cases["varying intercept N/B=10"] = Case(varying_intercept, 10)
    cases["collinear 100x5 16 chains"] = Case(collinear, num_chains=16)
    cases["input around 100"] = Case(far_from_zero)
    cases["plain gaussian N/B=10 16 chains"] = Case(plain_gaussian, 100, num_chains=16)
    cases["own units N/B=1"] = Case(own_units)
    cases["own units N/B=10"] = Case(own_units, 20)
    return cases


CASES = _cases()

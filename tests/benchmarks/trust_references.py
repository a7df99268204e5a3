"""Posterior moments that do not come from the kernels under test: closed forms, quadrature over scales, and NUTS."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import Distribution

NUTS_FILE = Path(__file__).parent / "results" / "trust_references.json"
NUTS_SETTINGS = {"sampler": "BlackJAX NUTS", "chains": 4, "num_samples": 3000, "warmup_steps": 500, "dense_mass": True, "seed": 0}


class Moments(NamedTuple):
    """Mean, standard deviation and kurtosis of every element of a site, and the effective sample size behind them (inf if exact)."""

    mean: Tensor
    sd: Tensor
    kurtosis: Tensor
    ess: float = math.inf


def gaussian_moments(mean: Tensor, variance: Tensor) -> Moments:
    """Moments of independent or marginal Gaussians."""
    return Moments(mean, variance.sqrt(), torch.full_like(mean, 3.0))


class Quadrature:
    r"""
    Exact moments of a Gaussian linear model whose scales :math:`s` are unknown, on a grid of :math:`s`. Given :math:`s`,

    .. math:: z \sim \mathrm{Normal}(0, P^{-1}), \qquad y \sim \mathrm{Normal}(\Phi_s z, \sigma_s^2 I),

    so that :math:`p(s | y)` is known up to a constant and :math:`p(z | s, y)` is Gaussian.

    :param design: :math:`\Phi_s / \sigma_s` ``[grid, N, P]``.
    :param y: observations over :math:`\sigma_s`, ``[grid, N]``.
    :param prior_precision: diagonal of P, ``[P]``.
    :param log_weight: log prior density of the scales times the volume of a cell, and minus N log sigma, ``[grid]``.
    """

    def __init__(self, design: Tensor, y: Tensor, prior_precision: Tensor, log_weight: Tensor) -> None:
        precision = design.mT @ design + torch.diag(prior_precision)
        factor = torch.linalg.cholesky(precision)
        projected = (design.mT @ y.unsqueeze(-1)).squeeze(-1)
        self.mean = torch.cholesky_solve(projected.unsqueeze(-1), factor).squeeze(-1)
        self.covariance = torch.cholesky_inverse(factor)
        log_determinant = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        fit = y.square().sum(-1) - (projected * self.mean).sum(-1)
        self.weight = (log_weight - 0.5 * (log_determinant + fit)).softmax(0)

    def linear(self, functionals: Tensor) -> Moments:
        """Moments of ``functionals @ z``, with ``functionals`` ``[grid or 1, F, P]``: those of a mixture of Gaussians."""
        means = (functionals @ self.mean.unsqueeze(-1)).squeeze(-1)
        variances = ((functionals @ self.covariance) * functionals).sum(-1)
        mean = self.weight @ means
        off = (means - mean).square()
        variance = self.weight @ (variances + off)
        fourth = self.weight @ (3.0 * variances.square() + 6.0 * variances * off + off.square())
        return Moments(mean, variance.sqrt(), fourth / variance.square())

    def scale(self, values: Tensor) -> Moments:
        """Moments of a function of the scales, ``[grid]``."""
        mean = self.weight @ values
        variance = self.weight @ (values - mean).square()
        return Moments(mean, variance.sqrt(), self.weight @ (values - mean).pow(4) / variance.square())


def unknown_noise(design: Tensor, y: Tensor, prior_sd: Tensor | float, noise: Distribution, sigma: Tensor) -> Quadrature:
    """
    A linear model with one unknown noise scale.

    :param design: ``[N, P]``.
    :param prior_sd: of the coefficients, each ~ Normal(0, prior_sd); a number or ``[P]``.
    :param noise: prior of the noise scale.
    :param sigma: a grid of it, evenly spaced in the logarithm.
    """
    rows = design.double() / sigma.reshape(-1, 1, 1)
    log_weight = noise.log_prob(sigma) + (1 - len(y)) * sigma.log()
    precision = torch.as_tensor(prior_sd, dtype=torch.float64).expand(design.shape[1]) ** -2
    return Quadrature(rows, y.double() / sigma.unsqueeze(-1), precision, log_weight)


def log_grid(low: float, high: float, points: int) -> Tensor:
    """Evenly spaced in the logarithm, whose Jacobian is then the value itself; float64."""
    return torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------- NUTS


def nuts_moments(key: str) -> dict[str, Moments]:
    """
    The kept moments of a data set, by site.

    :raises KeyError: if there are none: run ``python tests/benchmarks/trust.py --references``.
    """
    found = json.loads(NUTS_FILE.read_text())
    if key not in found:
        raise KeyError(f"{NUTS_FILE.name} has no {key!r}: run `python tests/benchmarks/trust.py --references`")
    content = found[key]
    return {
        name: Moments(*(torch.tensor(site[part], dtype=torch.float64) for part in ("mean", "sd", "kurtosis")), content["ess"])
        for name, site in content["sites"].items()
    }


class Target(NamedTuple):
    """
    A posterior density on :math:`R^d`, written out by hand in JAX: not by the models under test.

    :ivar log_density: unnormalised, of a point ``[d]``.
    :ivar start: where chains start, ``[d]``, give or take 0.1.
    :ivar sites: from draws ``[chains, draws, d]`` to those of a model's sites, ``[chains, draws, *site]``.
    """

    log_density: Callable[[Any], Any]
    start: Sequence[float]
    sites: Callable[[Tensor], dict[str, Tensor]]


def linear_predictor_target(likelihood: str, x: Tensor, y: Tensor) -> Target:
    """
    A generalised linear model with weights and bias ~ Normal(0, 1).

    :param likelihood: ``"logistic"`` or ``"poisson"``.
    """
    import jax
    import jax.numpy as jnp

    design, labels = jnp.asarray(torch.cat([x, torch.ones(len(x), 1)], -1).numpy()), jnp.asarray(y.numpy())

    def log_density(theta: Any) -> Any:
        f = design @ theta
        rows = labels * f - (jnp.exp(f) if likelihood == "poisson" else jax.nn.softplus(f))
        return rows.sum() - 0.5 * theta @ theta

    return Target(log_density, [0.0] * design.shape[1], lambda draws: {"net.weight": draws[..., None, :-1], "net.bias": draws[..., -1:]})


def run_nuts(key: str, make: Callable[[], Target]) -> None:
    """
    Runs NUTS, and keeps its moments, unless they are there with the same settings.

    :raises RuntimeError: if the effective sample size is below 4000.
    """
    kept = json.loads(NUTS_FILE.read_text()) if NUTS_FILE.exists() else {}
    if key in kept and kept[key]["settings"] == NUTS_SETTINGS:
        return
    target = make()
    found = _summary(target.sites(_nuts_draws(target)))
    if found["ess"] < 4000:
        raise RuntimeError(f"{key}: an effective sample size of {found['ess']} is too small for a reference (4000)")
    kept[key] = {"settings": NUTS_SETTINGS, **found}
    NUTS_FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{key}: R-hat {found['r_hat']:.4f}, ESS {found['ess']}", flush=True)


def _nuts_draws(target: Target) -> Tensor:
    """Draws ``[chains, draws, d]``, by BlackJAX."""
    import blackjax
    import jax
    import jax.numpy as jnp

    def chain(key: Any) -> Any:
        begin, warmup, sampling = jax.random.split(key, 3)
        adaptation = blackjax.window_adaptation(blackjax.nuts, target.log_density, is_mass_matrix_diagonal=False)
        start = jnp.asarray(target.start) + 0.1 * jax.random.normal(begin, (len(target.start),))
        (state, parameters), _ = adaptation.run(warmup, start, num_steps=NUTS_SETTINGS["warmup_steps"])
        step = blackjax.nuts(target.log_density, **parameters).step

        def body(state: Any, key: Any) -> Any:
            state, _ = step(key, state)
            return state, state.position

        return jax.lax.scan(body, state, jax.random.split(sampling, NUTS_SETTINGS["num_samples"]))[1]

    keys = jax.random.split(jax.random.key(NUTS_SETTINGS["seed"]), NUTS_SETTINGS["chains"])
    return torch.stack([torch.tensor(jax.device_get(chain(key))) for key in keys])


def _summary(samples: Mapping[str, Tensor]) -> dict[str, Any]:
    sites, r_hats, sizes = {}, [], []
    for name, draws in samples.items():
        draws = draws.double()
        mean = draws.mean((0, 1))
        variance = (draws - mean).square().mean((0, 1))
        kurtosis = (draws - mean).pow(4).mean((0, 1)) / variance.square()
        rounded = {"mean": mean, "sd": variance.sqrt(), "kurtosis": kurtosis}
        sites[name] = {part: torch.round(value, decimals=6).tolist() for part, value in rounded.items()}
        r_hats.append(float(split_gelman_rubin(draws, 0, 1).max()))
        for values in (draws, (draws - mean).square()):
            sizes.append(float(effective_sample_size(values, 0, 1).min()))
    return {"r_hat": round(max(r_hats), 5), "ess": round(min(sizes)), "sites": sites}

"""Posterior moments that do not come from the kernels under test: closed forms, quadrature over scales, and Pyro's NUTS."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor

NUTS_FILE = Path(__file__).parent / "results" / "trust_references.json"
NUTS_SETTINGS = {"chains": 4, "num_samples": 3000, "warmup_steps": 500, "full_mass": True, "seed": 0}


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


def run_nuts(key: str, model: Any, args: tuple[Any, ...]) -> None:
    """Runs NUTS on one data set and keeps its moments, unless they are there with the same settings."""
    kept = json.loads(NUTS_FILE.read_text()) if NUTS_FILE.exists() else {}
    if key in kept and kept[key]["settings"] == NUTS_SETTINGS:
        return
    pyro.set_rng_seed(NUTS_SETTINGS["seed"])
    chains = []
    for _ in range(NUTS_SETTINGS["chains"]):
        kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, full_mass=NUTS_SETTINGS["full_mass"])
        mcmc = MCMC(kernel, NUTS_SETTINGS["num_samples"], NUTS_SETTINGS["warmup_steps"], disable_progbar=True)
        mcmc.run(*args)
        chains.append(mcmc.get_samples())
    kept[key] = {"settings": NUTS_SETTINGS, **_summary({name: torch.stack([c[name] for c in chains]) for name in chains[0]})}
    if kept[key]["ess"] < 4000:
        raise RuntimeError(f"{key}: an effective sample size of {kept[key]['ess']:.0f} is too small for a reference (4000)")
    NUTS_FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{key}: R-hat {kept[key]['r_hat']:.4f}, ESS {kept[key]['ess']:.0f}", flush=True)


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

"""
What the statistical tests of the samplers share: Gaussian targets, the law that each kernel should have on them, and a comparison
of draws with a law in Monte-Carlo standard errors.

A target is many *replicas* of one small problem in one model. The updates work element by element and energies add up, so that
replicas are independent chains at a thousandth of a chain's price, and their spread is an honest standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab

FRICTION = 0.1
# In units of the Monte-Carlo standard error. Every test compares a hundred numbers or so, at a fixed seed.
LIMIT = 4.5


class Case(NamedTuple):
    """One way to sample: a kernel with its options, and what its law depends on."""

    kernel: Callable[..., Any]
    friction: float = 1.0  # share of momentum lost per step: the Langevin rules are SGHMC that loses all of it
    scaled: bool = False
    corrected: bool = False

    def step_size(self, share: float, temperature: float, precision: Tensor) -> float:
        """The step size at which the largest eigenvalue of h·precision is about ``share``, with the V that full data lead to."""
        if not self.scaled:
            return share / float(torch.linalg.eigvalsh(precision).max())
        metric = (temperature * precision.diagonal()).pow(-0.25)
        return (share / float(torch.linalg.eigvalsh(metric * precision * metric[:, None]).max())) ** 0.5

    def rates(self, kernel: Any, step_size: float) -> Tensor:
        """h of every coordinate ``[chains, size]``, in float64."""
        state = kernel.state()
        if not self.scaled:
            return torch.full_like(state["theta"], step_size).double()
        return step_size**2 * state["variables"]["V"].double().rsqrt()

    def taken(self, kernel: Any, rates: Tensor) -> Tensor:
        """h² M, the variance of the gradient that a kernel takes off what it injects, ``[chains, size]``."""
        moment = kernel.state()["variables"].get("moment")
        return torch.zeros_like(rates) if moment is None else rates**2 * moment.double()


CASES = {
    "SGLD": Case(ab.SGLD),
    "SGAdaLD": Case(ab.SGAdaLD, scaled=True, corrected=True),
    "SGAdaLD-uncorrected": Case(partial(ab.SGAdaLD, noise_correction=False), scaled=True),
    "SGHMC": Case(partial(ab.SGHMC, friction=FRICTION), FRICTION),
    "SGHMC-adaptive": Case(partial(ab.SGHMC, friction=FRICTION, adaptive=True), FRICTION, scaled=True),
}


# ------------------------------------------------------------------------------------------------------------------- targets


def rotated(*eigenvalues: float) -> Tensor:
    """A symmetric matrix with these eigenvalues and no eigenvector along an axis."""
    dim = len(eigenvalues)
    rotation, _ = torch.linalg.qr(torch.cos(torch.arange(float(dim * dim), dtype=torch.float64)).reshape(dim, dim))
    return rotation @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ rotation.T


def gaussian(precision: Tensor, mean: float, replicas: int, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """A model with one site ``"x"`` ``[replicas, dim]`` whose rows are Normal(mean, precision⁻¹)."""
    scale = torch.linalg.cholesky(torch.linalg.inv(precision)).to(dtype)
    law = dist.MultivariateNormal(torch.full((len(scale),), mean, dtype=dtype), scale_tril=scale).expand([replicas]).to_event(1)

    def model() -> None:
        pyro.sample("x", law)

    return model


class Noisy(NamedTuple):
    """A Gaussian target made of data, with minibatch noise that is known exactly: model, its arguments, options for the kernel."""

    model: Callable[..., None]
    args: tuple[Any, ...]
    options: dict[str, Any]


MODES = ("full", "batch_size", "plate", "loader", "white")


def noisy_gaussian(
    mode: str, precision: Tensor, noise: Tensor, num_data: int, batch_size: int, replicas: int, dtype: torch.dtype = torch.float32
) -> Noisy:
    r"""
    With :math:`\Lambda = R^\top R`, :math:`x \sim N(0, 2 \Lambda^{-1})` and :math:`y_i \sim N(R x / \sqrt{2 N}, I)` have the posterior
    precision :math:`\Lambda`, and a gradient whose noise is the same at every :math:`x`: the covariance of the rows, which is not one
    that this model would have drawn, decides about it. Their mean makes the posterior mean 1.

    :param mode: how data arrive: all at once; cut by ``batch_size``; by a plate that subsamples itself; by a shuffling ``DataLoader``;
        or as ``"white"`` noise, by a loader whose rows are new numbers every time.
    :param noise: covariance of the minibatch gradient at one x.
    """
    root = torch.linalg.cholesky(precision).T / (2.0 * num_data) ** 0.5
    mean = 2.0 * root.sum(1)
    # the gradient of a batch is num_data · rootᵀ (root x - mean of its rows), and that of the prior
    spread = torch.linalg.inv(num_data * root.T) @ torch.linalg.cholesky(noise) * batch_size**0.5
    scale = torch.linalg.cholesky(2.0 * torch.linalg.inv(precision)).to(dtype)
    prior = dist.MultivariateNormal(torch.zeros(replicas, len(precision), dtype=dtype), scale_tril=scale).to_event(1)
    root, subsample_size = root.to(dtype), batch_size if mode == "plate" else None

    def model(y: Tensor) -> None:
        x = pyro.sample("x", prior)
        with pyro.plate("data", len(y), subsample_size=subsample_size) as rows:
            pyro.sample("obs", dist.Normal(x @ root.T, 1.0).to_event(2), obs=y[rows] if mode == "plate" else y)

    if mode == "white":
        return Noisy(model, (FreshRows(mean.to(dtype), spread.to(dtype), batch_size, replicas),), {"num_data": num_data})
    without_replacement = (1.0 - batch_size / num_data) ** 0.5
    y = (mean + exact_rows(num_data, replicas, len(precision)) @ spread.T / without_replacement).to(dtype)
    if mode == "loader":
        return Noisy(model, (DataLoader(TensorDataset(y), batch_size, shuffle=True),), {})
    return Noisy(model, (y,), {"batch_size": batch_size} if mode == "batch_size" else {})


def exact_rows(num_data: int, replicas: int, dim: int) -> Tensor:
    """Rows ``[num_data, replicas, dim]`` whose own mean is 0 and covariance I, for every replica, without sampling error."""
    rows = torch.randn(num_data, replicas, dim, dtype=torch.float64)
    rows = rows - rows.mean(0)
    seen = torch.linalg.cholesky(torch.einsum("nri,nrj->rij", rows, rows) / (num_data - 1))
    return torch.linalg.solve_triangular(seen, rows.permute(1, 2, 0), upper=False).permute(2, 0, 1)


class FreshRows:
    """A loader of normal rows that never come again, as if from a data set without end."""

    def __init__(self, mean: Tensor, spread: Tensor, batch_size: int, replicas: int) -> None:
        self.mean, self.spread, self.shape = mean, spread, (batch_size, replicas, len(spread))

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        for _ in range(len(self)):
            yield (self.mean + torch.randn(self.shape, dtype=self.spread.dtype) @ self.spread.T,)


def run(kernel: Any, *args: Any, warmup: int, samples: int, every: int = 1, chains: int = 1, start: float | None = None) -> Tensor:
    """
    Draws of site ``"x"`` ``[chains, samples, *shape]`` in float64, ``every`` updates apart; warm-up is counted alike. With ``start``
    all chains set out from there. (The kernel's own ``num_steps_per_sample`` would trace a second graph, which takes longer.)
    """
    initial = None
    if start is not None:
        kernel.setup_chains(chains, warmup, args, {})
        initial = {name: torch.full_like(value, start) for name, value in kernel.initial_params.items()}
    mcmc = ab.SGMCMC(kernel, samples * every, warmup * every, chains, initial_params=initial, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples(group_by_chain=True)["x"][:, every - 1 :: every].double()


# ------------------------------------------------------------------------------------------------ the laws that chains should have


def closed_form(case: Case, precision: Tensor, rates: Tensor, temperature: float, taken: Tensor) -> Tensor:
    r"""
    The covariance ``[..., dim, dim]`` of a chain on a Gaussian of precision :math:`\Lambda` that sees all data at every step:

    .. math:: T\, \bigl(\Lambda - \Lambda H \Lambda / (2 (2 - a))\bigr)^{-1}, \qquad H = \mathrm{diag}(h),

    which in one dimension is (T/λ) / (1 − hλ / (2 (2 − a))); less what a correction takes off.

    :param rates: h, ``[..., dim]``.
    :param taken: the variance that the correction takes off at every step, ``[..., dim]``.
    """
    bend = precision @ torch.diag_embed(rates) @ precision
    covariance = temperature * torch.linalg.inv(precision - bend / (2.0 * (2.0 - case.friction)))
    if case.corrected:
        identity = torch.eye(len(precision), dtype=torch.float64)
        covariance = covariance - lyapunov(identity - torch.diag_embed(rates) @ precision, torch.diag_embed(taken))
    return covariance


def lyapunov(drift: Tensor, noise: Tensor) -> Tensor:
    """The covariance S = drift S driftᵀ + noise, by doubling."""
    covariance = noise.expand_as(drift).clone()
    for _ in range(30):
        covariance = covariance + drift @ covariance @ drift.mT
        drift = drift @ drift
    return covariance


def noisy_variance(
    case: Case, precision: Tensor, rates: Tensor, injected: Tensor, noise: Tensor, batches: int | None = None, steps: int = 400
) -> Tensor:
    r"""
    The variance of a chain on a one-dimensional Gaussian with minibatch noise, element by element: with :math:`c_j` how far a push
    has moved the chain after j steps, :math:`D \sum c_j^2 + h^2 C \sum c_j^2`, with the injected variance :math:`D` and white noise of
    variance :math:`C`.

    :param batches: batches in a shuffled epoch. Their noise adds up to nothing, so that two batches of one epoch have the correlation
        −1/(batches − 1). The result is the mean over the places in an epoch.
    :param steps: steps after which a push is forgotten.
    """
    position, momentum = torch.zeros_like(rates), torch.ones_like(rates)
    pushes = []
    for _ in range(steps):
        position = position + momentum
        momentum = (1.0 - case.friction) * momentum - rates * precision * position
        pushes.append(position)
    squares = sum(c * c for c in pushes)
    if batches is None:
        return (injected + rates**2 * noise) * squares
    total = torch.zeros_like(squares)
    reached = torch.stack([torch.zeros_like(rates), *pushes]).cumsum(0)
    for place in range(1, batches + 1):
        ends = reached[[0, *range(place, steps, batches), steps]]
        total = total + ends.diff(dim=0).square().sum(0) / batches
    shuffled = (batches * squares - total) / (batches - 1)
    return injected * squares + rates**2 * noise * shuffled


def injected_variance(case: Case, kernel: Any, rates: Tensor, temperature: float) -> Tensor:
    """The variance of the noise that a kernel adds in a step, by METHODS' equations."""
    variables = kernel.state()["variables"]
    injected = 2.0 * case.friction * temperature * rates
    if case.corrected:
        injected = injected - rates**2 * variables["moment"]
    if "noise" in variables:
        injected = injected - rates**2 * variables["noise"]
    return injected.clamp_min(0.0)


# ------------------------------------------------------------------------------------------------------------------ comparison


def assert_law(draws: Tensor, mean: Tensor | float, covariance: Tensor, label: str) -> None:
    """
    Mean, covariance and KL of draws ``[chains, draws, replicas, dim]`` against a Gaussian with a covariance for each replica,
    ``[chains, replicas, dim, dim]``: seen through its own square root, every replica's law should be Normal(0, I).
    """
    factor = torch.linalg.cholesky(covariance).unsqueeze(1)
    white = torch.linalg.solve_triangular(factor, (draws - mean).unsqueeze(-1), upper=False).squeeze(-1)
    dim = white.shape[-1]
    rows = white.transpose(1, 2).reshape(-1, white.shape[1], dim)  # [chains * replicas, draws, dim]
    upper = torch.triu_indices(dim, dim)
    squares = (rows.mT @ rows / rows.shape[1] - torch.eye(dim, dtype=rows.dtype))[:, upper[0], upper[1]]
    assert_mean(rows.mean(1), 0.0, f"{label}: whitened mean")
    assert_mean(squares, 0.0, f"{label}: whitened covariance")

    last = rows[:, -1]
    covariance = torch.cov(last.T, correction=0)
    kl = 0.5 * (covariance.diagonal().sum() + last.mean(0).square().sum() - dim - torch.logdet(covariance))
    # 2 n KL(draws || law) is chi-squared, with a degree of freedom for each number that was estimated
    most = stats.chi2.isf(1e-5, dim * (dim + 3) // 2) / (2.0 * len(last))
    assert kl < most, f"{label}: KL of the last draws to the law is {kl:.4g}, above {most:.4g}"


def estimate(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first dimension, along which values must be independent, and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def assert_mean(values: Tensor, expected: Tensor | float, label: str) -> None:
    """The mean over the first dimension against what it should be, in standard errors."""
    mean, error = estimate(values)
    worst = ((mean - expected) / error).abs().max()
    assert worst < LIMIT, f"{label}: {worst:.1f} standard errors off\nseen {mean}\nwanted {expected}\nerror {error}"

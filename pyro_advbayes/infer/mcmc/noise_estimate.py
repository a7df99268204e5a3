"""The noise of minibatch gradients, and the temperature that it leads to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.state import Run

ESTIMATE_FROM = 0.7  # share of warm-up: by then the chain has come to rest
EVALUATIONS = 32
FRESH_EVALUATIONS = 8
MOST_NUMBERS = 2**25  # in the differences that are kept


class GradientNoise(NamedTuple):
    """
    Statistics of the minibatch gradient at one theta, means over the chains.

    :param variance: ``[size]``.
    :param second_moment: mean of the square, ``[size]``.
    :param slope: lower bound of the squared mean in the rule's metric, mean over coordinates.
    """

    variance: Tensor
    second_moment: Tensor
    slope: float = 0.0


def adapt(run: Run) -> None:
    r"""
    Called before every update in warm-up. Estimates the variance of the minibatch gradient at one :math:`\theta`, per coordinate: the
    mean over the last 30 % of warm-up of

    .. math:: \tfrac{1}{2} (g_1 - g_2)^2 (1 - B/N),

    with the gradients of two minibatches. The last factor is there because batches of one epoch do not overlap. A rule with a variable
    ``"noise"`` gets the estimate, which is then made at every update; otherwise at 32 of them.
    """
    if due(run, run.chains.counts.updates):
        measure(run)


def due(run: Run, updates: int) -> bool:
    """Whether :func:`adapt` measures after so many updates."""
    every = 1 if "noise" in run.chains.variables else max(1, int((1.0 - ESTIMATE_FROM) * run.warmup_updates / EVALUATIONS))
    return updates >= ESTIMATE_FROM * run.warmup_updates and updates % every == 0


def finish(run: Run) -> None:
    """Called at the end of warm-up. Without a warm-up, measures where the chains start."""
    if run.chains.noise.count == 0:
        for _ in range(EVALUATIONS):
            measure(run)


def estimate(run: Run) -> GradientNoise:
    """The estimate so far."""
    return GradientNoise(run.chains.noise.variance, run.chains.noise.second_moment)


def fresh(run: Run) -> GradientNoise:
    """An estimate from the present states alone."""
    pairs = [pair for pair in (_pair(run) for _ in range(FRESH_EVALUATIONS)) if pair is not None]
    run.chains.noise.differences = []
    if not pairs:
        return estimate(run)
    for _, difference in pairs:
        _keep(run, difference)
    variance = torch.stack([noise.variance for noise, _ in pairs]).mean(0)
    second_moment = torch.stack([noise.second_moment for noise, _ in pairs]).mean(0)
    slopes = torch.tensor([noise.slope for noise, _ in pairs], dtype=torch.float64)
    error = float(slopes.std()) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
    return GradientNoise(variance, second_moment, max(0.0, float(slopes.mean()) - 2.0 * error))


def measure(run: Run) -> None:
    """Adds two more gradients to the estimate."""
    pair, chains, noise = _pair(run), run.chains, run.chains.noise
    if pair is None:
        return
    latest, difference = pair
    if noise.count == 0:
        noise.differences = []
    noise.count += 1
    for mean, new in ((noise.variance, latest.variance), (noise.second_moment, latest.second_moment)):
        mean += (new - mean) / noise.count
    _keep(run, difference)
    if "noise" in chains.variables:
        chains.variables["noise"].copy_(noise.variance.expand_as(chains.theta))


def _keep(run: Run, difference: Tensor) -> None:
    kept, (num_chains, size) = run.chains.noise.differences, run.chains.theta.shape
    followed = min(4, num_chains, MOST_NUMBERS // (EVALUATIONS * size))
    if followed and len(kept) < EVALUATIONS and run.potential.batches.num_data is not None:
        kept.append(difference[:followed].clone())


def _pair(run: Run) -> tuple[GradientNoise, Tensor] | None:
    """
    Two gradients, on full data one: their statistics, and the scaled differences ``[chains, size]``. None where no chain has finite
    gradients.
    """
    batches, chains = run.potential.batches, run.chains
    first = second = run.gradient()
    share = 1.0
    if batches.num_data is not None and batches.batch_size is not None:
        second, share = run.gradient(), batches.batch_size / batches.num_data
    difference = (0.5 * (1.0 - share)) ** 0.5 * (first - second)
    # leaves out chains that are lost, or about to be
    good = chains.alive.to(first.device) & first.isfinite().all(dim=-1) & second.isfinite().all(dim=-1)
    if not bool(good.any()):
        return None
    one, two = first[good], second[good]
    metric = run.rule.metric(chains.variables)
    square = 1.0 if metric is None else metric[good].square()
    second_moment = 0.5 * (one.square() + two.square()).mean(0)
    return GradientNoise(difference[good].square().mean(0), second_moment, float((square * one * two).mean())), difference

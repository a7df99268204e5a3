"""The temperatures that a run is predicted to sample at, with the noise of minibatch gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.noise_estimate import FRESH_EVALUATIONS
from pyro_advbayes.infer.mcmc.rule import site_means
from pyro_advbayes.infer.mcmc.state import Run


def predict(run: Run, step_size: float) -> None:
    """
    Called at the end of warm-up.

    :raises ValueError: if the rule is not valid at this step size.
    """
    chains, rule = run.chains, run.rule
    alive, variance = chains.alive_variables(), chains.noise.variance
    chains.clamped = rule.check(step_size, run.T, alive, run.places)
    chains.effective = rule.temperatures(variance, step_size, run.T, alive, run.updates_per_batch)
    chains.hottest = hottest(run, step_size)
    injected = rule.injected_temperature(variance, step_size, run.T, alive)
    chains.coldest = None if injected is None else by_site(run, injected, worst=torch.amin)


def by_site(run: Run, values: Tensor, worst: Callable[[Tensor, int], Tensor]) -> dict[str, float]:
    """
    Means over the coordinates of each site, of the worst chain.

    :param values: broadcast to ``[chains, size]``.
    :param worst: reduces over chains.
    """
    means = site_means(values.expand(*values.shape[:-1], run.potential.size).float(), run.places)
    of_worst = worst(means.reshape(-1, len(run.places)), 0).tolist()
    return {name: mean for (name, _), mean in zip(run.places, of_worst, strict=True)}


def hottest(run: Run, step_size: float) -> float | None:
    r"""
    The temperature along the direction in which minibatch noise heats most, of the worst of up to four chains. Noise is correlated
    between weights, and the temperatures of single coordinates do not show it. One half of the differences finds the direction, and the
    other half measures the heat along it, so that the estimate is not biased by the choice of the largest.

    :return: None on full data, where too few differences were kept, and for a rule that predicts no temperature.
    """
    chains, rule = run.chains, run.rule
    if len(chains.noise.differences) < FRESH_EVALUATIONS:
        return None
    differences = torch.stack(chains.noise.differences, dim=1)  # [chains, evaluations, size]
    found = []
    for chain in range(len(differences)):
        if not chains.alive[chain] or not bool(differences[chain].isfinite().all()):
            continue
        variables = {name: value[chain] for name, value in chains.variables.items()}
        per_variance = rule.heating(chains.noise.variance, step_size, run.T, variables)
        injected = rule.injected_temperature(chains.noise.variance, step_size, run.T, variables)
        if per_variance is None or injected is None:
            return None
        base = injected.expand(differences.shape[-1])
        scaled = differences[chain] * ((run.updates_per_batch * per_variance) ** 0.5)
        halves = scaled[::2], scaled[1::2]
        values = []
        for one, other in (halves, halves[::-1]):
            _, vectors = torch.linalg.eigh((one @ one.T).double())
            direction = (vectors[:, -1].to(one) @ one).double()
            norm = torch.linalg.vector_norm(direction)
            if norm == 0.0:
                continue
            direction = direction / norm
            values.append(float(direction.square() @ base.double() + (other.double() @ direction).square().mean()))
        found.extend([sum(values) / len(values)] if values else [])
    return max(found) if found else None

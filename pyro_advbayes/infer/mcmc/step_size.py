"""Step sizes found from the model: bounded by curvature, energy error and minibatch noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc import energy_error, noise_estimate
from pyro_advbayes.infer.mcmc.noise_estimate import GradientNoise
from pyro_advbayes.infer.mcmc.rule import Rule, has_own_steps, site_means
from pyro_advbayes.infer.mcmc.schedules import PerChain, Schedule, as_schedule
from pyro_advbayes.infer.mcmc.state import AutoStepSize, Run
from pyro_advbayes.infer.mcmc.temperatures import hottest
from pyro_advbayes.infer.mcmc.trajectory import energy_rise

# Shares of warm-up at which the step is found again: a chain starts where curvature and noise are much larger than where it ends, and
# a preconditioner that is frozen at one half needs a step of its own.
MEASURE_AT = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.6)
# Until then minibatch noise may double the temperature, which the chain soon forgets; after it, noise keeps to its share.
REST_FROM = 0.6
EARLY_SHARE = 1.0
# While the bound on its growth holds the step back, it is measured again after so much of warm-up, up to so far.
GROWS_AFTER, GROWS_UNTIL = 0.01, 0.8
GROWTH = 4.0  # by which the rate h may grow from one measurement to the next: where U is flat, curvature is no bound
POWER_ITERATIONS = 12
MORE_ITERATIONS = 4  # where the iteration continues from the direction of the measurement before
HALVINGS = 12
FIRST_LENGTH = 0.01  # times the root of the number of weights: where the search begins that curvature does not bound


def as_step_size(value: Any, rule: Rule, share: float) -> AutoStepSize | Schedule:
    """
    A kernel's step size from its argument.

    :raises ValueError: naming the argument.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"auto_share={share!r}: a share of the temperature, in (0, 1)")
    name = type(rule).__name__
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f'step_size={value!r}: a number > 0, a function of the step, or "auto"')
        if type(rule).largest_step is Rule.largest_step:
            raise ValueError(f'step_size="auto": {name} has no largest_step. Give a step size')
        return AutoStepSize(share)
    schedule = as_schedule(value, "step_size")
    if isinstance(schedule, PerChain) and not has_own_steps(rule):
        raise ValueError(f"step_size={value!r}: {name} has one step for all chains, a number > 0. SGHMC and MCLMC take one for each")
    return schedule


def adapt(run: Run, auto: AutoStepSize) -> None:
    """
    Called before every update: measures where it is time.

    The step is the largest at which discretisation and minibatch noise each change the temperature by at most ``auto.share``. Curvature
    bounds it, the energy error of updates (for each chain its own) and of short trajectories, noise (its mean over each site, and along
    the direction in which it is largest), and four times the rate of the measurement before. In the first 60 % of warm-up noise may
    double the temperature.

    Curvature and energy error are local, and say nothing about a density of straight pieces (a Laplace likelihood), which needs a step
    size of the user's.
    """
    if run.warmup_updates == 0:
        if auto.value is None:
            noise_estimate.finish(run)
            _measure(run, auto, rest=True)
        return
    updates = run.chains.counts.updates
    if due(run, auto, updates):
        place = auto.measured_at = updates / run.warmup_updates
        while auto.measured < len(MEASURE_AT) and place >= MEASURE_AT[auto.measured]:
            auto.measured += 1
        _measure(run, auto, rest=place >= REST_FROM)


def due(run: Run, auto: AutoStepSize, updates: int) -> bool:
    """Whether :func:`adapt` measures after so many updates of warm-up."""
    place = updates / run.warmup_updates
    if auto.measured < len(MEASURE_AT) and place >= MEASURE_AT[auto.measured]:
        return True
    return auto.growing and auto.measured_at + GROWS_AFTER <= place <= GROWS_UNTIL


def finish(run: Run, auto: AutoStepSize) -> None:
    """Called at the end of warm-up, after which the step is constant. The noise estimated since may make it smaller."""
    if auto.value is None:
        adapt(run, auto)
    else:
        auto.value = _hold(run, auto, auto.value, noise_estimate.estimate(run), rest=True, find=False)
    auto.directions = {}
    if _target(run, auto) is not None and auto.value is not None:
        run.chains.variables["energy_error"].copy_(energy_error.measure(run, auto.value)[:, None])


def _measure(run: Run, auto: AutoStepSize, rest: bool) -> None:
    rule, variables, T = run.rule, run.chains.variables, run.T
    scaled = rule.metric(variables) is not None
    if run.chains.counts.updates == 0 and scaled:
        # g² in the stiffest direction: the first moves are then those of an unscaled rule
        rule.start_metric(variables, 1.0)
        rule.start_metric(variables, max(T, 1e-3) * largest_curvature(run, auto.directions))
    before = auto.value
    if rule.bounded_by_curvature:
        auto.curvature = largest_curvature(run, auto.directions)
    noise = noise_estimate.estimate(run) if run.warmup_updates == 0 else noise_estimate.fresh(run)
    value = _hold(run, auto, before, noise, rest, find=True)
    half = 0.5 ** (1.0 / rule.rate_power)
    if before is not None:
        most = before / half ** (GROWTH / 2.0)
        auto.growing = most < value
        value = min(value, most)
    for _ in range(HALVINGS if rule.bounded_by_curvature else 0):
        if not energy_rises(run, value):
            break
        value *= half
        auto.growing = False
    if auto.ceiling is not None:
        value = min(value, auto.ceiling)
    auto.value = value
    if rest and auto.warm_value is None:
        auto.warm_value = before


def _hold(run: Run, auto: AutoStepSize, before: float | None, noise: GradientNoise, rest: bool, find: bool) -> float:
    """
    The step within its bounds. Where chains have steps of their own, each is kept within them, and their mean is returned (geometric).

    :param before: the step so far.
    :param find: whether to look for the energy error's step; else the step so far is kept to its bounds.
    """
    relative, target = run.chains.variables.get("relative_step"), _target(run, auto)
    if relative is None or target is None:
        value = bound(run, auto.share, auto.curvature, noise, rest)
        return value if find or before is None else min(before, value)
    steps = None if before is None else before * relative
    relative.fill_(1.0)
    most = bound(run, auto.share, auto.curvature, noise, rest)
    if find or steps is None:
        first = most if run.rule.bounded_by_curvature else min(most, FIRST_LENGTH * run.potential.size**0.5)
        start = torch.full_like(relative, first) if steps is None else steps
        steps = energy_error.find_steps(run, start, target, most, first=before is None)
    elif before is not None and bool((steps <= most).all()):  # nothing to change, not even by rounding
        relative.copy_(steps / before)
        return before
    log = steps.clamp_max(most).log()
    mean = log[run.chains.alive.to(log.device)].mean()
    relative.copy_((log - mean).exp())
    return float(mean.exp())


def _target(run: Run, auto: AutoStepSize) -> float | None:
    """The energy error to aim at; None for a rule without, and at T = 0, where a chain has no kinetic energy."""
    return None if run.T == 0.0 else run.rule.target_error(run.potential.size, auto.share)


def bound(run: Run, share: float, curvature: float | None, noise: GradientNoise, rest: bool) -> float:
    """
    The largest step that curvature and noise allow.

    :param share: of the temperature, in (0, 1).
    :param curvature: the largest eigenvalue of the Hessian of U, in the rule's metric; None where it is no bound.
    :param rest: whether noise is held to its share.
    """
    rule, potential, T = run.rule, run.potential, run.T
    alive = run.chains.alive_variables()
    metric = rule.metric(alive)
    square = torch.ones_like(noise.variance) if metric is None else metric.square()
    heat = site_means(square * noise.variance, run.places).reshape(-1, len(run.places)).amax(0)  # of the worst chain
    if T == 0.0:  # a chain without a temperature has none that could be kept to
        heat = torch.zeros_like(heat)
    elif not rest:
        # far from where it will rest, a chain has more energy to lose than noise brings: |g|² / (2 λ) at the least
        excess = 0.0 if curvature is None else noise.slope / (2.0 * curvature)
        heat = heat * (share * T / (EARLY_SHARE * T + excess))
    # among many weights the stiffest direction hardly shows, and the energy error, a mean over all directions, bounds the step
    slack = 1.0 if rule.target_error(potential.size, share) is None or T == 0.0 else max(1.0, potential.size / 20.0)
    value = rule.largest_step((curvature or 0.0) / slack, heat, T, share, alive)
    along = hottest(run, value) if rest and T > 0.0 else None
    allowed = hottest_allowed(share, potential.size) * T
    if along is not None and along - T > allowed:
        value *= (allowed / (along - T)) ** (1.0 / rule.rate_power)
    return value


def hottest_allowed(share: float, size: int) -> float:
    """
    The share of T by which noise may heat the direction in which it is largest, in a model of ``size`` weights. That direction's part in
    the variance of a single weight is about ``1 / size``: among a few weights twice the share changes a standard deviation by as much as
    the share, and in a network a hot direction hardly shows.
    """
    return 2.0 * share * max(1.0, size / 10.0)


def largest_curvature(run: Run, directions: dict[str, Tensor] | None = None) -> float:
    """
    The largest eigenvalue of the Hessian of U by power iteration, in the rule's metric, the largest over up to four chains and two
    minibatches.

    :param directions: of an earlier call, from which the iteration continues; overwritten with those of this call.
    :raises ValueError: if there is none.
    """
    potential, chains = run.potential, run.chains
    metric = run.rule.metric(chains.variables)
    generator = torch.Generator().manual_seed(0)  # the iteration's start hardly matters, and must not use the run's own numbers
    largest = 0.0
    for chain in chains.alive.nonzero().flatten().tolist()[:4]:
        theta = chains.theta[chain]
        scale: Tensor | float = 1.0 if metric is None else metric[chain]
        for number, batch in enumerate(potential.probes(chain)):
            key = f"{chain}, {number}"
            direction = torch.randn(potential.size, generator=generator, device="cpu").to(theta)
            known = None if directions is None else directions.get(key)
            if known is not None:
                direction = known + 0.01 * direction / potential.size**0.5  # a little of all directions, lest it miss a new one
            for _ in range(POWER_ITERATIONS if known is None else MORE_ITERATIONS):
                direction = direction / torch.linalg.vector_norm(direction)
                product = scale * potential.hessian_product(theta, scale * direction, batch, run.T)
                value = abs(float(direction @ product))
                direction = product
            if directions is not None and bool(direction.isfinite().all()) and bool((direction != 0.0).any()):
                directions[key] = direction / torch.linalg.vector_norm(direction)
            largest = max(largest, value) if value == value else largest
    if largest == 0.0:
        raise ValueError(
            'step_size="auto" finds no curvature: the Hessian of U is 0 or NaN where the chains are, as that of a density of straight '
            "pieces (Laplace) is. Give a step_size"
        )
    return largest


def energy_rises(run: Run, step_size: float) -> bool:
    r"""
    Whether a short trajectory gains more energy at this step size than a stable one would: :math:`\Delta H > T (1 + 0.3 \sqrt d)` in
    any chain. The curvature at one point does not tell that a few steps on (an exponential link, a scale near 0).

    At the largest step that curvature allows, a Gaussian of :math:`d` equal precisions has a standard deviation of
    :math:`0.09\, T \sqrt d`. Losses of energy do not count: the start of a chain is far out, or off the mode of the minibatch.
    """
    chains = run.chains
    rise = energy_rise(run, chains.theta, step_size, run.T, seed=chains.counts.updates)
    allowed = run.T * (1.0 + 0.3 * run.potential.size**0.5)
    return bool((rise > allowed)[chains.alive.to(rise.device)].any())

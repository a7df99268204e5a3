"""Step sizes from the energy error of single updates, for each chain its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.state import Run

TRIALS = 16  # updates in a round
ROUNDS, FIRST_ROUNDS = 4, 12
RARE = 20.0  # times the target: the most that one update counts in the search. Where U is rough, rare updates would else rule the mean
LARGEST_ERROR = 1e6  # which stands for an energy that is not finite, in what is reported
NEAR = 2.0  # within this factor of the target an error is left as it is: it is a mean over a few updates
POWER = 6.0  # of the length of a step, to which the error of a second-order integrator grows
RESOLVED = 10.0  # times the dtype's epsilon: the share of an energy below which its change is rounding
SLOWEST, FASTEST = 0.3, 3.0  # the factors by which a round may change a length


def find_steps(run: Run, start: Tensor, target: float, most: float, first: bool) -> Tensor:
    r"""
    The step size of each chain at which :math:`E = \overline{\Delta E^2} / d` is the target, by rounds of trial updates from where the
    chains are, which leave them there. After a round the length of a step is multiplied by :math:`(\mathrm{target} / E)^{1/6}`, kept in
    [0.3, 3]. A longer step than before is averaged with that, in the logarithm. (Robnik et al., 2023, adapt it like this in every update.)
    An update counts 20 times the target at most.

    :param start: of each chain, ``[chains, 1]``; what was found before, unless this is the first time.
    :param most: a bound from elsewhere, which no chain's step exceeds.
    :return: ``[chains, 1]``.
    """
    per_length = 2.0 / run.rule.rate_power
    step = start.clamp_max(most)
    for number in range(FIRST_ROUNDS if first else ROUNDS):
        error = trial_errors(run, step, run.chains.counts.updates + number, RARE * target)
        factor = ((target / error) ** (1.0 / POWER)).clamp(SLOWEST, FASTEST) ** per_length
        near = (error < NEAR * target) & ((error > target / NEAR) | (step.flatten() >= most))
        if bool(near[run.chains.alive.to(near.device)].all()):
            break
        step = torch.where(near[:, None], step, step * factor[:, None].to(step.dtype)).clamp_max(most)
    return step if first else torch.minimum(step, (step * start).sqrt())


def measure(run: Run, step_size: float) -> Tensor:
    """The energy error of each chain at its step, ``[chains]``."""
    return trial_errors(run, step_size * run.chains.variables["relative_step"], run.chains.counts.updates, LARGEST_ERROR)


def trial_errors(run: Run, step: Tensor, seed: int, most: float) -> Tensor:
    r"""
    :math:`\overline{\Delta E^2} / d` over trial updates without noise, energies in units of T, both of an update on one minibatch. Changes
    that the dtype does not resolve do not count: no step would be short enough for them.

    :param step: ``[chains, 1]``.
    :param seed: of the momenta, where the rule has one. The run's own random numbers stay as they are.
    :param most: what an update counts at most; one whose energy is not finite counts this.
    :return: ``[chains]``, > 0.
    """
    potential, rule, T = run.potential, run.rule, run.T
    theta = run.chains.theta.clone()
    variables = rule.trial_variables(run.chains.variables, T, torch.Generator().manual_seed(seed))
    full_data = potential.batches.num_data is None
    resolved = RESOLVED * torch.finfo(theta.dtype).eps / T
    total = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
    batch = potential.batches.next()
    gradient, energy = potential.evaluate("both", theta, batch, T)
    for _ in range(TRIALS):
        variables, first = rule.half_kick(gradient, step, T, variables)
        theta = rule.drift(theta, step, variables)
        gradient, new = potential.evaluate("both", theta, batch, T)
        variables, last = rule.half_kick(gradient, step, T, variables)
        change = ((new.double() - energy.double()) / T + first.double() + last.double()).abs()
        change = (change - resolved * energy.double().abs()).clamp_min(0.0)
        total += (change.square() / potential.size).nan_to_num(most, most).clamp_max(most)
        energy = new
        if not full_data:
            batch = potential.batches.next()
            gradient, energy = potential.evaluate("both", theta, batch, T)
    return (total / TRIALS).clamp_min(1e-12)

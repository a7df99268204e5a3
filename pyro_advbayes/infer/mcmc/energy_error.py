"""Step sizes from the energy error of single updates, for each chain its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.state import Run

TRIALS = 16  # updates in a round
ROUNDS, FIRST_ROUNDS = 4, 12
LARGEST_ERROR = 1e6  # which stands for an energy that is not finite
NEAR = 1.5  # a round whose errors are within this factor of the target is the last
POWER = 6.0  # of the step size, to which the error of a second-order integrator grows


def find_step(run: Run, before: float | None, target: float) -> float:
    r"""
    The step size of each chain at which :math:`E = \overline{\Delta E^2} / d` is the target, by rounds of trial updates from where the
    chains are, which leave them there. After a round the step is multiplied by :math:`(\mathrm{target} / E)^{1/6}`, kept in [0.3, 3].
    What is found is averaged with what was found before, in the logarithm. (Robnik et al., 2023, adapt it like this in every update.)

    Writes the ratios of the chains' steps to their geometric mean to ``variables["relative_step"]``.

    :param before: the geometric mean before this; None at the start.
    :return: the geometric mean.
    """
    chains = run.chains
    relative = chains.variables["relative_step"]
    first = run.potential.size**0.5 * 0.01
    old = torch.full_like(relative, first) if before is None else before * relative
    step = old.clone()
    for _ in range(FIRST_ROUNDS if before is None else ROUNDS):
        error = trial_errors(run, step)
        step = step * ((target / error) ** (1.0 / POWER)).clamp(0.3, 3.0)[:, None].to(step.dtype)
        if bool(((error < NEAR * target) & (error > target / NEAR))[chains.alive.to(error.device)].all()):
            break
    log = step.log() if before is None else 0.5 * (step.log() + old.log())
    mean = log[chains.alive.to(log.device)].mean()
    relative.copy_((log - mean).exp())
    return float(mean.exp())


def measure(run: Run, step_size: float) -> Tensor:
    """The energy error of each chain at its step, ``[chains]``."""
    return trial_errors(run, step_size * run.chains.variables["relative_step"])


def trial_errors(run: Run, step: Tensor) -> Tensor:
    r"""
    :math:`\overline{\Delta E^2} / d` over trial updates without noise, energies in units of T, both of an update on one minibatch.

    :param step: ``[chains, 1]``.
    :return: ``[chains]``, in (0, 1e6].
    """
    potential, rule, T = run.potential, run.rule, run.T
    theta, variables = run.chains.theta.clone(), {name: value.clone() for name, value in run.chains.variables.items()}
    full_data = potential.batches.num_data is None
    total = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
    batch = potential.batches.next()
    gradient, energy = potential.evaluate("both", theta, batch, T)
    for _ in range(TRIALS):
        variables, first = rule.half_kick(gradient, step, T, variables)
        theta = rule.drift(theta, step, variables)
        gradient, new = potential.evaluate("both", theta, batch, T)
        variables, last = rule.half_kick(gradient, step, T, variables)
        change = (new.double() - energy.double()) / T + first.double() + last.double()
        total += (change.square() / potential.size).nan_to_num(LARGEST_ERROR, LARGEST_ERROR).clamp_max(LARGEST_ERROR)
        energy = new
        if not full_data:
            batch = potential.batches.next()
            gradient, energy = potential.evaluate("both", theta, batch, T)
    return (total / TRIALS).clamp_min(1e-12)

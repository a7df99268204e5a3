"""The energy error of short Hamiltonian trajectories: whether a step size fits where a chain is."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.state import Run, SteepestStates

LEAPFROG_STEPS = 10
TRAJECTORIES = 20  # from a chain's steepest state
MOST_NUMBERS = 2**24  # in the states that are kept


def energy_rise(run: Run, theta: Tensor, step_size: float, temperature: float, seed: int) -> Tensor:
    r"""
    The largest gain :math:`\Delta H` of energy in ten leapfrog steps, which have the discretisation error of the rule's updates, on a
    fixed minibatch.

    :param theta: where they start, ``[chains, size]``, all chains of the run or the first of them.
    :param seed: of the momenta. The run's own random numbers stay as they are.
    :return: ``[chains]``, in nats; infinite where energy is not finite.
    """
    potential = run.potential
    batch = potential.probe_batches[0]
    variables = {name: value[: len(theta)] for name, value in run.chains.variables.items()}
    metric = run.rule.metric(variables)
    step = run.rule.leapfrog_step(step_size, temperature, variables) * (1.0 if metric is None else metric)
    generator = torch.Generator().manual_seed(seed)
    momentum = temperature**0.5 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device="cpu").to(theta.device)
    gradient, energy = potential.evaluate("both", theta, batch, temperature)
    start = energy + 0.5 * momentum.square().sum(-1)
    largest = torch.zeros_like(start)
    for _ in range(LEAPFROG_STEPS):
        momentum = momentum - 0.5 * step * gradient
        theta = theta + step * momentum
        gradient, energy = potential.evaluate("both", theta, batch, temperature)
        momentum = momentum - 0.5 * step * gradient
        rise = energy + 0.5 * momentum.square().sum(-1) - start
        largest = torch.maximum(largest, rise.nan_to_num(torch.inf))
    return largest - 1e-5 * start.abs().nan_to_num(0.0, 0.0)  # float32 does not resolve less


def watch_steepest(steepest: SteepestStates, theta: Tensor, norm: Tensor) -> None:
    """
    Called with every kept sample; keeps the state with the largest gradient of each chain. A step size found elsewhere may be unstable
    there, and throw the chain out of a part of the posterior (the neck of a funnel), which is then hardly sampled.

    :param theta: ``[chains, size]``.
    :param norm: of the gradient there, ``[chains]``.
    """
    followed = min(len(theta), MOST_NUMBERS // theta.shape[-1])
    theta, norm = theta[:followed], norm[:followed].nan_to_num(0.0)
    if steepest.norm is None or steepest.theta is None:
        steepest.theta, steepest.norm = theta.clone(), norm.clone()
        return
    steeper = norm > steepest.norm
    if bool(steeper.any()):
        steepest.norm[steeper], steepest.theta[steeper] = norm[steeper], theta[steeper]


def unstable_share(run: Run, step_size: float, temperature: float, most: int = TRAJECTORIES) -> float | None:
    r"""
    The share of short trajectories from the steepest states, with new momenta, that gain more energy than :math:`T (50 + \sqrt d)`.
    Where a step is only coarse, errors stay bounded (up to 25 T in tails that hold a thousandth of a posterior). Beyond the limit of
    stability they grow with every step.

    :param most: trajectories per chain.
    :return: None before the first sample, and where none of these chains is alive.
    """
    theta = run.chains.steepest.theta
    if theta is None:
        return None
    alive = run.chains.alive[: len(theta)].to(theta.device)
    if not bool(alive.any()):
        return None
    allowed = temperature * (50.0 + theta.shape[-1] ** 0.5)
    rises = torch.stack([energy_rise(run, theta, step_size, temperature, seed)[alive] for seed in range(most)])
    return float((rises > allowed).float().mean())

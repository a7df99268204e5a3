"""How well short trajectories of Hamiltonian dynamics keep their energy, which tells whether a step size fits where a chain is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel

LEAPFROG_STEPS = 10
TRAJECTORIES = 20  # from a chain's steepest state
MOST_NUMBERS = 2**24  # in the states that are kept; of so many chains


def energy_rise(kernel: SGMCMCKernel, theta: Tensor, step_size: float, temperature: float, seed: int) -> Tensor:
    r"""
    The largest gain :math:`\Delta H` of energy in ten leapfrog steps, which have the discretisation error of the rule's updates, on a
    fixed minibatch.

    :param theta: where they start, ``[chains, size]``, all chains of the run or the first of them.
    :param seed: of the momenta; the run's own random numbers are left alone.
    :return: ``[chains]``, in nats; infinite where energy is not finite.
    """
    potential = kernel.potential
    batch = potential.probe_batches[0]
    metric = kernel.update_rule.metric(kernel.variables)
    step = kernel.update_rule.leapfrog_step(step_size) * (1.0 if metric is None else metric[: len(theta)])
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
    return largest - 1e-5 * start.abs().nan_to_num(0.0, 0.0)  # what float32 does not resolve


class SteepestStates:
    """
    Where each chain met its largest gradient after warm-up. A step size found elsewhere may be unstable there, and the chain thrown out
    of a part of the posterior (the neck of a funnel) that it then hardly samples.

    :param num_chains: number of chains, of which the first are followed where all would take much memory.
    :param size: number of weights.
    """

    def __init__(self, num_chains: int, size: int) -> None:
        self._followed = min(num_chains, MOST_NUMBERS // size)
        self.norm: Tensor | None = None
        self.theta: Tensor | None = None

    def watch(self, theta: Tensor, norm: Tensor) -> None:
        """
        Called with every kept sample.

        :param theta: ``[chains, size]``.
        :param norm: of the gradient there, ``[chains]``.
        """
        theta, norm = theta[: self._followed], norm[: self._followed].nan_to_num(0.0)
        if self.norm is None or self.theta is None:
            self.theta, self.norm = theta.clone(), norm.clone()
            return
        steeper = norm > self.norm
        if bool(steeper.any()):
            self.norm[steeper], self.theta[steeper] = norm[steeper], theta[steeper]

    def unstable(self, kernel: SGMCMCKernel, step_size: float, temperature: float, most: int = TRAJECTORIES) -> float | None:
        r"""
        The share of short trajectories from these states, with momenta drawn anew, that gain more energy than :math:`T (50 + \sqrt d)`.
        Where a step is only coarse, errors stay bounded (up to 25 T were seen in tails that hold a thousandth of a posterior); beyond the
        limit of stability they grow with every step.

        :param most: trajectories per chain.
        :return: None before the first sample, and where none of the chains that are followed is left.
        """
        if self.theta is None:
            return None
        alive = kernel.alive[: len(self.theta)].to(self.theta.device)
        if not bool(alive.any()):
            return None
        allowed = temperature * (50.0 + self.theta.shape[-1] ** 0.5)
        rises = torch.stack([energy_rise(kernel, self.theta, step_size, temperature, seed)[alive] for seed in range(most)])
        return float((rises > allowed).float().mean())

    def state(self) -> list[Any]:
        """What :meth:`load` needs, as tensors."""
        return [self.norm, self.theta]

    def load(self, state: list[Any]) -> None:
        """Goes on from a :meth:`state`."""
        self.norm, self.theta = state

"""Chains that are lost in warm-up, or run away, start again from where they were last well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.rule import Variables

if TYPE_CHECKING:
    from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel

MOST_RESTARTS = 10  # of one chain: the step is then a thousandth
LOOKS = 50  # in a warm-up


class Restarts:
    """
    The last good states of all chains, and how often each was set back to it. A state is good while its energy on a fixed
    minibatch is finite and at most :math:`T (1000 + 10 d)` above the last good one's: a chain that was thrown out to where U is flat
    has finite numbers, and would count as converged there.

    Every restart halves the step size of all chains (:meth:`AutoStepSize.lower`).

    :param num_chains: number of chains.
    """

    def __init__(self, num_chains: int) -> None:
        self.counts = [0] * num_chains
        self.theta: Tensor | None = None
        self.variables: Variables = {}
        self.energy: Tensor | None = None

    def watch(self, kernel: SGMCMCKernel) -> None:
        """Called before every update of warm-up: looks 50 times at the chains, keeps good states and sets back runaways."""
        if kernel.steps % max(1, kernel.warmup_updates // LOOKS):
            return
        potential, T = kernel.potential, kernel.temperature(kernel.steps)
        _, energy = potential.evaluate("both", kernel.theta, potential.probe_batches[0], T)
        if self.theta is None:
            self.theta, self.energy = kernel.theta.clone(), energy.clone()
            self.variables = {name: value.clone() for name, value in kernel.variables.items()}
            return
        allowed = T * (1000.0 + 10.0 * potential.size) + 1e-3 * self.energy.abs()
        good = (energy <= self.energy + allowed).to(kernel.alive.device)  # False for NaN
        bad = kernel.alive & ~good
        self.restart(kernel, bad, kernel.theta)
        good = (good & kernel.alive).to(energy.device)
        self.theta[good], self.energy[good] = kernel.theta[good], energy[good]
        for name, value in self.variables.items():
            value[good] = kernel.variables[name][good]

    def restart(self, kernel: SGMCMCKernel, lost: Tensor, into: Tensor) -> Tensor:
        """
        Sets chains back, those that have restarts left.

        :param lost: which, ``[chains]``.
        :param into: the state to write to, ``[chains, size]``.
        :return: which were set back.
        """
        left = torch.tensor([count < MOST_RESTARTS for count in self.counts], device=lost.device)
        again = lost & left
        if self.theta is None or not bool(again.any()):
            return torch.zeros_like(lost)
        rows = again.to(into.device)
        into[rows] = self.theta[rows]
        for name, value in self.variables.items():
            kernel.variables[name][rows] = value[rows]
        for chain in again.nonzero().flatten().tolist():
            self.counts[chain] += 1
        kernel.step_size.lower()
        return again

    def forget_states(self) -> None:
        """Frees the states, once warm-up is over."""
        self.theta, self.energy, self.variables = None, None, {}

    def without_states(self) -> Restarts:
        """A copy that holds the counts alone."""
        copy = Restarts(0)
        copy.counts = list(self.counts)
        return copy

    def state(self) -> list[Any]:
        """What :meth:`load` needs, as tensors and plain values."""
        return [self.counts, self.theta, self.energy, self.variables]

    def load(self, state: list[Any]) -> None:
        """Goes on from a :meth:`state`."""
        self.counts, self.theta, self.energy, variables = state
        self.variables = dict(variables)

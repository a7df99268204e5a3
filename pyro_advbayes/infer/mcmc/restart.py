"""Chains that are lost or run away: in warm-up they start again from their last good state, later they stay where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.state import ChainState, Run

MOST_RESTARTS = 10  # per chain; the step is then a thousandth
LOOKS = 50  # in a warm-up


def watch(run: Run) -> None:
    """
    Called before every update of warm-up: looks 50 times at the chains, keeps good states and sets back runaways.

    A state is good while its energy on a fixed minibatch is finite and at most :math:`T (1000 + 10 d)` above that of the last good one. A
    chain that was thrown out to where U is flat has finite numbers, and would count as converged there.
    """
    chains, potential, T = run.chains, run.potential, run.T
    if not due(run, chains.counts.updates):
        return
    _, energy = potential.evaluate("both", chains.theta, potential.probe_batches[0], T)
    last = chains.restarts
    if last.theta is None or last.energy is None:
        last.theta, last.energy = chains.theta.clone(), energy.clone()
        # a chain's step is not set back with it: an older one may be longer than the one that threw it out
        last.variables = {name: value.clone() for name, value in chains.variables.items() if name != "relative_step"}
        return
    allowed = T * (1000.0 + 10.0 * potential.size) + 1e-3 * last.energy.abs()
    good = (energy <= last.energy + allowed).to(chains.alive.device)  # False for NaN
    restart(chains, chains.alive & ~good, chains.theta)
    good = (good & chains.alive).to(energy.device)
    last.theta[good], last.energy[good] = chains.theta[good], energy[good]
    for name, value in last.variables.items():
        value[good] = chains.variables[name][good]


def due(run: Run, updates: int) -> bool:
    """Whether :func:`watch` looks after so many updates of warm-up."""
    return updates % max(1, run.warmup_updates // LOOKS) == 0


def restart(chains: ChainState, lost: Tensor, into: Tensor) -> Tensor:
    """
    Sets lost chains that have restarts left back to their last good state. Each call that does so halves the step size of all chains.

    :param lost: which chains are lost, ``[chains]``.
    :param into: the state to write to, ``[chains, size]``.
    :return: which were set back, ``[chains]``.
    """
    last = chains.restarts
    left = torch.tensor([count < MOST_RESTARTS for count in last.counts], device=lost.device)
    again = lost & left
    if last.theta is None or chains.auto is None or not bool(again.any()):
        return torch.zeros_like(lost)
    rows = again.to(into.device)
    into[rows] = last.theta[rows]
    for name, value in last.variables.items():
        chains.variables[name][rows] = value[rows]
    for chain in again.nonzero().flatten().tolist():
        last.counts[chain] += 1
    chains.auto.lower()
    return again


def find_lost(chains: ChainState, step_size: float, energy: Tensor | None, adapting: bool) -> None:
    """
    Finds out which chains are lost by an update, and sets them back in warm-up.

    :param energy: energy before the update, ``[chains]``, if known.
    :raises RuntimeError: if no chain is left.
    """
    finite = chains.buffer.isfinite().all(dim=-1)
    if energy is not None:
        finite &= energy.isfinite()
    lost = chains.alive & ~finite.to(chains.alive.device)
    if adapting:
        lost &= ~restart(chains, lost, chains.buffer)
    chains.alive &= ~lost
    chains.some_lost = not bool(chains.alive.all())
    if bool(chains.alive.any()):
        return
    what = f"every chain is lost: energy or gradient is not finite at update {chains.counts.updates} (step_size={step_size:.3g})"
    elsewhere = "check the data for values that are far out, or start elsewhere (init_strategy)"
    if chains.auto is None:
        raise RuntimeError(f'{what}. Take a smaller step_size, or "auto"; {elsewhere}')
    raise RuntimeError(
        f"{what}, after {sum(chains.restarts.counts)} restarts, each with half the step. Give a smaller step_size, scale inputs and "
        f"targets to about 1, {elsewhere}"
    )


def hold_lost(chains: ChainState) -> None:
    """Sets lost chains back to their last finite state, where they stay."""
    lost = (~chains.alive).to(chains.theta.device)
    chains.buffer[lost] = chains.theta[lost]
    for value in chains.variables.values():
        value[lost] = torch.nan_to_num(value[lost], 0.0, 0.0, 0.0)
    if "momentum" in chains.variables:
        chains.variables["momentum"][lost] = 0.0
    if "direction" in chains.variables:
        chains.variables["direction"][lost] = chains.theta.shape[-1] ** -0.5

"""Microcanonical Langevin Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, Variables, own_step
from pyro_advbayes.infer.mcmc.schedules import Schedule


@dataclass(frozen=True)
class MCLMCRule(Rule):
    """One step of MCLMC; the equation and the arguments are in :class:`MCLMC`."""

    memory: float = 250.0
    energy_error: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.memory < math.inf:
            raise ValueError(f"memory={self.memory!r}: updates after which a direction is forgotten, a number > 0")
        if self.energy_error is not None and not 0.0 < self.energy_error < math.inf:
            raise ValueError(f'energy_error={self.energy_error!r}: what step_size="auto" aims at, a number > 0')

    def target_error(self, size: int, share: float) -> float:
        return min(0.1, 5e-4 * max(0.5, size / 10.0)) if self.energy_error is None else self.energy_error

    @property
    def rate_power(self) -> int:
        return 2

    @property
    def bounded_by_curvature(self) -> bool:
        return False

    def variables(self, theta: Tensor) -> Variables:
        if theta.shape[-1] < 2:
            raise ValueError("MCLMC moves along directions, and needs at least two unknown numbers: this model has one. Take SGHMC")
        return {"direction": _unit(torch.randn_like(theta))}

    def step(
        self,
        theta: Tensor,
        gradient: Tensor,
        noise: Tensor,
        step_size: Tensor,
        temperature: Tensor,
        variables: Variables,
        learning: str | None,
    ) -> Tensor:
        step = own_step(step_size, variables)
        delta, downhill = _push(gradient, step, temperature)
        direction = turned(variables["direction"], downhill, delta)
        direction = _unit(direction + noise.mul_(math.sqrt(math.expm1(2.0 / self.memory) / theta.shape[-1])))
        variables["direction"].copy_(turned(direction, downhill, delta))
        return torch.addcmul(theta, variables["direction"], step, out=noise)

    def half_kick(self, gradient: Tensor, step_size: Tensor, temperature: float, variables: Variables) -> tuple[Variables, Tensor]:
        delta, downhill = _push(gradient, step_size, temperature)
        direction = variables["direction"]
        along = (direction * downhill).sum(-1, keepdim=True)
        change = delta - math.log(2.0) + torch.log1p(along + (1.0 - along) * torch.exp(-2.0 * delta))
        return {**variables, "direction": turned(direction, downhill, delta)}, (gradient.shape[-1] - 1) * change.squeeze(-1)

    def drift(self, theta: Tensor, step_size: Tensor, variables: Variables) -> Tensor:
        return theta + step_size * variables["direction"]

    def _kappa(self, size: int, step_size: float, temperature: float, variables: Variables) -> Any:
        return (self.memory / (2.0 * temperature**2 * size)) * own_step(step_size, variables) ** 2

    def injected_temperature(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        return temperature / (1.0 + self._kappa(noise_variance.shape[-1], step_size, temperature, variables) * noise_variance.mean())

    def heating(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        kappa = self._kappa(noise_variance.shape[-1], step_size, temperature, variables)
        return kappa * self.injected_temperature(noise_variance, step_size, temperature, variables)

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        # kappa times the variance is the share; the energy error bounds the step in the place of curvature
        if not bool((noise_variance > 0).any()):
            return math.inf
        unit = torch.as_tensor(self._kappa(variables["direction"].shape[-1], 1.0, temperature, variables)).max()
        return float((share / (unit * noise_variance.max())).sqrt())

    def leapfrog_step(self, step_size: float, temperature: float, variables: Variables) -> Tensor:
        return own_step(step_size, variables) / (temperature * variables["direction"].shape[-1]) ** 0.5


def _push(gradient: Tensor, step_size: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Half an update's delta ``[chains, 1]``, and the direction downhill ``[chains, size]``."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return norm * step_size / (2.0 * (gradient.shape[-1] - 1) * temperature), -gradient / norm


def turned(direction: Tensor, downhill: Tensor, delta: Tensor) -> Tensor:
    """
    Where a direction is after a constant force.

    :param direction: u, ``[chains, size]``, of length 1.
    :param downhill: e, ``[chains, size]``, of length 1.
    :param delta: ``[chains, 1]``, >= 0.
    """
    rest = torch.exp(-delta)
    along = (direction * downhill).sum(-1, keepdim=True)
    return _unit(2.0 * rest * direction + (1.0 - rest) * (1.0 + rest + along * (1.0 - rest)) * downhill)


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


@checked
class MCLMC(SGMCMCKernel):
    r"""
    Microcanonical Langevin Monte Carlo (Robnik et al., 2023; Sommer et al., 2025, for neural networks). A chain moves at constant speed
    along a direction :math:`u`, which gradients turn downhill. One gradient makes one update,

    .. math:: u \leftarrow F(u), \quad u \leftarrow \frac{u + \nu n}{|u + \nu n|}, \quad u \leftarrow F(u), \quad
        \theta \leftarrow \theta + \epsilon u, \qquad n \sim \mathrm{Normal}(0, I),

    with :math:`\epsilon` = ``step_size``, a length in the space of the weights; :math:`\nu^2 = (e^{2/m} - 1) / d` for m = ``memory`` and d
    weights; and half the force of an update,

    .. math:: F(u) = \frac{2 \zeta u + (1 - \zeta) (1 + \zeta + (e \cdot u) (1 - \zeta)) e}{|\ldots|}, \qquad
        \zeta = \exp\left(-\frac{\epsilon\, |\nabla \hat U|}{2 (d - 1) T}\right), \qquad
        e = -\frac{\nabla \hat U}{|\nabla \hat U|},

    at T = ``temperature``. A step that is too long turns the chain; it cannot throw it out.

    **Step size.** ``"auto"`` gives each chain the step at which updates without noise change its energy by
    :math:`\overline{\Delta E^2} = d \cdot` ``energy_error``; ``diagnostics()["energy error"]`` has what was reached. The default is
    0.00025 up to five weights, where it makes the standard deviation along the stiffest direction at most a tenth too large (on Gaussians
    of condition 1 to 100), and grows with d, since that direction's part in a weight's variance falls: 0.0005 d / 10, at most the 0.1 of
    Sommer et al. The step grows with the sixth root of it.

    **Minibatches.** Noise of variance :math:`\sigma_i^2` along direction i of the weights leads to

    .. math:: T_\mathrm{eff} = T\, \frac{1 + \kappa \sigma_i^2}{1 + \kappa \overline{\sigma^2}}, \qquad
        \kappa = \frac{m\, \epsilon^2}{2 T^2 d}:

    noise that is the same in all directions only turns the chain. That of a network is largest where curvature is; it heats those
    directions and cools the others. (Of the variance of the speed along i, ``memory`` renews a share :math:`2/m` in an update; noise
    adds :math:`\kappa \sigma_i^2` times that, and constant speed takes the mean of it from all directions.) ``"auto"`` keeps
    :math:`\kappa \sigma_i^2` to its share of T. Steps are then so short on small batches that full data, up to a few thousand rows, is the
    recommended use.

    :param memory: m, updates after which a direction is forgotten, > 0.
    :param energy_error: what ``step_size="auto"`` aims at, > 0; None for the rule above.
    :raises ValueError: if the model has only one unknown number: there is no direction to turn to.

    Other arguments: :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`. T must be > 0.
    """

    rule_type = MCLMCRule

    def __init__(
        self,
        model: Callable,
        step_size: float | str | Sequence[float] | Tensor | Schedule = "auto",
        temperature: float | Schedule = 1.0,
        batch_size: int | None = None,
        num_steps_per_sample: int = 1,
        *,
        memory: float = 250.0,
        energy_error: float | None = None,
        **options: Any,
    ) -> None:
        self.update_rule = MCLMCRule(memory, energy_error)
        super().__init__(model, step_size, temperature, batch_size, num_steps_per_sample, **options)
        if self.temperature(0) == 0.0:
            raise ValueError("temperature=0: MCLMC moves at constant speed, and needs a temperature > 0; take SGHMC")

    def refuse_vanishing(self, step_size: float, dtype: torch.dtype) -> None:
        if float(torch.tensor(step_size, dtype=dtype)) == 0.0:
            raise ValueError(f"step_size={step_size:.3g}: updates so small are 0 in {dtype}: take a larger one")

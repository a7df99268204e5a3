"""Stochastic-gradient Langevin dynamics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, Variables


@dataclass(frozen=True)
class SGLDRule(Rule):
    """One step of SGLD; the equation is in :class:`SGLD`."""

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
        return noise.mul_((2.0 * step_size * temperature).sqrt()).sub_(gradient.mul_(step_size)).add_(theta)

    def injected_temperature(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        return torch.full_like(noise_variance, temperature)

    def heating(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> float:
        return 0.5 * step_size

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        # stationary variance T / lambda / (1 - step lambda / 2), and temperature T + step noise / 2
        step = 2.0 * share / (1.0 + share) / curvature
        if bool((noise_variance > 0).any()):
            step = min(step, float(2.0 * share * temperature / noise_variance.max()))
        return step


class SGLD(SGMCMCKernel):
    r"""
    Stochastic-gradient Langevin dynamics, Welling and Teh (2011), at a temperature:

    .. math:: \theta \leftarrow \theta - \epsilon \nabla \hat U(\theta) + \sqrt{2 \epsilon T}\, n, \qquad n \sim \mathrm{Normal}(0, I),

    with :math:`\epsilon` = ``step_size``, :math:`T` = ``temperature`` and :math:`\hat U` in nats over the whole data set. APD writes
    :math:`\epsilon / 2` for this :math:`\epsilon`; BAL's :math:`\eta_1` is this one.

    On a Gaussian of precision :math:`\lambda` the chain has variance :math:`(T / \lambda) / (1 - \epsilon\lambda/2)`. A minibatch
    gradient of variance :math:`\sigma^2` heats it to :math:`T_\mathrm{eff} = T + \epsilon \sigma^2 / 2`, which ``diagnostics`` reports.
    With shuffled epochs this is an upper bound, because the rest of an epoch takes back the noise that one batch adds.

    Example::

        mcmc = SGMCMC(SGLD(model, batch_size=100), num_samples=200, warmup_steps=1000, num_chains=4)
        mcmc.run(x, y)

    For arguments, drivers and errors see :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`.
    """

    rule_type = SGLDRule
    update_rule = SGLDRule()

"""Stochastic-gradient Hamiltonian Monte Carlo, plain and scale-adapted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, Variables, own_step
from pyro_advbayes.infer.mcmc.schedules import Schedule
from pyro_advbayes.infer.mcmc.sgadald import adapt_second_moment, check_window, second_moment_variables


@dataclass(frozen=True)
class SGHMCRule(Rule):
    """One step of SGHMC; the equation and the arguments are in :class:`SGHMC`."""

    friction: float = 0.05
    adaptive: bool = False
    averaging_window: float | None = None
    noise_correction: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.friction <= 1.0:
            raise ValueError(f"friction={self.friction!r}: the share of momentum lost per step, in (0, 1]")
        check_window(self.averaging_window)

    @property
    def learns(self) -> frozenset[str]:
        return frozenset({"metric"} if self.adaptive else ())

    def variables(self, theta: Tensor) -> Variables:
        variables = {"momentum": torch.zeros_like(theta)}
        if self.adaptive:
            variables.update(second_moment_variables(theta))
        if self.noise_correction:
            variables["noise"] = torch.zeros_like(theta)
        return variables

    def _rate_at(self, share: float) -> float:
        """h times the precision of a Gaussian, where discretisation makes its variance larger by the share."""
        return 2.0 * (2.0 - self.friction) * share / (1.0 + share)

    def _rate(self, step_size: Any, variables: Variables) -> Any:
        step = own_step(step_size, variables)
        return step * step * variables["V"].rsqrt() if self.adaptive else step

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
        if self.adaptive and learning == "metric":
            adapt_second_moment(variables, gradient, self.averaging_window)
        rate = self._rate(step_size, variables)
        root = rate.sqrt()
        variance = 2.0 * self.friction * temperature
        if self.noise_correction:
            variance = (variance - rate * variables["noise"]).clamp_min(0.0)
        momentum = variables["momentum"]
        momentum.mul_(1.0 - self.friction).sub_(gradient.mul_(root)).add_(noise.mul_(variance.sqrt()))
        return torch.addcmul(theta, momentum, root, out=noise)

    def injected_temperature(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        if not self.noise_correction:
            return torch.full_like(noise_variance, temperature)
        return (temperature - self._rate(step_size, variables) / (2.0 * self.friction) * variables["noise"]).clamp_min(0.0)

    def heating(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor | float:
        return self._rate(step_size, variables) / (2.0 * self.friction)

    @property
    def rate_power(self) -> int:
        return 2 if self.adaptive else 1

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        # stationary variance T / lambda / (1 - h lambda / (2 (2 - a))), and temperature T + h noise / (2 a)
        rate = self._rate_at(share) / curvature
        if bool((noise_variance > 0).any()):
            rate = min(rate, float(2.0 * self.friction * share * temperature / noise_variance.max()))
        return rate**0.5 if self.adaptive else rate

    def leapfrog_step(self, step_size: float, temperature: float, variables: Variables) -> float | Tensor:
        step = own_step(step_size, variables)
        return step if self.adaptive else step**0.5

    def target_error(self, size: int, share: float) -> float:
        # of a Gaussian of equal precisions at the step that curvature allows: s^6 / 16 for s^2 = h lambda
        return self._rate_at(share) ** 3 / 16.0

    def trial_variables(self, variables: Variables, temperature: float, generator: torch.Generator) -> Variables:
        momentum = variables["momentum"]
        fresh = torch.randn(momentum.shape, generator=generator, dtype=momentum.dtype, device="cpu").to(momentum.device)
        return {**variables, "momentum": temperature**0.5 * fresh}

    def half_kick(self, gradient: Tensor, step_size: Tensor, temperature: float, variables: Variables) -> tuple[Variables, Tensor]:
        before = variables["momentum"]
        momentum = before - 0.5 * self._root(step_size, variables) * gradient
        return {**variables, "momentum": momentum}, (momentum.square() - before.square()).sum(-1) / (2.0 * temperature)

    def drift(self, theta: Tensor, step_size: Tensor, variables: Variables) -> Tensor:
        return theta + self._root(step_size, variables) * variables["momentum"]

    def _root(self, step_size: Tensor, variables: Variables) -> Tensor:
        return step_size * variables["V"].pow(-0.25) if self.adaptive else step_size.sqrt()

    def metric(self, variables: Variables) -> Tensor | None:
        return variables["V"].pow(-0.25) if self.adaptive else None

    def start_metric(self, variables: Variables, second_moment: float) -> None:
        if self.adaptive:
            variables["V"].fill_(second_moment)

    def check(self, step_size: float, temperature: float, variables: Variables, names: list[tuple[str, slice]]) -> float:
        if not self.noise_correction:
            return 0.0
        rate = self._rate(step_size, variables)
        return float((2.0 * self.friction * temperature <= rate * variables["noise"]).float().mean())


@checked
class SGHMC(SGMCMCKernel):
    r"""
    Stochastic-gradient Hamiltonian Monte Carlo (Chen et al., 2014) in its momentum form,

    .. math:: v \leftarrow (1 - a)\, v - \sqrt h\, \nabla \hat U(\theta) + \mathrm{Normal}(0,\; 2 a T - h \hat B), \qquad
        \theta \leftarrow \theta + \sqrt h\, v,

    with :math:`a` = ``friction``, the share of momentum lost per step, :math:`T` = ``temperature`` and :math:`h` = ``step_size``; or, with
    ``adaptive=True``, scale-adapted (Springenberg et al., 2016): :math:`h = e^2 V^{-1/2}`, :math:`e` = ``step_size``, where :math:`V` is
    the running mean of the squared gradient, adapted in the first half of warm-up and frozen after it. The second argument of Normal is a
    variance. The momentum :math:`v` has variance :math:`T` whatever the step, which may change at any update. (The usual form keeps
    :math:`\sqrt h\, v`, of variance :math:`T h`. A chain whose step falls then coasts on.)

    :math:`\hat B` is an estimate of the variance of the minibatch gradient at one :math:`\theta`. The published :math:`e^4` in its place
    is right only if momentum is forgotten at every step: with momentum it takes off the signal too. So :math:`\hat B = 0` unless
    ``noise_correction=True``, which estimates it in the last 30 % of warm-up from half the squared difference of two minibatch
    gradients, at the cost of two more gradients a step. It is taken off along the axes only: where noise is correlated between weights,
    stiff directions stay too hot and soft ones too cold. ``"T_eff direction"`` shows that; ``T_eff`` does not.

    On a Gaussian of precision :math:`\lambda` and full data the variance is :math:`(T/\lambda) / (1 - h\lambda / (2 (2 - a)))`; a minibatch
    gradient of variance :math:`\sigma^2` heats it to :math:`T_\mathrm{eff} = T + h \sigma^2 / (2 a)`.

    **Step size.** ``"auto"`` gives each chain the step at which updates without friction and noise, which are leapfrog steps, change its
    energy by :math:`\overline{\Delta E^2} = d\, s^6 / 16`, for d weights and :math:`s^2 = 2 (2 - a) r / (1 + r)`, r = ``auto_share``: the
    error on a Gaussian of equal precisions whose variance is larger by the share. It bounds the mean over all directions. The stiffest one
    is held to its share by its curvature, among up to twenty weights, and to d / 20 times the step of that in larger models.
    ``diagnostics()["energy error"]`` has :math:`\overline{\Delta E^2} / d`, and ``"step sizes"`` the chains' steps, whose geometric mean is
    ``"step size"``. The search counts at most 20 times the target in an update, since rare updates rule the mean where U is rough, and
    no change of the energy that the dtype does not resolve.

    :param friction: a, in (0, 1].
    :param adaptive: whether steps are scaled per weight.
    :param averaging_window: as in :class:`~pyro_advbayes.infer.mcmc.sgadald.SGAdaLD`.
    :param noise_correction: whether the estimated minibatch noise is taken off the injected noise.

    For other arguments see :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`.
    """

    rule_type = SGHMCRule

    def __init__(
        self,
        model: Callable,
        step_size: float | str | Sequence[float] | Tensor | Schedule = "auto",
        temperature: float | Schedule = 1.0,
        batch_size: int | None = None,
        num_steps_per_sample: int = 1,
        *,
        friction: float = 0.05,
        adaptive: bool = False,
        averaging_window: float | None = None,
        noise_correction: bool = False,
        **options: Any,
    ) -> None:
        self.update_rule = SGHMCRule(friction, adaptive, averaging_window, noise_correction)
        super().__init__(model, step_size, temperature, batch_size, num_steps_per_sample, **options)

"""Scale-adapted Langevin dynamics without momentum, BAL's sampler of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, Variables
from pyro_advbayes.infer.mcmc.schedules import Schedule


def adapt_second_moment(variables: Variables, gradient: Tensor, window: float | None) -> None:
    r"""
    Updates :math:`V`, the running mean of the squared gradient. With a window it is an average over about that many steps; without,
    the window :math:`\tau` adapts itself (Springenberg et al., 2016, section 3.3), with :math:`r = 1/(\tau + 1)`:

    .. math:: \tau \leftarrow \tau + 1 - \tau \bar g^2 / V, \quad \bar g \leftarrow \bar g + r (g - \bar g), \quad
        V \leftarrow V + r (g^2 - V),

    all on old values. (With :math:`r = 1/\tau`, as printed in some accounts, :math:`V` collapses onto the last gradient.)

    :param variables: ``"V"``, ``"tau"`` and, without a window, ``"mean"``; updated in place.
    :param gradient: a stochastic gradient of the same shape.
    :param window: number of steps, >= 1, or None.
    """
    V, tau = variables["V"], variables["tau"]
    rate = 1.0 / (tau + 1.0)
    if window is None:
        mean = variables["mean"]
        new_tau = tau + 1.0 - tau * mean * mean / V
        mean.add_(rate * (gradient - mean))
    else:
        new_tau = (tau + 1.0).clamp_max(window)
    V.add_(rate * (gradient * gradient - V))
    tau.copy_(new_tau)


def second_moment_variables(theta: Tensor, window: float | None) -> Variables:
    """The variables of :func:`adapt_second_moment` before the first step; all start at 1."""
    names = ("V", "tau") if window is not None else ("V", "tau", "mean")
    return {name: torch.ones_like(theta) for name in names}


@dataclass(frozen=True)
class SGAdaLDRule(Rule):
    """One step of SGAdaLD; the equation and the arguments are in :class:`SGAdaLD`."""

    friction: float | None = None
    averaging_window: float | None = None
    noise_correction: bool = True
    clamp: bool = False

    def __post_init__(self) -> None:
        if self.friction is not None and not self.friction > 0:
            raise ValueError(f"friction={self.friction!r}: a number > 0, or None for the invariant friction")
        check_window(self.averaging_window)

    @property
    def uses_noise_variance(self) -> bool:
        return not self.noise_correction

    def variables(self, theta: Tensor) -> Variables:
        return second_moment_variables(theta, self.averaging_window)

    def step(
        self,
        theta: Tensor,
        gradient: Tensor,
        noise: Tensor,
        step_size: Tensor,
        temperature: Tensor,
        variables: Variables,
        adapting: bool,
    ) -> Tensor:
        if adapting:
            adapt_second_moment(variables, gradient, self.averaging_window)
        rate = step_size * step_size * variables["V"].rsqrt()
        variance = self._noise_variance(rate, step_size, temperature, variables["V"])
        return noise.mul_(variance.clamp_min(0.0).sqrt()).sub_(gradient.mul_(rate)).add_(theta)

    def _noise_variance(self, rate: Tensor, step_size: Any, temperature: Any, V: Tensor) -> Tensor:
        if self.friction is None:
            injected = 2.0 * temperature * rate
        else:
            injected = (2.0 * temperature * self.friction) * step_size**3 / V
        return injected - step_size**4 if self.noise_correction else injected

    def temperatures(
        self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables, updates_per_batch: int = 1
    ) -> Tensor:
        V = variables["V"]
        rate = step_size**2 * V.rsqrt()
        injected = self._noise_variance(rate, step_size, temperature, V).clamp_min(0.0)
        if self.noise_correction:  # what was taken away is there in the gradient: V is signal and noise together
            return (injected + updates_per_batch * step_size**4) / (2.0 * rate)
        return injected / (2.0 * rate) + 0.5 * updates_per_batch * rate * noise_variance

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        # e^2 sqrt(V) <= share T keeps the whole effect of the noise under share / 2, either way
        squared = 2.0 * share / (1.0 + share) / curvature
        if bool((noise_variance > 0).any()):
            squared = min(squared, float(share * temperature / noise_variance.max().sqrt()))
            squared = min(squared, float(temperature / variables["V"].max().sqrt()))  # twice inside the valid region, everywhere
        return squared**0.5

    def metric(self, variables: Variables) -> Tensor:
        return variables["V"].pow(-0.25)

    def check(self, step_size: float, temperature: float, variables: Variables, names: list[tuple[str, slice]]) -> float:
        V = variables["V"]
        outside = self._noise_variance(step_size**2 * V.rsqrt(), step_size, temperature, V) <= 0.0
        share = float(outside.float().mean())
        if share > 0.0 and not self.clamp and temperature > 0.0:
            worst = max(names, key=lambda item: float(outside[..., item[1]].float().mean()))[0]
            raise ValueError(
                f"SGAdaLD: in {share:.1%} of the coordinates (most of them in site {worst!r}) step_size={step_size:.3g} makes the "
                f"minibatch noise hotter than temperature={temperature:.3g}: e^2 sqrt(V) must stay below 2 T. Take a smaller step_size "
                '("auto" does), a larger batch_size or temperature, or clamp=True to sample at the noise\'s temperature, which '
                "diagnostics() reports as T_eff"
            )
        return share


class SGAdaLD(SGMCMCKernel):
    r"""
    Scale-adapted Langevin dynamics, the sampler of weights in Bayesian Adversarial Learning (Ye and Zhu, 2018, Eq. 10): scale-adapted
    SGHMC (Springenberg et al., 2016) that forgets its momentum at every step. Elementwise, with :math:`h = e^2 V^{-1/2}`,

    .. math:: \theta \leftarrow \theta - h\, g + \mathrm{Normal}(0,\; 2 T h - e^4),

    where :math:`e` = ``step_size``, :math:`T` = ``temperature``, :math:`g = \nabla \hat U(\theta)` and :math:`V` is the running mean of
    :math:`g^2`, adapted in warm-up and frozen after it; the second argument is a variance. :math:`e^4 = h^2 V` is what the gradient
    itself brings. With it taken off, the variance of an axis-aligned Gaussian is exact at any stable step, valid where
    :math:`e^2 \sqrt V < 2 T`; without (``noise_correction=False``) it is :math:`(T/\lambda)/(1 - h \lambda / 2)`.

    Gradient noise that is correlated between weights, as a network's is, is taken off along the axes only. Where
    :math:`e^2\sqrt V \le 0.1\, T` the whole matter stays below 5 %: ``step_size="auto"`` keeps to that.

    :param friction: None takes the friction at which every weight has the temperature T, :math:`C = \sqrt V / e`; a number is the
        paper's constant :math:`C`: the variance is then :math:`2 T e^3 C / V - e^4`, and weight i has temperature
        :math:`T C e / \sqrt{V_i}`.
    :param averaging_window: steps over which :math:`V` averages; None adapts the window per weight.
    :param noise_correction: whether :math:`e^4` is taken off.
    :param clamp: outside the valid region, clamp the variance at 0, where the chain runs at :math:`T_\mathrm{eff} = e^2 \sqrt V / 2`,
        reported by ``diagnostics``, instead of raising an error at the end of warm-up.

    Other arguments: :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`.
    """

    rule_type = SGAdaLDRule

    def __init__(
        self,
        model: Callable,
        step_size: float | str | Schedule = "auto",
        temperature: float | Schedule = 1.0,
        batch_size: int | None = None,
        num_steps_per_sample: int = 1,
        *,
        friction: float | None = None,
        averaging_window: float | None = None,
        noise_correction: bool = True,
        clamp: bool = False,
        **options: Any,
    ) -> None:
        self.update_rule = SGAdaLDRule(friction, averaging_window, noise_correction, clamp)
        super().__init__(model, step_size, temperature, batch_size, num_steps_per_sample, **options)


def check_window(averaging_window: float | None) -> None:
    """:raises ValueError: if it is no number of steps."""
    if averaging_window is not None and not averaging_window >= 1:
        raise ValueError(f"averaging_window={averaging_window!r}: a number of steps >= 1, or None to adapt it")

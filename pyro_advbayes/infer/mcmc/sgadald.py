"""Scale-adapted Langevin dynamics without momentum, BAL's sampler of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, Variables
from pyro_advbayes.infer.mcmc.schedules import Schedule
from pyro_advbayes.infer.mcmc.sgld import SGLDRule


def adapt_second_moment(variables: Variables, gradient: Tensor, window: float | None) -> None:
    r"""
    Updates :math:`V`, the running mean of the squared gradient, with the n-th gradient of the run,

    .. math:: n \leftarrow n + 1, \qquad V \leftarrow V + r\, (g^2 - V), \qquad r = \max(4 / (n + 4),\; 1 / w).

    Without a window :math:`w` the k-th gradient has a weight of about :math:`k^3`, so that the start, where gradients are large,
    fades. (Springenberg et al., 2016, section 3.3, adapt a window to each weight. That window closes to one step wherever gradients are
    autocorrelated. :math:`V` then depends on :math:`\theta`, and the chain samples :math:`p(\theta) \prod_i \sqrt{V_i(\theta)}`.)

    :param variables: ``"V"`` ``[chains, size]`` and ``"count"`` ``[chains, 1]``; updated in place.
    :param gradient: a stochastic gradient ``[chains, size]``.
    :param window: number of steps, >= 1, or None.
    """
    V, count = variables["V"], variables["count"]
    rate = 4.0 / (count.add_(1.0) + 4.0)
    if window is not None:
        rate = rate.clamp_min(1.0 / window)
    V.add_(rate * (gradient * gradient - V))


def second_moment_variables(theta: Tensor) -> Variables:
    """The variables of :func:`adapt_second_moment` before the first step."""
    return {"V": torch.ones_like(theta), "count": torch.zeros_like(theta[..., :1])}


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
    def learns(self) -> frozenset[str]:
        return frozenset({"metric", "moment"} if self.noise_correction else {"metric"})

    def variables(self, theta: Tensor) -> Variables:
        variables = second_moment_variables(theta)
        if self.noise_correction:
            variables["moment"] = torch.zeros_like(theta)
        return variables

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
        if learning == "metric":
            adapt_second_moment(variables, gradient, self.averaging_window)
        elif learning == "moment" and self.noise_correction:
            moment, count = variables["moment"], variables["count"]
            moment.add_((gradient * gradient - moment) / count.add_(1.0))
        rate = step_size * step_size * variables["V"].rsqrt()
        variance = self._noise_variance(rate, step_size, temperature, variables)
        return noise.mul_(variance.clamp_min(0.0).sqrt()).sub_(gradient.mul_(rate)).add_(theta)

    def _noise_variance(self, rate: Tensor, step_size: Any, temperature: Any, variables: Variables) -> Tensor:
        if self.friction is None:
            injected = 2.0 * temperature * rate
        else:
            injected = (2.0 * temperature * self.friction) * step_size**3 / variables["V"]
        return injected - rate * rate * variables["moment"] if self.noise_correction else injected

    def injected_temperature(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        rate = step_size**2 * variables["V"].rsqrt()
        injected = self._noise_variance(rate, step_size, temperature, variables).clamp_min(0.0) / (2.0 * rate)
        if not self.noise_correction:
            return injected
        # the signal in the mean square equals what discretisation adds, which is taken off too
        return injected + 0.5 * rate * (variables["moment"] - noise_variance)

    def heating(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor:
        return 0.5 * step_size**2 * variables["V"].rsqrt()

    @property
    def rate_power(self) -> int:
        return 2

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        squared = SGLDRule().largest_step(curvature, noise_variance, temperature, share, variables)
        if self.noise_correction and temperature > 0.0:
            taken = (variables["moment"] * variables["V"].rsqrt()).max()  # twice inside the valid region, everywhere
            squared = min(squared, float(temperature / taken)) if bool(taken > 0) else squared
        return squared**0.5

    def leapfrog_step(self, step_size: float, temperature: float, variables: Variables) -> float:
        return 2.0**0.5 * step_size

    def metric(self, variables: Variables) -> Tensor:
        return variables["V"].pow(-0.25)

    def start_metric(self, variables: Variables, second_moment: float) -> None:
        variables["V"].fill_(second_moment)

    def settle(self, variables: Variables, second_moment: Tensor, evaluations: int) -> None:
        if self.noise_correction:
            variables["moment"].copy_(second_moment.expand_as(variables["moment"]))
            variables["count"].fill_(evaluations)

    def check(self, step_size: float, temperature: float, variables: Variables, names: list[tuple[str, slice]]) -> float:
        rate = step_size**2 * variables["V"].rsqrt()
        left = self._noise_variance(rate, step_size, temperature, variables)
        share = float((left <= 0.0).float().mean())
        if share > 0.0 and not self.clamp and temperature > 0.0:
            # M is an estimate: a coordinate that is a little hotter than T is clamped
            outside = left < -0.1 * (left + rate * rate * variables["moment"])
            if not bool(outside.any()):
                return share
            worst = max(names, key=lambda item: float(outside[..., item[1]].float().mean()))[0]
            raise ValueError(
                f"SGAdaLD: in {float(outside.float().mean()):.1%} of the coordinates (most of them in site {worst!r}) "
                f"step_size={step_size:.3g} brings more gradient noise than temperature={temperature:.3g} has room for: "
                'e^2 E[g^2] / sqrt(V) must stay below 2 T. Take a smaller step_size or "auto", noise_correction=False to sample hotter, '
                "or clamp=True to sample at the noise's temperature, which diagnostics() reports as T_eff"
            )
        return share


@checked
@checked
class SGAdaLD(SGMCMCKernel):
    r"""
    Scale-adapted Langevin dynamics, the sampler of weights in Bayesian Adversarial Learning (Ye and Zhu, 2018, Eq. 10). It is
    scale-adapted SGHMC (Springenberg et al., 2016) that forgets its momentum at every step. Elementwise, with :math:`h = e^2 V^{-1/2}`,

    .. math:: \theta \leftarrow \theta - h\, g + \mathrm{Normal}(0,\; 2 T h - h^2 M),

    where :math:`e` = ``step_size``, :math:`T` = ``temperature``, :math:`g = \nabla \hat U(\theta)`; the second argument is a variance.
    :math:`V` is the mean of :math:`g^2` over the first half of warm-up, in which later gradients weigh more. It is frozen then, and the
    chain comes to rest. :math:`M` is the mean of :math:`g^2` at rest, so that :math:`h^2 M` is the variance that the gradient itself adds.
    It is 0 in the first half of warm-up, and measured in the second. (The paper takes :math:`V` for :math:`M`, which gives :math:`e^4`: too
    much where :math:`V` includes the large gradients of the start.) With this correction the variance of an axis-aligned Gaussian is exact
    at any stable step, valid where :math:`h M < 2 T`; without (``noise_correction=False``) it is :math:`(T/\lambda)/(1 - h \lambda / 2)`.

    Gradient noise is taken off along the axes only. If it is correlated between weights, as in a network, stiff directions stay too hot and
    soft ones too cold. Minibatches of one epoch do not overlap, so that an epoch takes back a part of their noise, which is taken off all
    the same: draws are too cold by that part, at most down to ``diagnostics()["T_eff epochs"]``.
    ``step_size="auto"`` keeps the whole effect of the noise below ``auto_share`` (variances are 3 to 9 % too small in
    ``tests/benchmarks/results/temperature.md``, and 25 to 43 % at three times that step).

    :param friction: None takes the friction at which every weight has the temperature T, :math:`C = \sqrt V / e`; a number is the
        paper's constant :math:`C`: the variance is then :math:`2 T e^3 C / V - h^2 M`, and weight i has temperature
        :math:`T C e / \sqrt{V_i}`.
    :param averaging_window: steps, >= 1, over which :math:`V` averages; None for all since the start.
    :param noise_correction: whether :math:`h^2 M` is taken off.
    :param clamp: outside the valid region, clamp the variance at 0, where the chain runs at :math:`T_\mathrm{eff} = h M / 2`,
        reported by ``diagnostics``, instead of raising an error at the end of warm-up.

    For other arguments see :class:`~pyro_advbayes.infer.mcmc.kernel.SGMCMCKernel`.
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
        raise ValueError(f"averaging_window={averaging_window!r}: a number of steps >= 1, or None for all since the start")

"""Step sizes found from the model: curvature, energy error and minibatch noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.rule import site_means
from pyro_advbayes.infer.mcmc.trajectory import energy_rise

if TYPE_CHECKING:
    from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
    from pyro_advbayes.infer.mcmc.noise_estimate import GradientNoise

# At these shares of warm-up the step is found again: a chain starts where curvature and noise are much larger than where it ends, and
# a preconditioner that is frozen at one half needs a step of its own.
MEASURE_AT = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.6)
# Until then minibatch noise may double the temperature, which is soon forgotten; after it, noise keeps to its share.
REST_FROM = 0.6
EARLY_SHARE = 1.0
# A step that is still held back by the bound on its growth is measured again after so much of warm-up, up to so far.
GROWS_AFTER, GROWS_UNTIL = 0.01, 0.8
GROWTH = 4.0  # by which the rate h may grow from one measurement to the next: where U is flat, curvature knows no bound
POWER_ITERATIONS = 12
MORE_ITERATIONS = 4  # where the iteration goes on from the direction that the measurement before ended with
HALVINGS = 12


class AutoStepSize:
    """
    The step size that ``step_size="auto"`` stands for: the largest at which discretisation and minibatch noise each change the
    temperature by at most a share. It is bounded by curvature, by the energy error of short trajectories, by noise (in the mean over
    each site, and along the direction in which it is largest; in the first 60 % of warm-up it may double the temperature), and by four
    times the rate of the measurement before. A chain that is lost in
    warm-up starts again from its last good state with half the step.

    Curvature and energy error are those of points, and say nothing of a density of straight pieces (a Laplace likelihood): that
    takes a step size of the user's.

    :param float share: of the temperature, in (0, 1).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.reset()

    def reset(self) -> None:
        """Forgets what was found."""
        self.value: float | None = None
        self.curvature: float | None = None
        self.measured = 0
        self.ceiling: float | None = None  # half of the step at which a chain was lost
        self.warm_value: float | None = None  # the step before noise was held to its share
        self.growing = False  # whether the bound on its growth held the step back
        self.measured_at = 0.0
        self.directions: dict[str, Tensor] = {}  # of the largest curvature, by chain and minibatch

    def __call__(self, step: int) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"AutoStepSize(share={self.share})"

    def state(self) -> list:
        """What :meth:`load` needs, as tensors and plain values."""
        found = [self.value, self.curvature, self.measured, self.ceiling, self.warm_value]
        return [*found, self.growing, self.measured_at, self.directions]

    def load(self, state: list) -> None:
        """Goes on from a :meth:`state`."""
        self.value, self.curvature, self.measured, self.ceiling, self.warm_value, self.growing, self.measured_at, directions = state
        self.directions = dict(directions)

    def adapt(self, kernel: SGMCMCKernel) -> None:
        """Called before every update: measures where it is time."""
        updates = kernel.warmup_updates
        if updates == 0:
            if self.value is None:
                kernel.noise_estimate.finish(kernel)
                self._measure(kernel, rest=True)
            return
        place = kernel.steps / updates
        due = self.measured < len(MEASURE_AT) and place >= MEASURE_AT[self.measured]
        while self.measured < len(MEASURE_AT) and place >= MEASURE_AT[self.measured]:
            self.measured += 1
        if due or (self.growing and self.measured_at + GROWS_AFTER <= place <= GROWS_UNTIL):
            self.measured_at = place
            self._measure(kernel, rest=place >= REST_FROM)

    def finish(self, kernel: SGMCMCKernel) -> None:
        """Called at the end of warm-up, after which the step stays as it is; what was estimated since may make it smaller."""
        if self.value is None:
            self.adapt(kernel)
        else:
            self.value = min(self.value, self._bound(kernel, kernel.noise_estimate.mean(), rest=True))
        self.directions = {}

    def lower(self) -> None:
        """Halves the step, for good."""
        self.value = self.ceiling = 0.5 * self.value

    def _measure(self, kernel: SGMCMCKernel, rest: bool) -> None:
        rule, T = kernel.update_rule, kernel.temperature(kernel.steps)
        scaled = rule.metric(kernel.variables) is not None
        if kernel.steps == 0 and scaled:
            # what g² is in the stiffest direction: the first moves are then those of an unscaled rule
            rule.start_metric(kernel.variables, 1.0)
            rule.start_metric(kernel.variables, max(T, 1e-3) * largest_curvature(kernel, self.directions))
        self.curvature = largest_curvature(kernel, self.directions)
        before = self.value
        noise = kernel.noise_estimate.mean() if kernel.warmup_updates == 0 else kernel.noise_estimate.fresh(kernel)
        self.value = self._bound(kernel, noise, rest)
        half = 0.5**0.5 if scaled else 0.5
        if before is not None:
            most = before / half ** (GROWTH / 2.0)
            self.growing = most < self.value
            self.value = min(self.value, most)
        for _ in range(HALVINGS):
            if not energy_rises(kernel, self.value):
                break
            self.value *= half
            self.growing = False
        if self.ceiling is not None:
            self.value = min(self.value, self.ceiling)
        if rest and self.warm_value is None:
            self.warm_value = before

    def _bound(self, kernel: SGMCMCKernel, noise: GradientNoise, rest: bool) -> float:
        rule, T = kernel.update_rule, kernel.temperature(kernel.steps)
        alive = {name: value[kernel.alive] for name, value in kernel.variables.items()}
        metric = rule.metric(alive)
        square = torch.ones_like(noise.variance) if metric is None else metric.square()
        heat = site_means(square * noise.variance, kernel.names).reshape(-1, len(kernel.names)).amax(0)  # of the worst chain
        if T == 0.0:  # a chain without a temperature has none that could be kept to
            heat = torch.zeros_like(heat)
        elif not rest:
            # far from where it will rest, a chain has more energy to lose than noise brings: |g|² / (2 λ) at the least
            excess = noise.slope / (2.0 * self.curvature)
            heat = heat * (self.share * T / (EARLY_SHARE * T + excess))
        value = rule.largest_step(self.curvature, heat, T, self.share, alive)
        along = kernel.noise_estimate.hottest(kernel, value, T) if rest and T > 0.0 else None
        allowed = hottest_allowed(self.share, kernel.potential.size) * T
        if along is not None and along - T > allowed:
            value *= (allowed / (along - T)) ** (1.0 if metric is None else 0.5)
        return value


def hottest_allowed(share: float, size: int) -> float:
    """
    By what part of T noise may heat the direction in which it is largest, in a model of ``size`` weights. That direction's part in the
    variance of a single weight is about ``1 / size``: among a few weights twice the share changes a standard deviation by as much as the
    share, and in a network a hot direction hardly shows.
    """
    return 2.0 * share * max(1.0, size / 10.0)


def largest_curvature(kernel: SGMCMCKernel, directions: dict[str, Tensor] | None = None) -> float:
    """
    The largest eigenvalue of the Hessian of U by power iteration, in the rule's metric, the largest over up to four chains and two
    minibatches.

    :param directions: of an earlier call, from which the iteration goes on; those of this call are left in it.
    :raises ValueError: if there is none.
    """
    potential, rule = kernel.potential, kernel.update_rule
    metric = rule.metric(kernel.variables)
    generator = torch.Generator().manual_seed(0)  # the start of the iteration matters little; the run's own numbers are left alone
    largest = 0.0
    for chain in kernel.alive.nonzero().flatten().tolist()[:4]:
        theta = kernel.theta[chain]
        scale: Tensor | float = 1.0 if metric is None else metric[chain]
        for number, batch in enumerate(potential.probes(chain)):
            key = f"{chain}, {number}"
            direction = torch.randn(potential.size, generator=generator, device="cpu").to(theta)
            known = None if directions is None else directions.get(key)
            if known is not None:
                direction = known + 0.01 * direction / potential.size**0.5  # a little of all directions, lest it miss a new one
            for _ in range(POWER_ITERATIONS if known is None else MORE_ITERATIONS):
                direction = direction / torch.linalg.vector_norm(direction)
                product = scale * potential.hessian_product(theta, scale * direction, batch, kernel.temperature(kernel.steps))
                value = abs(float(direction @ product))
                direction = product
            if directions is not None and bool(direction.isfinite().all()) and bool((direction != 0.0).any()):
                directions[key] = direction / torch.linalg.vector_norm(direction)
            largest = max(largest, value) if value == value else largest
    if largest == 0.0:
        raise ValueError(
            'step_size="auto" finds no curvature: the Hessian of U is 0 or NaN where the chains are, as that of a density of straight '
            "pieces (Laplace) is. Give a step_size"
        )
    return largest


def energy_rises(kernel: SGMCMCKernel, step_size: float) -> bool:
    r"""
    Whether a short trajectory gains more energy at this step size than a stable one would: :math:`\Delta H > T (1 + 0.3 \sqrt d)` in
    any chain. Curvature where a chain is does not tell what it is a few steps on (an exponential link, a scale near 0).

    At the largest step that curvature allows, a Gaussian of :math:`d` equal precisions has a standard deviation of
    :math:`0.09\, T \sqrt d`. Losses of energy do not count: the start of a chain is far out, or off the mode of the minibatch.
    """
    T = kernel.temperature(kernel.steps)
    rise = energy_rise(kernel, kernel.theta, step_size, T, seed=kernel.steps)
    allowed = T * (1.0 + 0.3 * kernel.potential.size**0.5)
    return bool((rise > allowed)[kernel.alive.to(rise.device)].any())

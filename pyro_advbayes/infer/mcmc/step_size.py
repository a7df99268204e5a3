"""Step sizes found from the model: curvature and minibatch noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.rule import site_means

if TYPE_CHECKING:
    from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel

# At these shares of warm-up the curvature is measured again: a chain starts where it is much larger than where it ends.
MEASURE_AT = (0.0, 0.1, 0.3, 0.6)
# Until then the chain moves as fast as curvature allows; after it, it comes to rest at the temperature of the run.
NOISE_COUNTS_FROM = 0.6
FIRST_SCALED_STEP = 0.03  # for scaled rules before V has seen gradients: weights move by about e^2 = 0.001 a step
POWER_ITERATIONS = 12
NOISE_EVALUATIONS = 32


class NoiseEstimate:
    r"""
    The variance of the minibatch gradient at one :math:`\theta`, per coordinate: the mean over the second half of warm-up of

    .. math:: \tfrac{1}{2} (g_1 - g_2)^2 (1 - B/N),

    with the gradients of two minibatches; the last factor because batches of one epoch do not overlap.

    :param every_step: estimate at every update, and hand the estimate to the rule's variable ``"noise"``; otherwise at 32 of them.
    """

    def __init__(self, kernel: SGMCMCKernel, every_step: bool) -> None:
        self.every_step, self.count = every_step, 0
        self.variance = torch.zeros(kernel.potential.size, dtype=kernel.potential.dtype, device=kernel.potential.device)

    def adapt(self, kernel: SGMCMCKernel) -> None:
        """Called before every update in warm-up."""
        if not kernel.wants_noise:
            return
        updates = kernel._warmup_samples * kernel.updates_per_sample
        every = 1 if self.every_step else max(1, updates // (2 * NOISE_EVALUATIONS))
        if 2 * kernel._steps >= updates and kernel._steps % every == 0:
            self.measure(kernel)

    def finish(self, kernel: SGMCMCKernel) -> None:
        """Called at the end of warm-up; without a warm-up, measures where the chains start."""
        if self.count == 0 and kernel.wants_noise:
            for _ in range(NOISE_EVALUATIONS):
                self.measure(kernel)

    def measure(self, kernel: SGMCMCKernel) -> None:
        """Takes two more gradients into the mean."""
        batches = kernel.potential.batches
        if batches.num_data is None:
            return
        first, second = kernel.gradient(), kernel.gradient()
        share = batches.batch_size / batches.num_data
        latest = 0.5 * (1.0 - share) * (first - second).square()
        # not of chains that are lost, or about to be
        latest = latest[kernel._alive.to(latest.device) & latest.isfinite().all(dim=-1)]
        if len(latest) == 0:
            return
        latest = latest.mean(0)
        self.count += 1
        self.variance += (latest - self.variance) / self.count
        if self.every_step:
            kernel._variables["noise"].copy_(self.variance.expand_as(kernel._theta))


class AutoStepSize:
    """
    The step size that ``step_size="auto"`` stands for: the largest at which discretisation and minibatch noise each change the
    temperature by at most a share; before the last 40 % of warm-up by discretisation alone. Curvature is that of points, and says
    nothing of a density of straight pieces (a Laplace likelihood): that takes a step size of the user's.

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

    def __call__(self, step: int) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"AutoStepSize(share={self.share})"

    def adapt(self, kernel: SGMCMCKernel) -> None:
        """Called before every update: measures where it is time."""
        updates = kernel._warmup_samples * kernel.updates_per_sample
        if updates == 0:
            if self.value is None:
                kernel._noise_estimate.finish(kernel)
                self._measure(kernel, with_noise=True)
        elif self.measured < len(MEASURE_AT) and kernel._steps >= MEASURE_AT[self.measured] * updates:
            due = MEASURE_AT[self.measured]
            self.measured += 1
            self._measure(kernel, with_noise=due >= NOISE_COUNTS_FROM)

    def finish(self, kernel: SGMCMCKernel) -> None:
        """Called at the end of warm-up, after which the step stays as it is; what was estimated since may make it smaller."""
        if self.value is None:
            self.adapt(kernel)
        elif self.curvature is None:
            self._measure(kernel, with_noise=True)
        else:
            self.value = min(self.value, self._bound(kernel, with_noise=True))

    def _measure(self, kernel: SGMCMCKernel, with_noise: bool) -> None:
        if kernel._steps == 0 and kernel._warmup_samples and kernel.update_rule.metric(kernel._variables) is not None:
            self.value = FIRST_SCALED_STEP
            return
        self.curvature = largest_curvature(kernel)
        self.value = self._bound(kernel, with_noise)

    def _bound(self, kernel: SGMCMCKernel, with_noise: bool) -> float:
        alive = {name: value[kernel._alive] for name, value in kernel._variables.items()}
        noise, temperature = kernel._noise_estimate.variance, kernel.temperature(kernel._steps)
        with_noise = with_noise and temperature > 0.0  # a chain without a temperature has none that could be kept to
        noise = site_means(noise, kernel.names) if with_noise else torch.zeros(len(kernel.names), device=noise.device)
        return kernel.update_rule.largest_step(self.curvature, noise, temperature, self.share, alive)


def largest_curvature(kernel: SGMCMCKernel) -> float:
    """
    The largest eigenvalue of the Hessian of U by power iteration, in the rule's metric, the largest over up to four chains and two
    minibatches.

    :raises ValueError: if there is none.
    """
    potential, rule = kernel.potential, kernel.update_rule
    metric = rule.metric(kernel._variables)
    generator = torch.Generator().manual_seed(0)  # the start of the iteration matters little; the run's own numbers are left alone
    largest = 0.0
    for chain in kernel._alive.nonzero().flatten().tolist()[:4]:
        theta = kernel._theta[chain]
        scale: Tensor | float = 1.0 if metric is None else metric[chain]
        for batch in potential.probes(chain):
            direction = torch.randn(potential.size, generator=generator, device="cpu").to(theta)
            for _ in range(POWER_ITERATIONS):
                direction = direction / torch.linalg.vector_norm(direction)
                product = scale * potential.hessian_product(theta, scale * direction, batch, kernel.temperature(kernel._steps))
                value = abs(float(direction @ product))
                direction = product
            largest = max(largest, value) if value == value else largest
    if largest == 0.0:
        raise ValueError(
            'step_size="auto" finds no curvature: the Hessian of U is 0 or NaN where the chains are, as that of a density of straight '
            "pieces (Laplace) is. Give a step_size"
        )
    return largest

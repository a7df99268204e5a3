"""What the noise of minibatch gradients is, and how hot it makes a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel

ESTIMATE_FROM = 0.7  # share of warm-up: by then the chain has come to rest
EVALUATIONS = 32
FRESH_EVALUATIONS = 8
# Differences are kept of up to four chains, and of fewer or none where they would be more numbers than this.
MOST_NUMBERS = 2**25


class GradientNoise(NamedTuple):
    """
    Of the minibatch gradient at one theta: its variance and its mean square per coordinate ``[size]``, means over the chains; and what
    the square of its mean is at least, in the rule's metric, mean over coordinates and chains.
    """

    variance: Tensor
    second_moment: Tensor
    slope: float = 0.0


class NoiseEstimate:
    r"""
    The variance of the minibatch gradient at one :math:`\theta`, per coordinate: the mean over the last 30 % of warm-up of

    .. math:: \tfrac{1}{2} (g_1 - g_2)^2 (1 - B/N),

    with the gradients of two minibatches; the last factor because batches of one epoch do not overlap.

    :param every_step: estimate at every update, and hand the estimate to the rule's variable ``"noise"``; otherwise at 32 of them.
    """

    def __init__(self, kernel: SGMCMCKernel, every_step: bool) -> None:
        self.every_step, self.count = every_step, 0
        zero = torch.zeros(kernel.potential.size, dtype=kernel.potential.dtype, device=kernel.potential.device)
        self._mean = GradientNoise(zero, zero.clone())
        self._followed = min(4, kernel.num_chains, MOST_NUMBERS // (EVALUATIONS * kernel.potential.size))
        self._differences: list[Tensor] = []

    def mean(self) -> GradientNoise:
        """The estimate so far."""
        return self._mean

    def adapt(self, kernel: SGMCMCKernel) -> None:
        """Called before every update in warm-up."""
        updates = kernel.warmup_updates
        every = 1 if self.every_step else max(1, int((1.0 - ESTIMATE_FROM) * updates / EVALUATIONS))
        if kernel.steps >= ESTIMATE_FROM * updates and kernel.steps % every == 0:
            self.measure(kernel)

    def finish(self, kernel: SGMCMCKernel) -> None:
        """Called at the end of warm-up; without a warm-up, measures where the chains start."""
        if self.count == 0:
            for _ in range(EVALUATIONS):
                self.measure(kernel)

    def fresh(self, kernel: SGMCMCKernel) -> GradientNoise:
        """An estimate from where the chains are now alone."""
        pairs = [pair for pair in (self._pair(kernel) for _ in range(FRESH_EVALUATIONS)) if pair is not None]
        self._differences = []
        if not pairs:
            return self._mean
        for _, difference in pairs:
            self._follow(kernel, difference)
        variance, second_moment = (torch.stack([getattr(noise, name) for noise, _ in pairs]).mean(0) for name in GradientNoise._fields[:2])
        slopes = torch.tensor([noise.slope for noise, _ in pairs], dtype=torch.float64)
        error = float(slopes.std()) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
        return GradientNoise(variance, second_moment, max(0.0, float(slopes.mean()) - 2.0 * error))

    def measure(self, kernel: SGMCMCKernel) -> None:
        """Takes two more gradients into the mean."""
        pair = self._pair(kernel)
        if pair is None:
            return
        latest, difference = pair
        if self.count == 0:
            self._differences = []
        self.count += 1
        for mean, new in zip(self._mean[:2], latest[:2], strict=True):
            mean += (new - mean) / self.count
        self._follow(kernel, difference)
        if self.every_step:
            kernel.variables["noise"].copy_(self._mean.variance.expand_as(kernel.theta))

    def _follow(self, kernel: SGMCMCKernel, difference: Tensor) -> None:
        if self._followed and len(self._differences) < EVALUATIONS and kernel.potential.batches.num_data is not None:
            self._differences.append(difference[: self._followed].clone())

    def _pair(self, kernel: SGMCMCKernel) -> tuple[GradientNoise, Tensor] | None:
        """
        From two gradients, of full data from one: means over the chains, and the scaled differences ``[chains, size]``. None where
        no chain has finite gradients.
        """
        batches = kernel.potential.batches
        first = kernel.gradient()
        if batches.num_data is None:
            second, share = first, 1.0
        else:
            second, share = kernel.gradient(), batches.batch_size / batches.num_data
        difference = (0.5 * (1.0 - share)) ** 0.5 * (first - second)
        # not of chains that are lost, or about to be
        good = kernel.alive.to(first.device) & first.isfinite().all(dim=-1) & second.isfinite().all(dim=-1)
        if not bool(good.any()):
            return None
        one, two = first[good], second[good]
        metric = kernel.update_rule.metric(kernel.variables)
        square = 1.0 if metric is None else metric[good].square()
        second_moment = 0.5 * (one.square() + two.square()).mean(0)
        return GradientNoise(difference[good].square().mean(0), second_moment, float((square * one * two).mean())), difference

    def hottest(self, kernel: SGMCMCKernel, step_size: float, temperature: float) -> float | None:
        r"""
        The temperature along the direction in which minibatch noise heats most, of the worst of up to four chains: noise is correlated
        between weights, and the temperatures of single coordinates do not show it. The direction is found from one half of the
        differences, and the heat along it measured with the other half, so that the largest of many estimates is not taken for the
        largest of what they estimate.

        :return: None on full data, and where too few differences were kept.
        """
        if len(self._differences) < FRESH_EVALUATIONS:
            return None
        differences = torch.stack(self._differences, dim=1)  # [chains, evaluations, size]
        found = []
        for chain in range(len(differences)):
            if not kernel.alive[chain] or not bool(differences[chain].isfinite().all()):
                continue
            variables = {name: value[chain] for name, value in kernel.variables.items()}
            rule = kernel.update_rule
            heating = kernel.updates_per_batch * rule.heating(step_size, variables)
            base = rule.injected_temperature(self._mean.variance, step_size, temperature, variables).expand(differences.shape[-1])
            scaled = differences[chain] * (heating**0.5)
            halves = scaled[::2], scaled[1::2]
            values = []
            for one, other in (halves, halves[::-1]):
                _, vectors = torch.linalg.eigh((one @ one.T).double())
                direction = (vectors[:, -1].to(one) @ one).double()
                norm = torch.linalg.vector_norm(direction)
                if norm == 0.0:
                    continue
                direction = direction / norm
                values.append(float(direction.square() @ base.double() + (other.double() @ direction).square().mean()))
            found.extend([sum(values) / len(values)] if values else [])
        return max(found) if found else None

    def state(self) -> list[Any]:
        """What :meth:`load` needs, as tensors and plain values."""
        return [self.count, *self._mean[:2], torch.stack(self._differences) if self._differences else None]

    def load(self, state: list[Any]) -> None:
        """Goes on from a :meth:`state`."""
        self.count, *mean, differences = state
        self._mean = GradientNoise(*mean)
        self._differences = [] if differences is None else list(differences)

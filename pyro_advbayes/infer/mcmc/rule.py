"""What an update rule is: one step of a stochastic differential equation, tensors in and tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.schedules import Schedule

Variables = dict[str, Tensor]


class Rule(ABC):
    """
    One update of many chains, all tensors ``[chains, size]``. Rules know nothing of Pyro, models or data.

    A rule may keep variables per weight (a momentum, a preconditioner), which it updates in place; they persist from step to step
    and travel in checkpoints. All settings are plain numbers.
    """

    @property
    def uses_noise_variance(self) -> bool:
        """Whether :meth:`temperatures` looks at the variance of the minibatch gradient."""
        return True

    def variables(self, theta: Tensor) -> Variables:
        """What the rule keeps beside theta, at the start."""
        return {}

    @abstractmethod
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
        """
        One update.

        :param theta: where the chains are; left as it is.
        :param gradient: of U at theta, from a minibatch; used up.
        :param noise: standard normal numbers; used up, and returned holding the new theta: two buffers that change places are
            all the memory that a chain needs.
        :param step_size: a number in a tensor, > 0.
        :param temperature: a number in a tensor, >= 0.
        :param variables: the rule's own, updated in place.
        :param adapting: whether warm-up is going on.
        :return: the new theta, in the memory of ``noise``.
        """

    @abstractmethod
    def temperatures(
        self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables, updates_per_batch: int = 1
    ) -> Tensor:
        """
        The temperature at which each coordinate is sampled, once the noise of minibatch gradients is counted.

        :param noise_variance: variance of the minibatch gradient at one theta, per coordinate ``[size]``; 0 on full data.
        :param updates_per_batch: M >= 1, how many updates in a row see one minibatch. Their noise has one direction, so that it adds M
            times what as many minibatches would. That is exact for small steps, and an upper bound where M of them go far.
        :return: ``[size]`` or ``[chains, size]``.
        """

    @abstractmethod
    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        """
        The largest step size at which discretisation and minibatch noise each change the temperature by at most ``share``.

        :param curvature: largest eigenvalue of the Hessian of U, after :meth:`metric`.
        :param noise_variance: ``[sites]``, mean variance of the minibatch gradient per site.
        """

    def metric(self, variables: Variables) -> Tensor | None:
        """The square root of the preconditioner, ``[chains, size]``, in which curvature is measured; None for none."""
        return None

    def check(self, step_size: float, temperature: float, variables: Variables, names: list[tuple[str, slice]]) -> float:
        """
        Looks at the end of warm-up whether the rule is valid where it is going to sample.

        :return: the share of coordinates where it had to be clamped.
        :raises ValueError: if it is not valid, and not allowed to clamp.
        """
        return 0.0


class Updates(NamedTuple):
    """
    A rule with its own step size and number of updates: a part of a kernel that alternates between samplers. The kernels make them:
    ``SGLD.rule(step_size=0.01, num_steps=15)``.
    """

    rule: Rule
    step_size: Schedule
    num_steps: int


def site_means(values: Tensor, names: list[tuple[str, slice]]) -> Tensor:
    """Means over the coordinates of each site, ``[..., sites]``, of values ``[..., size]``."""
    return torch.stack([values[..., place].mean(-1) for _, place in names], dim=-1)

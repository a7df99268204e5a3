"""Update rules: one step of a stochastic differential equation, tensors in and tensors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.schedules import Schedule

Variables = dict[str, Tensor]


class Rule(ABC):
    """
    One update of many chains, all tensors ``[chains, size]``. Rules know nothing of Pyro, models or data. A rule needs :meth:`step`;
    the other methods are optional.

    A rule may keep variables per weight (a momentum, a preconditioner), which it updates in place. They persist from step to step, and
    checkpoints hold them. All settings are plain numbers.
    """

    @property
    def learns(self) -> frozenset[str]:
        """Quantities that :meth:`step` learns from gradients: ``"metric"``, a preconditioner; ``"moment"``, their mean square at rest."""
        return frozenset()

    def variables(self, theta: Tensor) -> Variables:
        """The rule's variables at the start. None of them is in units of the step size, which may change at any update."""
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
        learning: str | None,
    ) -> Tensor:
        """
        One update.

        :param theta: where the chains are; not changed.
        :param gradient: of U at theta, from a minibatch; may be overwritten.
        :param noise: standard normal numbers, overwritten with the new theta. Two buffers that change places are all the memory that a
            chain needs.
        :param step_size: a number in a tensor, > 0.
        :param temperature: a number in a tensor, >= 0.
        :param variables: the rule's own, updated in place.
        :param learning: what the rule learns from this gradient: ``"metric"`` in the first half of warm-up, after which the chain
            must relax, since a preconditioner that depends on theta leads to another law; ``"moment"`` in the last 30 %; else None.
        :return: the new theta, in the memory of ``noise``.
        """

    def injected_temperature(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor | None:
        """
        The temperature of each coordinate without the noise of minibatch gradients: T, less what the rule takes off for that noise.

        :param noise_variance: variance of the minibatch gradient at one theta, per coordinate ``[size]``; 0 on full data.
        :return: broadcasts to ``[chains, size]``. None if unknown: the run then reports no ``T_eff``.
        """
        return None

    def heating(self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables) -> Tensor | float | None:
        """
        By how much each unit of a minibatch gradient's variance raises a coordinate's temperature; broadcasts to ``[chains, size]``. None
        if unknown.

        :param noise_variance: as for :meth:`injected_temperature`.
        """
        return None

    def temperatures(
        self, noise_variance: Tensor, step_size: float, temperature: float, variables: Variables, updates_per_batch: int = 1
    ) -> Tensor | None:
        """
        The temperature at which each coordinate is sampled, with the noise of minibatch gradients.

        :param noise_variance: variance of the minibatch gradient at one theta, per coordinate ``[size]``; 0 on full data.
        :param updates_per_batch: M >= 1, how many updates in a row see one minibatch. Their noise has one direction, and adds M times what
            as many minibatches would. That is exact for small steps, and an upper bound where M of them go far.
        :return: ``[size]`` or ``[chains, size]``; None if unknown.
        """
        heating = self.heating(noise_variance, step_size, temperature, variables)
        injected = self.injected_temperature(noise_variance, step_size, temperature, variables)
        return None if heating is None or injected is None else injected + updates_per_batch * heating * noise_variance

    def largest_step(self, curvature: float, noise_variance: Tensor, temperature: float, share: float, variables: Variables) -> float:
        """
        The largest step size at which discretisation and minibatch noise each change the temperature by at most ``share``. Without it,
        ``step_size="auto"`` is refused.

        :param curvature: largest eigenvalue of the Hessian of U, in the coordinates of :meth:`metric`.
        :param noise_variance: ``[sites]``, mean variance of the minibatch gradient per site, in the same coordinates; 0 where noise does
            not count.
        """
        raise NotImplementedError

    @property
    def rate_power(self) -> int:
        """The power of the step size that minibatch noise heats with: 1 where it is a rate h, 2 where it is a length."""
        return 1

    def leapfrog_step(self, step_size: float, temperature: float, variables: Variables) -> float | Tensor:
        """
        The step of Hamiltonian dynamics with the discretisation error of one update, in the coordinates of :meth:`metric`; broadcasts to
        ``[chains, size]``.
        """
        return (2.0 * step_size) ** 0.5

    def target_error(self, size: int, share: float) -> float | None:
        r"""
        The energy error that ``step_size="auto"`` aims at, the mean of :math:`\Delta E^2 / d` over updates, for d = ``size`` weights. None
        where curvature alone bounds the step. A rule that has it also has :meth:`half_kick` and :meth:`drift`, and takes its steps from
        :func:`own_step`.

        :param share: of the temperature, by which discretisation may change it.
        """
        return None

    @property
    def bounded_by_curvature(self) -> bool:
        """Whether a step that is too long for the curvature throws a chain out."""
        return True

    def trial_variables(self, variables: Variables, temperature: float, generator: torch.Generator) -> Variables:
        """Variables for trial updates, which may overwrite them: copies, or fresh ones."""
        return {name: value.clone() for name, value in variables.items()}

    def half_kick(self, gradient: Tensor, step_size: Tensor, temperature: float, variables: Variables) -> tuple[Variables, Tensor]:
        """
        The first and the last part of an update without noise, which moves no theta.

        :param step_size: ``[chains, 1]``.
        :return: variables after it, and by how much it changes the kinetic energy, in units of T, ``[chains]``.
        """
        raise NotImplementedError

    def drift(self, theta: Tensor, step_size: Tensor, variables: Variables) -> Tensor:
        """The part of an update that moves theta ``[chains, size]``."""
        raise NotImplementedError

    def metric(self, variables: Variables) -> Tensor | None:
        """The square root of the preconditioner, ``[chains, size]``, in which curvature and noise are measured; None for none."""
        return None

    def start_metric(self, variables: Variables, second_moment: float) -> None:
        """Starts the preconditioner, where there is one, from a guess of the gradient's mean square."""
        return

    def settle(self, variables: Variables, second_moment: Tensor, evaluations: int) -> None:
        """
        Called once the preconditioner is frozen, with a first estimate of ``"moment"``; without a warm-up, at the start.

        :param second_moment: mean square of the minibatch gradient where the chains are, ``[size]``.
        :param evaluations: number of gradients in this mean.
        """
        return

    def check(self, step_size: float, temperature: float, variables: Variables, names: list[tuple[str, slice]]) -> float:
        """
        Checks at the end of warm-up that the rule is valid where it is going to sample.

        :param names: sites, and where they stand in a row of theta.
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


def has_own_steps(rule: Rule) -> bool:
    """Whether chains of the rule can have steps of their own."""
    return type(rule).target_error is not Rule.target_error


def per_chain(theta: Tensor) -> Variables:
    """
    The variables of chains that have steps of their own, ``[chains, 1]``: ``"relative_step"``, the ratio to the geometric mean, and
    ``"energy_error"``, what was reached at the end of warm-up; 0 where it was not measured.
    """
    ones = torch.ones_like(theta[..., :1])
    return {"relative_step": ones, "energy_error": torch.zeros_like(ones)}


def own_step(step_size: Any, variables: Variables) -> Any:
    """Each chain's step ``[chains, 1]``, from the geometric mean; the same number where chains have none of their own."""
    return step_size * variables["relative_step"] if "relative_step" in variables else step_size


def site_means(values: Tensor, names: list[tuple[str, slice]]) -> Tensor:
    """Means over the coordinates of each site, ``[..., sites]``, of values ``[..., size]``."""
    return torch.stack([values[..., place].mean(-1) for _, place in names], dim=-1)

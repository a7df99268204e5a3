"""The fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_advbayes.attacks.base import GradientAttack, ascend
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class FGSM(GradientAttack):
    r"""
    One step of steepest ascent, :math:`\tilde x = x + \epsilon\, \mathrm{sign}(\nabla_x \ell(x))`; with ``norm="l2"``,
    :math:`x + \epsilon \nabla_x \ell / \|\nabla_x \ell\|_2`.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`, ``norm`` and ``loss``.

    Source: I. Goodfellow, J. Shlens and C. Szegedy, Explaining and harnessing adversarial examples, ICLR 2015.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    """

    def run(self, problem: Problem, region: Ball) -> Tensor:
        return ascend(problem, region, region.center, steps=1, step_size=self.eps)

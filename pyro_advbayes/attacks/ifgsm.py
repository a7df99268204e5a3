"""The iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_advbayes.attacks.base import GradientAttack, ascend
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class IFGSM(GradientAttack):
    r"""
    The basic iterative method: from :math:`x`, ``steps`` times
    :math:`\tilde x \leftarrow \Pi(\tilde x + \text{step\_size}\, \mathrm{sign}(\nabla_x \ell(\tilde x)))`, :math:`\Pi` the projection onto
    the ball and the range.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`, ``norm`` and ``loss``.

    Source: A. Kurakin, I. Goodfellow and S. Bengio, Adversarial examples in the physical world, ICLR 2017 workshop, Eq. 2.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int steps: >= 1.
    :param float step_size: > 0; by default eps / steps, which just reaches the ball's surface.
    """

    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        if self.step_size is not None:
            self.check_positive("step_size")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        return ascend(problem, region, region.center, self.steps, self.step_size or self.eps / self.steps)

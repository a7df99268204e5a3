"""Projected gradient descent, which here ascends the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_advbayes.attacks.base import Best, GradientAttack, ascend
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class PGD(GradientAttack):
    r"""
    From a random point of the ball, ``steps`` times

    .. math:: \tilde x \leftarrow \Pi\big(\tilde x + \text{step\_size}\, s(\nabla_x \ell(\tilde x))\big),

    where :math:`s` is the sign (``norm="linf"``) or the normalised gradient (``"l2"``) and :math:`\Pi` the projection onto the ball and
    the range. Without a random start it equals foolbox's up to rounding. With several restarts, the best result of each input is kept.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`, ``norm`` and ``loss``.

    Source: A. Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int steps: >= 1.
    :param float step_size: > 0; by default 2.5 eps / steps, enough to cross the ball.
    :param bool random_start: whether it starts at a random point, or at the clean input.
    :param int restarts: number of starts, >= 1.
    """

    steps: int = 40
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        self.check_count("restarts")
        if self.step_size is not None:
            self.check_positive("step_size")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} would all be the same: set random_start=True")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """Ascends from every start, and returns the best point of each example."""
        step_size, best = self.step_size or 2.5 * self.eps / self.steps, Best()
        for _ in range(self.restarts):
            start = region.random() if self.random_start else region.center
            x = ascend(problem, region, start, self.steps, step_size)
            if self.restarts == 1:
                return x
            best.offer(x, *problem.examine(x))
        return best.x

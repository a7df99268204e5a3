"""Random inputs, the baseline of any attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pyro_advbayes.attacks.base import BallAttack, Best
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class Uniform(BallAttack):
    r"""
    :math:`\tilde x` uniform in the ball of radius ``eps`` around :math:`x`; the best of ``tries`` draws for each input.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack` and ``norm``.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int tries: number of draws, >= 1.
    """

    tries: int = 1

    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("tries")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """The best of random points of the ball."""
        best = Best()
        for _ in range(self.tries):
            x = region.random()
            best.offer(x, *problem.examine(x))
        return best.x

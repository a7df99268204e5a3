"""Auto-PGD: projected gradient ascent that halves its own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_advbayes.attacks.base import Best, GradientAttack
from pyro_advbayes.attacks.geometry import Ball, rows
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked

MOMENTUM = 0.75  # the paper's alpha
PROGRESS = 0.75  # and rho: the share of steps that must raise the loss


@checked
@dataclass(frozen=True, repr=False)
class APGD(GradientAttack):
    r"""
    Steepest ascent with momentum,

    .. math::
        z = \Pi(x_k + \eta\, s(\nabla \ell(x_k))), \qquad
        x_{k+1} = \Pi\big(x_k + 0.75\, (z - x_k) + 0.25\, (x_k - x_{k-1})\big),

    from a random point with :math:`\eta = 2\epsilon`. At checkpoints, whose distances shrink, each input separately halves its
    :math:`\eta` and returns to its best point if fewer than 75 % of the steps since the last checkpoint raised the loss, or if neither the
    step nor the best loss has changed since. The best input is kept: a success before a failure, then the higher loss.

    ``loss="dlr"`` has a gradient where the classifier is overconfident. Further settings: :class:`~pyro_advbayes.attacks.base.Attack`,
    ``norm`` and ``loss``.

    Source: F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks, ICML
    2020, Algorithm 1. An input that returns to its best point starts there without momentum; the authors' code keeps the old one.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int steps: >= 1.
    :param int restarts: number of starts, >= 1.
    """

    steps: int = 100
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        self.check_count("restarts")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        best = Best()
        for _ in range(self.restarts):
            self._ascend(problem, region, best)
        return best.x

    def _ascend(self, problem: Problem, ball: Ball, best: Best) -> None:
        x = previous = ball.random()
        loss, gradient, success = problem.climb(x)
        best.offer(x, loss, success)
        top = _Top(x, gradient, loss)
        schedule = _Schedule(loss, 2 * self.eps, self.steps)
        for k in range(1, self.steps + 1):
            z = ball.restrict(x + rows(schedule.step_size, x) * ball.steepest(gradient))
            if k > 1:
                z = ball.restrict(x + MOMENTUM * (z - x) + (1 - MOMENTUM) * (x - previous))
            previous, x, before = x, z, loss
            loss, gradient, success = problem.climb(x)
            best.offer(x, loss, success)
            top.offer(x, gradient, loss)
            returns = schedule.after(k, loss > before, top.loss)
            if returns is not None:
                there = rows(returns, x)
                x, previous = torch.where(there, top.x, x), torch.where(there, top.x, previous)
                gradient, loss = torch.where(there, top.gradient, gradient), torch.where(returns, top.loss, loss)


def checkpoints(steps: int) -> list[int]:
    """The steps after which step sizes may be halved: first after 22 % of all, then at shrinking distances, at last every 6 %."""
    last, now = 0.0, 0.22
    found = []
    while now < 1:
        found.append(math.ceil(round(now * steps, 6)))
        last, now = now, now + max(now - last - 0.03, 0.06)
    return sorted(set(found))


class _Top:
    """The point of the highest loss so far, for each input."""

    def __init__(self, x: Tensor, gradient: Tensor, loss: Tensor) -> None:
        self.x, self.gradient, self.loss = x, gradient, loss

    def offer(self, x: Tensor, gradient: Tensor, loss: Tensor) -> None:
        higher = loss > self.loss
        there = rows(higher, x)
        self.x, self.gradient = torch.where(there, x, self.x), torch.where(there, gradient, self.gradient)
        self.loss = torch.where(higher, loss, self.loss)


class _Schedule:
    """
    The step size of every input.

    :param loss: at the start, ``[N]``.
    :param step_size: at the start.
    :param steps: how many there will be.
    """

    def __init__(self, loss: Tensor, step_size: float, steps: int) -> None:
        self.step_size = torch.full_like(loss, step_size)
        self._checkpoints, self._last = checkpoints(steps), 0
        self._rises = torch.zeros_like(loss)
        self._halved = torch.zeros_like(loss, dtype=torch.bool)
        self._top = loss

    def after(self, k: int, rose: Tensor, top: Tensor) -> Tensor | None:
        """
        Counts step ``k``; at a checkpoint, halves.

        :param rose: whether the step raised the loss, ``[N]``.
        :param top: the highest loss so far, ``[N]``.
        :return: which inputs return to their best point; None where there is no checkpoint.
        """
        self._rises += rose
        if k not in self._checkpoints:
            return None
        slow = self._rises < PROGRESS * (k - self._last)
        stuck = ~self._halved & (top <= self._top)
        self._halved = slow | stuck
        self.step_size = torch.where(self._halved, self.step_size / 2, self.step_size)
        self._rises, self._top, self._last = torch.zeros_like(self._rises), top, k
        return self._halved

"""The momentum iterative method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_advbayes.attacks.base import GradientAttack
from pyro_advbayes.attacks.geometry import Ball, flat, of_largest_1, rows
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class MIM(GradientAttack):
    r"""
    Iterative FGSM on a running sum of gradients: from :math:`x` and :math:`g = 0`, ``steps`` times

    .. math::
        g \leftarrow \text{decay}\, g + \frac{\nabla_x \ell(\tilde x)}{\|\nabla_x \ell(\tilde x)\|_1}, \qquad
        \tilde x \leftarrow \Pi(\tilde x + \text{step\_size}\, s(g)).

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`, ``norm`` and ``loss``.

    Source: Y. Dong et al., Boosting adversarial attacks with momentum, CVPR 2018, Eq. 6 and 7.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int steps: >= 1.
    :param float step_size: > 0; by default eps / steps.
    :param float decay: > 0; 1 sums all gradients alike.
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        self.check_positive("decay")
        if self.step_size is not None:
            self.check_positive("step_size")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """Steps along the accumulated gradients."""
        # divided by their sum, most entries of an image's gradient underflow in half precision
        x, dtype = region.center, torch.promote_types(region.center.dtype, torch.float32)
        total = torch.zeros_like(x, dtype=dtype)
        step_size = self.step_size or self.eps / self.steps
        for _ in range(self.steps):
            gradient = of_largest_1(problem.gradient(x).gradient).to(dtype)
            size = flat(gradient).abs().sum(1).clamp_min(1.0)
            total = self.decay * total + gradient / rows(size, gradient)
            x = region.restrict(x + step_size * region.steepest(total).to(x.dtype))
        return x

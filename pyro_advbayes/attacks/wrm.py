"""The inner maximisation of Wasserstein robust training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from pyro_advbayes.attacks.base import Attack
from pyro_advbayes.attacks.geometry import Region
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked


@checked
@dataclass(frozen=True, repr=False)
class WRM(Attack[Region]):
    r"""
    Ascends a loss minus a penalty on the distance: :math:`\text{strength}\; \ell(\tilde x) - \frac12 \|\tilde x - x\|_2^2`. The first
    step is :math:`\tilde x = x + \text{strength}\, \nabla \ell(x)`; then, for t = 0, ..., ``steps`` - 1,

    .. math:: \tilde x \leftarrow \tilde x + \frac{1}{\sqrt{t + 2}} \big(\text{strength}\, \nabla\ell(\tilde x) - (\tilde x - x)\big).

    There is no ball: the penalty bounds the perturbation. ``strength`` is :math:`1 / (2\gamma)` of the paper's penalty
    :math:`\gamma \|\tilde x - x\|_2^2`. There is a maximum only where 1 / strength exceeds the curvature of the loss.

    Source: A. Sinha, H. Namkoong and J. Duchi, Certifying some distributional robustness with principled adversarial training, ICLR
    2018, with the step sizes of the authors' code. The authors do not clip, which is ``clip=None``; another range holds after every step.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`.

    :param float strength: > 0; 1.3 is the authors' for MNIST in [0, 1].
    :param int steps: steps after the first, >= 1.
    :param str loss: as for :class:`~pyro_advbayes.attacks.base.GradientAttack`.
    """

    strength: float = 1.3
    steps: int = 15
    loss: str = field(default="cross_entropy", kw_only=True)  # type: ignore[misc]  # a setting here, a constant of other attacks

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("strength")
        self.check_count("steps")

    def run(self, problem: Problem, region: Region) -> Tensor:
        """Ascends the loss less the cost of the distance, without a bound."""
        clean = region.center
        x = region.restrict(clean + self.strength * problem.gradient(clean).gradient)
        for t in range(self.steps):
            rise = self.strength * problem.gradient(x).gradient - (x - clean)
            x = region.restrict(x + rise / math.sqrt(t + 2))
        return x

"""Carlini and Wagner's attack of the smallest Euclidean perturbation, and the one-step form that BAL's authors report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyro_advbayes.attacks.base import Attack
from pyro_advbayes.attacks.geometry import Region, flat, rows
from pyro_advbayes.attacks.problem import ClassifierProblem, Problem, check_gradient, differentiate, method
from pyro_advbayes.checked import checked
from pyro_advbayes.model.layers import refuse_inference_mode

DECAYS = 0.9, 0.999  # Adam's
SEARCHES = 9  # values of c that are tried, as in the authors' code


@checked
@dataclass(frozen=True, repr=False)
class CarliniWagner(Attack[Region]):
    r"""
    For each input, the smallest perturbation that succeeds:

    .. math:: \min_{\tilde x}\ \|\tilde x - x\|_2^2 + c\, \max\big(\text{confidence} - m(\tilde x), 0\big), \qquad
              m = \max_{k \ne y} z_k - z_y

    (for a target t, :math:`m = z_t - \max_{k \ne t} z_k`), by Adam, with every step clipped to the range. Bisection finds :math:`c` for
    each input: lower after a success, ten times as large after a failure; nine values are tried. The nearest of all successes is returned,
    or the clean input if there is none. There is no ball: judge the attack by the size of its perturbations.

    The logits of a posterior are logarithms of its mean probabilities; with ``objective="mean_loss"`` :math:`m` is the mean over draws.
    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`.

    Source: N. Carlini and D. Wagner, Towards evaluating the robustness of neural networks, IEEE S&P 2017, section VI. Of their three
    ways to keep to the range this is projection; the change of variables hardly moves from a white or black pixel.

    :param int steps: of Adam, for each c, >= 1.
    :param float step_size: Adam's, > 0, in the units of the inputs.
    :param float first_c: > 0.
    :param float confidence: the least m that counts as success, >= 0.
    """

    steps: int = 200
    step_size: float = 0.01
    first_c: float = 1e-2
    confidence: float = 0.0

    loss: ClassVar[str] = "margin"
    needs_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("steps")
        for name in ("step_size", "first_c"):
            self.check_positive(name)
        if not 0 <= self.confidence < math.inf:
            raise ValueError(f"confidence={self.confidence!r}: a finite number >= 0")

    def run(self, problem: Problem, region: Region) -> Tensor:
        """Searches c by bisection, for each example, and keeps the nearest success."""
        clean = region.center
        # half precision is too coarse for squared distances and for Adam's squared gradients
        dtype = torch.promote_types(clean.dtype, torch.float32)
        best, smallest = clean.clone(), clean.new_full((len(clean),), torch.inf, dtype=dtype)
        low, high, c = torch.zeros_like(smallest), smallest.clone(), torch.full_like(smallest, self.first_c)
        for _ in range(SEARCHES):
            x, size = self._nearest(problem, region, c)
            nearer = size < smallest
            best, smallest = torch.where(rows(nearer, x), x, best), torch.where(nearer, size, smallest)
            found = size.isfinite()
            low, high = torch.where(found, low, c), torch.where(found, c, high)
            c = torch.where(high.isfinite(), (low + high) / 2, c * 10)
        return best

    def _nearest(self, problem: Problem, region: Region, c: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest success for given c ``[N]``, and its squared distance: infinite where there is none."""
        clean = x = region.center
        mean, square = torch.zeros_like(x, dtype=c.dtype), torch.zeros_like(x, dtype=c.dtype)
        best, smallest = clean, torch.full_like(c, torch.inf)
        for t in range(1, self.steps + 2):
            margin, gradient, success = problem.climb(x)
            hit = success & (margin >= self.confidence) if self.confidence else success
            delta = (x - clean).to(c.dtype)
            size = flat(delta).square().sum(1)
            nearer = hit & (size < smallest)
            best, smallest = torch.where(rows(nearer, x), x, best), torch.where(nearer, size, smallest)
            if t > self.steps:  # the result of the last step has been compared
                break
            slope = 2 * delta - rows(c * ~hit, gradient) * gradient
            mean = DECAYS[0] * mean + (1 - DECAYS[0]) * slope
            square = DECAYS[1] * square + (1 - DECAYS[1]) * slope.square()
            spread = (square / (1 - DECAYS[1] ** t)).sqrt() + 1e-8
            x = region.restrict((x - self.step_size * mean / (1 - DECAYS[0] ** t) / spread).to(x.dtype))
        return best, smallest


@checked
@dataclass(frozen=True, repr=False)
class OneStepCarliniWagner(Attack[Region]):
    r"""
    The attack that BAL's experiments call Carlini and Wagner's: one step down the gradient of the batch's

    .. math:: \max\Big(\sum_n \big(z_{n, y_n} - \sum_{k \ne y_n} z_{n k}\big), 0\Big), \qquad
              \tilde x = \mathrm{clip}\big(x - \nabla_x / \sqrt 2\big),

    for each network separately; the gradients of the draws are averaged. (The published second term, the distance from the clean input,
    has no gradient at the clean input.) It is a weak attack, for comparison with published numbers. It has two peculiarities. A network
    whose sum over the batch is below zero gives no gradient, so that the result depends on the batch. And the loss changes when a constant
    is added to the logits: it needs the classifier's own logits (its ``logits`` method or its outputs), not log-probabilities.

    Source: N. Ye and Z. Zhu, Bayesian Adversarial Learning, NeurIPS 2018, and the authors' code.
    Settings: ``clip`` and ``batch_size`` of :class:`~pyro_advbayes.attacks.base.Attack`; it has one objective and no targets.
    """

    needs_classifier: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targeted or self.eot > 1 or self.objective != "loss_of_mean":
            raise ValueError("OneStepCarliniWagner has one published form: leave targeted, eot and objective at their defaults")

    def run(self, problem: Problem, region: Region) -> Tensor:
        """One step from the clean inputs along the draws' mean gradient."""
        assert isinstance(problem, ClassifierProblem)  # since needs_classifier
        refuse_inference_mode("the attack")
        problem.examine(region.center)  # raises for anything but a classifier
        x, total, count = region.center.detach().requires_grad_(), torch.zeros_like(region.center), 0
        with torch.enable_grad():
            for logits in _logits(problem.classifier, x):
                label = torch.nn.functional.one_hot(problem.y, logits.shape[-1]).bool()
                signed = torch.where(label, logits, -logits)
                total = total + differentiate(signed.sum((-2, -1)).clamp_min(0), x)
                count += len(logits)
                del logits, signed
        return region.center - check_gradient(total / count) / math.sqrt(2)


def _logits(classifier: Callable, x: Tensor) -> Iterator[Tensor]:
    """Logits of all networks, ``[chunk, N, K]`` at a time."""
    own = method(classifier, "logits")
    if own is not None:
        yield from own(x)
    else:
        yield classifier(x).unsqueeze(0)

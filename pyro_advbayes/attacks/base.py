"""The base of all attacks: :class:`Attack`, its settings, and the checks before and after it runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from pyro_advbayes.attacks.geometry import BALLS, Ball, Clip, Region, rows
from pyro_advbayes.attacks.losses import LOSSES
from pyro_advbayes.attacks.problem import OBJECTIVES, ClassifierProblem, LossProblem, Problem, Slope
from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_choice, check_int, class_labels, need_tensor
from pyro_advbayes.kinds import BATCH_NORMS, INSTANCE_NORMS
from pyro_advbayes.model.refusals import naming

Allowed = TypeVar("Allowed", bound=Region)
Result = TypeVar("Result")


@dataclass(frozen=True, repr=False)
class Attack(ABC, Generic[Allowed]):
    r"""
    Finds inputs near the clean ones that a classifier gets wrong. An attack holds its settings only, and is called with a classifier::

        x_adv = PGD(eps=0.3, objective="mean_loss")(classifier, x, y)

    ``classifier`` is any function of inputs ``[N, ...]`` to logits or log-probabilities ``[N, K]``. If it has a method ``log_probs`` (as
    :class:`~pyro_advbayes.PosteriorClassifier` has), it represents draws of a network, and ``objective`` chooses what is raised: the mean
    of the draws' losses, or the loss of their mean prediction (:class:`~pyro_advbayes.attacks.problem.ClassifierProblem` states both). For
    a plain network they are the same.

    Every attack takes these settings by keyword:

    :param clip: the range (low, high) of the inputs, clean and attacked; None for inputs without a range.
    :param bool targeted: whether ``y`` are target classes; by default they are the true classes.
    :param str objective: ``"loss_of_mean"`` (default) or ``"mean_loss"``.
    :param int eot: expectation over transformation: calls of a random classifier for one gradient, >= 1. They count as draws. For losses
        other than the cross-entropy of their mean prediction all of them are in memory together.
    :param int batch_size: number of inputs that are attacked together; by default all.
    :raises ValueError: for a setting out of its range.
    """

    clip: Clip = field(default=(0.0, 1.0), kw_only=True)
    targeted: bool = field(default=False, kw_only=True)
    objective: str = field(default="loss_of_mean", kw_only=True)
    eot: int = field(default=1, kw_only=True)
    batch_size: int | None = field(default=None, kw_only=True)

    loss: ClassVar[str] = "cross_entropy"
    uses_gradient: ClassVar[bool] = True
    needs_classifier: ClassVar[bool] = False  # whether a loss alone does not suffice

    def __post_init__(self) -> None:
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise ValueError(f"clip={self.clip!r}: the range of the inputs, (low, high) with low < high, or None")
        self.check_choice("objective", OBJECTIVES)
        self.check_choice("loss", LOSSES)
        self.check_count("eot")
        if self.batch_size is not None:
            self.check_count("batch_size")

    @final
    @checked
    def __call__(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """
        :param classifier: inputs ``[N, ...]`` -> logits ``[N, K]``. Its mode, its parameters and their ``.grad`` do not change.
        :param x: clean inputs ``[N, ...]``, of floating type and within ``clip``.
        :param y: labels ``[N]``, integers from 0 to K - 1.
        :return: attacked inputs, detached, of the shape of ``x``.
        :raises ValueError: if inputs or labels are anything else, or the classifier gives NaN or no logits ``[N, K]``.
        """
        return torch.cat(self.in_batches(self._perturb, classifier, x, y))

    def in_batches(
        self, work: Callable[[Problem, Tensor], Result], classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
    ) -> list[Result]:
        """
        What ``work`` gives for the problem and the inputs of each batch, once the arguments of a call are checked.

        :raises ValueError: as for a call.
        """
        x, y = self.check(classifier, x, y)
        size = self.batch_size or len(x)
        parts = []
        for inputs, labels in zip(x.split(size), y.split(size), strict=True):
            problem = ClassifierProblem(classifier, labels, self.loss, self.objective, self.targeted, self.eot)
            with naming(lambda values: classifier(values["x"]), {"x": inputs}):
                parts.append(work(problem, inputs))
        return parts

    @final
    def on_loss(self, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """
        Attacks the caller's own loss in place of a classifier's.

        :param loss: differentiable function of inputs ``[N, ...]`` to losses ``[N]``; each loss depends on its row only.
        :param x: clean inputs ``[N, ...]``, of floating type and within ``clip``.
        :return: attacked inputs, detached, of the shape of ``x``.
        :raises ValueError: if the inputs are anything else, the loss is not ``[N]``, or the attack needs logits.
        """
        self.check_for_loss()
        return self._perturb(LossProblem(loss), self._checked_inputs(x))

    def check(self, classifier: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Checks the arguments of a call without a prediction; returns the inputs detached and the labels as int64."""
        _refuse_training_norms(classifier)
        x = self._checked_inputs(x)
        return x, _checked_labels(x, y)

    def check_for_loss(self) -> None:
        """:raises ValueError: if the attack needs a classifier, or has a setting that applies to classifiers only."""
        if self.needs_classifier:
            raise ValueError(f"{type(self).__name__} needs more than a loss: call it with a classifier")
        if self.targeted:
            raise ValueError("targeted=True has no meaning without labels: pass the negative loss")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in ("loss", "objective", "eot", "batch_size") and value != setting.default:
                raise ValueError(f"{setting.name}={value!r} is for classifiers: a custom loss is raised unchanged, of all rows together")

    @abstractmethod
    def run(self, problem: Problem, region: Allowed) -> Tensor:
        """
        Runs the attack.

        :param problem: the loss to be raised.
        :param region: the allowed inputs; its ``center`` are the clean ones.
        :return: attacked inputs; the caller projects them onto the region.
        """

    def region(self, x: Tensor) -> Allowed:
        """The inputs that the attack may return for ``x``."""
        return Region(x, self.clip)  # type: ignore[return-value]  # an attack on another region overrides this

    def _perturb(self, problem: Problem, x: Tensor) -> Tensor:
        region = self.region(x)
        return region.restrict(self.run(problem, region).detach())

    def _checked_inputs(self, x: Tensor) -> Tensor:
        if not need_tensor(x, "x", inputs=True).is_floating_point() or x.dim() == 0 or x.numel() == 0:
            raise ValueError(
                f"inputs must be a tensor of floating type [N, ...] with one row or more, not {x.dtype} {tuple(x.shape)}"
                + (": give x.float()" if x.numel() and x.dim() and not x.is_complex() else "")
            )
        low, high = x.new_tensor(self.clip or (-math.inf, math.inf)).tolist()  # rounded as the inputs are
        least, most = float(x.min()), float(x.max())
        if not (low <= least and most <= high and math.isfinite(least) and math.isfinite(most)):  # NaN fails, too
            raise ValueError(f"inputs run from {least:.6g} to {most:.6g}, but clip={self.clip}: scale them, or give their range as clip")
        return x.detach().clone()

    def check_choice(self, name: str, choices: Any) -> None:
        """:raises ValueError: unless the setting is one of ``choices``."""
        check_choice(getattr(self, name), name, choices)

    def check_count(self, name: str) -> None:
        """:raises ValueError: unless the setting is an int >= 1."""
        check_int(getattr(self, name), name, 1)

    def check_positive(self, name: str) -> None:
        """:raises ValueError: unless the setting is a finite number > 0."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: a finite number > 0")

    def __repr__(self) -> str:
        said = [f for f in sorted(fields(self), key=lambda f: bool(f.kw_only)) if f.compare and getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in said)})"


@dataclass(frozen=True, repr=False)
class BallAttack(Attack[Ball]):
    """
    An attack within a ball around each input.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param str norm: ``"linf"`` (default) or ``"l2"``.
    """

    eps: float
    norm: str = field(default="linf", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("eps")
        self.check_choice("norm", BALLS)

    def region(self, x: Tensor) -> Ball:
        return BALLS[self.norm](x, self.eps, self.clip)


@dataclass(frozen=True, repr=False)
class GradientAttack(BallAttack):
    """
    An attack within a ball that uses the gradient of a loss.

    :param str loss: ``"cross_entropy"`` (default), ``"dlr"`` (of three classes or more) or ``"margin"``
        (:mod:`~pyro_advbayes.attacks.losses`). The gradient of the cross-entropy underflows where a classifier is overconfident; those of
        the others do not.
    """

    loss: str = field(default="cross_entropy", kw_only=True)  # type: ignore[misc]  # a setting here, a constant of other attacks


def ascend(problem: Slope, ball: Ball, x: Tensor, steps: int, step_size: float) -> Tensor:
    r"""Projected steepest ascent from ``x``: :math:`x \leftarrow \Pi(x + \text{step\_size}\, s(\nabla \ell(x)))`, ``steps`` times."""
    for _ in range(steps):
        x = ball.restrict(x + step_size * ball.steepest(problem.gradient(x).gradient))
    return x


class Best:
    """The best of several attacked versions of each input: a success before a failure, then the higher loss."""

    def __init__(self) -> None:
        self._x: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """``[N, ...]``."""
        assert self._x is not None
        return self._x

    def offer(self, x: Tensor, loss: Tensor, success: Tensor) -> None:
        """
        :param x: inputs within the region, as they would be returned ``[N, ...]``.
        :param loss: there, ``[N]``.
        :param success: there, ``[N]``.
        """
        if self._x is None:
            self._x, self._loss, self._success = x, loss, success
            return
        better = (success & ~self._success) | ((success == self._success) & (loss > self._loss))
        self._x = torch.where(rows(better, x), x, self._x)
        self._loss, self._success = torch.where(better, loss, self._loss), self._success | success


def _checked_labels(x: Tensor, y: Tensor) -> Tensor:
    return class_labels(y, len(x), "one for each input", "y").to(x.device)


def _refuse_training_norms(classifier: Any) -> None:
    """:raises ValueError: if attacked inputs would enter a network's running statistics."""
    for name, module in classifier.named_modules() if isinstance(classifier, nn.Module) else ():
        if isinstance(module, BATCH_NORMS + INSTANCE_NORMS) and module.training and module.track_running_stats:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) is in training mode, where attacks change its statistics: call .eval() first"
            )

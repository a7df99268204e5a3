"""The loss that an attack raises, with its gradient: of a network, of a posterior, or a custom one."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_advbayes.attacks.geometry import flat, rows
from pyro_advbayes.attacks.losses import LOSSES, LabelLoss, cross_entropy
from pyro_advbayes.model.layers import refuse_inference_mode

OBJECTIVES = ("loss_of_mean", "mean_loss")


class Ascent(NamedTuple):
    """
    A loss and its gradient.

    :ivar loss: ``[N]``.
    :ivar gradient: of each example's loss with respect to that example, ``[N, ...]``.
    :ivar success: ``[N]``, whether the attack has succeeded; None if it was not requested.
    """

    loss: Tensor
    gradient: Tensor
    success: Tensor | None


class Slope(Protocol):
    """A loss with a gradient."""

    def gradient(self, x: Tensor) -> Ascent:
        """:param x: inputs ``[N, ...]``."""


class Problem(ABC):
    """A loss of each example, to be raised."""

    @abstractmethod
    def gradient(self, x: Tensor, success: bool = False) -> Ascent:
        """
        :param x: inputs ``[N, ...]``.
        :param success: whether to return the success, too.
        """

    def climb(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:return: the loss ``[N]`` at ``x``, its gradient ``[N, ...]``, and the success ``[N]``."""
        loss, gradient, success = self.gradient(x, success=True)
        assert success is not None  # since it was asked for
        return loss, gradient, success

    @abstractmethod
    def examine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the success at ``x``, ``[N]`` both, without gradients."""


class LossProblem(Problem):
    """
    A custom loss. No point counts as a success, so that the point of the highest loss is the best.

    :param loss: differentiable function of inputs ``[N, ...]`` to losses ``[N]``; each loss depends on its row only.
    """

    def __init__(self, loss: Callable[[Tensor], Tensor]) -> None:
        self._loss = loss

    def gradient(self, x: Tensor, success: bool = False) -> Ascent:
        """One pass through the custom loss and back."""
        refuse_inference_mode("the attack")
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._checked(self._loss(x), x)
            gradient = differentiate(loss, x)
        return Ascent(loss.detach(), check_gradient(gradient), self._none(x) if success else None)

    @torch.no_grad()
    def examine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._checked(self._loss(x), x), self._none(x)

    @staticmethod
    def _checked(loss: Tensor, x: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.shape != (len(x),):
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be [{len(x)}], one number for each input, not {shape}: leave out its mean or sum over rows")
        return loss

    @staticmethod
    def _none(x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)


class ClassifierProblem(Problem):
    r"""
    The loss :math:`\ell` of a classifier's predictions. With :math:`S` draws (a posterior's, or ``eot`` calls of a random classifier) it
    is one of

    .. math::
        \text{mean\_loss:}\ \frac1S \sum_s \ell(\log p_s(\cdot \mid x), y), \qquad
        \text{loss\_of\_mean:}\ \ell\Big(\log \frac1S \sum_s p_s(\cdot \mid x), y\Big).

    Either takes one pass over the draws, with one chunk in memory. For the cross-entropy of the mean this is possible since
    :math:`\nabla \log \frac1S \sum_s p_s(y) = \sum_s w_s \nabla \log p_s(y)` with :math:`w = \mathrm{softmax}_s \log p_s(y)`: a running
    log-sum-exp rescales the earlier sum. Other losses of the mean prediction go through the classifier's own backward pass.

    :param classifier: inputs ``[N, ...]`` -> logits or log-probabilities ``[N, K]``. Its method ``log_probs``, if there is one, gives those
        of its draws, ``[chunk, N, K]`` at a time, and its method ``gradients`` computes their gradients faster than autograd.
    :param y: ``[N]``; the targets, if ``targeted``.
    :param str loss: a name in :data:`~pyro_advbayes.attacks.losses.LOSSES`.
    :param str objective: a name in :data:`OBJECTIVES`.
    :param bool targeted: whether the negative loss is raised.
    :param int eot: calls of the classifier for one gradient, >= 1.
    """

    def __init__(self, classifier: Callable, y: Tensor, loss: str, objective: str, targeted: bool, eot: int) -> None:
        self.classifier, self.y, self.targeted = classifier, y, targeted
        self._loss, self._eot, self._sign = LOSSES[loss], eot, -1.0 if targeted else 1.0
        self._log_probs, self._gradients = (method(classifier, name) for name in ("log_probs", "gradients"))
        self._several = self._log_probs is not None or eot > 1
        self._mean_loss = objective == "mean_loss"
        self._reduce = log_sum if loss == "cross_entropy" and self._several and not self._mean_loss else sum_of(self._loss)
        self._needs_third = loss == "dlr"
        self._seen = False

    def gradient(self, x: Tensor, success: bool = False) -> Ascent:
        """One pass over the draws, chunk by chunk, and back."""
        refuse_inference_mode("the attack")
        x = x.detach().requires_grad_()
        if self._several and not self._mean_loss and self._loss is not cross_entropy:
            return self._gradient_of_mean(x, success)
        mean, total = _LogMean(), _LogSum() if self._reduce is log_sum else _Sum()
        for log_probs, part, gradient in self._slopes(x):
            total.add(part, gradient, len(log_probs))
            if success:
                mean.add(log_probs)
            del log_probs, part, gradient  # before the next chunk is there
        loss, gradient = total.result()
        return Ascent(loss * self._sign, check_gradient(gradient) * self._sign, self.succeeds(mean.result()) if success else None)

    def _slopes(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Log-probabilities ``[chunk, N, K]``, the part ``[N]`` of their draws in the loss, and its gradient, chunk by chunk."""
        if self._gradients is not None:
            try:
                for _ in range(self._eot):
                    for log_probs, part, gradient in self._gradients(x, self.y, self._reduce):
                        yield self._checked(log_probs, "[chunk, N, K]"), part, gradient
            except (RuntimeError, IndexError):  # perhaps of labels or classes that are unchecked so far: the draws are checked here
                with torch.no_grad():
                    for _ in self.draws(x):
                        pass
                raise
            self._seen = True
            return
        with torch.enable_grad():
            for log_probs in self.draws(x):
                part = self._reduce(log_probs, self.y)
                gradient = differentiate(part, x)
                yield log_probs.detach(), part.detach(), gradient
                del log_probs, part, gradient

    def _gradient_of_mean(self, x: Tensor, success: bool) -> Ascent:
        with torch.enable_grad():
            outputs = [self._checked(self.classifier(x), "[N, K]") for _ in range(self._eot)]
            if self._eot > 1:
                log_probs = torch.stack(outputs).log_softmax(-1).logsumexp(0) - math.log(self._eot)
            else:
                log_probs = outputs[0]
            self._seen = True
            loss = self._loss(log_probs, self.y)
            gradient = differentiate(loss, x)
        found = self.succeeds(log_probs.detach()) if success else None
        return Ascent(loss.detach() * self._sign, check_gradient(gradient) * self._sign, found)

    @torch.no_grad()
    def examine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the draws, chunk by chunk, without gradients."""
        mean, total, count = _LogMean(), torch.zeros((), device=x.device), 0
        for log_probs in self.draws(x):
            mean.add(log_probs)
            if self._mean_loss:
                total, count = total + self._loss(log_probs, self.y).sum(0), count + len(log_probs)
        log_probs = mean.result()
        loss = total / count if self._mean_loss else self._loss(log_probs, self.y)
        return loss * self._sign, self.succeeds(log_probs)

    def succeeds(self, log_probs: Tensor) -> Tensor:
        """
        Whether the attack has succeeded at predictions ``[N, K]``.

        :raises ValueError: if there is NaN among them, which would count as a success.
        """
        check_outputs(log_probs, len(self.y))
        right = log_probs.argmax(-1) == self.y
        return right if self.targeted else ~right

    def draws(self, x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities ``[chunk, N, K]``, chunk by chunk."""
        for _ in range(self._eot):
            if self._log_probs is None:
                yield self._checked(self.classifier(x), "[N, K]").log_softmax(-1).unsqueeze(0)
            else:
                for log_probs in self._log_probs(x):
                    yield self._checked(log_probs, "[chunk, N, K]")
        self._seen = True

    def _checked(self, outputs: Tensor, shape: str) -> Tensor:
        """Checks the outputs of all draws at the first call; later errors show in the result of the attack."""
        if not self._seen:
            check_outputs(outputs, len(self.y), shape)
            check_labels(self.y, outputs.shape[-1])
            if self._needs_third and outputs.shape[-1] < 3:
                raise ValueError("loss='dlr' compares three logits, but the classifier has 2 classes: take 'cross_entropy' or 'margin'")
        return outputs


def method(classifier: Callable, name: str) -> Callable | None:
    """A classifier's method; a layer of that name is ignored."""
    return getattr(classifier, name) if callable(getattr(type(classifier), name, None)) else None


def check_outputs(outputs: Tensor, count: int, shape: str = "[N, K]") -> None:
    """:raises ValueError: unless ``outputs`` are logits of N = ``count`` inputs, no NaN and no plus infinity among them."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(f"the classifier must give a tensor of logits {shape}, not {getattr(outputs, 'dtype', type(outputs).__name__)}")
    if outputs.dim() != shape.count(",") + 1 or outputs.shape[-2] != count or outputs.shape[-1] < 2:
        raise ValueError(
            f"the classifier must give logits {shape}, a row for each of the {count} inputs and K >= 2 classes; it gave "
            f"{tuple(outputs.shape)}"
        )
    bad = (outputs.isnan() | outputs.isposinf()).any(-1)
    bad = bad.flatten(0, -2).any(0) if bad.dim() > 1 else bad
    if bool(bad.any()):
        places = bad.nonzero().flatten()
        raise ValueError(
            f"the classifier gives NaN or infinite logits for {len(places)} of {count} inputs, the first in row {int(places[0])}: check "
            "its weights (or draws) and the inputs"
        )


def check_labels(y: Tensor, num_classes: int) -> None:
    """:raises ValueError: unless all labels are classes."""
    if int(y.min()) < 0 or int(y.max()) >= num_classes:
        raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, but the classifier has the classes 0 to {num_classes - 1}")


def differentiate(loss: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``loss`` ``[N]`` with respect to ``x``; each loss depends on its row."""
    gradient = torch.autograd.grad(loss.sum(), x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError("the loss does not depend on the inputs in a way that can be differentiated: attack it without gradients (Square)")
    return gradient


def check_gradient(gradient: Tensor) -> Tensor:
    """
    The gradient itself, once it is known to be finite: the sign of NaN is 0, which would hide a failed attack.

    :raises ValueError: unless it is finite.
    """
    if not bool(gradient.isfinite().all()):
        bad = int(flat(~gradient.isfinite()).any(1).sum())
        raise ValueError(f"gradients of the loss are NaN or infinite for {bad} of {len(gradient)} inputs: check the weights (or draws)")
    return gradient


@functools.cache  # one function for each loss, since a posterior keeps its recordings by function
def sum_of(loss: LabelLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The sum of a loss over draws ``[chunk, N, K]``."""
    return lambda log_probs, y: loss(log_probs, y).sum(0)


def log_sum(log_probs: Tensor, y: Tensor) -> Tensor:
    """The logarithm of the label's probabilities, summed over draws ``[chunk, N, K]``."""
    return (-cross_entropy(log_probs, y)).logsumexp(0)


class _Sum:
    """Losses averaged over draws, and their gradients."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def add(self, part: Tensor, gradient: Tensor, count: int) -> None:
        """Adds the part ``[N]`` of ``count`` draws in the loss, and its gradient ``[N, ...]``."""
        self._count += count
        if self._sums is None:
            self._sums = part, gradient.contiguous()  # what autograd gives may be an expanded view
        else:
            self._sums = self.joined(*self._sums, part, gradient)

    def joined(self, total: Tensor, gradients: Tensor, part: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return total + part, gradients.add_(gradient)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        assert self._sums is not None  # there is one draw at least
        return self._sums

    def result(self) -> tuple[Tensor, Tensor]:
        total, gradients = self.sums
        return total / self._count, gradients / self._count


class _LogSum(_Sum):
    r""":math:`-\log` of the mean of :math:`e^{-\ell_s}` over draws, and its gradient."""

    def joined(self, total: Tensor, gradients: Tensor, part: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.logaddexp(total, part)
        old, new = ((share - both).exp_().nan_to_num_(0.0) for share in (total, part))  # 0 where both are log 0
        return both, gradients.mul_(rows(old, gradient)).addcmul_(gradient, rows(new, gradient))

    def result(self) -> tuple[Tensor, Tensor]:
        total, gradients = self.sums
        return math.log(self._count) - total, -gradients


class _LogMean:
    """The logarithm of probabilities averaged over draws."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, log_probs: Tensor) -> None:
        part = log_probs.logsumexp(0)
        self._total = part if self._total is None else torch.logaddexp(self._total, part)
        self._count += len(log_probs)

    def result(self) -> Tensor:
        assert self._total is not None  # there is one draw at least
        return self._total - math.log(self._count)

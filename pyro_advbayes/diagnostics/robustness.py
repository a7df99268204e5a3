r"""Robustness of predictions to perturbed inputs, as in Carbone et al., "Robustness of Bayesian neural networks to
gradient-based attacks", NeurIPS 2020.

Probabilities are ``[N, K]``, or ``[draws, N, K]``, whose mean over draws is judged. Means over inputs come with their standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import check_labels, in_chunks, predictive_mean


class Estimate(NamedTuple):
    """A mean over inputs.

    :ivar value: the mean.
    :ivar error: its standard error.
    """

    value: float
    error: float


@checked
def softmax_robustness(probs: Tensor, attacked: Tensor) -> Estimate:
    r"""One minus the mean change of the prediction in its most changed class,

    .. math:: 1 - \frac1N \sum_i \max_k |\bar p_k(x_i) - \bar p_k(\tilde x_i)|,

    with :math:`\bar p` the mean over draws of each draw's softmax: 1 where nothing changes, 0 where every label flips with certainty.
    (The authors' code applies a second softmax to these probabilities, which keeps it above 0.853 for ten classes whatever happens.)

    :param probs: ``[draws, N, K]`` or ``[N, K]``, at the clean inputs.
    :param attacked: the same at the perturbed inputs; the number of draws may differ.
    :raises ValueError: if one holds no probabilities, or the two differ in inputs or classes.
    """
    clean, moved = predictive_mean(probs), predictive_mean(attacked, "attacked")
    if clean.shape != moved.shape:
        raise ValueError(
            f"attacked has inputs and classes {list(moved.shape)}, probs has {list(clean.shape)}: give the same inputs, perturbed"
        )
    change = (clean - moved.to(clean.device)).abs().amax(-1)
    error = change.std().item() / math.sqrt(len(change)) if len(change) > 1 else math.nan
    return Estimate(1 - change.mean().item(), error)


@checked
def accuracy_under_attack(attacked: Tensor, labels: Tensor) -> Estimate:
    r"""The share of perturbed inputs whose most probable class is still the label.

    The error is half the width of Wilson's score interval at one standard deviation, with share :math:`p`,

    .. math:: \frac{\sqrt{p (1 - p) / N + 1 / (4 N^2)}}{1 + 1/N},

    the binomial error for large :math:`N`, and not 0 where all inputs are right, or none is.

    :param attacked: ``[draws, N, K]`` or ``[N, K]``, at the perturbed inputs.
    :param labels: ``[N]``, integers from 0 to K - 1.
    :raises ValueError: if ``attacked`` holds no probabilities, or the labels do not fit.
    """
    mean = predictive_mean(attacked, "attacked")
    right = mean.argmax(-1) == check_labels(labels, mean)
    return _share(right)


def _share(right: Tensor) -> Estimate:
    share, count = right.double().mean().item(), len(right)
    return Estimate(share, math.sqrt(share * (1 - share) / count + 0.25 / count**2) / (1 + 1 / count))


class AccuracyCurve(NamedTuple):
    """Accuracy against the size of the perturbation.

    :ivar eps: ``[E]``, sizes in the unit of the inputs, growing.
    :ivar accuracy: ``[E]``, in [0, 1].
    :ivar error: ``[E]``, see :func:`accuracy_under_attack`.
    """

    eps: Tensor
    accuracy: Tensor
    error: Tensor


@checked
def accuracy_curve(eps: Sequence[float], attacked: Iterable[Tensor], labels: Tensor) -> AccuracyCurve:
    """Accuracy under attacks of growing size.

    :param eps: the sizes, E of them, growing.
    :param attacked: for each size, probabilities ``[draws, N, K]`` or ``[N, K]`` at the perturbed inputs; a generator keeps only
        one in memory.
    :param labels: ``[N]``, integers from 0 to K - 1.
    :raises ValueError: if sizes do not grow, or there are not as many as predictions; else as :func:`accuracy_under_attack`.
    """
    sizes = [float(size) for size in eps]
    if not sizes or any(not low < high for low, high in pairwise(sizes)):
        raise ValueError(f"eps must be one number or more, in increasing order, got {sizes}")
    found = [accuracy_under_attack(probs, labels) for probs in attacked]
    if len(found) != len(sizes):
        raise ValueError(f"eps has {len(sizes)} sizes, attacked has {len(found)} predictions: give one for each")
    values, errors = zip(*found, strict=True)
    return AccuracyCurve(*(torch.tensor(column, dtype=torch.float64) for column in (sizes, values, errors)))


class GradientNorms(NamedTuple):
    r"""Norms of the gradient of the expected loss at N inputs, for C growing numbers of draws.

    :ivar draws: ``[C]``, the number of draws that were averaged.
    :ivar linf: ``[C, N]``, the largest absolute component of each input's mean gradient.
    :ivar l2: ``[C, N]``, its Euclidean norm.
    :ivar l2_by_chance: ``[C, N]``, the l2 norm (root mean square) that as many independent gradients of these lengths would average to
        if their expectation were zero, :math:`\sqrt{\frac1n \mathrm{mean}_s |g_s|^2}`.
    """

    draws: Tensor
    linf: Tensor
    l2: Tensor
    l2_by_chance: Tensor

    @property
    def share_falling(self) -> Estimate:
        """The share of inputs whose linf norm falls from each number of draws to the next."""
        if len(self.draws) < 2:
            raise ValueError("share_falling compares numbers of draws: there is only one")
        return _share((self.linf.diff(dim=0) < 0).all(0))


@checked
def gradient_norms(gradients: Tensor | Iterable[Tensor], draws: Sequence[int] | None = None) -> GradientNorms:
    r"""The size of the gradient of the expected loss with respect to the inputs, for growing numbers of draws,

    .. math:: \Bigl| \frac1n \sum_{s=1}^n \nabla_x L(x_i, \theta_s) \Bigr|.

    Carbone et al. prove that it vanishes on the data manifold in the limit of infinite data and width. A norm that falls with n does
    not show this, since the error of a mean of n independent gradients falls as :math:`n^{-1/2}`. The gradient has vanished where ``l2``
    stays at ``l2_by_chance``. Shuffle the draws of a chain, so that the first n are a sample of all.

    :param gradients: each draw's gradient of the loss, ``[draws, N, *input]``, or chunks of draws of this form, one after the other.
    :param draws: the numbers n, increasing, each >= 1; by default 1, 10, 50, 100, 500, 1000, ... up to the number of draws, and all draws.
    :raises ValueError: if there are fewer draws than a number n, or a gradient is not finite.
    """
    wanted = None if draws is None else list(draws)
    if wanted is not None and (not wanted or wanted[0] < 1 or sorted(set(wanted)) != wanted):
        raise ValueError(f"draws must be numbers >= 1 in increasing order, got {wanted}")
    seen, rows = 0, []
    total = squares = torch.zeros((), dtype=torch.float64)
    for chunk in in_chunks(gradients, "gradients"):
        if chunk.dim() < 2 or 0 in chunk.shape:
            raise ValueError(f"gradients must be a tensor [draws, N, *input], or chunks of draws of this form, not {list(chunk.shape)}")
        if not chunk.isfinite().all():
            raise ValueError(f"gradients has entries that are NaN or infinite, among the draws after {seen}")
        flat = chunk.detach().reshape(*chunk.shape[:2], -1).double()
        stops = [n - seen for n in (_usual(seen + len(flat)) if wanted is None else wanted) if seen < n <= seen + len(flat)]
        for start, stop in zip([0, *stops], [*stops, len(flat)], strict=True):
            if start == stop:
                continue
            part = flat[start:stop]
            total, squares = total + part.sum(0), squares + part.square().sum((0, 2))
            if stop in stops:
                rows.append(_norms(seen + stop, total, squares))
        seen += len(flat)
    if seen and wanted is None and (not rows or rows[-1][0] < seen):
        rows.append(_norms(seen, total, squares))
    if not rows or (wanted is not None and len(rows) < len(wanted)):
        raise ValueError(f"draws={wanted} asks for more draws than there are: {seen}")
    counts, *norms = zip(*rows, strict=True)
    return GradientNorms(torch.tensor(counts), *(torch.stack(column) for column in norms))


def _usual(most: int) -> list[int]:
    """1, 10, 50, 100, 500, ... up to ``most``."""
    return [1] + [n for power in range(1, len(str(most))) for n in (10**power, 5 * 10**power) if n <= most]


def _norms(count: int, total: Tensor, squares: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    mean = total / count
    return count, mean.abs().amax(-1), mean.norm(dim=-1), (squares / count**2).sqrt()

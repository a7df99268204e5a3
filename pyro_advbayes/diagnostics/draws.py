r"""Accuracy of single draws of a posterior, and of their mean on the inputs it is most certain of: the measures of Zhang et
al., "Improving Bayesian neural networks by adversarial sampling", AAAI 2022.

Some draws may be bad where the mean prediction is good: :func:`draw_quality` gives the lowest and the highest accuracy of a draw beside
that of the mean prediction. ::

    network = ab.PosteriorClassifier(model, guide=guide, num_samples=100)
    quality = draw_quality(network.log_probs(x), y)
    quality.lowest, quality.highest, quality.ensembled.value
    retained_accuracy(quality.probs, y)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import ROUNDING, check_labels, check_probs, in_chunks, predictive_mean
from pyro_advbayes.diagnostics.robustness import Estimate, accuracy_under_attack
from pyro_advbayes.diagnostics.uncertainty import predictive_entropy
from pyro_advbayes.given import need_tensor


class DrawQuality(NamedTuple):
    r"""
    Accuracies of S draws and of their mean, on N inputs.

    :ivar accuracy: ``[S]``, of each draw, in [0, 1].
    :ivar ensembled: accuracy of the mean prediction :math:`\bar p`, with its standard error over inputs.
    :ivar probs: ``[N, K]``, the mean prediction.
    """

    accuracy: Tensor
    ensembled: Estimate
    probs: Tensor

    @property
    def lowest(self) -> float:
        """The accuracy of the worst draw. It falls with the number of draws: compare equal numbers."""
        return self.accuracy.min().item()

    @property
    def highest(self) -> float:
        """The accuracy of the best draw."""
        return self.accuracy.max().item()

    @property
    def mean(self) -> float:
        """The mean accuracy of a draw."""
        return self.accuracy.mean().item()

    @property
    def spread(self) -> float:
        """The difference of the highest and the lowest."""
        return self.highest - self.lowest

    def __str__(self) -> str:
        value, error = self.ensembled
        return (
            f"{len(self.accuracy)} draws: lowest {self.lowest:.4f}, highest {self.highest:.4f}, mean {self.mean:.4f}, "
            f"ensembled {value:.4f} ± {error:.4f}"
        )


@checked
def draw_quality(log_probs: Tensor | Iterable[Tensor], labels: Tensor) -> DrawQuality:
    """Accuracies of the draws of a posterior and of their mean.

    :param log_probs: logarithms of each draw's probabilities, ``[draws, N, K]``, or an iterable of such chunks, of which one is in memory
        at a time: ``PosteriorClassifier.log_probs(x)``, or ``Predictive``'s logits after ``log_softmax(-1)``.
    :param labels: ``[N]``, integers from 0 to K - 1.
    :raises ValueError: if these are not logarithms of probabilities, there is no draw, or the labels do not fit.
    """
    right, total, count = [], torch.zeros((), dtype=torch.float64), 0
    for chunk in in_chunks(log_probs, "log_probs"):
        if not chunk.is_floating_point() or chunk.dim() != 3:
            raise ValueError("log_probs must be a tensor [draws, N, K] of floating type, or chunks of draws of this form")
        if chunk.numel() and not (chunk <= 1e-4).all():
            raise ValueError("log_probs has entries above 0: give logarithms of probabilities, logits.log_softmax(-1) or probs.log()")
        probs = check_probs(_normalised(chunk.detach()).exp(), ranks=(3,), name="log_probs.exp()")
        right.append((probs.argmax(-1) == check_labels(labels, probs)).double().mean(-1))
        total, count = total + probs.sum(0), count + len(probs)
    if not count:
        raise ValueError("log_probs holds no draws")
    mean = total / count
    return DrawQuality(torch.cat(right), accuracy_under_attack(mean, labels), mean)


def _normalised(log_probs: Tensor) -> Tensor:
    """In float64; rows that sum to 1 up to the rounding of their type are normalised, the others do not change."""
    # a logarithm l is rounded by up to |l| eps / 2, so that the sum is off by the entropy times eps / 2, and the entropy is at most log K
    rounding = max(ROUNDING, math.log(max(1, log_probs.shape[-1])) * torch.finfo(log_probs.dtype).eps)
    log_probs = log_probs.double()
    total = log_probs.logsumexp(-1, keepdim=True)
    return torch.where(total.abs() <= rounding, log_probs - total, log_probs)


class RetainedAccuracy(NamedTuple):
    """Accuracy on the inputs that a posterior is most certain of.

    :ivar share: ``[R]``, the share of inputs that are kept, increasing.
    :ivar accuracy: ``[R]``, the accuracy on them.
    """

    share: Tensor
    accuracy: Tensor


@checked
def retained_accuracy(
    probs: Tensor, labels: Tensor, shares: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0), *, uncertainty: Tensor | None = None
) -> RetainedAccuracy:
    r"""Uncertainty-retained accuracy: of the mean prediction, on the share of inputs with the lowest uncertainty.

    Of inputs with equal uncertainty at the threshold the fraction that fits counts, so that the order of the inputs does not matter.

    :param probs: ``[draws, N, K]`` or ``[N, K]``.
    :param labels: ``[N]``, integers from 0 to K - 1.
    :param shares: which shares are kept, in (0, 1], growing; a share of N inputs is rounded to whole ones, one at least.
    :param uncertainty: ``[N]``, higher for less certain; by default the total uncertainty, :math:`H(\bar p)`.
    :raises ValueError: if a share is out of range, or the arguments do not fit each other.
    """
    mean = predictive_mean(probs)
    right = (mean.argmax(-1) == check_labels(labels, mean)).double()
    kept = [float(share) for share in shares]
    if not kept or not all(0 < share <= 1 for share in kept) or any(not low < high for low, high in pairwise(kept)):
        raise ValueError(f"shares must be numbers in (0, 1] in increasing order, got {kept}")
    score = (
        predictive_entropy(mean) if uncertainty is None else need_tensor(uncertainty, "uncertainty").detach().to(mean.device, torch.double)
    )
    if score.shape != right.shape or not score.isfinite().all():
        raise ValueError(f"uncertainty must be [{len(right)}], one finite number per input of probs, not {list(score.shape)}")
    accuracies = []
    for share in kept:
        size = max(1, round(share * len(right)))
        edge = score.kthvalue(size).values
        inside, at_edge = score < edge, score == edge
        fits = (size - inside.sum()).double() / at_edge.sum()
        accuracies.append((right[inside].sum() + fits * right[at_edge].sum()) / size)
    return RetainedAccuracy(torch.tensor(kept, dtype=torch.double), torch.stack(accuracies).cpu())

r"""Accuracy and calibration of classifiers.

All functions take probabilities ``[N, K]``, or ``[draws, N, K]``, whose mean over draws is judged, and labels
``[N]``, integers from 0 to K - 1; they raise ``ValueError`` on anything else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import check_labels, predictive_mean
from pyro_advbayes.given import check_int


@checked
def accuracy(probs: Tensor, labels: Tensor) -> float:
    """The share of inputs whose most probable class is the label, in [0, 1]."""
    mean = predictive_mean(probs)
    return (mean.argmax(-1) == check_labels(labels, mean)).double().mean().item()


@checked
def nll(probs: Tensor, labels: Tensor) -> float:
    r"""Negative log-likelihood, :math:`-\frac1N\sum_i \log \bar p_{i,y_i}`, in nats per input.

    A label of probability 0 makes it infinite; scikit-learn's ``log_loss`` clips instead.
    """
    mean = predictive_mean(probs)
    return torch.nn.functional.nll_loss(mean.log(), check_labels(labels, mean)).item()


@checked
def brier(probs: Tensor, labels: Tensor) -> float:
    r"""Brier's score, :math:`\frac1N\sum_i\sum_k (\bar p_{ik} - [y_i = k])^2`, in [0, 2]: Brier's own form, not halved."""
    mean = predictive_mean(probs)
    truth = torch.nn.functional.one_hot(check_labels(labels, mean), mean.shape[-1])
    return (mean - truth).square().sum(-1).mean().item()


class Reliability(NamedTuple):
    """Accuracy as a function of confidence: the numbers of a reliability diagram.

    :ivar edges: ``[num_bins + 1]``, bin ``b`` holding confidences in ``(edges[b], edges[b + 1]]``.
    :ivar count: ``[num_bins]``, inputs in each bin.
    :ivar confidence: ``[num_bins]``, their mean confidence; NaN in an empty bin.
    :ivar accuracy: ``[num_bins]``, the share of them that is right; NaN in an empty bin.
    """

    edges: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which has no meaning here
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        r"""Expected calibration error, :math:`\sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|`."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return ((gap * self.count).sum() / self.count.sum()).item()


@checked
def reliability(probs: Tensor, labels: Tensor, num_bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins of equal width.

    :param num_bins: number of bins on [0, 1], each open on the left and closed on the right. (torchmetrics closes them on
        the left, so that a confidence on an edge, as in a vote of few draws, counts one bin higher.)
    :raises ValueError: if ``num_bins`` is below 1.
    """
    check_int(num_bins, "num_bins", 1)
    mean = predictive_mean(probs).detach()
    confidence, prediction = mean.max(-1)
    right = (prediction == check_labels(labels, mean)).double()
    edges = torch.arange(num_bins + 1, dtype=torch.float64, device=mean.device) / num_bins
    # Compared in float32: a float32 0.2 lies on the edge 3/15, and the rounding of a mean over draws does not matter.
    bins = torch.bucketize(confidence.float(), edges[1:-1].float())
    count = torch.bincount(bins, minlength=num_bins)
    sums = (torch.bincount(bins, weights=values, minlength=num_bins) for values in (confidence, right))
    return Reliability(edges, count, *(total / count for total in sums))


@checked
def ece(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error, in [0, 1], over bins of confidence that are closed on the right; see
    :func:`reliability`."""
    return reliability(probs, labels, num_bins).ece

"""The inputs of a pool to label next, from the predictions of draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import check_probs
from pyro_advbayes.diagnostics.regression import check_normals
from pyro_advbayes.diagnostics.uncertainty import mutual_information, predictive_entropy, variation_ratio
from pyro_advbayes.given import check_choice, check_int

SCORES = {"entropy": predictive_entropy, "bald": mutual_information, "variation_ratio": variation_ratio}
ACQUISITIONS = (*SCORES, "batch_bald", "random")
DECIMALS = 12  # further ones are rounding: sums in another order must tie
REGRESSION_ACQUISITIONS = ("variance", "mean_variance", "random")
LABELS_AT_ONCE = 64  # joint labels whose probabilities with every label of the pool are held in memory together


@checked
def acquire(probs: Tensor, count: int, acquisition: str = "bald") -> Tensor:
    """
    The inputs to label next.

    :param probs: of the pool, ``[draws, N, K]``.
    :param int count: number of inputs, 1 to N.
    :param str acquisition: ``"entropy"``, ``"bald"`` (mutual information) or ``"variation_ratio"`` choose the highest scores, the first
        input in a tie; ``"batch_bald"``: see :func:`batch_bald`; ``"random"``.
    :return: their indices, ``[count]``, the highest score first.
    :raises ValueError: naming the argument out of range.
    """
    num_inputs = check_probs(probs, ranks=(3,)).shape[1]
    check_int(count, "count", 1, "inputs to label of the pool", most=num_inputs)
    if acquisition == "random":
        return torch.randperm(num_inputs)[:count].to(probs.device)
    if acquisition == "batch_bald":
        return batch_bald(probs, count)
    check_choice(acquisition, "acquisition", ACQUISITIONS)
    return SCORES[acquisition](probs).double().round(decimals=DECIMALS).sort(descending=True, stable=True).indices[:count]


@checked
def acquire_regression(mean: Tensor, scale: Tensor | float, count: int, acquisition: str = "variance") -> Tensor:
    r"""
    The inputs of a regression to label next, from the Normals that draws predict.

    :param mean: of the pool, ``[draws, N]``.
    :param scale: standard deviations, > 0, of a shape that broadcasts to that of ``mean``.
    :param int count: number of inputs, 1 to N.
    :param str acquisition: ``"variance"`` chooses the highest predictive variances,
        :math:`\frac1S \sum_s \sigma_s^2 + \frac1S \sum_s (\mu_s - \bar\mu)^2`; ``"mean_variance"`` the highest second terms,
        the disagreement of draws. With heteroscedastic noise the first term prefers noisy inputs, which labels do not improve; with
        homoscedastic noise both rank alike. ``"random"``. In a tie the first input comes first.
    :return: their indices, ``[count]``, the highest score first.
    :raises ValueError: naming the argument out of range.
    """
    mean, scale = check_normals(mean, scale, ranks=(2,))
    check_int(count, "count", 1, "inputs to label of the pool", most=mean.shape[1])
    check_choice(acquisition, "acquisition", REGRESSION_ACQUISITIONS)
    if acquisition == "random":
        return torch.randperm(mean.shape[1])[:count].to(mean.device)
    score = mean.var(0, correction=0)
    if acquisition == "variance":
        score = score + scale.square().mean(0)
    return score.sort(descending=True, stable=True).indices[:count]


@checked
def batch_bald(probs: Tensor, count: int, num_labels: int = 1000) -> Tensor:
    r"""
    Inputs whose labels together are most informative about the draws: one after the other, each raises

    .. math:: I(y_1, \ldots, y_b; t) = H(y_1, \ldots, y_b) - \frac1T \sum_t \sum_{i=1}^b H(p_t(y_i))

    the most, so that no two of them are redundant. Ties go to the first.

    Source: A. Kirsch, J. van Amersfoort and Y. Gal, BatchBALD: efficient and diverse batch acquisition for deep Bayesian active
    learning, NeurIPS 2019, Eq. 8 to 14.

    :param probs: of the pool, ``[draws, N, K]``.
    :param int count: number of inputs, 1 to N.
    :param int num_labels: >= 1; the expectation is exact up to this number of joint labels, and a sample of as many beyond it.
    :return: their indices, ``[count]``, in the order in which they were chosen.
    :raises ValueError: if ``count`` or ``num_labels`` is out of range.
    """
    p = check_probs(probs, ranks=(3,))
    check_int(count, "count", 1, "inputs to label of the pool", most=p.shape[1])
    check_int(num_labels, "num_labels", 1)
    conditional = torch.special.entr(p).sum(-1).mean(0)  # [N]
    labels = _Labels(p.new_ones(len(p), 1), p.new_zeros(1), p.new_ones(1))
    chosen: list[int] = []
    flat = p.permute(0, 2, 1).flatten(1)  # [draws, K * N]
    for _ in range(count):
        # P(y | labels) = mean over draws of P_t(labels) / P(labels) p_t(y), for every y of every input
        entropy = p.new_zeros(p.shape[1])
        for part in zip(*(values.split(LABELS_AT_ONCE, -1) for values in labels), strict=True):
            given = _Labels(*part)
            of_next = (given.ratios.T @ flat / len(p)).view(-1, p.shape[2], p.shape[1])
            entropy += ((torch.special.entr(of_next).sum(1) - given.log_probs[:, None]) * given.weights[:, None]).sum(0)
        score = (entropy - conditional).round(decimals=DECIMALS)
        score[chosen] = -torch.inf
        best = int((score == score.max()).nonzero()[0])
        chosen.append(best)
        if len(chosen) < count:
            labels = _with(labels, p[:, best], num_labels)
    return torch.tensor(chosen, device=probs.device)


class _Labels(NamedTuple):
    """
    Joint labels of the inputs chosen so far, by quantities that do not underflow as their probabilities do.

    :ivar ratios: P_t(labels) / P(labels), ``[draws, labels]``.
    :ivar log_probs: log P(labels), ``[labels]``.
    :ivar weights: the share of the total probability that each represents, ``[labels]``.
    """

    ratios: Tensor
    log_probs: Tensor
    weights: Tensor


def _with(labels: _Labels, p: Tensor, num_labels: int) -> _Labels:
    """The joint labels with those of one more input; a sample of them if there are too many."""
    ratios = (labels.ratios[:, :, None] * p[:, None, :]).flatten(1)
    given = ratios.mean(0)  # P(label | labels)
    possible = given > 0
    ratios, given = ratios[:, possible], given[possible]
    log_probs = labels.log_probs.repeat_interleave(p.shape[-1])[possible] + given.log()
    weights = labels.weights.repeat_interleave(p.shape[-1])[possible] * given
    found = _Labels(ratios / given, log_probs, weights)
    if len(given) <= num_labels:
        return found
    # the sum over all labels is the mean over a sample of them that is drawn by weight
    drawn = torch.multinomial(weights, num_labels, replacement=True)
    return _Labels(found.ratios[:, drawn], log_probs[drawn], weights.sum().expand(num_labels) / num_labels)


class LearningCurve(NamedTuple):
    """
    Accuracy on test data against the number of labels, over repetitions.

    :ivar num_labels: ``[rounds]``.
    :ivar accuracy: ``[repetitions, rounds]``, in [0, 1].
    """

    num_labels: Tensor
    accuracy: Tensor

    @property
    def mean(self) -> Tensor:
        """Over repetitions, ``[rounds]``."""
        return over_repetitions(self.accuracy)[0]

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, ``[rounds]``; 0 with one repetition, from which it cannot be estimated."""
        return over_repetitions(self.accuracy)[1]


class RegressionCurve(NamedTuple):
    """
    Scores on test data against the number of labels, over repetitions.

    :ivar num_labels: ``[rounds]``.
    :ivar rmse: ``[repetitions, rounds]``, of the predictive means, in the units of the target.
    :ivar log_density: ``[repetitions, rounds]``, mean log predictive density of a test row, in nats.
    """

    num_labels: Tensor
    rmse: Tensor
    log_density: Tensor


def over_repetitions(scores: Tensor) -> tuple[Tensor, Tensor]:
    """
    :param scores: ``[repetitions, rounds]``.
    :return: their mean and its standard error, ``[rounds]``; the error is 0 with one repetition, from which it cannot be estimated.
    """
    return scores.mean(0), scores.var(0, correction=min(1, len(scores) - 1)).div(len(scores)).sqrt()

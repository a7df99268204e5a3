"""Which inputs of a pool to ask the labels of, from what draws predict for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.diagnostics.checks import check_probs
from pyro_advbayes.diagnostics.uncertainty import mutual_information, predictive_entropy, variation_ratio

SCORES = {"entropy": predictive_entropy, "bald": mutual_information, "variation_ratio": variation_ratio}
ACQUISITIONS = (*SCORES, "batch_bald", "random")
LABELS_AT_ONCE = 64  # joint labels whose probabilities with every label of the pool are held in memory together


def acquire(probs: Tensor, count: int, acquisition: str = "bald") -> Tensor:
    """
    The inputs to label next.

    :param probs: of the pool, ``[draws, N, K]``.
    :param int count: how many, 1 to N.
    :param str acquisition: ``"entropy"``, ``"bald"`` (mutual information) or ``"variation_ratio"`` take the highest scores, of which the
        first comes first in a tie; ``"batch_bald"``: see :func:`batch_bald`; ``"random"``.
    :return: their numbers, ``[count]``, the most wanted first.
    :raises ValueError: naming the argument out of range.
    """
    num_inputs = check_probs(probs, ranks=(3,)).shape[1]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= num_inputs:
        raise ValueError(f"count={count!r}: how many inputs of a pool of {num_inputs}")
    if acquisition == "random":
        return torch.randperm(num_inputs)[:count].to(probs.device)
    if acquisition == "batch_bald":
        return batch_bald(probs, count)
    if acquisition not in SCORES:
        raise ValueError(f"acquisition={acquisition!r}: choose one of {', '.join(map(repr, ACQUISITIONS))}")
    return SCORES[acquisition](probs).sort(descending=True, stable=True).indices[:count]


def batch_bald(probs: Tensor, count: int, num_labels: int = 1000) -> Tensor:
    r"""
    Inputs whose labels together tell most about which draw is right: one after the other, each raises

    .. math:: I(y_1, \ldots, y_b; t) = H(y_1, \ldots, y_b) - \frac1T \sum_t \sum_{i=1}^b H(p_t(y_i))

    the most, so that no two of them ask the same. Ties go to the first.

    Source: A. Kirsch, J. van Amersfoort and Y. Gal, BatchBALD: efficient and diverse batch acquisition for deep Bayesian active
    learning, NeurIPS 2019, Eq. 8 to 14.

    :param probs: of the pool, ``[draws, N, K]``.
    :param int count: how many, 1 to N.
    :param int num_labels: up to so many joint labels of the inputs chosen are all counted; beyond, so many are drawn.
    :return: their numbers, ``[count]``, in the order in which they were chosen.
    """
    p = check_probs(probs, ranks=(3,))
    conditional = torch.special.entr(p).sum(-1).mean(0)  # [N]
    joint, weights = p.new_ones(len(p), 1), p.new_ones(1)  # of the labels chosen so far: [draws, labels], and what each stands for
    chosen: list[int] = []
    flat = p.permute(0, 2, 1).flatten(1)  # [draws, K * N]
    for _ in range(count):
        # P(labels, y) = mean over draws of P_t(labels) p_t(y), for every y of every input
        entropy = p.new_zeros(p.shape[1])
        for part, weight in zip(joint.split(LABELS_AT_ONCE, 1), weights.split(LABELS_AT_ONCE), strict=True):
            of_both = (part.T @ flat / len(p)).view(-1, p.shape[2], p.shape[1])
            entropy += (torch.special.entr(of_both).sum(1) * weight[:, None]).sum(0)
        score = entropy - conditional
        score[chosen] = -torch.inf
        best = int(score.argmax())
        chosen.append(best)
        if len(chosen) < count:
            joint, weights = _with(joint, weights, p[:, best], num_labels)
    return torch.tensor(chosen, device=probs.device)


def _with(joint: Tensor, weights: Tensor, p: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """The joint labels with those of one more input; drawn, where there are too many."""
    joint = (joint[:, :, None] * p[:, None, :]).flatten(1)
    weights = weights[:, None].expand(-1, p.shape[-1]).flatten()
    if joint.shape[1] <= num_labels:
        return joint, weights
    shares = joint.mean(0) * weights
    drawn = torch.multinomial(shares, num_labels, replacement=True)
    # a sum over all labels is the mean over drawn ones of what they stand for, over the probability with which they were drawn
    return joint[:, drawn], weights[drawn] * shares.sum() / (shares[drawn] * num_labels)


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
        return self.accuracy.mean(0)

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, ``[rounds]``; 0 with one repetition, which tells nothing of it."""
        return self.accuracy.var(0, correction=min(1, len(self.accuracy) - 1)).div(len(self.accuracy)).sqrt()

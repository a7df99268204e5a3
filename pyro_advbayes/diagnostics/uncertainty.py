r"""Scores of uncertainty ``[N]`` of an ensemble of predictions :math:`p_t`, ``[draws, N, K]``.

With the mean :math:`\bar p = \frac1T\sum_t p_t` and the entropy :math:`H(p) = -\sum_k p_k \log p_k` in nats,
:math:`0 \log 0 = 0`. The scores that depend on the mean alone take ``[N, K]``, too. The first four are those of
Adversarial Posterior Distillation (Wang et al., ICML 2018). Every function raises ``ValueError`` where ``probs`` does not
hold probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import check_probs, like, predictive_mean


@checked
def predictive_entropy(probs: Tensor) -> Tensor:
    r"""Total uncertainty, :math:`H(\bar p)`.

    :param probs: ``[draws, N, K]`` or ``[N, K]``.
    :return: ``[N]``, in [0, log K].
    """
    return like(_entropy(predictive_mean(probs)), probs)


@checked
def variation_ratio(probs: Tensor) -> Tensor:
    r"""One minus the confidence, :math:`1 - \max_k \bar p_k`: the "variation ratio" of the APD paper's code.

    :param probs: ``[draws, N, K]`` or ``[N, K]``.
    :return: ``[N]``, in [0, 1 - 1/K].
    """
    mean = predictive_mean(probs)
    # the sum of the other classes, which is exact where the largest rounds to 1
    return like(mean.scatter(-1, mean.argmax(-1, keepdim=True), 0.0).sum(-1), probs)


@checked
def mutual_information(probs: Tensor) -> Tensor:
    r"""Disagreement of the draws, :math:`H(\bar p) - \frac1T\sum_t H(p_t)`; "BALD" in active learning.

    :param probs: ``[draws, N, K]``.
    :return: ``[N]``, in [0, log K]; 0 where all draws agree.
    """
    p = check_probs(probs, ranks=(3,))
    # rounding can leave 1e-16 of either sign where draws agree
    agree = (p == p[:1]).all(0).all(-1)
    return like((_entropy(p.mean(0)) - _entropy(p).mean(0)).clamp_min(0).masked_fill(agree, 0.0), probs)


@checked
def model_variance(probs: Tensor) -> Tensor:
    r"""The classes' variances over draws, summed: :math:`U = \frac1T\sum_t p_t \cdot p_t - \bar p \cdot \bar p`.

    :param probs: ``[draws, N, K]``.
    :return: ``[N]``, in [0, 1); 0 if and only if all draws agree.
    """
    return like(check_probs(probs, ranks=(3,)).var(0, correction=0).sum(-1), probs)


@checked
def expected_entropy(probs: Tensor) -> Tensor:
    r"""Mean uncertainty of a draw, :math:`\frac1T\sum_t H(p_t)`: the predictive entropy minus the mutual information.

    :param probs: ``[draws, N, K]``.
    :return: ``[N]``, in [0, log K].
    """
    return like(_entropy(check_probs(probs, ranks=(3,))).mean(0), probs)


@checked
def vote_variation_ratio(probs: Tensor) -> Tensor:
    r"""The share of draws that vote against the majority, :math:`1 - \frac1T \max_k |\{t : \arg\max p_t = k\}|`.

    The variation ratio of the statistics literature (Freeman, 1965). A draw votes for its first largest class.

    :param probs: ``[draws, N, K]``.
    :return: ``[N]``, in [0, 1 - 1/K].
    """
    p = check_probs(probs, ranks=(3,))
    votes = p.argmax(-1)
    counts = p.new_zeros(p.shape[1:]).scatter_add_(-1, votes.T, p.new_ones(votes.T.shape))
    return like(1 - counts.amax(-1) / len(p), probs)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)

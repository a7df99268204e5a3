"""How well a score of uncertainty tells inputs from elsewhere (out-of-distribution, adversarial) from the data's own.

All functions take scores of the data's own inputs, ``[N]``, and of the others, ``[M]``, where higher means more unusual;
1 is perfect. AUPR depends on the share of the two (by chance it is the share of the positive kind), AUROC does not. They
raise ``ValueError`` where scores are not finite vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(in_scores: Tensor, out_scores: Tensor) -> float:
    """Area under the ROC curve: the probability that one of the others scores higher than one of the data's own, ties
    counting half."""
    from sklearn.metrics import roc_auc_score  # here, not above: scikit-learn takes a second to import

    return float(roc_auc_score(*_labelled(in_scores, out_scores)))


def aupr_out(in_scores: Tensor, out_scores: Tensor) -> float:
    """Average precision with the others as the positive kind ("AUPR+")."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_labelled(in_scores, out_scores)))


def aupr_in(in_scores: Tensor, out_scores: Tensor) -> float:
    """Average precision with the data's own as the positive kind, by the negative score ("AUPR-")."""
    from sklearn.metrics import average_precision_score

    labels, scores = _labelled(in_scores, out_scores)
    return float(average_precision_score(1 - labels, -scores))


def _labelled(negative: Tensor, positive: Tensor) -> tuple:
    """Labels and scores of both kinds, as scikit-learn takes them."""
    for scores in (negative, positive):
        if not isinstance(scores, Tensor) or scores.dim() != 1 or len(scores) == 0:
            raise ValueError(f"scores must be vectors with one score per input, not {getattr(scores, 'shape', scores)}")
        if not scores.isfinite().all():
            raise ValueError("scores has entries that are NaN or infinite")
    scores = torch.cat([negative.detach().cpu(), positive.detach().cpu()]).double()
    labels = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))])
    return labels.numpy(), scores.numpy()

"""How well a score of uncertainty detects out-of-distribution or adversarial inputs.

The four measures take scores of in-distribution inputs, ``[N]``, and of the others, ``[M]``, where higher means more unusual. AUPR
depends on the share of the two (at chance level it is the share of the positive kind), AUROC and FPR95 do not. They raise ``ValueError``
where scores are not finite vectors, and ``ModuleNotFoundError`` without scikit-learn, the extra ``sklearn``. :func:`ood_detection` and
:func:`adversarial_detection` take the probabilities of draws, and give all measures of all scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.checks import check_probs
from pyro_advbayes.diagnostics.uncertainty import model_variance, mutual_information, predictive_entropy, variation_ratio
from pyro_advbayes.given import need_extra, need_tensor

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": predictive_entropy,
    "variation ratio": variation_ratio,
    "mutual information": mutual_information,
    "model variance": model_variance,
}


class Detection(NamedTuple):
    """Measures of one score: :func:`auroc`, :func:`aupr_out`, :func:`aupr_in`, :func:`fpr95`, each in [0, 1]."""

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr95: float


@checked
def detection(in_scores: Tensor, out_scores: Tensor) -> Detection:
    """All four measures of one score."""
    return Detection(*(measure(in_scores, out_scores) for measure in (auroc, aupr_out, aupr_in, fpr95)))


@checked
def ood_detection(in_probs: Tensor, out_probs: Mapping[str, Tensor]) -> dict[str, dict[str, Detection]]:
    """
    All measures of all scores for several out-of-distribution sets. ::

        table = ood_detection(probs(x_test), {"notMNIST": probs(letters), "uniform": probs(noise)})
        table["notMNIST"]["entropy"].auroc

    :param in_probs: probabilities of in-distribution inputs, ``[draws, N, K]``; ``[N, K]`` of a single network, without the scores of
        disagreement.
    :param out_probs: set -> ``[draws, M, K]`` (or ``[M, K]``).
    :return: set -> score (``"entropy"``, ``"variation ratio"``, ``"mutual information"``, ``"model variance"``) -> :class:`Detection`.
    :raises ValueError: if these are not probabilities, or differ in their number of classes or dimensions.
    """
    return _table(in_probs, "in_probs", out_probs, {name: f"out_probs[{name!r}]" for name in out_probs})


def _table(own: Tensor, own_name: str, others: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, dict[str, Detection]]:
    """
    Detections by set and score.

    :param own_name: the caller's argument, for messages.
    :param names: likewise, by set.
    """
    own_scores = _scores(own, own_name)
    table = {}
    for key, probs in others.items():
        if need_tensor(probs, names[key]).dim() != own.dim() or probs.shape[-1] != own.shape[-1]:
            raise ValueError(
                f"{names[key]}: probabilities must be [draws, M, K] with the K of {own_name}, which is {_kind(own)}; got {_kind(probs)}"
            )
        scores = _scores(probs, names[key])
        table[key] = {score: detection(own_scores[score], scores[score]) for score in own_scores}
    return table


class AdversarialDetection(NamedTuple):
    """
    Detection of attacked inputs, by score.

    :ivar all: score -> :class:`Detection` of all attacked inputs.
    :ivar hit: the same for inputs at which the attack succeeded against the source; None if there are none.
    :ivar missed: the same for the others; None if there are none.
    :ivar hit_share: share of successful attacks, in [0, 1].
    """

    all: dict[str, Detection]
    hit: dict[str, Detection] | None
    missed: dict[str, Detection] | None
    hit_share: float


@checked
def adversarial_detection(clean_probs: Tensor, attacked_probs: Tensor, hit: Tensor) -> AdversarialDetection:
    """
    How well the uncertainty of a model, the detector, separates attacked from clean inputs. The attack may target another model, the
    source, which decides whether it succeeded.

    :param clean_probs: the detector's probabilities of clean inputs, ``[draws, N, K]`` or ``[N, K]``.
    :param attacked_probs: the detector's probabilities of attacked inputs, ``[draws, M, K]`` or ``[M, K]``.
    :param hit: whether the source is wrong at each attacked input, bool ``[M]``.
    :raises ValueError: if these are not probabilities, no input was attacked, or ``hit`` does not fit.
    """
    for name, value in (("attacked_probs", attacked_probs), ("hit", hit)):
        if not need_tensor(value, name).numel():
            raise ValueError(f"{name} is {_kind(value)}: a tensor is needed, of one attacked input at least")
    if attacked_probs.dim() < 2:
        raise ValueError(f"attacked_probs is {_kind(attacked_probs)}: [draws, M, K] or [M, K] is needed")
    if hit.dtype != torch.bool or hit.shape != attacked_probs.shape[-2:-1]:
        raise ValueError(f"hit is {hit.dtype} {_kind(hit)}: a bool for each of the {attacked_probs.shape[-2]} attacked inputs is needed")
    parts = {"all": torch.ones_like(hit), "hit": hit, "missed": ~hit}
    chosen = {name: attacked_probs[..., rows, :] for name, rows in parts.items() if bool(rows.any())}
    table = _table(clean_probs, "clean_probs", chosen, dict.fromkeys(chosen, "attacked_probs"))
    return AdversarialDetection(table["all"], table.get("hit"), table.get("missed"), float(hit.double().mean()))


def _kind(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _scores(probs: Tensor, name: str) -> dict[str, Tensor]:
    draws = check_probs(probs, name=name).dim() == 3
    return {name: score(probs) for name, score in SCORES.items() if draws or name in ("entropy", "variation ratio")}


@checked
def auroc(in_scores: Tensor, out_scores: Tensor) -> float:
    """Area under the ROC curve: the probability that an out-of-distribution input scores higher than an in-distribution one, ties
    counting half."""
    return float(need_extra("sklearn.metrics", "sklearn").roc_auc_score(*_labelled(in_scores, out_scores)))


@checked
def aupr_out(in_scores: Tensor, out_scores: Tensor) -> float:
    """Average precision with out-of-distribution inputs as the positive kind ("AUPR+")."""
    return float(need_extra("sklearn.metrics", "sklearn").average_precision_score(*_labelled(in_scores, out_scores)))


@checked
def aupr_in(in_scores: Tensor, out_scores: Tensor) -> float:
    """Average precision with in-distribution inputs as the positive kind, by the negative score ("AUPR-")."""
    labels, scores = _labelled(in_scores, out_scores)
    return float(need_extra("sklearn.metrics", "sklearn").average_precision_score(1 - labels, -scores))


@checked
def fpr95(in_scores: Tensor, out_scores: Tensor) -> float:
    """The share of out-of-distribution inputs that are accepted at the threshold that accepts 95 % of the in-distribution ones; 0 is
    perfect."""
    _labelled(in_scores, out_scores)
    own = in_scores.detach().cpu().double().sort().values
    threshold = own[-(-95 * len(own) // 100) - 1]
    return float((out_scores.detach().cpu().double() <= threshold).double().mean())


def _labelled(negative: Tensor, positive: Tensor) -> tuple:
    """Labels and scores of both kinds, in scikit-learn's form."""
    for name, scores in (("in_scores", negative), ("out_scores", positive)):
        if need_tensor(scores, name).dim() != 1 or len(scores) == 0:
            raise ValueError(f"{name}: scores must be vectors with one score per input, not {list(scores.shape)}")
        if not scores.isfinite().all():
            raise ValueError(f"{name}: scores has entries that are NaN or infinite")
    scores = torch.cat([negative.detach().cpu(), positive.detach().cpu()]).double()
    labels = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))])
    return labels.numpy(), scores.numpy()

r"""
Losses of a label, which an untargeted attack raises.

Each takes log-probabilities ``[..., N, K]`` and labels ``[N]`` and gives ``[..., N]``. Margin and ratio do not change when a constant is
added to the logits, so that they take any logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LabelLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(log_probs: Tensor, y: Tensor) -> Tensor:
    r""":math:`-\log p_y`, in nats."""
    return -_of_label(log_probs, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    r""":math:`\max_{k \ne y} z_k - z_y`: positive where the label is not the prediction."""
    return _largest_other(logits, y) - _of_label(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""
    The difference-of-logits ratio :math:`(\max_{k \ne y} z_k - z_y) / (z_{(1)} - z_{(3)})`, where :math:`z_{(i)}` is the i-th largest
    logit. It does not change when logits are multiplied by a constant, so that overconfidence does not hide its gradient.

    Source: F. Croce and M. Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks, ICML
    2020, Eq. 6. A targeted attack lowers it for the target; the paper's targeted form needs the true label beside the target.
    """
    largest = logits.topk(3, dim=-1).values
    return margin(logits, y) / (largest[..., 0] - largest[..., 2]).clamp_min(torch.finfo(logits.dtype).eps)


LOSSES: dict[str, LabelLoss] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def _of_label(values: Tensor, y: Tensor) -> Tensor:
    # On a GPU a label out of range would end the process before it can be refused.
    y = y.clamp(0, values.shape[-1] - 1)
    return values.gather(-1, y.expand(values.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _largest_other(logits: Tensor, y: Tensor) -> Tensor:
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(classes == y.unsqueeze(-1), -torch.inf).amax(-1)

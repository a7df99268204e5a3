"""Checks of the arguments of diagnostics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_advbayes.given import class_labels, is_array, need_tensor

ROUNDING = 1e-4  # how far from 1 the probabilities of one prediction may sum


def check_probs(probs: Tensor, ranks: tuple[int, ...] = (2, 3), name: str = "probs") -> Tensor:
    """``probs`` in float64, checked; every row is normalised to sum 1.

    Differences of entropies and of squares cancel: in float32 only rounding would remain for two draws that agree. The rounding error of a
    largest probability near 1 may exceed the sum of all others: normalising removes it.

    :param probs: ``[N, K]`` or ``[draws, N, K]``, of any floating type.
    :param ranks: the numbers of dimensions that the caller takes.
    :param name: of the argument, for messages.
    :raises ValueError: if the rank is another, an entry is negative or not finite, or a row does not sum to 1.
    """
    if not need_tensor(probs, name).is_floating_point():
        raise ValueError(f"{name} must be a tensor of floating type, not {probs.dtype}")
    shapes = {2: "[N, K]", 3: "[draws, N, K]"}
    if probs.dim() not in ranks:
        remedy = f"; one draw is {name}[None]" if probs.dim() == 2 else ""
        raise ValueError(f"{name} must be {' or '.join(shapes[r] for r in ranks)}, not {list(probs.shape)}{remedy}")
    if probs.numel() == 0:
        raise ValueError(f"{name} must have at least one draw, input and class, not {list(probs.shape)}")
    low, total = probs.min(), probs.sum(-1)
    off = (total - 1).abs().max()
    # Written so that NaN fails, since every comparison with it is false.
    if not (low >= 0 and off <= max(ROUNDING, 2 * torch.finfo(probs.dtype).eps)):
        if not probs.isfinite().all():
            raise ValueError(f"{name} has entries that are NaN or infinite")
        if low < 0:
            raise ValueError(f"{name} has negative entries, down to {low.item():.4g}: give probabilities, not logits")
        raise ValueError(
            f"{name} must sum to 1 over the last dimension; one row is off by {off.item():.4g}: give probabilities, not logits"
        )
    probs = probs.double()
    return probs / probs.sum(-1, keepdim=True)


def predictive_mean(probs: Tensor, name: str = "probs") -> Tensor:
    """The mean over draws, ``[N, K]``, in float64; ``[N, K]`` is its own mean. Arguments are checked."""
    checked = check_probs(probs, name=name)
    return checked.mean(0) if checked.dim() == 3 else checked


def in_chunks(values: Tensor | Iterable[Tensor], name: str) -> Iterable[Tensor]:
    """Chunks of draws, of a tensor of all draws or of an iterable of chunks.

    :param name: of the argument, for messages.
    :raises ValueError: for an array that is no tensor; during iteration, for such a chunk.
    """
    if isinstance(values, Tensor) or is_array(values):
        return [need_tensor(values, name)]
    return (need_tensor(chunk, name) for chunk in values)


def like(result: Tensor, probs: Tensor) -> Tensor:
    """``result`` in the type of ``probs``, float32 at least."""
    return result.to(torch.promote_types(probs.dtype, torch.float32))


def check_labels(labels: Tensor, probs: Tensor) -> Tensor:
    """``labels`` as int64 on the device of ``probs``.

    :param labels: ``[N]``, integers from 0 to K - 1.
    :param probs: ``[..., N, K]``.
    :raises ValueError: if the shape, type or range is another.
    """
    num_rows, num_classes = probs.shape[-2:]
    labels = class_labels(labels, num_rows, "one per input of probs", "labels").to(probs.device)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels run from {low} to {high}, but probs has the classes 0 to {num_classes - 1}")
    return labels

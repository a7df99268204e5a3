"""Digests of tensors, by which data and draws are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensor_digest(value: Tensor) -> list[Any]:
    """Shape, dtype and a hash of a tensor."""
    return [list(value.shape), str(value.dtype), hash_of(value.detach().flatten().split(1 << 20))]


def hash_of(parts: Iterable[Tensor]) -> str:
    """BLAKE2b of the bytes of tensors, one after the other; only one need be in memory at a time."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()

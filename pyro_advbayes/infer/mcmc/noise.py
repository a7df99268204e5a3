"""Standard normal numbers, many at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_advbayes.tracing.guard import RandomState

# PyTorch fills shorter rows: the dozen calls below cost more than they save there.
LONG = 2**15


class NormalNoise:
    r"""
    Fills rows with standard normal numbers. On a CPU PyTorch's own generator takes half the time of a large network's step, nine tenths of
    it for uniform bits. Long float32 rows there take their bits from NumPy's SFC64, and become normal by Box and Muller: with
    :math:`u \in (0, 1]` and an angle :math:`\varphi`, each of 32 bits,

    .. math:: \sqrt{-2 \log u}\, \cos \varphi, \qquad \sqrt{-2 \log u}\, \sin \varphi.

    :param like: a state ``[chains, size]``; its dtype, device and length select the generator.
    """

    def __init__(self, like: Tensor) -> None:
        # drawn in any case, so that other random numbers do not depend on the length of a row
        seed = int(torch.randint(2**31 - 1, ()))
        own = like.device.type == "cpu" and like.dtype == torch.float32 and like.shape[-1] >= LONG
        self._bits = np.random.SFC64(seed) if own else None

    def fill(self, state: Tensor) -> None:
        """Overwrites a state ``[chains, size]``."""
        if self._bits is None:
            state.normal_()
            return
        for row in state:
            _fill_row(row, self._bits)

    def mark(self) -> Any:
        """Where the generator is, for :meth:`rewind`."""
        return RandomState(), None if self._bits is None else self._bits.state

    def rewind(self, mark: Any) -> None:
        """Goes back to a :meth:`mark`."""
        generators, bits = mark
        generators.restore()
        if self._bits is not None:
            self._bits.state = bits

    def state(self) -> dict[str, Any] | None:
        """The generator's state for :meth:`load`, as plain values; None for PyTorch's own."""
        if self._bits is None:
            return None
        return {"words": [hex(int(word)) for word in self._bits.state["state"]["state"]]}

    def load(self, state: dict[str, Any] | None) -> None:
        """Continues from a :meth:`state`."""
        if state is not None and self._bits is not None:
            words = np.array([int(word, 16) for word in state["words"]], dtype=np.uint64)
            self._bits.state = {**self._bits.state, "state": {"state": words}}


def _fill_row(row: Tensor, source: np.random.SFC64) -> None:
    half = len(row) // 2
    bits = torch.from_numpy(source.random_raw(half + 1).view(np.int32))
    radius, angle = row[:half], row[half : 2 * half]
    radius.copy_(bits[:half].bitwise_and_(2**31 - 1)).add_(0.5).mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle.copy_(bits[half : 2 * half]).mul_(math.pi * 2.0**-31)  # signed: from -π to π
    cosine = angle.cos()
    angle.sin_().mul_(radius)
    radius.mul_(cosine)
    if len(row) % 2:
        row[-1].normal_()

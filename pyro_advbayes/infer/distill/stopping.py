"""The stopping rule of a generator's training: :class:`Stopping`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.diagnostics.two_sample import sliced_wasserstein
from pyro_advbayes.infer.autoguide.rows import READY

SPLITS, RECENT, PATIENCE = 20, 3, 15


def refuse_few(count: int) -> None:
    """:raises ValueError: if there are too few draws to split them into two sets."""
    if count < 4:
        raise ValueError(
            f"{count} draws cannot be split into two sets whose distance is the bound: at least 4 are needed, or check_every=None, which "
            "trains for num_steps"
        )


class Stopping:
    """
    Stops when the sliced Wasserstein distance between generated codes and those of the draws, a mean over the last measurements, is at most
    that between two sets of draws: their mean over random splits plus one standard deviation. Gives up when it has not fallen for
    ``PATIENCE`` measurements.

    :param draw: function of an index ``[n]`` to codes ``[n, code]`` of these draws.
    :param count: number of draws.
    :param code_size: dimension of a code.
    :raises ValueError: if there are too few draws to be split.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor], count: int, code_size: int) -> None:
        refuse_few(count)
        self._draw, self._count = draw, count
        self._rows = max(2, min(2000, count // 2, READY // (2 * code_size)))
        self.distances: list[float] = []
        self.best: tuple[float, list[Tensor]] | None = None
        self.since_best = 0
        splits = torch.tensor([sliced_wasserstein(*self._two_sets()) for _ in range(SPLITS)])
        self.floor, self.threshold = float(splits.mean()), float(splits.mean() + splits.std())

    def _two_sets(self) -> tuple[Tensor, Tensor]:
        one, two = torch.randperm(self._count)[: 2 * self._rows].split(self._rows)[:2]
        return self._draw(one), self._draw(two)

    @property
    def distance(self) -> float:
        """Mean of the last measurements; nan before the first."""
        recent = self.distances[-RECENT:]
        return sum(recent) / len(recent) if recent else math.nan

    def measure(self, make: Callable[[int], Tensor], parameters: list[Tensor]) -> bool:
        """
        :param make: function of a number n to n generated codes.
        :param parameters: those of the generator; the best are remembered.
        :return: whether to stop.
        """
        real = self._draw(torch.randperm(self._count)[: self._rows])
        with torch.no_grad():
            self.distances.append(sliced_wasserstein(real, make(self._rows)))
        if len(self.distances) < RECENT:
            return False
        self.since_best += 1
        if self.best is None or self.distance < self.best[0]:
            self.best, self.since_best = (self.distance, [p.detach().clone() for p in parameters]), 0
        return self.over

    @property
    def over(self) -> bool:
        """Whether to stop, also in a restored state."""
        return self.arrived or self.since_best >= PATIENCE

    @property
    def arrived(self) -> bool:
        """Whether the distance has come down to that between draws."""
        return len(self.distances) >= RECENT and self.distance <= self.threshold

    def state(self) -> dict[str, Any]:
        """What :meth:`load` restores."""
        return {
            "distances": self.distances,
            "best": self.best,
            "since_best": self.since_best,
            "floor": self.floor,
            "threshold": self.threshold,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a :meth:`state`."""
        if set(state) != set(self.state()):
            raise ValueError(f"what decides when to stop is {sorted(map(str, state))}")
        best = state["best"]
        numbers = [*state["distances"], state["floor"], state["threshold"], *([] if best is None else best[:1])]
        if not all(isinstance(number, float) for number in numbers) or not isinstance(state["since_best"], int) or state["since_best"] < 0:
            raise ValueError("what decides when to stop holds no numbers")
        if best is not None and not all(isinstance(value, Tensor) for value in best[1]):
            raise ValueError("the best parameters are none")
        for name, value in state.items():
            setattr(self, name, value)

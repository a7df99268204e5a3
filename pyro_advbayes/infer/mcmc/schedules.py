"""Step sizes and temperatures as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from pyro_advbayes.checked import checked

Schedule = Callable[[int], float]


@checked
@dataclass(frozen=True)
class Constant:
    """The same value at every step. A plain number given for a schedule means this."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@checked
@dataclass(frozen=True)
class Polynomial:
    r"""
    :math:`a (1 + t/b)^{-\gamma}`, from Welling and Teh (2011). With :math:`\gamma \in (1/2, 1]` the steps sum to infinity and their
    squares do not; SGLD's averages then converge.

    :param float initial: a, the value at step 0, > 0.
    :param float scale: b, the number of steps after which :math:`2^{-\gamma}` of it is left, > 0.
    :param float power: :math:`\gamma` >= 0.
    """

    initial: float
    scale: float
    power: float = 0.55

    def __call__(self, step: int) -> float:
        return self.initial * (1.0 + step / self.scale) ** -self.power


@checked
@dataclass(frozen=True)
class Cyclical:
    r"""
    Cycles of a cosine from ``initial`` to 0, from Zhang et al. (2020), Eq. 1:

    .. math:: \frac{a}{2} \left[\cos\left(\pi \frac{t \bmod p}{p}\right) + 1\right].

    The hot part of a cycle finds another mode; only the cold part gives samples.

    :param float initial: a, the value at the start of every cycle, > 0.
    :param int period: p, updates in a cycle, >= 2.
    :param float explore: share of a cycle, 0 to 1, in which no sample is taken.
    """

    initial: float
    period: int
    explore: float = 0.5

    def __post_init__(self) -> None:
        if self.period < 2 or not 0.0 <= self.explore < 1.0:
            raise ValueError(f"{self}: period must be at least 2 updates and explore in [0, 1)")
        if not self.keeps(self.period - 1):
            raise ValueError(f"{self} leaves no update of a cycle to take a sample from: lower explore, or lengthen period")

    def __call__(self, step: int) -> float:
        return 0.5 * self.initial * (math.cos(math.pi * (step % self.period) / self.period) + 1.0)

    def keeps(self, step: int) -> bool:
        """Whether the state after update ``step`` may be kept as a sample."""
        return step % self.period >= self.explore * self.period


@dataclass(frozen=True)
class PerChain:
    """Constant steps, of each chain its own. As a schedule it is their geometric mean."""

    values: tuple[float, ...]

    def __call__(self, step: int) -> float:
        return math.exp(math.fsum(map(math.log, self.values)) / len(self.values))

    def write(self, relative: Tensor) -> None:
        """
        :param relative: ``[chains, 1]``, overwritten with the ratios of the steps to their mean.
        :raises ValueError: if there is another number of chains.
        """
        if len(self.values) != len(relative):
            raise ValueError(f"step_size holds {len(self.values)} numbers, one for each chain: there are {len(relative)} chains")
        relative.copy_(relative.new_tensor([value / self(0) for value in self.values])[:, None])


def as_schedule(value: Any, name: str) -> Schedule:
    """
    A schedule from a number, a function of the step, or, for a step size, a tensor or sequence of numbers, one for each chain.

    :raises ValueError: if it is none of them, or gives something else than finite numbers > 0 (>= 0 for a temperature) at step 0.
    """
    numbers = value.tolist() if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1 else value
    if name == "step_size" and isinstance(numbers, (list, tuple)) and numbers:
        return PerChain(tuple(check_value(number, f"step_size[{chain}]", 0) for chain, number in enumerate(numbers)))
    if isinstance(value, bool) or not (callable(value) or isinstance(value, (int, float))):
        raise ValueError(f"{name}={value!r}: a number or a function of the step is needed")
    schedule = value if callable(value) else Constant(float(value))
    try:
        first = schedule(0)
    except Exception as error:  # whatever a function raises that is none of the step
        raise ValueError(f"{name} is a function that fails at step 0 ({error}): give one of the update's number, an int") from error
    check_value(first, name, 0)
    return schedule


def check_value(value: Any, name: str, step: int) -> float:
    """:raises ValueError: naming the argument and the step, if a schedule gave no finite number in range."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r} at step {step}: a schedule must return a number") from None
    if not math.isfinite(number) or number < 0.0 or (number == 0.0 and not name.endswith("temperature")):
        raise ValueError(f"{name} is {number} at step {step}: it must be finite and {'>= 0' if name.endswith('temperature') else '> 0'}")
    return number


def keeps_sample(schedules: tuple[Schedule, ...], step: int) -> bool:
    """Whether all schedules allow the state after update ``step`` as a sample."""
    return all(schedule.keeps(step) for schedule in schedules if hasattr(schedule, "keeps"))


def schedule_name(schedule: Schedule) -> str:
    """The name of a schedule in a checkpoint. Not the ``repr`` of a function or a custom object, which may show its address."""
    while isinstance(schedule, partial):
        schedule = schedule.func
    if isinstance(schedule, (Constant, Polynomial, Cyclical, PerChain)):
        return repr(schedule)
    return getattr(schedule, "__qualname__", type(schedule).__qualname__)

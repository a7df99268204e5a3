"""How a benchmark measures: rivals in turn, round by round, so that a noisy machine is noisy to all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

PACKAGES = ("torch", "pyro-ppl", "numpy", "posteriors", "blackjax", "jax", "jaxlib", "foolbox")


class Missing(Exception):
    """A rival or a device that is not here; its message says why."""


class Contender(NamedTuple):
    """Something to time: a function, and how many steps one call of it takes."""

    call: Callable[[], Any]
    steps: int = 1


class Spread(NamedTuple):
    """The median of repeated measurements, their quartiles, and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


class Target(NamedTuple):
    """What a median has to reach."""

    relation: str  # "<=", ">=" or "<"
    value: float

    def met(self, median: float) -> bool:
        """Whether a median reaches it."""
        return {"<=": median <= self.value, ">=": median >= self.value, "<": median < self.value}[self.relation]

    def __str__(self) -> str:
        return f"{self.relation} {self.value:g}"


class Comparison(NamedTuple):
    """One number of the table: a ratio or a quantity, with what it has to reach (None: for information)."""

    what: str
    spread: Spread
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        return None if self.target is None else self.target.met(self.spread.median)


@dataclass
class Result:
    """What one workload gave: the measured values by name, the comparisons made of them, and what could not be measured."""

    what: str
    unit: str
    values: dict[str, Spread] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        compared = [
            {"what": c.what, **c.spread._asdict(), "target": None if c.target is None else str(c.target), "met": c.met}
            for c in self.comparisons
        ]
        values = {name: spread._asdict() for name, spread in self.values.items()}
        return {"what": self.what, "unit": self.unit, "values": values, "comparisons": compared, "missing": self.missing, **self.notes}


class Stopwatch:
    """
    Times contenders.

    :param device: whose work a measurement waits for.
    :param quick: two short rounds, to see that everything runs.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.block_seconds, self.race_seconds, self.least_rounds = (0.0, 0.0, 2) if quick else (0.15, 10.0, 7)

    def seconds(self, call: Callable[[], Any], repeats: int = 1) -> float:
        """Wall-clock seconds of ``repeats`` calls, the device's work included."""
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return time.perf_counter() - start

    def race(self, what: str, contenders: Mapping[str, Contender]) -> dict[str, list[float]]:
        """
        Milliseconds a step of every contender, round by round: A B C, B C A, and so on, each for a block of at least 0.15 s.

        :return: by name, one number per round; the rounds of all contenders belong together.
        """
        for contender in contenders.values():
            contender.call()  # traces, compiles, allocates
        once = {name: self.seconds(contender.call) for name, contender in contenders.items()}
        repeats = {name: max(1, int(self.block_seconds / max(seconds, 1e-9))) for name, seconds in once.items()}
        round_seconds = sum(once[name] * repeats[name] for name in contenders)
        rounds = max(self.least_rounds, min(40, int(self.race_seconds / round_seconds)))
        names = list(contenders)
        times: dict[str, list[float]] = {name: [] for name in names}
        for i in tqdm(range(rounds), desc=what, leave=False, disable=None):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds = self.seconds(contenders[name].call, repeats[name])
                times[name].append(1e3 * seconds / (repeats[name] * contenders[name].steps))
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def ratio(times: Mapping[str, Sequence[float]], of: str, against: str) -> Spread:
    """The spread of the ratios of two contenders' times, round by round."""
    return Spread.of([a / b for a, b in zip(times[of], times[against], strict=True)])


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    cuda = device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "versions": versions,
    }


def total_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say
        return platform.processor() or platform.machine()

"""The state of the chains as one value, and the parts of one run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from pyro_advbayes.infer.mcmc.noise import NormalNoise
from pyro_advbayes.infer.mcmc.rule import Rule, Variables
from pyro_advbayes.infer.mcmc.schedules import Schedule
from pyro_advbayes.model.potential import Potential

_UNSAVED = {"unsaved": True}  # metadata of a field that no checkpoint holds
_State = TypeVar("_State", bound="ChainState")


@dataclass
class Counts:
    """Updates of the run, and samples of each chain; both include warm-up."""

    updates: int = 0
    samples: int = 0


@dataclass
class NoiseEstimate:
    """The noise of minibatch gradients, as means over ``count`` measurements; see :mod:`~pyro_advbayes.infer.mcmc.noise_estimate`."""

    count: int
    variance: Tensor  # of the gradient at one theta, [size]
    second_moment: Tensor  # mean of its square, [size]
    differences: list[Tensor] = field(default_factory=list)  # scaled differences of two gradients, [chains, size]


@dataclass(repr=False)
class AutoStepSize:
    """
    The step size that ``step_size="auto"`` stands for; see :mod:`~pyro_advbayes.infer.mcmc.step_size`.

    :param share: share of the temperature, in (0, 1), by which discretisation and noise may each change it.
    """

    share: float = field(metadata=_UNSAVED)
    value: float | None = None
    curvature: float | None = None  # largest eigenvalue of the Hessian of U, in the rule's metric
    measured: int = 0  # number of planned measurements that are done
    ceiling: float | None = None  # half of the step at which a chain was lost
    warm_value: float | None = None  # the step before noise was held to its share
    growing: bool = False  # whether the bound on its growth held the step back
    measured_at: float = 0.0  # share of warm-up
    directions: dict[str, Tensor] = field(default_factory=dict)  # directions of largest curvature, by chain and minibatch

    def __repr__(self) -> str:
        return f"AutoStepSize(share={self.share})"

    def __call__(self, step: int) -> float:
        if self.value is None:
            raise RuntimeError('step_size="auto" is found in a run: there is none yet')
        return self.value

    def lower(self) -> None:
        """Halves the step, for good."""
        self.value = self.ceiling = 0.5 * self(0)

    @property
    def fell(self) -> float | None:
        """By what factor the step became smaller when noise was held to its share; None if it was not."""
        return None if self.value is None or self.warm_value is None else self.warm_value / self.value


@dataclass
class Restarts:
    """Restarts of each chain, and the last good states of all chains in warm-up; see :mod:`~pyro_advbayes.infer.mcmc.restart`."""

    counts: list[int]
    theta: Tensor | None = None  # [chains, size]
    energy: Tensor | None = None  # [chains]
    variables: Variables = field(default_factory=dict)

    def forget_states(self) -> None:
        """Frees the states, once warm-up is over."""
        self.theta, self.energy, self.variables = None, None, {}


@dataclass
class SteepestStates:
    """Where each chain met its largest gradient after warm-up; see :mod:`~pyro_advbayes.infer.mcmc.trajectory`."""

    norm: Tensor | None = None  # of the gradient, [chains]
    theta: Tensor | None = None  # [chains, size]


@dataclass
class ChainState:
    """The state of all chains of one run. A checkpoint holds its fields by name, and those of the dataclasses in it in their order."""

    theta: Tensor  # [chains, size]
    buffer: Tensor = field(metadata=_UNSAVED)  # an update overwrites it with noise, then with the new theta
    variables: Variables
    alive: Tensor  # [chains], bool; on the CPU
    normal: NormalNoise
    noise: NoiseEstimate
    auto: AutoStepSize | None  # None for a given step size
    divergences: list[list[int]]  # per chain, indices of the samples at which it was lost
    restarts: Restarts
    steepest: SteepestStates = field(default_factory=SteepestStates)
    counts: Counts = field(default_factory=Counts)
    info: dict[str, Any] = field(default_factory=dict)  # of the last update
    settled: bool = False  # whether the second half of warm-up has begun
    # Temperatures are predicted at the end of warm-up; None where the rule does not predict them.
    effective: Tensor | None = None  # with the noise of minibatches, [size] or [chains, size]
    hottest: float | None = None  # along the direction in which noise heats most
    coldest: dict[str, float] | None = None  # by site, without the noise of minibatches
    clamped: float = 0.0  # share of coordinates where the rule was clamped
    some_lost: bool = field(default=False, metadata=_UNSAVED)

    @classmethod
    def start(cls: type[_State], theta: Tensor, rule: Rule, auto: AutoStepSize | None, **more: Any) -> _State:
        """The state of chains at their start; ``more`` are the fields of a subclass."""
        zero = theta.new_zeros(theta.shape[-1])
        return cls(
            theta,
            buffer=torch.empty_like(theta),
            normal=NormalNoise(theta),
            variables=rule.variables(theta),
            alive=torch.ones(len(theta), dtype=torch.bool, device="cpu"),
            noise=NoiseEstimate(0, zero, zero.clone()),
            auto=auto,
            divergences=[[] for _ in theta],
            restarts=Restarts([0] * len(theta)),
            **more,
        )

    def alive_variables(self) -> Variables:
        """The rule's variables of the chains that are not lost."""
        return {name: value[self.alive] for name, value in self.variables.items()}

    def content(self) -> dict[str, Any]:
        """The state for :meth:`load`, as tensors and plain values."""
        return {name: _content(getattr(self, name)) for name in _saved(self)}

    def load(self, content: Mapping[str, Any]) -> None:
        """
        Continues from a :meth:`content`.

        :raises LookupError, TypeError, ValueError: if it is not that of chains like these.
        """
        _load(self, {name: content[name] for name in _saved(self)})
        _check(self)
        self.some_lost = not bool(self.alive.all())


def _saved(value: Any) -> list[str]:
    return [each.name for each in fields(value) if not each.metadata.get("unsaved")]


def _content(value: Any) -> Any:
    if isinstance(value, NormalNoise):
        return value.state()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if is_dataclass(value):
        return [_content(getattr(value, name)) for name in _saved(value)]
    return value


def _load(value: Any, content: Mapping[str, Any], within: str = "") -> None:
    """:param within: of which field the value is, for messages."""
    hints = get_type_hints(type(value))
    for name, new in content.items():
        old, where = getattr(value, name), within + name
        if isinstance(old, NormalNoise):
            old.load(new)
        elif isinstance(old, torch.Generator):
            old.set_state(new.cpu())
        elif is_dataclass(old):
            if not isinstance(new, (list, tuple)) or len(new) != len(_saved(old)):
                raise ValueError(f"{where} is not the list {', '.join(_saved(old))}")
            _load(old, dict(zip(_saved(old), new, strict=True)), f"{where}.")
        elif isinstance(old, Tensor):
            if not isinstance(new, Tensor) or _form(new) != _form(old):
                raise ValueError(f"{where} is not of shape {list(old.shape)} and {old.dtype}")
            setattr(value, name, new)
        else:
            new = [] if isinstance(old, list) and new is None else new
            if not _is_of(new, hints[name]):
                raise ValueError(f"{where} is {str(new)[:100]}")
            if isinstance(old, list) and old and len(new) != len(old):
                raise ValueError(f"{where} is of {len(new)} chains, not {len(old)}")
            if where == "variables" and isinstance(new, dict) and _forms(new) != _forms(old):
                raise ValueError(f"variables are {', '.join(new) or 'none'}, not {', '.join(old) or 'any'}, or are of other shapes")
            setattr(value, name, list(new) if isinstance(old, list) else dict(new) if isinstance(old, dict) else new)


def _form(value: Tensor) -> tuple[torch.Size, torch.dtype]:
    return value.shape, value.dtype


def _forms(values: Variables) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: _form(value) for name, value in values.items()}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type, and its elements are."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for option in options:
        kind, inner = get_origin(option) or option, get_args(option)
        if kind is Any or (kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool)):
            return True
        if kind in (list, tuple) and isinstance(value, (list, tuple)) and all(_is_of(each, inner[0]) for each in value):
            return True
        if kind is dict and isinstance(value, dict) and all(_is_of(each, inner[1]) for each in value.values()):
            return True
        if kind not in (int, float, list, tuple, dict) and isinstance(value, kind):
            return True
    return False


def _check(state: ChainState) -> None:
    """:raises ValueError: naming a value that no run has."""
    chains, size = state.theta.shape
    numbers: dict[str, tuple[float | None, float, float]] = {"clamped": (state.clamped, 0.0, 1.0)}  # with their bounds
    some = range(chains + 1)  # where only the first chains are followed
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "restarts.theta": (state.restarts.theta, [(chains, size)]),
        "restarts.energy": (state.restarts.energy, [(chains,)]),
        "steepest.theta": (state.steepest.theta, [(n, size) for n in some]),
        "steepest.norm": (state.steepest.norm, [(n,) for n in some]),
        "effective": (state.effective, [(1,), (size,), *((n, m) for n in some for m in (1, size))]),  # of the chains alive
        **{f"noise.differences[{i}]": (each, [(n, size) for n in some]) for i, each in enumerate(state.noise.differences)},
    }
    counts = [
        state.counts.updates,
        state.counts.samples,
        state.noise.count,
        *state.restarts.counts,
        *(each for rows in state.divergences for each in rows),
    ]
    if state.auto is not None:
        least = torch.finfo(torch.float64).tiny
        for name in ("value", "ceiling", "warm_value"):
            numbers[f"auto.{name}"] = getattr(state.auto, name), least, sys.float_info.max
        numbers |= {"auto.curvature": (state.auto.curvature, 0.0, math.inf), "auto.measured_at": (state.auto.measured_at, 0.0, 1.0)}
        shapes |= {f"auto.directions[{name!r}]": (each, [(size,)]) for name, each in state.auto.directions.items()}
        counts.append(state.auto.measured)
    for name, (number, low, high) in numbers.items():
        if number is not None and not low <= number <= high:
            raise ValueError(f"{name} is {number}")
    for name, (tensor, allowed) in shapes.items():
        if tensor is not None and not (tuple(tensor.shape) in allowed and tensor.is_floating_point()):
            raise ValueError(f"{name} is of shape {list(tensor.shape)} and {tensor.dtype}, with {chains} chains of {size} numbers")
    if any(count < 0 for count in counts):
        raise ValueError("counts, or those of noise, restarts, divergences or auto, are negative")
    for name, value in state.info.items():
        if not _is_of(value, float) and not (isinstance(value, Tensor) and value.shape[:1] == (chains,)):
            raise ValueError(f"info[{name!r}] is {str(value)[:100]}")


@dataclass
class Run:
    """The parts of one run of a kernel, made by its ``setup``."""

    potential: Potential
    rule: Rule
    temperature: Schedule
    chains: ChainState
    gradient: Callable[[], Tensor]  # a fresh stochastic gradient where the chains are, [chains, size]
    warmup_samples: int
    warmup_updates: int
    updates_per_batch: int  # updates in a row that see one minibatch

    @property
    def adapting(self) -> bool:
        """Whether warm-up is going on."""
        return self.chains.counts.samples < self.warmup_samples

    @property
    def T(self) -> float:
        """The temperature of the next update."""
        return self.temperature(self.chains.counts.updates)

    @property
    def places(self) -> list[tuple[str, slice]]:
        """Where each site stands in a row of theta."""
        return [(site.name, slice(site.start, site.start + site.numel)) for site in self.potential.sites]

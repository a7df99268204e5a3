"""The training of a generator, for any objective: settings, a moving average of its parameters, and its state for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_advbayes.given import check_choice, check_int
from pyro_advbayes.infer.autoguide.generators import RowGenerator, as_widths

OBJECTIVES = ("energy", "wgan-gp")


@dataclass(frozen=True)
class Settings:
    """
    Settings of a generator's training.

    :param objective: ``"wgan-gp"``, a critic and its gradient penalty (:mod:`pyro_advbayes.infer.distill.wgan`), or ``"energy"``, the
        energy distance between batches, without a critic (:mod:`pyro_advbayes.infer.distill.energy`).
    :param batch_size: real codes of a batch, >= 2.
    :param learning_rate: Adam's, > 0.
    :param ema: decay, in [0, 1), of the moving average of the generator's parameters that is kept; 0 keeps the last ones.
    :param num_steps: maximal number of generator steps, >= 1.
    :param check_every: steps between measurements of the two-sample distance. Training stops when it is as small as between two halves of
        the draws; None trains for ``num_steps``.
    :param critic_steps: critic steps for each step of the generator, >= 1, each on a new batch.
    :param penalty: the weight λ of the gradient penalty, >= 0.
    :param critic_hidden: widths of the critic's hidden layers.
    """

    objective: str = "energy"
    batch_size: int = 256
    learning_rate: float = 1e-2
    ema: float = 0.99
    num_steps: int = 20_000
    check_every: int | None = 100
    critic_steps: int = 5
    penalty: float = 10.0
    critic_hidden: tuple[int, ...] = (100, 100, 100)

    def __post_init__(self) -> None:
        check_choice(self.objective, "objective", OBJECTIVES)
        for name, least in (("batch_size", 2), ("critic_steps", 1), ("num_steps", 1), ("check_every", 1)):
            if name != "check_every" or self.check_every is not None:
                check_int(getattr(self, name), name, least)
        if not self.penalty >= 0.0:
            raise ValueError(f"penalty={self.penalty!r}: the weight of the gradient penalty, >= 0")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate={self.learning_rate!r}: a number > 0")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema={self.ema!r}: the decay of a moving average, in [0, 1)")
        as_widths(self.critic_hidden)


class Training:
    """
    Base: a generator in training.

    :cvar betas: Adam's.
    :cvar half_life: the learning rate falls as 1/(1 + step/half_life); None keeps it.
    :param generator: makes codes; its parameters are trained.
    :param code_size: dimension of a code.
    :param settings: see :class:`Settings`.
    :param draw: function of a number n to n real codes ``[n, code]``.
    """

    betas: ClassVar[tuple[float, float]]
    half_life: ClassVar[float | None]

    def __init__(self, generator: RowGenerator, code_size: int, settings: Settings, draw: Callable[[int], Tensor]) -> None:
        self.generator, self.settings, self.draw, self.steps = generator, settings, draw, 0
        self.average = [p.detach().clone() for p in generator.parameters()]
        self.optimizers = [self.adam(generator)]

    def adam(self, module: torch.nn.Module) -> torch.optim.Adam:
        """An optimiser of a module."""
        parameters = list(module.parameters())
        fused = parameters[0].device.type in ("cpu", "cuda")
        return torch.optim.Adam(parameters, lr=self.settings.learning_rate, betas=self.betas, fused=fused)

    def step(self) -> Tensor:
        """One step of the generator, with its critic steps; returns an estimate of the distance, for display."""
        if self.half_life is not None:
            rate = self.settings.learning_rate / (1.0 + self.steps / self.half_life)
            for optimizer in self.optimizers:
                optimizer.param_groups[0]["lr"] = rate
        distance = self._step()
        self.steps += 1
        return distance

    def _step(self) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def _keep_average(self) -> None:
        # over few steps at first, so that the initial parameters are soon forgotten
        decay = min(self.settings.ema, self.steps / (self.steps + 10.0))
        for kept, new in zip(self.average, self.generator.parameters(), strict=True):
            kept.lerp_(new, 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the generator's parameters with their moving average."""
        for kept, new in zip(self.average, self.generator.parameters(), strict=True):
            held = new.clone()
            new.copy_(kept)
            kept.copy_(held)

    def made(self, count: int) -> Tensor:
        """Codes ``[count, code]`` of new noise."""
        return self.generator.code(self.generator.latent(count))

    def state(self) -> dict[str, Any]:
        """What :meth:`load` restores."""
        return {
            "generator": dict(self.generator.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "steps": self.steps,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores a :meth:`state`."""
        self.generator.restore(state["generator"])
        for i, (optimizer, kept) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            _check_optimizer(optimizer, kept, f"optimizers[{i}]")
            optimizer.load_state_dict({**kept, "state": {int(place): value for place, value in kept["state"].items()}})
        with torch.no_grad():
            for kept, value in zip(self.average, state["average"], strict=True):
                if value.shape != kept.shape:
                    raise ValueError(f"an average has shape {list(value.shape)}, its parameter {list(kept.shape)}")
                kept.copy_(value)
        self.steps = state["steps"]


def _check_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any], where: str) -> None:
    """
    Refuses a saved state of Adam whose tensors have other shapes than the parameters: the fused kernel would write past their ends.

    :raises ValueError: naming what differs.
    """
    for i, (group, own) in enumerate(zip(kept["param_groups"], optimizer.state_dict()["param_groups"], strict=True)):
        for name in own.keys() & group.keys() - {"lr"}:  # which follows from the step
            if type(group[name]) is not type(own[name]) or group[name] != own[name]:
                raise ValueError(f"{where}, param_groups[{i}][{name!r}] is {str(group[name])[:100]}, not {own[name]}")
        if not isinstance(group["lr"], float) or not 0.0 < group["lr"] < math.inf:
            raise ValueError(f"{where}, param_groups[{i}]['lr'] is {str(group['lr'])[:100]}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if kept["state"] and set(kept["state"]) != set(map(str, range(len(parameters)))):
        raise ValueError(f"{where}: its state is of parameters {', '.join(kept['state'])[:100]}, of {len(parameters)}")
    for i, parameter in enumerate(parameters) if kept["state"] else ():
        moments = kept["state"][str(i)]
        if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"{where}, state[{i}] holds {', '.join(moments)[:100]}, not step, exp_avg, exp_avg_sq")
        for name, value in moments.items():
            shape = torch.Size() if name == "step" else parameter.shape
            fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
            if not fits or (name == "step" and not 0 <= float(value) < math.inf) or (name == "exp_avg_sq" and bool((value < 0).any())):
                raise ValueError(f"{where}, state[{i}][{name!r}] is {str(value)[:100]}, for a parameter {list(parameter.shape)}")

"""Updates of all chains, chunk by chunk: gradient and rule as one function, many updates in one call where Python would take the time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.given import warn
from pyro_advbayes.infer.mcmc import noise_estimate, restart
from pyro_advbayes.infer.mcmc import step_size as auto_step
from pyro_advbayes.infer.mcmc.control_variate import ControlVariate
from pyro_advbayes.infer.mcmc.noise_estimate import ESTIMATE_FROM
from pyro_advbayes.infer.mcmc.rule import Rule, Variables
from pyro_advbayes.infer.mcmc.schedules import Schedule, check_value
from pyro_advbayes.infer.mcmc.state import Run
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.loader import Loader
from pyro_advbayes.tracing.guard import autocast_state

# Updates in one call. Their minibatches and noise are drawn ahead, and the largest state and minibatches for which that is done are, in
# numbers, as here: where an update takes a millisecond, Python's tenth of one hardly shows.
MOST_TOGETHER = 16
LARGEST_STATE, LARGEST_BATCHES = 50_000, 2**20


class ChunkUpdates:
    """
    The updates of one run; keeps a function for every chunk.

    :param step_size: of the update's number.
    :param anchor: a control variate, or None.
    :param compiled: compiled updates of earlier runs, used again and added to.
    """

    def __init__(self, step_size: Schedule, anchor: ControlVariate | None, compiled: dict[Any, Callable]) -> None:
        self.step_size, self.anchor, self._compiled = step_size, anchor, compiled
        self._functions: dict[Any, list[Callable]] = {}
        self._scalars: dict[float, Tensor] = {}
        self._buffers: list[Tensor] = []

    # ------------------------------------------------------------------------------------------------------------- one update

    def update(self, run: Run, kind: str, batch: Batch) -> None:
        """
        Measures what is due, and moves the chains once.

        :param kind: ``"gradient"``, or ``"both"`` to report too.
        :raises RuntimeError: if every chain is lost.
        """
        _measure(run)
        self._move(run, kind, batch)

    def _move(self, run: Run, kind: str, batch: Batch) -> None:
        chains = run.chains
        step_size, temperature = self._settings(run, chains.counts.updates)
        chains.normal.fill(chains.buffer)
        finite, report = self._step(run, kind, batch, step_size, temperature)
        if not finite:
            restart.find_lost(chains, step_size, report.get("energy"), run.adapting)
        if chains.some_lost:
            restart.hold_lost(chains)
        chains.theta, chains.buffer = chains.buffer, chains.theta
        chains.counts.updates += 1
        chains.info.update(step_size=step_size, temperature=temperature, **report)

    def _settings(self, run: Run, updates: int) -> tuple[float, float]:
        """Step size and temperature after so many updates."""
        step_size, temperature = self.step_size(updates), run.temperature(updates)
        return check_value(step_size, "step_size", updates), check_value(temperature, "temperature", updates)

    def _step(self, run: Run, kind: str, batch: Batch, step_size: float, temperature: float) -> tuple[bool, dict[str, Tensor]]:
        """
        Writes the next theta of all chains over the noise in ``run.chains.buffer``, and updates their variables.

        :return: whether all of it is finite; and for ``"both"`` ``"energy"`` and ``"gradient_norm"``, ``[chains]``.
        """
        chains, due = run.chains, learning(run, run.chains.counts.updates)
        chunks = run.potential.chunks(len(chains.theta), batch)
        key = (kind, due, tuple(t.shape for t in chunks[0][1]), *autocast_state())
        if key not in self._functions:
            self._functions[key] = [self._function(run, kind, rows, tensors, due) for rows, tensors in chunks]
        scalars = self._scalar(run, step_size), self._scalar(run, temperature)
        finite, reports = True, []
        for (rows, tensors), function in zip(chunks, self._functions[key], strict=True):
            variables = {name: value[rows] for name, value in chains.variables.items()}
            *report, total = function(chains.theta[rows], chains.buffer[rows], *scalars, variables, *tensors)
            finite = finite and math.isfinite(total)
            reports.append(report)
        if kind != "both":
            return finite, {}
        energy, norm = (torch.cat([report[i].reshape(-1) for report in reports]) for i in (0, 1))
        return finite, {"energy": energy, "gradient_norm": norm}

    # ----------------------------------------------------------------------------------------------------------- many updates

    def updates(self, run: Run, most: int) -> int:
        """
        Up to ``most`` updates without a report, of the same bits as one by one. Where one of them is not finite, they are made again one
        by one.

        :return: how many updates they were; 0 where they are to be made one by one: that is as fast, or something is measured before the
            next.
        :raises RuntimeError: if every chain is lost.
        """
        chains, batches = run.chains, run.potential.batches
        most = min(most, MOST_TOGETHER)
        small = chains.theta.numel() <= LARGEST_STATE and most * getattr(batches, "numbers", 0) <= LARGEST_BATCHES
        if most == 1 or not small or isinstance(batches, Loader) or chains.some_lost or self.anchor is not None:
            return 0
        if run.potential.backend != "graph":
            return 0
        count, first = _undisturbed(run, most), chains.counts.updates
        if count < 2:
            return 0
        settings = [self._settings(run, updates) for updates in range(first, first + count)]
        ahead, mark = batches.many(count), chains.normal.mark()
        before = {name: value.clone() for name, value in chains.variables.items()}
        while len(self._buffers) < count:
            self._buffers.append(torch.empty_like(chains.theta))
        noises = self._buffers[:count]
        for noise in noises:
            chains.normal.fill(noise)
        if self._steps(run, ahead, noises, settings):
            chains.theta, self._buffers[count - 1] = noises[-1], chains.theta
            chains.counts.updates += count
            return count
        chains.normal.rewind(mark)
        for name, value in before.items():
            chains.variables[name].copy_(value)
        for batch in ahead:
            self._move(run, "gradient", batch)
        return count

    def _steps(self, run: Run, batches: Sequence[Batch], noises: Sequence[Tensor], settings: Sequence[tuple[float, float]]) -> bool:
        """Writes the next thetas over the noises; whether the last one is finite, as it is only if all are."""
        chains, due = run.chains, learning(run, run.chains.counts.updates)
        scalars = [(self._scalar(run, step_size), self._scalar(run, temperature)) for step_size, temperature in settings]
        each = [run.potential.chunks(len(chains.theta), batch) for batch in batches]
        key = ("many", due, tuple(t.shape for t in each[0][0][1]), *autocast_state())
        if key not in self._functions:
            self._functions[key] = [self._many(run, rows, tensors, due) for rows, tensors in each[0]]
        finite = True
        for place, function in enumerate(self._functions[key]):
            rows = each[0][place][0]
            variables = {name: value[rows] for name, value in chains.variables.items()}
            tensors = [chunks[place][1] for chunks in each]
            total = function(chains.theta[rows], [noise[rows] for noise in noises], scalars, variables, tensors)
            finite = finite and math.isfinite(total)
        return finite

    def _many(self, run: Run, rows: slice | int, tensors: tuple[Tensor, ...], due: str | None) -> Callable[..., Tensor]:
        evaluate = run.potential.function("gradient", run.chains.theta[rows], tensors)
        return many_updates(evaluate, run.rule, due)

    # -------------------------------------------------------------------------------------------------------------- functions

    def _function(self, run: Run, kind: str, rows: slice | int, tensors: tuple[Tensor, ...], due: str | None) -> Callable[..., Any]:
        theta, potential = run.chains.theta[rows], run.potential
        evaluate = potential.function(kind, theta, tensors)
        correction = None if self.anchor is None else self.anchor.correction(rows, tensors)
        update = chunk_update(kind, evaluate, correction, run.rule, due)
        if potential.backend != "compile":
            return update
        key = (run.rule, evaluate, due, theta.shape)
        compiled = None if correction is not None else self._compiled.get(key)
        if compiled is None:
            variables = {name: value[rows].clone() for name, value in run.chains.variables.items()}
            scalars = self._scalar(run, 1e-6), self._scalar(run, 1.0)
            compiled = compile_update(update, (theta.clone(), torch.zeros_like(theta), *scalars, variables, *tensors))
            if compiled is None:
                potential.backend = "graph"
                return update
            self._compiled[key] = compiled
        return compiled

    def _scalar(self, run: Run, value: float) -> Tensor:
        if value not in self._scalars:
            if len(self._scalars) > 64:  # a schedule gives a new number at every step
                self._scalars.clear()
            self._scalars[value] = run.potential.scalar(value)
        return self._scalars[value]


def learning(run: Run, updates: int) -> str | None:
    """
    What the rule learns from the next update, after so many: its preconditioner in the first half of warm-up, and in the last 30 % the
    mean square of the gradients, where the chain has come to rest.
    """
    due = None
    if 2 * run.chains.counts.samples < run.warmup_samples:
        due = "metric"
    elif run.adapting and updates >= ESTIMATE_FROM * run.warmup_updates:
        due = "moment"
    return due if due in run.rule.learns else None


def _measure(run: Run) -> None:
    """What is measured before an update, where it is due."""
    chains = run.chains
    if chains.auto is not None:
        auto_step.adapt(run, chains.auto)
        if run.adapting:
            restart.watch(run)
    if run.adapting:
        noise_estimate.adapt(run)
    elif chains.restarts.theta is not None:
        chains.restarts.forget_states()


def _undisturbed(run: Run, most: int) -> int:
    """How many of the next updates have nothing measured before them, and learn the same."""
    if not run.adapting:
        return most
    auto, first = run.chains.auto, run.chains.counts.updates
    now = learning(run, first)
    for updates in range(first, first + most):
        looks = auto is not None and (auto_step.due(run, auto, updates) or restart.due(run, updates))
        if looks or noise_estimate.due(run, updates) or learning(run, updates) != now:
            return updates - first
    return most


def many_updates(evaluate: Callable, rule: Rule, learning: str | None) -> Callable[..., Tensor]:
    """
    A function of ``(theta, noises, settings, variables, tensors)`` that writes one theta after the other over ``noises``, with step size
    and temperature from ``settings``, and the minibatches' tensors. It returns a number that is finite if the last theta is.

    :param evaluate: from :meth:`Potential.function`, for ``"gradient"``.
    """
    call = getattr(evaluate, "forward", evaluate)  # of a graph, without the hooks of a module

    def update(
        theta: Tensor,
        noises: Sequence[Tensor],
        settings: Sequence[tuple[Tensor, Tensor]],
        variables: Variables,
        tensors: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        for noise, (step_size, temperature), inputs in zip(noises, settings, tensors, strict=True):
            theta = rule.step(theta, call(theta, temperature, *inputs), noise, step_size, temperature, variables, learning)
        return theta.sum()

    return update


def chunk_update(kind: str, evaluate: Callable, correction: Callable | None, rule: Rule, learning: str | None) -> Callable[..., Any]:
    """
    A function of ``(theta, noise, step_size, temperature, variables, *tensors)`` that writes the new theta over ``noise``. It returns
    one number, which is finite if all of theta is; for the kind ``"both"``, energy and norm of the gradient before it.

    :param evaluate: from :meth:`Potential.function`, for ``kind``.
    :param correction: a control variate's, or None.
    """

    def update(theta: Tensor, noise: Tensor, step_size: Tensor, temperature: Tensor, variables: Variables, *tensors: Tensor) -> Any:
        report: tuple[Tensor, ...] = ()
        if kind == "both":
            gradient, energy = evaluate(theta, temperature, *tensors)
            report = (energy, torch.linalg.vector_norm(gradient, dim=-1))
        else:
            gradient = evaluate(theta, temperature, *tensors)
        if correction is not None:
            gradient = gradient + correction(*tensors)
        new = rule.step(theta, gradient, noise, step_size, temperature, variables, learning)
        return *report, new.sum() + report[0].sum() if report else new.sum()

    return update


def compile_update(update: Callable, example: Sequence[Any]) -> Callable | None:
    """
    The update under ``torch.compile``; None, with a warning, where that fails.

    :param example: arguments to compile it for, which it may overwrite.
    """
    # PyTorch allows one code object eight compilations: give each update its own
    update.__code__ = update.__code__.replace()
    compiled = torch.compile(update, dynamic=False)
    try:
        compiled(*example)
    except Exception as error:  # no C++ compiler, or an operation that it does not support: the graph runs all the same
        reason = str(error).strip().splitlines()[0]
        warn(f"backend='compile' falls back to 'graph', which is slower: torch.compile failed ({reason})")
        return None
    return compiled

"""Updates of all chains, chunk by chunk: gradient and rule as one function, so that ``torch.compile`` sees all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.given import warn
from pyro_advbayes.infer.mcmc.control_variate import ControlVariate
from pyro_advbayes.infer.mcmc.noise_estimate import ESTIMATE_FROM
from pyro_advbayes.infer.mcmc.rule import Rule, Variables
from pyro_advbayes.infer.mcmc.state import Run
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.tracing.guard import autocast_state


class ChunkUpdates:
    """
    The updates of one run; keeps a function for every chunk.

    :param anchor: a control variate, or None.
    :param compiled: compiled updates of earlier runs, used again and added to.
    """

    def __init__(self, anchor: ControlVariate | None, compiled: dict[Any, Callable]) -> None:
        self.anchor, self._compiled = anchor, compiled
        self._functions: dict[Any, list[Callable]] = {}
        self._scalars: dict[float, Tensor] = {}

    def step(self, run: Run, kind: str, batch: Batch, step_size: float, temperature: float) -> tuple[bool, dict[str, Tensor]]:
        """
        Writes the next theta of all chains over the noise in ``run.chains.buffer``, and updates their variables.

        :param kind: ``"gradient"``, or ``"both"`` to report too.
        :return: whether all of it is finite; and for ``"both"`` ``"energy"`` and ``"gradient_norm"``, ``[chains]``.
        """
        chains, due = run.chains, learning(run)
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


def learning(run: Run) -> str | None:
    """
    What the rule learns from the next update: its preconditioner in the first half of warm-up, and in the last 30 % the mean square of the
    gradients, where the chain has come to rest.
    """
    counts, due = run.chains.counts, None
    if 2 * counts.samples < run.warmup_samples:
        due = "metric"
    elif run.adapting and counts.updates >= ESTIMATE_FROM * run.warmup_updates:
        due = "moment"
    return due if due in run.rule.learns else None


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

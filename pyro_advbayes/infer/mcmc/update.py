"""Updates of all chains, chunk by chunk: gradient and rule as one function, many updates in one call where Python would take the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

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
from pyro_advbayes.tracing.compiled import compile_graph
from pyro_advbayes.tracing.guard import autocast_state

# Updates in one call. Their minibatches and noise are drawn ahead, and the largest state and minibatches for which that is done are, in
# numbers, as here: where an update takes a millisecond, Python's tenth of one hardly shows.
MOST_TOGETHER = 16
MOST_COMPILED = 8  # compiling takes a second for every two
LARGEST_STATE, LARGEST_BATCHES = 50_000, 2**20


class Ahead(NamedTuple):
    """What updates in a row need: their minibatches, step sizes and temperatures, and the noise that they overwrite."""

    batches: Sequence[Batch]
    noises: Sequence[Tensor]
    settings: Sequence[tuple[float, float]]


class ChunkUpdates:
    """
    The updates of one run; keeps a function for every chunk.

    :param step_size: of the update's number.
    :param in_a_row: how many updates of a sample have no report.
    :param anchor: a control variate, or None.
    :param compiled: compiled updates of earlier runs, used again and added to.

    :ivar seconds: how long compiling took.
    """

    def __init__(self, step_size: Schedule, in_a_row: int, anchor: ControlVariate | None, compiled: dict[Any, Callable]) -> None:
        self.step_size, self.anchor, self._compiled = step_size, anchor, compiled
        # compiled code is for one number of updates: of at most eight, the one that leaves fewest over
        self._compiled_together = in_a_row // max(1, -(-in_a_row // MOST_COMPILED))
        self._functions: dict[Any, list[Callable]] = {}
        self._scalars: dict[float, Tensor] = {}
        self._noises: list[Tensor] = []
        self.seconds = 0.0

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
        step_size, temperature = settings = self._settings(run, chains.counts.updates)
        chains.normal.fill(chains.buffer)
        finite, report = self._call(run, kind, Ahead([batch], [chains.buffer], [settings]))
        if not finite:
            restart.find_lost(chains, step_size, report.get("energy"), run.adapting)
        if chains.some_lost:
            restart.hold_lost(chains)
        chains.theta, chains.buffer = chains.buffer, chains.theta
        chains.counts.updates += 1
        chains.info.update(step_size=step_size, temperature=temperature, **report)

    def updates(self, run: Run, most: int) -> int:
        """
        Up to ``most`` updates without a report, of the same bits as one by one. Where one of them is not finite, they are made again one
        by one.

        :return: how many updates they were; 0 where they are to be made one by one: that is as fast, or something is measured before the
            next.
        :raises RuntimeError: if every chain is lost.
        """
        chains, count = run.chains, self._together(run, most)
        if count < 2:
            return 0
        source, mark, first = run.potential.batches, chains.normal.mark(), chains.counts.updates
        assert not isinstance(source, Loader)
        batches = source.many(count)
        before = {name: value.clone() for name, value in chains.variables.items()}
        self._noises += [torch.empty_like(chains.theta) for _ in range(count - len(self._noises))]
        ahead = Ahead(batches, self._noises[:count], [self._settings(run, updates) for updates in range(first, first + count)])
        for noise in ahead.noises:
            chains.normal.fill(noise)
        finite, _ = self._call(run, "gradient", ahead)
        if finite:
            chains.theta, self._noises[count - 1] = ahead.noises[-1], chains.theta
            chains.counts.updates += count
            return count
        chains.normal.rewind(mark)
        for name, value in before.items():
            chains.variables[name].copy_(value)
        for batch in batches:
            self._move(run, "gradient", batch)
        return count

    def _together(self, run: Run, most: int) -> int:
        """How many of the next updates are made in one call."""
        chains, batches, backend = run.chains, run.potential.batches, run.potential.backend
        if backend == "handlers" or isinstance(batches, Loader) or chains.some_lost or self.anchor is not None:
            return 0
        if chains.theta.numel() > LARGEST_STATE:
            return 0
        most = min(most, MOST_TOGETHER, LARGEST_BATCHES // max(1, batches.numbers))
        if backend == "compile":
            # what a rule learns in warm-up would be one more function to compile
            most = self._compiled_together if most >= self._compiled_together and learning(run, chains.counts.updates) is None else 0
        count = _undisturbed(run, most)
        return 0 if backend == "compile" and count < most else count

    def _settings(self, run: Run, updates: int) -> tuple[float, float]:
        """Step size and temperature after so many updates."""
        step_size, temperature = self.step_size(updates), run.temperature(updates)
        return check_value(step_size, "step_size", updates), check_value(temperature, "temperature", updates)

    def _call(self, run: Run, kind: str, ahead: Ahead) -> tuple[bool, dict[str, Tensor]]:
        """
        Moves all chains, and writes the last theta over the last noise.

        :return: whether it is finite, as it is only if all before it are; and for ``"both"`` ``"energy"`` and ``"gradient_norm"``,
            ``[chains]``.
        """
        chains, due = run.chains, learning(run, run.chains.counts.updates)
        each = [run.potential.chunks(len(chains.theta), batch) for batch in ahead.batches]
        together = len(each) if run.potential.backend == "compile" else 1
        key = (kind, due, together, tuple(t.shape for t in each[0][0][1]), *autocast_state())
        if key not in self._functions:
            self._functions[key] = [self._function(run, kind, rows, tensors, due, together) for rows, tensors in each[0]]
        settings = [(self._scalar(run, step_size), self._scalar(run, temperature)) for step_size, temperature in ahead.settings]
        finite, reports = True, []
        for place, function in enumerate(self._functions[key]):
            rows = each[0][place][0]
            variables = {name: value[rows] for name, value in chains.variables.items()}
            tensors = [chunks[place][1] for chunks in each]
            *report, total = function(chains.theta[rows], [noise[rows] for noise in ahead.noises], settings, variables, tensors)
            finite = finite and math.isfinite(total)
            reports.append(report)
        if kind != "both":
            return finite, {}
        energy, norm = (torch.cat([report[i].reshape(-1) for report in reports]) for i in (0, 1))
        return finite, {"energy": energy, "gradient_norm": norm}

    def _function(
        self, run: Run, kind: str, rows: slice | int, tensors: tuple[Tensor, ...], due: str | None, together: int
    ) -> Callable[..., Any]:
        theta, potential = run.chains.theta[rows], run.potential
        evaluate = potential.function(kind, theta, tensors)
        correction = None if self.anchor is None else self.anchor.correction(rows, tensors)
        update = chunk_update(kind, evaluate, correction, run.rule, due)
        if potential.backend != "compile":
            return update
        key = (run.rule, evaluate, due, theta.shape, together)
        compiled = None if correction is not None else self._compiled.get(key)
        if compiled is None:
            start = time.perf_counter()
            variables = {name: value[rows] for name, value in run.chains.variables.items()}
            settings = [(self._scalar(run, 1e-6), self._scalar(run, 1.0))] * together
            graph = cast(fx.GraphModule, evaluate)
            held = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
            example = theta, [torch.zeros_like(theta)] * together, settings, variables, [tensors] * together
            compiled = compile_update(update, example, held)
            self.seconds += time.perf_counter() - start
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


def chunk_update(kind: str, evaluate: Callable, correction: Callable | None, rule: Rule, learning: str | None) -> Callable[..., Any]:
    """
    A function of ``(theta, noises, settings, variables, tensors)`` that writes one theta after the other over ``noises``, with step size
    and temperature from ``settings``, and the tensors of a minibatch each. It returns one number, which is finite if the last theta is; for
    the kind ``"both"``, energy and norm of the gradient before it.

    :param evaluate: from :meth:`Potential.function`, for ``kind``.
    :param correction: a control variate's, or None.
    """
    call = getattr(evaluate, "forward", evaluate)  # of a graph, without the hooks of a module

    def update(
        theta: Tensor,
        noises: Sequence[Tensor],
        settings: Sequence[tuple[Tensor, Tensor]],
        variables: Variables,
        tensors: Sequence[tuple[Tensor, ...]],
    ) -> Any:
        report: tuple[Tensor, ...] = ()
        for noise, (step_size, temperature), inputs in zip(noises, settings, tensors, strict=True):
            if kind == "both":
                gradient, energy = call(theta, temperature, *inputs)
                report = (energy, torch.linalg.vector_norm(gradient, dim=-1))
            else:
                gradient = call(theta, temperature, *inputs)
            if correction is not None:
                gradient = gradient + correction(*inputs)
            theta = rule.step(theta, gradient, noise, step_size, temperature, variables, learning)
        return *report, theta.sum() + report[0].sum() if report else theta.sum()

    return update


def compile_update(update: Callable, example: Sequence[Any], held: Sequence[Tensor]) -> Callable | None:
    """
    :func:`chunk_update` as machine code; None, with a warning, where that fails. It writes the last theta over the last noise, and leaves
    the other noises as they are.

    :param example: arguments of ``update`` that it is compiled for; not changed.
    :param held: tensors in ``update`` whose values may change in place.
    """
    _, noises, _, variables, tensors = example
    names, count, width = list(variables), len(noises), len(tensors[0])

    def flat(*arguments: Any) -> list[Tensor]:
        theta, noises, settings, variables, tensors = arguments
        pairs = [value for pair in settings for value in pair]
        return [theta, *noises, *pairs, *variables.values(), *(value for inputs in tensors for value in inputs)]

    def functional(theta: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own = [noise.clone() for noise in rest[:count]]
        pairs = list(zip(rest[count : 3 * count : 2], rest[count + 1 : 3 * count : 2], strict=True))
        values = {name: value.clone() for name, value in zip(names, rest[3 * count : 3 * count + len(names)], strict=True)}
        inputs = rest[3 * count + len(names) :]
        results = update(theta, own, pairs, values, [inputs[i * width : (i + 1) * width] for i in range(count)])
        return *results, own[-1], *values.values()

    overwritten = [count, *range(1 + 3 * count, 1 + 3 * count + len(names))]
    try:
        run_compiled = compile_graph(functional, flat(*example), overwritten, held)
    except Exception as error:  # no C++ compiler, or an operation that it does not support: the graph runs all the same
        reason = str(error).strip().splitlines()[0]
        warn(f"backend='compile' falls back to 'graph', which is slower: the compiler failed ({reason})")
        return None
    return lambda *arguments: run_compiled(*flat(*arguments))

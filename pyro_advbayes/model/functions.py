"""A potential's functions of one chunk of chains: Pyro's handlers, or graphs traced from them, checked against them and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from pyro_advbayes.handlers import in_a_line
from pyro_advbayes.model.energy import Energy
from pyro_advbayes.tracing.guard import DIFFERS, Guard, agree, autocast_state, noting_modules, roots_of, warn_of_handlers
from pyro_advbayes.tracing.replay import quiet_batching, trace_graph

BACKENDS = ("handlers", "graph", "compile")


class _Mark(NamedTuple):
    """Fingerprint of a model, to detect stale graphs: sums of energy and gradient, in which plain numbers show, and its modules' state."""

    numbers: Tensor
    guard: Guard


class _Traced(NamedTuple):
    """A graph, and the fingerprint of the model on these inputs when it was traced."""

    graph: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    mark: _Mark


class Functions:
    """
    Functions of ``(state, temperature, *tensors)`` for one chunk of chains: ``"energy"``, ``"gradient"``, ``"both"`` as
    ``(gradient, energy)``, and ``"inputs"``, the gradient of the negative log-likelihood with respect to an argument.

    :param energy: what they evaluate, for one chain.
    :param backend: one of :data:`BACKENDS`; becomes ``"handlers"`` if a model cannot be traced.
    :param graphs: traced graphs to use again, from an earlier potential of the same model.
    :param probes: gives the inputs of all chunks of some minibatches, one after the other, to compare a graph on.
    """

    def __init__(
        self, energy: Energy, backend: str, graphs: dict[Any, Any], probes: Callable[[], Iterable[list[tuple[Tensor, ...]]]]
    ) -> None:
        self.energy, self.backend, self._graphs, self._probes = energy, backend, graphs, probes
        # graphs that this object has checked; it needs them even if they are not kept for others
        self._ready: dict[Any, Callable[..., Any]] = {}

    def get(self, kind: str, state: Tensor, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """
        :param state: a row ``[size]``, or rows ``[chunk, size]``.
        :param tensors: what :meth:`Potential.chunks` gave.
        """
        looped = self._looped(kind, state.dim() == 1)
        if self.backend == "handlers":
            return looped
        key = (kind, state.shape, state.dtype, str(state.device), tuple((t.shape, t.dtype) for t in tensors), *autocast_state())
        if key not in self._ready:
            traced = self._graphs.get(key)
            if traced is None or not self._is_unchanged(traced) or not self._agrees(traced.graph, looped, state, tensors):
                varying = self._varying(state, tensors)
                inputs = tuple(t[0].clone() if i in varying else t for i, t in enumerate(tensors))
                mark = self._mark(inputs)
                graph = self._trace(kind, state, tensors, looped, mark.guard.held)
                if graph is looped:
                    return looped
                traced = self._graphs[key] = _Traced(graph, inputs, mark)
            self._ready[key] = traced.graph
        return self._ready[key]

    def _is_unchanged(self, traced: _Traced) -> bool:
        """Whether the model still has what the graph holds: the tensors of modules, plain numbers, N."""
        now = self._mark(traced.inputs)
        return torch.equal(now.numbers, traced.mark.numbers) and now.guard.state == traced.mark.guard.state

    def _mark(self, inputs: Sequence[Tensor]) -> _Mark:
        energy, roots = self.energy, roots_of(self.energy.model)
        row = 0.1 * torch.randn(energy.size, dtype=energy.dtype, generator=torch.Generator().manual_seed(0), device="cpu")
        with noting_modules(roots):
            value, gradient = energy.slope_at(row.to(energy.device), energy.scalar(0.5), inputs)
        return _Mark(torch.stack([value.double(), gradient.double().sum(), gradient.double().abs().sum()]), Guard(roots))

    def _varying(self, state: Tensor, tensors: Sequence[Tensor]) -> Sequence[int]:
        """Which tensors have a row per chain."""
        return self.energy.varying(len(tensors)) if state.dim() == 2 else ()

    def _trace(self, kind: str, state: Tensor, tensors: Sequence[Tensor], looped: Callable, held: Sequence[Tensor]) -> Callable:
        energy = self.energy
        fn: Callable[..., Any] = {
            "energy": lambda: energy.log_density,
            "gradient": lambda: grad(energy.log_density),
            "both": lambda: grad_and_value(energy.log_density),
            "inputs": lambda: grad(energy.data_loss, argnums=2 + self._place),
        }[kind]()
        if state.dim() == 2:
            varying = self._varying(state, tensors)
            fn = vmap(fn, in_dims=(0, None, *(0 if i in varying else None for i in range(len(tensors)))))
        try:
            with pyro.validation_enabled(False), quiet_batching():
                graph = trace_graph(fn, (state.detach().clone(), energy.scalar(1.0), *tensors), held)
        except Exception as error:  # whatever a model's Python does under a tracer: the handlers still run it
            return self._fall_back(f"it cannot be traced: {in_a_line(error)}", looped)
        if not self._agrees(graph, looped, state, tensors):
            return self._fall_back(DIFFERS, looped)
        return graph

    @property
    def _place(self) -> int:
        if self.energy.perturbed is None:
            raise ValueError("the gradient with respect to inputs needs the name of their argument: give perturb=")
        return self.energy.perturbed

    def _fall_back(self, why: str, looped: Callable) -> Callable:
        warn_of_handlers(f"backend={self.backend!r}", why)
        self.backend = "handlers"
        return looped

    def _agrees(self, graph: Callable, looped: Callable, state: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Compares with the handlers, of many chains on three: on a second state, and on a chunk of this shape of each probe."""
        other = state.detach() + torch.linspace(-0.05, 0.05, state.shape[-1], dtype=state.dtype, device=state.device)
        candidates = [tensors]
        for chunks in self._probes():
            candidates += [inputs for inputs in chunks if [t.shape for t in inputs] == [t.shape for t in tensors]][:1]
        varying, temperature = self._varying(state, tensors), self.energy.scalar(0.5)
        rows = slice(None) if state.dim() == 1 else sorted({0, len(state) // 2, len(state) - 1})
        for inputs in candidates:
            some = [t[rows] if i in varying else t for i, t in enumerate(inputs)]
            theirs = _parts(looped(other[rows], temperature, *some))
            if not all(bool(part.isfinite().all()) for part in theirs):
                other = (other - state.detach()).expand_as(state)  # near 0, where a density is finite that is not at this start
                theirs = _parts(looped(other[rows], temperature, *some))
            try:
                ours = _parts(graph(other, temperature, *inputs))
            except RuntimeError:
                return False
            if not agree([part[rows] for part in ours] if state.dim() == 2 else ours, theirs):
                return False
        return True

    # ------------------------------------------------------------------------------------------------------ the handlers' way

    def _looped(self, kind: str, single: bool) -> Callable:
        """Pyro's handlers for one chain after the other."""
        energy = self.energy

        def one(row: Tensor, temperature: Tensor, *tensors: Tensor) -> Any:
            if kind == "inputs":
                return energy.input_slope(row, temperature, tensors, self._place)
            if kind == "energy":
                return energy.energy_at(row, temperature, tensors)
            value, gradient = energy.slope_at(row, temperature, tensors)
            return gradient if kind == "gradient" else (gradient, value)

        def many(state: Tensor, temperature: Tensor, *tensors: Tensor) -> Any:
            varying = self._varying(state, tensors)
            rows = [one(row, temperature, *(t[c] if i in varying else t for i, t in enumerate(tensors))) for c, row in enumerate(state)]
            return assemble(rows, True)

        return one if single else many


def _parts(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assemble(pieces: list[Any], single: bool) -> Any:
    """Results of chunks as one: results of single rows are stacked, of several concatenated."""
    join = torch.stack if single else torch.cat
    if isinstance(pieces[0], tuple):
        return tuple(join(part) for part in zip(*pieces, strict=True))
    return join(pieces)

"""A potential's functions of one chunk of chains: Pyro's handlers, or graphs traced from them, checked against them and kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from pyro_advbayes.tracing.guard import DIFFERS, Guard, agree, autocast_state, noting_modules, reason, roots_of, warn_of_handlers
from pyro_advbayes.tracing.replay import quiet_batching, trace_graph

if TYPE_CHECKING:
    from pyro_advbayes.model.potential import Potential

BACKENDS = ("handlers", "graph", "compile")

# How many graphs a kernel keeps from run to run: a run makes one or two for each shape of a batch and of a chunk of chains.
KEPT = 32


class Kept(OrderedDict):
    """
    Of more than ``most`` entries, those that were used last.

    :param int most: >= 1.
    """

    def __init__(self, most: int = KEPT) -> None:  # a default, which pickle needs
        super().__init__()
        self._most = most

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        self.move_to_end(key)
        return self[key]


class _Mark(NamedTuple):
    """Fingerprint of a model, to detect stale graphs: sums of energy and gradient, in which plain numbers show, and its modules' state."""

    numbers: Tensor
    guard: Guard


class _Traced(NamedTuple):
    """A graph, and what tells whether the model is still the one that was traced."""

    graph: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    mark: _Mark


class Functions:
    """
    Functions of ``(state, temperature, *tensors)`` for one chunk of chains: ``"energy"``, ``"gradient"``, ``"both"`` as
    ``(gradient, energy)``, and ``"inputs"``, the gradient of the negative log-likelihood with respect to an argument.

    :param potential: what they evaluate.
    :param backend: one of :data:`BACKENDS`; becomes ``"handlers"`` where a model cannot be traced.
    :param graphs: traced graphs to use again, from an earlier potential of the same model.
    """

    def __init__(self, potential: Potential, backend: str, graphs: dict[Any, Any]) -> None:
        self.potential, self.backend = potential, backend
        self._graphs = graphs
        # those that this potential has checked, which it needs even if they are not kept for others
        self._ready: dict[Any, Callable[..., Any]] = {}

    def get(self, kind: str, state: Tensor, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """
        :param state: a row ``[size]``, or rows ``[chunk, size]``.
        :param tensors: what :meth:`Potential.chunks` gave.
        """
        looped = self._looped(kind, len(tensors), state.dim() == 1)
        if self.backend == "handlers":
            return looped
        key = (kind, state.shape, state.dtype, str(state.device), tuple((t.shape, t.dtype) for t in tensors), *autocast_state())
        if key not in self._ready:
            traced = self._graphs.get(key)
            if traced is None or not self._is_unchanged(traced) or not self._agrees(traced.graph, looped, state, tensors):
                inputs = self._of_first_chain(state, tensors)
                mark = self._mark(inputs)
                graph = self._trace(kind, state, tensors, looped, mark.guard.held)
                if graph is looped:
                    return looped
                traced = self._graphs[key] = _Traced(graph, inputs, mark)
            self._ready[key] = traced.graph
        return self._ready[key]

    def _is_unchanged(self, traced: _Traced) -> bool:
        """Whether what the graph holds (the tensors of modules, plain numbers, N) is still what the model has."""
        now = self._mark(traced.inputs)
        return torch.equal(now.numbers, traced.mark.numbers) and now.guard.state == traced.mark.guard.state

    def _mark(self, inputs: Sequence[Tensor]) -> _Mark:
        potential, roots = self.potential, roots_of(self.potential.model)
        row = 0.1 * torch.randn(potential.size, dtype=potential.dtype, generator=torch.Generator().manual_seed(0), device="cpu")
        with noting_modules(roots):
            energy, gradient = self.by_handlers(row.to(potential.device), potential.scalar(0.5), inputs)
        return _Mark(torch.stack([energy.double(), gradient.double().sum(), gradient.double().abs().sum()]), Guard(roots))

    def _varying(self, state: Tensor, num_tensors: int) -> Sequence[int]:
        """Which tensors have a row per chain."""
        return self.potential.varying(num_tensors) if state.dim() == 2 and self.potential.batches.per_chain else ()

    def _of_first_chain(self, state: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        varying = self._varying(state, len(tensors))
        return tuple(t[0].clone() if i in varying else t for i, t in enumerate(tensors))

    def _trace(self, kind: str, state: Tensor, tensors: Sequence[Tensor], looped: Callable, held: Sequence[Tensor]) -> Callable:
        potential = self.potential
        fn = {
            "energy": lambda: potential.log_density,
            "gradient": lambda: grad(potential.log_density),
            "both": lambda: grad_and_value(potential.log_density),
            "inputs": lambda: grad(potential.data_loss, argnums=2 + potential.perturbed),
        }[kind]()
        if state.dim() == 2:
            varying = self._varying(state, len(tensors))
            fn = vmap(fn, in_dims=(0, None, *(0 if i in varying else None for i in range(len(tensors)))))
        try:
            with pyro.validation_enabled(False), quiet_batching():
                graph = trace_graph(fn, (state.detach().clone(), potential.scalar(1.0), *tensors), held)
        except Exception as error:  # whatever a model's Python does under a tracer: the handlers still run it
            return self._fall_back(f"it cannot be traced: {reason(error)}", looped)
        if not self._agrees(graph, looped, state, tensors):
            return self._fall_back(DIFFERS, looped)
        return graph

    def _fall_back(self, why: str, looped: Callable) -> Callable:
        warn_of_handlers(f"backend={self.backend!r}", why)
        self.backend = "handlers"
        return looped

    def _agrees(self, graph: Callable, looped: Callable, state: Tensor, tensors: Sequence[Tensor]) -> bool:
        """
        Compares with the handlers on a second state, and on two more batches where they are of this shape; of many chains, on three.
        """
        potential = self.potential
        other = state.detach() + torch.linspace(-0.05, 0.05, state.shape[-1], dtype=state.dtype, device=state.device)
        candidates = [tensors]
        for probe in potential.probe_batches:
            chunks = (inputs for _, inputs in potential.chunks(potential.num_chains, probe))
            candidates += [inputs for inputs in chunks if [t.shape for t in inputs] == [t.shape for t in tensors]][:1]
        varying = self._varying(state, len(tensors))
        rows = slice(None) if state.dim() == 1 else sorted({0, len(state) // 2, len(state) - 1})
        for inputs in candidates:
            temperature = potential.scalar(0.5)
            theirs = looped(other[rows], temperature, *(t[rows] if i in varying else t for i, t in enumerate(inputs)))
            if not all(bool(part.isfinite().all()) for part in (theirs if isinstance(theirs, tuple) else (theirs,))):
                other = (other - state.detach()).expand_as(state)  # near 0, where a density is finite that is not at this start
                theirs = looped(other[rows], temperature, *(t[rows] if i in varying else t for i, t in enumerate(inputs)))
            try:
                ours = graph(other, temperature, *inputs)
            except RuntimeError:
                return False
            if state.dim() == 2:
                ours = tuple(part[rows] for part in ours) if isinstance(ours, tuple) else ours[rows]
            if not agree(*((part if isinstance(part, tuple) else (part,)) for part in (ours, theirs))):
                return False
        return True

    # ------------------------------------------------------------------------------------------------------ the handlers' way

    def _looped(self, kind: str, num_tensors: int, single: bool) -> Callable:
        """Pyro's handlers for one chain after the other."""

        def one(row: Tensor, temperature: Tensor, *tensors: Tensor) -> Any:
            if kind == "inputs":
                return self._inputs_by_handlers(row, temperature, tensors)
            energy, gradient = self.by_handlers(row, temperature, tensors, kind != "energy")
            return {"energy": energy, "gradient": gradient, "both": (gradient, energy)}[kind]

        def many(state: Tensor, temperature: Tensor, *tensors: Tensor) -> Any:
            varying = self._varying(state, num_tensors)
            rows = [one(row, temperature, *(t[c] if i in varying else t for i, t in enumerate(tensors))) for c, row in enumerate(state)]
            return assemble(rows, True)

        return one if single else many

    def by_handlers(
        self, row: Tensor, temperature: Tensor, tensors: Sequence[Tensor], with_gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Energy and gradient of one row ``[size]``."""
        with torch.enable_grad(), pyro.validation_enabled(False):
            row = row.detach().requires_grad_(with_gradient)
            energy = self.potential.log_density(row, temperature, *tensors)
            gradient = torch.autograd.grad(energy, row)[0] if with_gradient else None
        return energy.detach(), gradient

    def _inputs_by_handlers(self, row: Tensor, temperature: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with torch.enable_grad(), pyro.validation_enabled(False):
            tensors = [t.detach() for t in tensors]
            moved = tensors[self.potential.perturbed].requires_grad_()
            loss = self.potential.data_loss(row.detach(), temperature, *tensors)
            if not loss.requires_grad:
                return torch.zeros_like(moved)
            (gradient,) = torch.autograd.grad(loss, moved, allow_unused=True)
        return torch.zeros_like(moved) if gradient is None else gradient


def assemble(pieces: list[Any], single: bool) -> Any:
    """Results of chunks as one: of single rows stacked, of several put together."""
    join = torch.stack if single else torch.cat
    if isinstance(pieces[0], tuple):
        return tuple(join(part) for part in zip(*pieces, strict=True))
    return join(pieces)

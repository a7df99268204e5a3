"""A Pyro model as the potential energy U(state, batch) of flat rows, and its gradient, for many chains at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_choice
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.data import Chunk
from pyro_advbayes.model.energy import Energy
from pyro_advbayes.model.functions import BACKENDS, Functions, assemble
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.notices import tell_of_held_parameters
from pyro_advbayes.model.program import draw
from pyro_advbayes.model.scale import check_additive, tell_of_tempering
from pyro_advbayes.tracing.guard import RandomState
from pyro_advbayes.tracing.replay import chains_together


@checked
class Potential(Energy):
    r"""
    The potential energy of a Pyro model in unconstrained space, in nats over the whole data set:

    .. math:: U(\theta) = -\log p(\theta) - \frac{N}{B} \sum_{i \in \mathrm{batch}} \log p(y_i \mid x_i, \theta)
        - T \log \left|\det \frac{\partial\theta}{\partial u}\right|,

    an unbiased estimate from a minibatch of :math:`B` of :math:`N` rows. The Jacobian of the map from unconstrained :math:`u` is
    weighted by the temperature :math:`T`, so that a sampler of :math:`e^{-U/T}` has the law :math:`p(\theta, D)^{1/T}` in the
    model's own space.

    A ``pyro.factor`` outside the data plate belongs to the prior where it is the same on any rows. Observations may be NaN where a mask
    covers them.

    Data arrives in three ways: tensors cut into minibatches (``batch_size``), a plate that subsamples itself
    (``plate("data", N, subsample_size=B)``), or a loader, the only argument. Without any, every evaluation sees all the data.

    Three backends give the same numbers. ``"handlers"`` runs Pyro's handlers at every evaluation. ``"graph"`` traces them once
    into a flat graph and compares it with ``"handlers"`` on a second state and a second batch; where they differ, or the trace
    fails, it falls back to ``"handlers"`` with one warning that says why. ``"compile"`` compiles that graph.

    :param model: a Pyro model with continuous latent sites.
    :param args: its arguments, or one loader.
    :param kwargs: its keyword arguments.
    :param int num_chains: number of rows of a state.
    :param int batch_size: rows in a minibatch, 1 to N; None for all rows.
    :param batch_args: positions or names of the arguments that hold a row per data point; by default every tensor as long as
        the first one.
    :param int num_data: N, where a loader does not tell it.
    :param str backend: ``"handlers"``, ``"graph"`` or ``"compile"``.
    :param int chunk_size: how many chains are evaluated side by side; 1 means one after the other, without ``vmap``. The default
        is a fixed rule: all of them, but one on a CPU where the model has convolutions or over 500 000 weights.
    :param init_strategy: a per-site function as in ``pyro.infer.autoguide.initialization``.
    :param dict graphs: traced graphs to use again, from an earlier potential of the same model.
    :param str perturb: name of the argument, a batch's floating-point tensor, whose gradient :meth:`input_gradient` gives.
    :param int copies: how many rows of a batch that is evaluated stand for one row of the data, >= 1.
    :param bool shared_batches: whether all chains see the same minibatches.
    :param bool batch_dependent: accepts a log-likelihood of minibatches that is not a sum over their rows, so that :math:`N / B` times
        it is no estimate of the whole data set's (a contrastive loss, say); refused by default.
    :raises ValueError: naming site, plate, layer or argument, if the model or its data cannot be sampled as asked.
    """

    def __init__(
        self,
        model: Callable,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        num_chains: int = 1,
        batch_size: int | None = None,
        batch_args: Sequence[int | str] | None = None,
        num_data: int | None = None,
        backend: str = "graph",
        chunk_size: int | None = None,
        init_strategy: Callable = init_to_fan_in,
        graphs: dict[Any, Any] | None = None,
        perturb: str | None = None,
        copies: int = 1,
        shared_batches: bool = False,
        batch_dependent: bool = False,
    ) -> None:
        check_choice(backend, "backend", BACKENDS)
        super().__init__(
            model,
            args,
            kwargs,
            num_chains=num_chains,
            batch_size=batch_size,
            batch_args=batch_args,
            num_data=num_data,
            copies=copies,
            shared_batches=shared_batches,
            perturb=perturb,
        )
        self.init_strategy = init_strategy
        self._functions = Functions(self, backend, {} if graphs is None else graphs, self._probe_chunks)
        if self.structure.plate is not None and not batch_dependent:
            check_additive(self, init_strategy)
        if not batch_dependent:
            tell_of_tempering(self)
        tell_of_held_parameters(model, self.example_arguments(), self.structure.parameters)
        convolutional = any(len(site.shape) > 2 for site in self.sites)
        default = chains_together(num_chains, self.size, convolutional, self.device)
        self.chunk_size = default if chunk_size is None else min(chunk_size, num_chains)
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size!r}: the number of chains in one call, >= 1")
        self.covers = self._starts_on
        if self.not_finite is not None and not (self.structure.masked and all(map(self._starts_on, self.every_row()))):
            raise ValueError(self.not_finite)
        self.probe_batches = tuple(self.repeat(self.batches.next()) for _ in range(2))

    @property
    def backend(self) -> str:
        """The backend in use: what was asked for, or what it fell back to."""
        return self._functions.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._functions.backend = name

    # ------------------------------------------------------------------------------------------------------------ where chains start

    def init(self) -> Tensor:
        """
        A start for every chain, ``[chains, size]``, by the init strategy, with finite energy and gradient on two batches.

        :raises ValueError: if 100 tries find none.
        """
        state, wanting = torch.empty(self.num_chains, self.size, dtype=self.dtype, device=self.device), list(range(self.num_chains))
        for _ in range(100):
            for chain in wanting:
                state[chain] = self._draw_start()
            if len(wanting) == self.num_chains:
                self._check_fixed(state[0])
            wanting = (~self._finite_at(state)).nonzero().flatten().tolist()
            if not wanting:
                return state
        raise ValueError(
            "no start with a finite energy and gradient was found in 100 tries: check priors and data, or give "
            "initial_params or another init_strategy (pyro.infer.autoguide.initialization)"
        )

    @torch.no_grad()
    def _draw_start(self) -> Tensor:
        """A row ``[size]`` by the init strategy."""
        values = draw(self.model, self.example_arguments(), self.init_strategy)
        return self.unconstrain({site.name: values[site.name].unsqueeze(0) for site in self.sites})[0]

    def check_start(self, state: Tensor) -> None:
        """
        :param state: where chains are to start, ``[chains, size]``.
        :raises ValueError: if energy or gradient is not finite there, or differs from one evaluation to the next.
        """
        self._check_fixed(state[0])
        for chain in (~self._finite_at(state)).nonzero().flatten().tolist():
            raise ValueError(f"initial_params: energy or gradient is not finite where chain {chain} would start")

    def _finite_at(self, state: Tensor) -> Tensor:
        """Whether energy and gradient are finite, ``[chains]``: evaluated as in the run, side by side."""
        gradient, energy = self.evaluate("both", state, self.probe_batches[0])
        return energy.isfinite() & gradient.isfinite().all(-1)

    def _starts_on(self, batch: Batch) -> bool:
        """Whether energy and gradient are finite on a batch where a chain may start: then masks cover its NaN."""
        with RandomState().again():  # a run's numbers must not depend on what was looked at
            for _ in range(3):
                energy, gradient = self.slope_at(self._draw_start(), self.scalar(1.0), self.inputs(batch))
                if bool(energy.isfinite()) and bool(gradient.isfinite().all()):
                    return True
        return False

    def _check_fixed(self, row: Tensor) -> None:
        """:raises ValueError: if two evaluations differ, near a row: at 0 a network's random numbers may not show."""
        near = row + torch.linspace(-0.05, 0.05, len(row), dtype=row.dtype, device=row.device)
        inputs = self.inputs(self.probe_batches[0], 0)
        one, two = (self.energy_at(near, self.scalar(1.0), inputs) for _ in range(2))
        if not torch.allclose(one, two, rtol=1e-4, equal_nan=True):
            raise ValueError(
                f"the model has no fixed log-density: two evaluations at one point gave {float(-one)} and {float(-two)}. It draws "
                "random numbers outside of its sites (dropout in training mode?): call .eval()"
            )

    # ------------------------------------------------------------------------------------------------ energies and gradients

    def energy(self, state: Tensor, batch: Batch | None = None, temperature: float = 1.0) -> Tensor:
        """
        :param state: ``[chains, size]``.
        :param batch: what :attr:`batches` gave; None takes the next.
        :param temperature: T, which weights the Jacobian of constrained sites.
        :return: U, in nats, ``[chains]``.
        """
        return self.evaluate("energy", state, batch, temperature)

    def gradient(self, state: Tensor, batch: Batch | None = None, temperature: float = 1.0) -> Tensor:
        """The gradient of :meth:`energy` with respect to the state, ``[chains, size]``."""
        return self.evaluate("gradient", state, batch, temperature)

    @torch.no_grad()
    def evaluate(self, kind: str, state: Tensor, batch: Batch | None = None, temperature: float = 1.0) -> Any:
        """``"energy"``, ``"gradient"``, or ``"both"`` as ``(gradient, energy)``."""
        batch = self.batches.next() if batch is None else batch
        pieces = []
        for rows, tensors in self.chunks(state.shape[0], batch):
            piece = state[rows]
            pieces.append(self.function(kind, piece, tensors)(piece, self.scalar(temperature), *tensors))
        return assemble(pieces, self.chunk_size == 1)

    @torch.no_grad()
    def input_gradient(self, state: Tensor, batch: Batch, mean: bool = False) -> Tensor:
        """
        The gradient of the negative log-likelihood, in nats, with respect to the argument ``perturb``.

        :param state: ``[chains, size]``.
        :param batch: as for :meth:`energy`.
        :param mean: the mean over chains, which see one batch.
        :return: ``[chains, *argument]``, or ``[*argument]`` for the mean.
        """
        pieces: list[Tensor] = []
        for rows, tensors in self.chunks(state.shape[0], batch):
            piece = self.function("inputs", state[rows], tensors)(state[rows], self.scalar(1.0), *tensors)
            piece = piece.unsqueeze(0) if self.chunk_size == 1 else piece
            if not mean:
                pieces.append(piece)
            elif pieces:
                pieces[0] += piece.sum(0)
            else:
                pieces.append(piece.sum(0))
        return pieces[0] / state.shape[0] if mean else torch.cat(pieces)

    def chunks(self, num_chains: int, batch: Batch, size: int | None = None) -> list[Chunk]:
        """As :meth:`Data.chunks`, by default of ``chunk_size`` chains."""
        return super().chunks(num_chains, batch, self.chunk_size if size is None else size)

    def function(self, kind: str, state: Tensor, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """
        The function of ``(state, temperature, *tensors)`` that evaluates one chunk: a graph, or Pyro's handlers.

        :param kind: ``"energy"``, ``"gradient"``, ``"both"`` or ``"inputs"``.
        :param state: a row ``[size]``, or rows ``[chunk, size]``.
        :param tensors: what :meth:`chunks` gave.
        """
        return self._functions.get(kind, state, tensors)

    def shared_gradient(self, row: Tensor, batch: Batch) -> Tensor:
        """The gradient at one row ``[size]`` from a batch of ``batches.epoch()``, which all chains share."""
        return self.slope_at(row, self.scalar(1.0), self.inputs(batch))[1]

    # ------------------------------------------------------------------------------------------------------ two fixed minibatches

    def probes(self, chain: int) -> list[tuple[Tensor, ...]]:
        """The inputs of two fixed minibatches for one chain; of the full data once."""
        probes = self.probe_batches if self.probe_batches[0] else self.probe_batches[:1]
        return [self.inputs(probe, chain) for probe in probes]

    def _probe_chunks(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """The inputs of every chunk, of one probe after the other."""
        for probe in self.probe_batches:
            yield [tensors for _, tensors in self.chunks(self.num_chains, probe)]

    def reference_energy(self, row: Tensor) -> Tensor:
        """U at one row ``[size]`` on the first probe, by Pyro's handlers: tells one model from another."""
        return self.energy_at(row, self.scalar(1.0), self.probes(0)[0])

    def reference_trace(self, row: Tensor) -> Trace:
        """The model's trace at one row ``[size]`` on the first probe, with log-densities."""
        return self.densities_at(row, self.probes(0)[0])

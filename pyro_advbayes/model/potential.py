"""A Pyro model as the potential energy U(state, batch) of flat rows, and its gradient, for many chains at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyro_advbayes.checked import checked
from pyro_advbayes.given import need_tensor
from pyro_advbayes.handlers import CoveredMessenger, MinibatchMessenger, UnvalidatedMessenger, kept_random_state
from pyro_advbayes.model.batches import Arguments, Batch, FullData, Loader, PlateIndices, TensorRows, is_loader
from pyro_advbayes.model.functions import BACKENDS, Functions, assemble
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.notices import tell_of_held_parameters
from pyro_advbayes.model.refusals import Given, check_number, raised_here, told
from pyro_advbayes.model.scale import check_additive, tell_of_tempering
from pyro_advbayes.model.structure import Site, Structure, look
from pyro_advbayes.tracing.replay import chains_together


@checked
class Potential:
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
    fails, it falls back to ``"handlers"`` with one warning that says why. ``"compile"`` gives that graph to ``torch.compile``.

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
        graphs: dict[Any, Callable] | None = None,
        perturb: str | None = None,
        copies: int = 1,
        shared_batches: bool = False,
        batch_dependent: bool = False,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise ValueError(f"copies={copies!r}: how many rows of a plate stand for one row of the data, an int >= 1")
        self.model, self.num_chains, self.init_strategy = model, num_chains, init_strategy
        self.shared_batches, self.copies = shared_batches, copies
        self._functions = Functions(self, backend, {} if graphs is None else graphs)
        self._not_finite: str | None = None  # what to say of the data, unless a mask covers it
        self._ready = False
        kwargs = dict(kwargs or {})
        if is_loader(args, kwargs):
            self._from_loader(args[0], batch_size, num_data)
        else:
            given = Given(model, args, kwargs)

            def take(values: Mapping[str, Any]) -> None:
                self._from_arguments(Arguments(model, *given.call(values)), batch_size, batch_args, num_data)

            told(take, given.values)
        self.sites: tuple[Site, ...] = self.structure.sites
        self.size = sum(site.numel for site in self.sites)
        self.dtype = self.sites[0].dtype
        for site in self.sites:
            self.dtype = torch.promote_types(self.dtype, site.dtype)
        if self.structure.plate is not None and not batch_dependent:
            check_additive(self)
        if not batch_dependent:
            tell_of_tempering(self)
        tell_of_held_parameters(model, *self.example_arguments(), self.structure.parameters)
        convolutional = any(len(site.shape) > 2 for site in self.sites)
        default = chains_together(num_chains, self.size, convolutional, self.device)
        self.chunk_size = default if chunk_size is None else min(chunk_size, num_chains)
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size!r}: the number of chains in one call, >= 1")
        self._ready = True
        if self._not_finite is not None and not all(self._covers(batch, "") for batch in self._every_row()):
            raise ValueError(self._not_finite)
        self.probe_batches = tuple(self.repeat(self.batches.next()) for _ in range(2))
        self.perturbed = None if perturb is None else self._place_of(perturb)

    @property
    def backend(self) -> str:
        """The backend in use: what was asked for, or what it fell back to."""
        return self._functions.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._functions.backend = name

    # ---------------------------------------------------------------------------------------------- where data comes from

    def _from_loader(self, loader: Iterable[Any], batch_size: int | None, num_data: int | None) -> None:
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size}: a loader cuts its own batches; give batch_size to the loader")
        self.batches = Loader(loader, num_data, covers=self._covers)
        check_number(self.model, self.batches.example)
        given = Given(self.model, self.batches.example)
        told(lambda values: self._from_item(given.call(values)[0]), given.values)

    def _from_item(self, item: Batch) -> None:
        self.arguments = Arguments(self.model, item, {})
        self.places = list(range(len(item)))
        rows = len(item[0])
        fewer = tuple(t[: rows - 1] if rows > 1 else torch.cat([t, t]) for t in item)
        self.structure = self._look(
            self.model,
            (item, {}),
            (fewer, {}),
            (rows, len(fewer[0])),
            self.batches.num_data,
            self.arguments.lengths(),
            loader=True,
            whole=[(label, t, t) for label, t in zip(self.arguments.labels, item, strict=True)],
        )
        self.batches.labels = [(self.arguments.labels.index(labels.argument), labels) for labels in self.structure.labels]
        self.device, self.from_loader = item[0].device, True

    def _from_arguments(
        self, arguments: Arguments, batch_size: int | None, batch_args: Sequence[int | str] | None, num_data: int | None
    ) -> None:
        if num_data is not None:
            raise ValueError(f"num_data={num_data}: only a loader needs it; here the number of rows is read off the arguments")
        self._not_finite = arguments.not_finite()
        self.arguments, self.places, self.from_loader = arguments, [], False
        tensors = arguments.tensors
        self.device = tensors[0].device if tensors else torch.get_default_device()
        seed = int(torch.randint(2**31 - 1, ()))
        if batch_size is None:
            whole = [(label, t, t) for label, t in zip(arguments.labels, tensors, strict=True)]
            self.structure = self._look(self.model, (arguments.args, arguments.kwargs), None, None, None, arguments.lengths(), whole=whole)
            found = self.structure
            self.batches = FullData()
            if found.scaling == "indices":
                self.batches = PlateIndices(found.plate_size, found.plate_batch, self.num_chains, seed, self.device)
            return
        self.places, size = arguments.rows(batch_args)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= size:
            raise ValueError(
                f"batch_size={batch_size!r}: an int from 1 to the number of rows, {size} in argument {arguments.labels[self.places[0]]} "
                "(batch_args= names the arguments that hold data, if that is none of them)"
            )
        other = batch_size - 1 if batch_size > 1 else min(2, size)
        rows = self._rows(batch_size)
        self.structure = self._look(
            self.model,
            arguments.replace(rows),
            arguments.replace(self._rows(other)),
            (batch_size, other),
            size,
            arguments.lengths(),
            whole=list(zip(arguments.labels, rows, tensors, strict=True)),
        )
        self.batches = TensorRows([tensors[i] for i in self.places], batch_size, 1 if self.shared_batches else self.num_chains, seed)

    def _look(self, *args: Any, **kwargs: Any) -> Structure:
        """:func:`look`, at data that may be the reason why it fails."""
        try:
            return look(*args, **kwargs)
        except Exception as error:  # whatever a model's Python does with NaN
            if self._not_finite is not None and not raised_here(error):
                raise ValueError(self._not_finite) from None
            raise

    def _covers(self, batch: Batch, message: str) -> bool:
        """Whether a mask covers what is not finite in a batch: energy and gradient are finite where a chain may start."""
        if not self._ready:
            self._not_finite = message
            return True
        if not self.structure.masked:
            return False
        args, kwargs = self.example_arguments()
        with kept_random_state():  # a run's numbers must not depend on what was looked at
            for _ in range(3):
                row = self._draw_start(args, kwargs)
                energy, gradient = self._functions.by_handlers(row, self.scalar(1.0), self._inputs(batch))
                if bool(energy.isfinite()) and bool(gradient.isfinite().all()):
                    return True
        return False

    def _every_row(self) -> Iterator[Batch]:
        """Batches that hold every row of the data once at least; of a loader, the first."""
        if self.from_loader:
            yield self.batches.example
        elif self.structure.scaling == "indices":
            size = self.structure.plate_batch
            for rows in torch.arange(self.structure.plate_size + size - 1, device=self.device).split(size):
                if len(rows) == size:
                    yield (rows % self.structure.plate_size,)
        else:
            yield from (batch for batch, _ in self.batches.epoch())

    def _place_of(self, name: str) -> int:
        """Where an argument stands among the tensors."""
        labels = self.arguments.labels
        batched = [label for i, label in enumerate(labels) if i in self.places]
        if name not in batched:
            raise ValueError(
                f"perturb={name!r}: the model has no such argument that is cut into minibatches; there are {', '.join(batched) or 'none'}"
                + ("" if self.places else " (give batch_size=, or a loader)")
            )
        place = labels.index(name)
        if not self.arguments.tensors[place].is_floating_point():
            raise ValueError(
                f"perturb={name!r}: an argument of {self.arguments.tensors[place].dtype} cannot be moved, only one of floating point"
            )
        return place

    def repeat(self, batch: Batch) -> Batch:
        """A batch with every row ``copies`` times, one copy after the other."""
        if self.copies == 1:
            return batch
        return tuple(t.repeat_interleave(self.copies, dim=int(self.batches.per_chain)) for t in batch)

    def some_rows(self, count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        The model's ``(args, kwargs)`` with evenly spaced rows of the data, of a loader those of its first batch; with all rows where
        nothing is cut into minibatches.
        """
        tensors = list(self.arguments.tensors)
        for i in self.places:
            chosen = torch.linspace(0, len(tensors[i]) - 1, min(count, len(tensors[i])), device=tensors[i].device).round().long()
            tensors[i] = tensors[i][chosen]
        return self.arguments.replace(tensors)

    def _rows(self, count: int) -> list[Tensor]:
        return [t[:count] if i in self.places else t for i, t in enumerate(self.arguments.tensors)]

    # ------------------------------------------------------------------------------------------------- rows and their sites

    def split(self, state: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site, views ``[chains, *unconstrained_shape]`` into a state ``[chains, size]``."""
        parts = state.split([site.numel for site in self.sites], dim=-1)
        return {s.name: part.view(state.shape[:-1] + s.unconstrained_shape) for s, part in zip(self.sites, parts, strict=True)}

    def join(self, params: Mapping[str, Tensor]) -> Tensor:
        """
        A state ``[chains, size]`` from unconstrained values ``[chains, *unconstrained_shape]``; the inverse of :meth:`split`.

        :raises ValueError: naming a site that is missing, unknown or of another shape.
        """
        names = {site.name for site in self.sites}
        if set(params) != names:
            wrong = sorted(set(params) ^ names)[0]
            raise ValueError(f"site {wrong!r} is {'unknown to the model' if wrong in params else 'missing'}: expected {sorted(names)}")
        parts = []
        for site in self.sites:
            value = need_tensor(params[site.name], f"initial_params[{site.name!r}]")
            if value.dim() == 0 or value.shape[1:] != site.unconstrained_shape:
                raise ValueError(
                    f"site {site.name!r} has shape {tuple(value.shape)}: expected [chains, *{tuple(site.unconstrained_shape)}] in "
                    "unconstrained space"
                )
            if parts and len(value) != len(parts[0]):
                raise ValueError(
                    f"site {site.name!r} has values for {len(value)} chains, but site {self.sites[0].name!r} for {len(parts[0])}: the "
                    "first dimension is the chains', of the same length at every site"
                )
            parts.append(value.detach().to(self.device, self.dtype).reshape(len(value), -1))
        return torch.cat(parts, dim=-1)

    def constrain(self, state: Tensor) -> dict[str, Tensor]:
        """
        Values by site ``[chains, *shape]``, in the model's own space and dtypes; of sites that need no map, views into the state: clone
        them to keep them.
        """
        with torch.no_grad():
            parts = self.split(state.detach()).values()
            values = {site.name: site.transform(part) for site, part in zip(self.sites, parts, strict=True)}
            return {site.name: values[site.name].to(site.dtype) for site in self.sites}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """A state from values ``[chains, *shape]``; the inverse of :meth:`constrain`."""
        with torch.no_grad():
            missing = [site.name for site in self.sites if site.name not in values]
            if missing:
                raise ValueError(f"site {missing[0]!r} is missing: values are needed for {[s.name for s in self.sites]}")
            return self.join(
                {
                    site.name: site.transform.inv(need_tensor(values[site.name], f"values[{site.name!r}]").to(self.device))
                    for site in self.sites
                }
            )

    @property
    def transforms(self) -> dict[str, Any]:
        """Maps from the model's space to unconstrained space, by site, as Pyro's kernels give them."""
        return {site.name: site.transform.inv for site in self.sites}

    def init(self) -> Tensor:
        """
        A start for every chain, ``[chains, size]``, by the init strategy, with finite energy and gradient on two batches.

        :raises ValueError: if 100 tries find none.
        """
        args, kwargs = self.example_arguments()
        state, wanting = torch.empty(self.num_chains, self.size, dtype=self.dtype, device=self.device), list(range(self.num_chains))
        for _ in range(100):
            for chain in wanting:
                state[chain] = self._draw_start(args, kwargs)
            if len(wanting) == self.num_chains:
                self._check_fixed(state[0])
            wanting = (~self._finite_at(state)).nonzero().flatten().tolist()
            if not wanting:
                return state
        raise ValueError(
            "no start with a finite energy and gradient was found in 100 tries: check priors and data, or give "
            "initial_params or another init_strategy (pyro.infer.autoguide.initialization)"
        )

    def _draw_start(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(InitMessenger(self.init_strategy)(self.model)).get_trace(*args, **kwargs)
        return self.unconstrain({site.name: trace.nodes[site.name]["value"].detach().unsqueeze(0) for site in self.sites})[0]

    def check_start(self, state: Tensor) -> None:
        """
        :param state: where chains are to start, ``[chains, size]``.
        :raises ValueError: if energy or gradient is not finite there, or differs from one evaluation to the next.
        """
        self._check_fixed(state[0])
        for chain in (~self._finite_at(state)).nonzero().flatten().tolist():
            raise ValueError(f"initial_params: energy or gradient is not finite where chain {chain} would start")

    def _finite_at(self, state: Tensor) -> Tensor:
        """Whether energy and gradient are finite, ``[chains]``: evaluated as in the run, which a thousand chains need."""
        gradient, energy = self.evaluate("both", state, self.probe_batches[0])
        return energy.isfinite() & gradient.isfinite().all(-1)

    def _check_fixed(self, row: Tensor) -> None:
        """:raises ValueError: if two evaluations differ, near a row: at 0 a network's random numbers may not show."""
        near = row + torch.linspace(-0.05, 0.05, len(row), dtype=row.dtype, device=row.device)
        inputs = self._inputs(self._chain_batch(self.probe_batches[0], 0))
        one, two = (self._functions.by_handlers(near, self.scalar(1.0), inputs, with_gradient=False)[0] for _ in range(2))
        if not torch.allclose(one, two, rtol=1e-4, equal_nan=True):
            raise ValueError(
                f"the model has no fixed log-density: two evaluations at one point gave {float(-one)} and {float(-two)}. It draws "
                "random numbers beside its sites (dropout in training mode?): call .eval()"
            )

    def example_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's ``(args, kwargs)`` with as many rows as a minibatch has, where they are cut into minibatches."""
        cut = self.structure.scaling == "minibatch" and self.places
        return self.arguments.replace(self._rows(self.batches.batch_size) if cut else self.arguments.tensors)

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

    def function(self, kind: str, state: Tensor, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """
        The function of ``(state, temperature, *tensors)`` that evaluates one chunk: a graph, or Pyro's handlers.

        :param kind: ``"energy"``, ``"gradient"``, ``"both"`` or ``"inputs"``.
        :param state: a row ``[size]``, or rows ``[chunk, size]``.
        :param tensors: what :meth:`chunks` gave.
        """
        return self._functions.get(kind, state, tensors)

    def hessian_product(self, row: Tensor, direction: Tensor, tensors: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The Hessian of U at one row ``[size]`` times a direction ``[size]``, on the inputs that :meth:`probes` gave."""
        # the other ways to compute attention have no second derivative
        with torch.enable_grad(), pyro.validation_enabled(False), sdpa_kernel(SDPBackend.MATH):
            row = row.detach().requires_grad_()
            energy = self.log_density(row, self.scalar(temperature), *tensors)
            (gradient,) = torch.autograd.grad(energy, row, create_graph=True)
            if not gradient.requires_grad:  # U is linear
                return torch.zeros_like(direction)
            try:
                (product,) = torch.autograd.grad(gradient @ direction, row, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error) and "double backward" not in str(error):
                    raise
                raise ValueError(_without_curvature(self.model, error)) from None
        return torch.zeros_like(direction) if product is None else product.detach()

    def probes(self, chain: int) -> list[tuple[Tensor, ...]]:
        """The inputs of two fixed minibatches for one chain; of the full data once."""
        probes = self.probe_batches if self.probe_batches[0] else self.probe_batches[:1]
        return [self._inputs(self._chain_batch(probe, chain)) for probe in probes]

    def reference_energy(self, row: Tensor) -> Tensor:
        """U at one row ``[size]`` on the first probe, by Pyro's handlers: tells one model from another."""
        return self._functions.by_handlers(row, self.scalar(1.0), self.probes(0)[0], with_gradient=False)[0]

    def reference_trace(self, row: Tensor) -> Trace:
        """What the model does at one row ``[size]`` on the first probe, with log-densities."""
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = self._trace(self._values(row)[0], self.probes(0)[0])
            trace.compute_log_prob()
        return trace

    def shared_gradient(self, row: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The gradient at one row ``[size]`` from a batch that no chain has to itself (:meth:`batches.epoch`)."""
        return self._functions.by_handlers(row, self.scalar(temperature), self._inputs(batch))[1]

    def chunks(self, num_chains: int, batch: Batch) -> list[tuple[slice | int, tuple[Tensor, ...]]]:
        """Which rows of a state go into one call of :meth:`function`, and with which tensors: an int is a row by itself."""
        if self.chunk_size == 1:
            return [(c, self._inputs(self._chain_batch(batch, c))) for c in range(num_chains)]
        result: list[tuple[slice | int, tuple[Tensor, ...]]] = []
        for start in range(0, num_chains, self.chunk_size):
            rows = slice(start, min(start + self.chunk_size, num_chains))
            result.append((rows, self._inputs(tuple(t[rows] for t in batch) if self.batches.per_chain else batch)))
        return result

    def log_density(self, row: Tensor, temperature: Tensor, *tensors: Tensor) -> Tensor:
        """U of one chain: everything else evaluates, differentiates, batches or traces this (or :meth:`data_loss`)."""
        values, log_jacobian = self._values(row)
        trace = self._trace(values, tensors)
        return -(trace.log_prob_sum() + temperature * log_jacobian).to(row.dtype)

    def _trace(self, values: dict[str, Tensor], tensors: Sequence[Tensor]) -> Trace:
        """The model at given values of its sites, scaled to the whole data set."""
        model = self.model
        if self.structure.scaling == "minibatch":
            model = MinibatchMessenger(self.structure.plate_size, self.structure.plate, self.structure.prior_factors, self.copies)(model)
        elif self.structure.scaling == "indices":
            *tensors, values[self.structure.plate] = tensors
        args, kwargs = self.arguments.replace(tensors)
        with poutine.block(), UnvalidatedMessenger(), self.covering():
            return poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)

    def covering(self) -> Any:
        """A handler under which observations that a mask covers may be NaN, where some are or a loader may bring some."""
        # of a loader, since a later batch may be the first with NaN
        covers = self.structure.masked and (self._not_finite is not None or self.from_loader)
        return CoveredMessenger() if covers else contextlib.nullcontext()

    def _values(self, row: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The sites' values for one row, and the logarithm of the Jacobian's determinant."""
        values, log_jacobian = {}, row.new_zeros(())
        for site, part in zip(self.sites, row.split([site.numel for site in self.sites]), strict=True):
            part = part.view(site.unconstrained_shape).to(site.dtype)
            values[site.name] = site.transform(part)
            if not _is_identity(site.transform):
                log_jacobian = log_jacobian + site.transform.log_abs_det_jacobian(part, values[site.name]).sum()
        return values, log_jacobian

    def data_loss(self, row: Tensor, temperature: Tensor, *tensors: Tensor) -> Tensor:
        """The negative log-likelihood of the rows in ``tensors`` for one chain, the sum over rows, not scaled to all data."""
        values, _ = self._values(row)
        args, kwargs = self.arguments.replace(tensors)
        with poutine.block(), UnvalidatedMessenger(), self.covering():
            trace = poutine.trace(poutine.condition(self.model, values)).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, site: site["is_observed"] and name not in values)
        return -sum(trace.nodes[name]["log_prob_sum"] for name in trace.observation_nodes if name not in values).to(row.dtype)

    # ---------------------------------------------------------------------------------------------- inputs of the functions

    def varying(self, num_tensors: int) -> Sequence[int]:
        """Which of a function's tensors differ from chain to chain, where batches do."""
        return (num_tensors - 1,) if self.structure.scaling == "indices" else self.places

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """All tensor arguments, with a batch in its places; a plate's indices come last."""
        if self.structure.scaling == "indices":
            return (*self.arguments.tensors, *batch)
        if not self.places:
            return tuple(self.arguments.tensors)
        tensors = list(self.arguments.tensors)
        for place, value in zip(self.places, batch, strict=True):
            tensors[place] = value
        return tuple(tensors)

    def arguments_with(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's ``(args, kwargs)`` with a batch in its place."""
        return self.arguments.replace(self._inputs(batch))

    def _chain_batch(self, batch: Batch, chain: int) -> Batch:
        return tuple(t[chain] for t in batch) if self.batches.per_chain else batch

    def scalar(self, value: float) -> Tensor:
        """A number (a temperature) as a tensor."""
        return torch.tensor(float(value), dtype=self.dtype, device=self.device)


def _without_curvature(model: Callable, error: Exception) -> str:
    layers = {type(module).__name__ for module in model.modules()} if isinstance(model, nn.Module) else set()
    where = (
        " (nn.EmbeddingBag; nn.Embedding and a mean have one)" if "EmbeddingBag" in {name.removeprefix("Pyro") for name in layers} else ""
    )
    what = str(error).splitlines()[0].rstrip(".")
    return (
        f'step_size="auto" needs second derivatives, and an operation of the model has none{where}: {what}. Give a step size, a number or '
        "a function of the step"
    )


def _is_identity(transform: Any) -> bool:
    base = getattr(transform, "base_transform", transform)
    return base is torch.distributions.transforms.identity_transform

"""The data of a run: a model's arguments, which of them are cut into minibatches, and where a minibatch goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_advbayes.given import check_int
from pyro_advbayes.handlers import CoveredMessenger, MinibatchMessenger
from pyro_advbayes.model.batches import Arguments, Batch, FullData, PlateIndices, TensorRows
from pyro_advbayes.model.loader import Loader, is_loader
from pyro_advbayes.model.program import Call, run
from pyro_advbayes.model.refusals import Given, check_number, raised_here, told
from pyro_advbayes.model.structure import Structure, look

Batches = FullData | PlateIndices | Loader
Chunk = tuple[slice | int, tuple[Tensor, ...]]


class Data:
    """
    A model with its data, as :class:`~pyro_advbayes.model.potential.Potential` takes them.

    :ivar arguments: the model's arguments; of a loader, its first batch.
    :ivar places: which of the tensor arguments are cut into minibatches.
    :ivar batches: where the minibatches come from.
    :ivar structure: what :func:`~pyro_advbayes.model.structure.look` found.
    :ivar from_loader: whether the batches come from a loader.
    :ivar covers: function of a batch to whether masks cover its NaN and infinities; until it is set, these are noted in ``not_finite``.
    :ivar not_finite: the message about NaN or infinities in the data, None without any.
    """

    arguments: Arguments
    places: list[int]
    batches: Batches
    structure: Structure
    device: torch.device

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
        copies: int = 1,
        shared_batches: bool = False,
    ) -> None:
        check_int(copies, "copies", 1, "how many rows of a plate stand for one row of the data")
        self.model, self.num_chains, self.copies, self.shared_batches = model, num_chains, copies, shared_batches
        self.covers: Callable[[Batch], bool] | None = None
        self.not_finite: str | None = None
        kwargs = dict(kwargs or {})
        self.from_loader = is_loader(args, kwargs)
        if self.from_loader:
            self._from_loader(args[0], batch_size, num_data)
        else:
            given = Given(model, args, kwargs)
            told(lambda values: self._from_arguments(Arguments(model, *given.call(values)), batch_size, batch_args, num_data), given.values)

    def _from_loader(self, loader: Iterable[Any], batch_size: int | None, num_data: int | None) -> None:
        if batch_size is not None:
            raise ValueError(f"batch_size={batch_size}: a loader cuts its own batches; give batch_size to the loader")
        self.batches = batches = Loader(loader, num_data, covers=self._covers)
        check_number(self.model, batches.example)
        given = Given(self.model, batches.example)
        told(lambda values: self._from_item(batches, given.call(values)[0]), given.values)

    def _from_item(self, batches: Loader, item: Batch) -> None:
        self.arguments, self.places, self.device = Arguments(self.model, item, {}), list(range(len(item))), item[0].device
        rows = len(item[0])
        fewer = tuple(t[: rows - 1] if rows > 1 else torch.cat([t, t]) for t in item)
        self._look((item, {}), (fewer, {}), (rows, len(fewer[0])), batches.num_data, item)
        batches.labels = [(self.arguments.labels.index(labels.argument), labels) for labels in self.structure.labels]

    def _from_arguments(
        self, arguments: Arguments, batch_size: int | None, batch_args: Sequence[int | str] | None, num_data: int | None
    ) -> None:
        if num_data is not None:
            raise ValueError(f"num_data={num_data}: only a loader needs it; here the number of rows is read off the arguments")
        self.not_finite = arguments.not_finite()
        self.arguments, self.places = arguments, []
        tensors = arguments.tensors
        self.device = tensors[0].device if tensors else torch.get_default_device()
        seed = int(torch.randint(2**31 - 1, ()))
        if batch_size is None:
            self._look((arguments.args, arguments.kwargs), None, None, None, tensors)
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
        rows, fewer = self._rows(batch_size), self._rows(other)
        self._look(arguments.replace(rows), arguments.replace(fewer), (batch_size, other), size, rows)
        self.batches = TensorRows([tensors[i] for i in self.places], batch_size, 1 if self.shared_batches else self.num_chains, seed)

    def _look(self, few: Call, fewer: Call | None, rows: tuple[int, int] | None, num_data: int | None, given: Sequence[Tensor]) -> None:
        """
        Finds the structure; where the model fails, the data may be the reason.

        :param given: the tensor arguments in ``few``.
        """
        whole = list(zip(self.arguments.labels, given, self.arguments.tensors, strict=True))
        try:
            self.structure = look(self.model, few, fewer, rows, num_data, self.arguments.lengths(), self.from_loader, whole)
        except Exception as error:  # whatever a model's Python does with NaN
            if self.not_finite is not None and not raised_here(error):
                raise ValueError(self.not_finite) from None
            raise

    def _covers(self, batch: Batch, message: str) -> bool:
        """Whether masks cover what is not finite in a batch."""
        if self.covers is None:
            self.not_finite = message
            return True
        return self.structure.masked and self.covers(batch)

    # ---------------------------------------------------------------------------------------------- rows that are looked at

    def _rows(self, count: int) -> list[Tensor]:
        return [t[:count] if i in self.places else t for i, t in enumerate(self.arguments.tensors)]

    def example_arguments(self) -> Call:
        """The model's ``(args, kwargs)``, with as many rows as a minibatch has if arguments are cut."""
        cut = self._rows(self.structure.plate_batch) if self.structure.scaling == "minibatch" and self.places else self.arguments.tensors
        return self.arguments.replace(cut)

    def some_rows(self, count: int) -> Call:
        """
        The model's ``(args, kwargs)`` with evenly spaced rows of the data, of a loader those of its first batch; with all rows if no
        argument is cut.
        """
        tensors = list(self.arguments.tensors)
        for i in self.places:
            chosen = torch.linspace(0, len(tensors[i]) - 1, min(count, len(tensors[i])), device=tensors[i].device).round().long()
            tensors[i] = tensors[i][chosen]
        return self.arguments.replace(tensors)

    def every_row(self) -> Iterator[Batch]:
        """Batches that hold every row of the data at least once; of a loader, the first batch."""
        if isinstance(self.batches, Loader):
            yield self.batches.example
        elif self.structure.scaling == "indices":
            size, batch = self.structure.plate_size, self.structure.plate_batch
            for rows in torch.arange(size + batch - 1, device=self.device).split(batch):
                if len(rows) == batch:
                    yield (rows % size,)
        else:
            yield from (batch for batch, _ in self.batches.epoch())

    # --------------------------------------------------------------------------------------------- a minibatch in its place

    def repeat(self, batch: Batch) -> Batch:
        """A batch with every row ``copies`` times, one copy after the other."""
        if self.copies == 1:
            return batch
        return tuple(t.repeat_interleave(self.copies, dim=int(self.batches.per_chain)) for t in batch)

    def chunks(self, num_chains: int, batch: Batch, size: int) -> list[Chunk]:
        """
        Which rows of a state go into one call of a function, and with which tensors: an int is a row by itself.

        :param size: the number of chains in one call.
        """
        if size == 1:
            return [(chain, self.inputs(batch, chain)) for chain in range(num_chains)]
        if size >= num_chains:
            return [(slice(0, num_chains), self.inputs(batch))]
        parts = [slice(start, min(start + size, num_chains)) for start in range(0, num_chains, size)]
        return [(part, self.inputs(batch, part)) for part in parts]

    def inputs(self, batch: Batch, chain: int | slice | None = None) -> tuple[Tensor, ...]:
        """
        All tensor arguments, with a batch in its place; a plate's indices come last.

        :param chain: whose part of a batch that differs between chains; None for a batch that no chain has to itself.
        """
        if chain is not None and self.batches.per_chain:
            batch = tuple(t[chain] for t in batch)
        tensors = self.arguments.tensors
        if self.structure.scaling == "indices":
            return (*tensors, *batch)
        for place, value in zip(self.places, batch, strict=True):
            tensors[place] = value
        return tuple(tensors)

    def varying(self, num_tensors: int) -> Sequence[int]:
        """Which of :meth:`inputs` differ from chain to chain."""
        if not self.batches.per_chain:
            return ()
        return (num_tensors - 1,) if self.structure.scaling == "indices" else self.places

    def arguments_with(self, batch: Batch) -> Call:
        """The model's ``(args, kwargs)`` with a batch in its place."""
        return self.arguments.replace(self.inputs(batch))

    # ----------------------------------------------------------------------------------------------------- the model on it

    def trace(self, values: Mapping[str, Tensor], tensors: Sequence[Tensor], scaled: bool = True) -> Trace:
        """
        The model at values of its sites and on :meth:`inputs`.

        :param scaled: whether the rows stand for the whole data set.
        """
        model = self.model
        if self.structure.scaling == "indices":
            *tensors, indices = tensors
            values = {**values, str(self.structure.plate): indices}
        elif self.structure.scaling == "minibatch" and scaled:
            model = MinibatchMessenger(self.structure.plate_size, self.structure.plate, self.structure.prior_factors, self.copies)(model)
        return run(model, self.arguments.replace(tensors), values, self.covering(), validated=False)

    def covering(self) -> contextlib.AbstractContextManager[Any]:
        """A handler under which masked observations may be NaN, if some are, or a loader may bring some in a later batch."""
        covers = self.structure.masked and (self.not_finite is not None or self.from_loader)
        return CoveredMessenger() if covers else contextlib.nullcontext()

"""Minibatches from a ``torch.utils.data.DataLoader``, or from another iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from pyro.util import get_rng_state, set_rng_seed, set_rng_state
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pyro_advbayes.given import as_tensor, is_array, is_pandas, kind, warn
from pyro_advbayes.model.batches import Batch, not_finite

# A loader is known by so many batches at most, and by no more after so many bytes.
LOOKED_AT, LOOKED_AT_BYTES = 16, 2**24

_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)  # these tell how many rows they choose from


class Loader:
    """
    Minibatches of a ``torch.utils.data.DataLoader``, or of any iterable of tuples of tensors with a length that can be iterated again. All
    chains see the same batch. :meth:`next` leaves out a short last batch of shuffled rows.

    :param loader: gives the model's arguments, a tuple (or one tensor) at a time.
    :param num_data: rows in the data set; by default read off the loader.
    :param device: where the batches go.
    :param covers: function of a batch with NaN or infinity in it, and of the message about it, to whether the model masks it; called once
        for each place in a batch. By default no NaN is accepted.

    :ivar labels: places in a batch, with the labels whose ``check`` the tensors there must pass.
    """

    per_chain = False

    def __init__(
        self,
        loader: Iterable[Any],
        num_data: int | None,
        device: torch.device | None = None,
        covers: Callable[[Batch, str], bool] | None = None,
    ) -> None:
        self.loader, self.device, self.covers = loader, device, covers
        self._covered: set[int] = set()
        self.num_data = _rows_behind(loader) if num_data is None else num_data
        self._iterator: Iterator[Any] | None = None
        self._epoch_random: dict[str, Any] = {}
        self._taken = 0
        self.batch_size: int | None = None
        self.labels: list[tuple[int, Any]] = []
        self.example = self.next()
        self.batch_size = len(self.example[0])
        if num_data is not None:
            _check_num_data(loader, num_data, self.batch_size)
        self._iterator = None

    @property
    def tensors(self) -> Batch:
        """The tensors in the loader: its data set, or its batches, and the rows and weights of its sampler."""
        if isinstance(self.loader, (list, tuple)):
            return tuple(value for number, item in enumerate(self.loader, 1) for value in self._tensors(item, number))
        dataset, sampler = getattr(self.loader, "dataset", None), _sampler(self.loader)
        found = list(dataset.tensors) if isinstance(dataset, TensorDataset) else []
        chosen = [getattr(part, name, None) for part, name in ((dataset, "indices"), (sampler, "indices"), (sampler, "weights"))]
        found += [rows for rows in chosen if isinstance(rows, Tensor)]
        numbers = [list(rows) for rows in chosen if isinstance(rows, Sequence)]
        return (*found, *(torch.tensor(rows) for rows in numbers if all(isinstance(row, int) for row in rows)))

    def describe(self) -> list[Any]:
        """Plain values in which two loaders of the same data usually differ."""
        sampler = getattr(self.loader, "sampler", None)
        return [type(self.loader).__name__, type(sampler).__name__, self.batch_size, getattr(self.loader, "drop_last", None)]

    def first_batches(self) -> Iterator[Batch]:
        """
        The first batches of an epoch under a fixed random state, up to 16 of them or 16 MiB: the fingerprint of a loader. Stream and
        generators are restored.
        """
        shared, own = get_rng_state(), self._own_states()
        place = None if self._iterator is None else self.state()  # a loader whose workers live on has one iterator
        size = 0
        try:
            set_rng_seed(0)
            for generator in self._own_generators():
                generator.manual_seed(0)
            for number, item in enumerate(self.loader, 1):
                batch = self._tensors(item, number)
                yield batch
                size += sum(value.nbytes for value in batch)
                if number == LOOKED_AT or size >= LOOKED_AT_BYTES:
                    break
        finally:
            if place is None:
                self._set_own_states(own)
            else:
                self.load(place)
            set_rng_state(shared)

    def next(self) -> Batch:
        """
        The next item's tensors; a new epoch follows the last item.

        :raises ValueError: if batches in a fixed order differ in length, so that some rows would always weigh more.
        """
        if self._iterator is None:
            self._epoch_random = {"shared": dict(get_rng_state()), "own": self._own_states()}
            self._taken = 0
            self._iterator = iter(self.loader)
        try:
            item = next(self._iterator)
        except StopIteration:
            if self._taken == 0:
                raise ValueError("the loader is empty: it gave no batch") from None
            self._iterator = None
            return self.next()
        self._taken += 1
        batch = self._tensors(item, self._taken)
        return self.next() if self._is_rest(batch) else batch

    def _is_rest(self, batch: Batch) -> bool:
        rows = len(batch[0])
        if self.batch_size in (None, rows):
            return False
        sampler = _sampler(self.loader)
        if isinstance(sampler, SequentialSampler) or isinstance(self.loader, (list, tuple)):
            raise self._uneven(self._taken, rows)
        # the rows of a short last batch are random: leaving it out favours none, and its gradient would be by far the noisiest
        cut = type(getattr(self.loader, "batch_sampler", None)) is BatchSampler and isinstance(sampler, _SAMPLERS)
        return cut and isinstance(self.loader, Sized) and self._taken == len(self.loader) > 1

    def _uneven(self, number: int, rows: int) -> ValueError:
        return ValueError(
            f"batch {number} of the loader has {rows} rows and the first one {self.batch_size}, in a fixed order: each stands for "
            "the whole data set, so that the same rows would weigh more in every epoch. Give the DataLoader shuffle=True or "
            "drop_last=True, or all batches the same length"
        )

    def check_lengths(self) -> None:
        """:raises ValueError: as :meth:`next`, if a loader holds its batches, or their lengths are known."""
        if isinstance(self.loader, (list, tuple)):
            for number, item in enumerate(self.loader, 1):
                rows = len(self._tensors(item, number)[0])
                if rows != self.batch_size:
                    raise self._uneven(number, rows)
        cut = getattr(self.loader, "batch_sampler", None)
        if type(cut) is BatchSampler and type(cut.sampler) is SequentialSampler and not cut.drop_last and cut.batch_size == self.batch_size:
            whole, rest = divmod(len(cut.sampler), cut.batch_size)
            if whole and rest:
                raise self._uneven(whole + 1, rest)

    def _tensors(self, item: Any, number: int) -> Batch:
        item = (item,) if isinstance(item, Tensor) else item
        if not isinstance(item, (tuple, list)) or not item or not all(isinstance(value, Tensor) and value.dim() > 0 for value in item):
            found = [type(value).__name__ for value in item] if isinstance(item, (tuple, list)) else type(item).__name__
            arrays = [value for value in item if is_array(value)] if isinstance(item, (tuple, list)) else [item] if is_array(item) else []
            form = as_tensor("array", arrays[0], torch.get_default_dtype()) if arrays else None
            remedy = "" if form is None else f". Of {kind(arrays[0])} make a tensor, {form.expression}"
            raise ValueError(
                f"the loader gave {found}: every item must be a tuple of tensors with a row per data point, the model's arguments "
                f"in order (DataLoader's collate_fn= can make it one){remedy}"
            )
        for i, value in enumerate(item):
            message = (
                None
                if i in self._covered
                else not_finite(value, f"tensor {i} in batch {number} of the loader", None if self.covers is None else "y")
            )
            if message:
                if self.covers is None or not self.covers(self._moved(item), message):
                    raise ValueError(message)
                self._covered.add(i)
        for place, labels in self.labels:
            labels.check(item[place], f", batch {number} of the loader,")
        return self._moved(item)

    def _moved(self, item: Sequence[Tensor]) -> Batch:
        return tuple(item) if self.device is None else tuple(value.to(self.device) for value in item)

    def _own_generators(self) -> list[torch.Generator]:
        """The random generators of the loader, its samplers and its data set, other than PyTorch's shared one."""
        batch_sampler, dataset = getattr(self.loader, "batch_sampler", None), getattr(self.loader, "dataset", None)
        parts = [self.loader, getattr(self.loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None), dataset]
        while isinstance(dataset, Subset):
            parts.append(dataset := dataset.dataset)
        found = [g for part in parts for g in getattr(part, "__dict__", {}).values() if isinstance(g, torch.Generator)]
        return list({id(generator): generator for generator in found}.values())

    def _own_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._own_generators()]

    def _set_own_states(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._own_generators(), states, strict=True):
            generator.set_state(state)

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """One run through the loader, as ``(batch, rows)``."""
        for number, item in enumerate(self.loader, 1):
            batch = self._tensors(item, number)
            yield batch, len(batch[0])

    def state(self) -> dict[str, Any]:
        """The number of batches taken from the epoch, and the random generators at its start and now."""
        return {"taken": self._taken, **self._epoch_random, "own now": self._own_states()}

    def load(self, state: dict[str, Any]) -> None:
        """Starts the epoch again and skips the batches already taken; the shared random generators stay at that place."""
        if len(state["own"]) != len(self._own_generators()):
            raise ValueError(f"the loader has {len(self._own_generators())} random generators of its own: it had {len(state['own'])}")
        self._iterator = None
        self._set_own_states(state["own"])
        set_rng_state(state["shared"])
        for _ in range(state["taken"]):
            self.next()
        self._set_own_states(state["own now"])


def is_loader(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """
    Whether the arguments of ``run(*args, **kwargs)`` are a loader: one iterable with a length.

    :raises ValueError: for a loader beside other arguments, and for an iterable without a length, or for one pass only.
    """
    if len(args) != 1 or kwargs:
        if any(isinstance(value, DataLoader) for value in (*args, *kwargs.values())):
            raise ValueError("a loader must be the only argument: its items hold all the model's arguments, in order")
        return False
    (value,) = args
    if isinstance(value, (Tensor, str, Mapping, np.ndarray, nn.Module)) or is_pandas(value) or not hasattr(value, "__iter__"):
        return False
    name = type(value).__name__
    if hasattr(value, "__next__"):
        raise ValueError(f"{name} can be run through only once: give a DataLoader, or a list of the batches")
    if not hasattr(value, "__len__"):
        raise ValueError(f"{name} has no length: give a DataLoader, a list of the batches, or add __len__, the number of batches")
    return True


def _rows_behind(loader: Any) -> int:
    if isinstance(loader, DataLoader) and loader.batch_sampler is None:
        raise ValueError(
            "num_data: the loader does not make its batches itself (batch_size=None), so that the number of rows behind it must be "
            "given, num_data=..."
        )
    sampler, dataset = _sampler(loader), getattr(loader, "dataset", None)
    rows: Any
    if isinstance(sampler, (SequentialSampler, RandomSampler)):
        rows = sampler.data_source  # an epoch may be shorter than these (num_samples=), or longer
    elif isinstance(sampler, WeightedRandomSampler):
        rows = sampler.weights
        if bool((rows != rows[0]).any()):
            warn(
                "the loader draws its rows with unequal weights (WeightedRandomSampler), so that the posterior is that of data whose rows "
                "count unequally. Draw rows evenly (shuffle=True), or weight their log-likelihood if that is meant",
            )
    elif isinstance(dataset, IterableDataset) or (sampler is None and not isinstance(loader, DataLoader)):
        rows = dataset
    else:
        rows = sampler
    try:
        return len(rows)
    except TypeError:
        raise ValueError(
            "num_data: the loader has no .dataset with a length, or its rows are chosen by something without one, so that the number of "
            f"rows behind it must be given, num_data=...{_if_arguments(loader)}"
        ) from None


def _if_arguments(loader: Any) -> str:
    several = isinstance(loader, (tuple, list)) and all(isinstance(value, Tensor) for value in loader)
    return (
        f". (A {type(loader).__name__} of tensors is taken for a loader: several arguments are given apart, run(x, y))" if several else ""
    )


def _sampler(loader: Any) -> Any:
    """The sampler of a loader's rows; None if unknown. A batch sampler replaces the loader's own sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)


def _check_num_data(loader: Any, num_data: int, rows: int) -> None:
    if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < rows:
        raise ValueError(f"num_data={num_data!r}: the number of rows behind the loader, an int; one batch has {rows} of them")
    # a custom sampler may choose from more rows than its epoch has, and a custom collate_fn may make more rows
    if isinstance(loader, DataLoader) and loader.collate_fn is default_collate and isinstance(_sampler(loader), _SAMPLERS):
        known = _rows_behind(loader)
        if num_data != known:
            raise ValueError(f"num_data={num_data}, but the loader draws from {known} rows: drop num_data, which is read off a DataLoader")

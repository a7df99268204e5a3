"""Where minibatches come from: shuffled epochs over tensors or over a plate's indices, or a ``DataLoader``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.utils.data import SubsetRandomSampler

Batch = tuple[Tensor, ...]


class FullData:
    """No minibatches: every step sees all the data, so there is nothing to replace."""

    per_chain = False
    num_data: int | None = None
    batch_size: int | None = None

    def next(self) -> Batch:
        """The tensors that differ from step to step: none."""
        return ()

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, as ``(batch, rows)``."""
        yield (), 1

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to go on from here."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state`."""


class Permutations:
    """
    Rows ``t * batch_size`` to ``(t + 1) * batch_size`` of an endless row of shuffled epochs, apart for every chain: each epoch
    holds every row once, and what is left of one goes into the next, so that a batch always has ``batch_size`` rows.

    Chains see different rows in one step: minibatch noise that they share would pass for agreement between them.

    :param num_data: rows in the data set.
    :param batch_size: rows in a batch, 1 to ``num_data``.
    :param num_chains: number of independent rows of indices.
    :param seed: with the position, all that the stream depends on.
    """

    def __init__(self, num_data: int, batch_size: int, num_chains: int, seed: int) -> None:
        self.num_data, self.batch_size, self.num_chains = num_data, batch_size, num_chains
        self.seed, self.position = seed, 0
        self._generator = torch.Generator()
        self._epochs: dict[int, Tensor] = {}

    def next(self) -> Tensor:
        """Row indices ``[chains, batch_size]``, or ``[batch_size]`` for one chain."""
        epoch, start = divmod(self.position * self.batch_size, self.num_data)
        self.position += 1
        stop = start + self.batch_size
        index = self._epoch(epoch)[:, start:stop]
        if stop > self.num_data:
            index = torch.cat([index, self._epoch(epoch + 1)[:, : stop - self.num_data]], dim=1)
        return index[0] if self.num_chains == 1 else index

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # PyTorch's CPU generator reads 32 bits of its seed: hash into them
            digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest()
            self._generator.manual_seed(int.from_bytes(digest, "little"))
            rows = [torch.randperm(self.num_data, generator=self._generator) for _ in range(self.num_chains)]
            self._epochs = {e: rows for e, rows in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.stack(rows)
        return self._epochs[epoch]


class PlateIndices:
    """Indices for a plate that subsamples itself."""

    def __init__(self, num_data: int, batch_size: int, num_chains: int, seed: int, device: torch.device) -> None:
        self.num_data, self.batch_size, self.device = num_data, batch_size, device
        self.per_chain = num_chains > 1
        self._rows = Permutations(num_data, batch_size, num_chains, seed)

    def next(self) -> Batch:
        """``(indices,)`` of shape ``[chains, batch_size]``, or ``[batch_size]`` for one chain."""
        return (self._rows.next().to(self.device),)

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, as ``(batch, rows)``; the plate's size is fixed, so the last batch may repeat no rows only
        where ``batch_size`` divides ``num_data``."""
        if self.num_data % self.batch_size:
            raise ValueError(
                f"the plate subsamples {self.batch_size} of {self.num_data} rows: to visit every row once its subsample_size "
                "must divide its size"
            )
        for rows in torch.arange(self.num_data, device=self.device).split(self.batch_size):
            yield (rows,), len(rows)

    def state(self) -> dict[str, Any]:
        """Seed and position of the stream."""
        return {"seed": self._rows.seed, "position": self._rows.position}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state`."""
        self._rows.seed, self._rows.position, self._rows._epochs = state["seed"], state["position"], {}


class TensorRows(PlateIndices):
    """Rows of tensors, cut by :class:`Permutations`."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, num_chains: int, seed: int) -> None:
        super().__init__(len(tensors[0]), batch_size, num_chains, seed, tensors[0].device)
        self.tensors = tuple(tensors)

    def next(self) -> Batch:
        """One tensor ``[chains, batch_size, ...]`` per argument, or ``[batch_size, ...]`` for one chain."""
        (index,) = super().next()
        flat = index.reshape(-1)
        return tuple(t.index_select(0, flat).view(index.shape + t.shape[1:]) for t in self.tensors)

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, in order, as ``(batch, rows)``; the last batch may be shorter."""
        for start in range(0, self.num_data, self.batch_size):
            batch = tuple(t[start : start + self.batch_size] for t in self.tensors)
            yield batch, len(batch[0])


class Loader:
    """
    A ``torch.utils.data.DataLoader``, or any iterable of tuples of tensors with a length that can be run through again. All
    chains see the same batch.

    :param loader: gives the model's arguments, a tuple (or one tensor) at a time.
    :param num_data: rows in the data set; by default read off the loader.
    :param device: where the batches go.
    """

    per_chain = False

    def __init__(self, loader: Iterable[Any], num_data: int | None, device: torch.device | None = None) -> None:
        self.loader, self.device = loader, device
        self.num_data = _rows_behind(loader) if num_data is None else num_data
        self._iterator: Iterator[Any] | None = None
        self._epoch_rng: dict[str, Any] = {}
        self._taken = 0
        self.example = self.next()
        self.batch_size = len(self.example[0])
        self._iterator = None

    def next(self) -> Batch:
        """The next item's tensors, from a new epoch where the last one is over."""
        if self._iterator is None:
            self._epoch_rng, self._taken = self._generators(), 0
            self._iterator = iter(self.loader)
        try:
            item = next(self._iterator)
        except StopIteration:
            if self._taken == 0:
                raise ValueError("the loader is empty: it gave no batch") from None
            self._iterator = None
            return self.next()
        self._taken += 1
        return self._tensors(item)

    def _generators(self) -> dict[str, Any]:
        own = getattr(self.loader, "generator", None)
        return {**get_rng_state(), **({} if own is None else {"loader": own.get_state()})}

    def _tensors(self, item: Any) -> Batch:
        item = (item,) if isinstance(item, Tensor) else tuple(item)
        if not item or not all(isinstance(value, Tensor) and value.dim() > 0 for value in item):
            raise ValueError(
                f"the loader gave {[type(value).__name__ for value in item]}: every item must be a tuple of tensors with a row "
                "per data point, the model's arguments in order"
            )
        return item if self.device is None else tuple(value.to(self.device) for value in item)

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """One run through the loader, as ``(batch, rows)``."""
        for item in self.loader:
            batch = self._tensors(item)
            yield batch, len(batch[0])

    def state(self) -> dict[str, Any]:
        """How many batches of the epoch are taken, and the random generators as they were at its start."""
        started = self._iterator is not None
        return {"taken": self._taken if started else -1, "rng": self._epoch_rng if started else {}}

    def load(self, state: dict[str, Any]) -> None:
        """Starts the epoch again and skips the batches already taken. Leaves the random generators at that place."""
        self._iterator = None
        if state["taken"] >= 0:
            rng = dict(state["rng"])
            if "loader" in rng:
                self.loader.generator.set_state(rng.pop("loader"))
            set_rng_state(rng)
            for _ in range(state["taken"]):
                self.next()


def is_loader(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``run(*args, **kwargs)`` was given a loader: one argument, no tensor, which can be run through and has a length."""
    if len(args) != 1 or kwargs or isinstance(args[0], (Tensor, str, dict)):
        return False
    return hasattr(args[0], "__iter__") and hasattr(args[0], "__len__")


def _rows_behind(loader: Any) -> int:
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise ValueError(
            "num_data: the loader has no .dataset with a length, so the number of rows behind it must be given, num_data=..."
        ) from None

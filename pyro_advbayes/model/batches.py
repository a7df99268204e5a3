"""A model's arguments, and minibatches of them: shuffled epochs over rows, or over the indices of a plate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.given import kind, need_dense
from pyro_advbayes.model.refusals import Mismatch, label_of

Batch = tuple[Tensor, ...]


class Arguments:
    """
    A model's arguments. The tensors among them are listed, so that a graph can take them as inputs and a minibatch can replace some.

    :param model: the model; names its arguments in messages.
    :param args: positional arguments.
    :param kwargs: keyword arguments.
    """

    def __init__(self, model: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = tuple(args), dict(kwargs)
        self.keys: list[int | str] = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        self.keys += [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        self.labels = [label_of(model, key) for key in self.keys]
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        self._kinds = {label_of(model, key): kind(value) for key, value in given}
        for label, tensor in zip(self.labels, self.tensors, strict=True):
            need_dense(tensor, f"argument {label}")

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor arguments: positional ones first, then keywords."""
        return [self.args[key] if isinstance(key, int) else self.kwargs[key] for key in self.keys]

    def replace(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with these tensors in the place of :attr:`tensors`."""
        new = dict(zip(self.keys, tensors, strict=True))
        args = tuple(new.get(i, value) for i, value in enumerate(self.args))
        return args, {name: new.get(name, value) for name, value in self.kwargs.items()}

    def rows(self, batch_args: Sequence[int | str] | None) -> tuple[list[int], int]:
        """
        Which tensors hold a row per data point, and how many rows there are.

        :param batch_args: positions or names; by default every tensor as long as the first one.
        :return: places in :attr:`tensors`, and the number of rows.
        :raises ValueError: if there is no such tensor, a name is unknown, or the lengths differ.
        """
        tensors = self.tensors
        if batch_args is None:
            places = [i for i, value in enumerate(tensors) if value.dim() > 0]
            if not places:
                given = "".join(f", {name} is {what}" for name, what in self._kinds.items())
                raise Mismatch(f"batch_size: none of the model's arguments is a tensor with rows for a minibatch{given}", "give one")
            size = len(tensors[places[0]])
            return [i for i in places if len(tensors[i]) == size], size
        if isinstance(batch_args, str):
            raise ValueError(f"batch_args={batch_args!r}: a sequence of names or positions, [{batch_args!r}] for one")
        known: dict[int | str, int] = {key: i for i, key in enumerate(self.keys)}
        known.update({label: i for i, label in enumerate(self.labels)})
        unknown = [key for key in batch_args if key not in known]
        if unknown or not batch_args:
            raise ValueError(f"batch_args={list(batch_args)!r}: the model's tensor arguments are {self.labels}")
        places = sorted({known[key] for key in batch_args})
        if len({len(tensors[i]) for i in places}) > 1:
            raise ValueError(f"batch_args: the arguments differ in length: {in_words(self.lengths())}")
        return places, len(tensors[places[0]])

    def lengths(self) -> dict[str, int]:
        """The first dimension of every tensor argument that has one."""
        return {label: len(t) for label, t in zip(self.labels, self.tensors, strict=True) if t.dim()}

    def not_finite(self) -> str | None:
        """The message about the first tensor argument that holds NaN or infinity; None without any."""
        found = (not_finite(value, f"argument {label}", label) for label, value in zip(self.labels, self.tensors, strict=True))
        return next((message for message in found if message), None)


def in_words(lengths: Mapping[str, int]) -> str:
    """``{"x": 60}`` as "x has 60 rows"."""
    return ", ".join(f"{label} has {size} rows" for label, size in lengths.items())


def not_finite(value: Tensor, what: str, label: str | None) -> str | None:
    """
    The message about a tensor that holds NaN or infinity; None if it holds neither.

    :param what: the tensor, in the message.
    :param label: its name in an expression, if a mask may cover it.
    """
    if not value.is_floating_point():
        return None
    # piece by piece: isfinite() needs more memory than the data
    bad = sum(int((~piece.isfinite()).sum()) for piece in value.reshape(-1).split(2**20))
    if not bad:
        return None
    mask = "" if label is None else f", or mask the observations that are missing, poutine.mask(mask={label}.isfinite())"
    return f"{what} holds {bad} non-finite values (NaN or infinity): clean the data first{mask}"


class FullData:
    """No minibatches: every step sees all the data."""

    per_chain = False
    num_data: int | None = None
    batch_size: int | None = None
    numbers = 0  # in a batch

    def next(self) -> Batch:
        """The tensors that differ from step to step: none."""
        return ()

    def many(self, count: int) -> list[Batch]:
        """What :meth:`next` would give in as many calls."""
        return [()] * count

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, as ``(batch, rows)``."""
        yield (), 1

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs to continue from here."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state`."""


class Permutations:
    """
    Rows ``t * batch_size`` to ``(t + 1) * batch_size`` of an endless sequence of shuffled epochs, one sequence for every chain. An epoch
    holds every row once; the rest of an epoch goes into the next batch, so that a batch always has ``batch_size`` rows.

    Chains see different rows in one step: shared minibatch noise would pass for agreement between them.

    :param num_data: rows in the data set.
    :param batch_size: rows in a batch, 1 to ``num_data``.
    :param num_chains: number of independent rows of indices.
    :param seed: the sequences depend on it and the position only.
    """

    def __init__(self, num_data: int, batch_size: int, num_chains: int, seed: int) -> None:
        self.num_data, self.batch_size, self.num_chains = num_data, batch_size, num_chains
        self.seed, self.position = seed, 0
        self._generator = torch.Generator()
        self._epochs: dict[int, Tensor] = {}

    def next(self) -> Tensor:
        """Row indices ``[chains, batch_size]``, or ``[batch_size]`` for one chain."""
        return self.many(1)[0]

    def many(self, count: int) -> Tensor:
        """What :meth:`next` would give in as many calls, ``[count, chains, batch_size]`` or ``[count, batch_size]``."""
        first = self.position * self.batch_size
        last = first + count * self.batch_size
        self.position += count
        epochs = range(first // self.num_data, (last - 1) // self.num_data + 1)
        index = torch.cat([self._epoch(e)[:, max(0, first - e * self.num_data) : last - e * self.num_data] for e in epochs], dim=1)
        index = index.view(self.num_chains, count, self.batch_size).transpose(0, 1)
        return index[:, 0] if self.num_chains == 1 else index

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # PyTorch's CPU generator reads 32 bits of its seed: hash into them
            digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest()
            self._generator.manual_seed(int.from_bytes(digest, "little"))
            rows = [torch.randperm(self.num_data, generator=self._generator, device="cpu") for _ in range(self.num_chains)]
            self._epochs = {e: rows for e, rows in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.stack(rows)
        return self._epochs[epoch]


class PlateIndices:
    """Indices for a plate that subsamples itself."""

    def __init__(self, num_data: int, batch_size: int, num_chains: int, seed: int, device: torch.device) -> None:
        self.num_data, self.batch_size, self.device = num_data, batch_size, device
        self.per_chain = num_chains > 1
        self._rows = Permutations(num_data, batch_size, num_chains, seed)
        self.numbers = num_chains * batch_size  # in a batch

    def next(self) -> Batch:
        """``(indices,)`` of shape ``[chains, batch_size]``, or ``[batch_size]`` for one chain."""
        return self.many(1)[0]

    def many(self, count: int) -> list[Batch]:
        """What :meth:`next` would give in as many calls."""
        return [(index,) for index in self._rows.many(count).to(self.device).contiguous()]

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """
        The whole data set once, as ``(batch, rows)``.

        :raises ValueError: if ``batch_size`` does not divide ``num_data``: the plate takes no other number of rows.
        """
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
        """Continues from a :meth:`state`."""
        for name in ("seed", "position"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"the {name} of its batches is {str(state[name])[:100]}")
        self._rows.seed, self._rows.position, self._rows._epochs = state["seed"], state["position"], {}


class TensorRows(PlateIndices):
    """Rows of tensors, cut by :class:`Permutations`."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, num_chains: int, seed: int) -> None:
        super().__init__(len(tensors[0]), batch_size, num_chains, seed, tensors[0].device)
        self.tensors = tuple(tensors)
        self.numbers *= sum(t[0].numel() for t in tensors)

    def next(self) -> Batch:
        """One tensor ``[chains, batch_size, ...]`` per argument, or ``[batch_size, ...]`` for one chain."""
        return self.many(1)[0]

    def many(self, count: int) -> list[Batch]:
        """What :meth:`next` would give in as many calls."""
        index = self._rows.many(count).to(self.device)
        shape = index.shape[1:]
        # not read at once: products of parts of a tensor, in memory of another alignment, round differently
        return [
            tuple(t.index_select(0, rows).view(shape + t.shape[1:]) for t in self.tensors) for rows in index.reshape(count, -1).unbind()
        ]

    def epoch(self) -> Iterator[tuple[Batch, int]]:
        """The whole data set once, in order, as ``(batch, rows)``; the last batch may be shorter."""
        for start in range(0, self.num_data, self.batch_size):
            batch = tuple(t[start : start + self.batch_size] for t in self.tensors)
            yield batch, len(batch[0])

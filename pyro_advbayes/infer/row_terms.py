"""The terms of a model's log-likelihood, row by row: which belong together, and which rows are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_advbayes.handlers import own_mask
from pyro_advbayes.kinds import Node, is_deterministic

Nodes = Mapping[str, Node]


class Terms(NamedTuple):
    """
    Which variable each term of a model belongs to.

    :ivar owners: the variable of every observed site and factor: a site's own; a factor's own, or the one site in the same plates.
    :ivar outside: factors in no plate of the data, which belong to no row.
    """

    owners: dict[str, str]
    outside: list[str]


def is_observed(node: Node) -> bool:
    """Whether a sample site is observed, and neither a deterministic value nor a factor."""
    return node["is_observed"] and not is_deterministic(node) and not node["infer"].get("is_auxiliary")


def find_terms(nodes: Nodes) -> Terms:
    """:param nodes: the sample sites of a run with observations, without those that draws give values to."""
    plates = {name: frozenset(frame.name for frame in node["cond_indep_stack"]) for name, node in nodes.items()}
    sites = [name for name, node in nodes.items() if is_observed(node)]
    of_data = frozenset().union(*(plates[name] for name in sites)) or frozenset().union(*plates.values())
    owners, outside = {name: name for name in sites}, []
    for name in [name for name, node in nodes.items() if isinstance(node["fn"], dist.Unit)]:
        beside = [site for site in sites if plates[site] == plates[name]]
        if not plates[name] & of_data:
            outside.append(name)
        else:
            owners[name] = beside[0] if len(beside) == 1 else name
    return Terms(owners, outside)


def row_terms(nodes: Nodes) -> dict[str, Tensor]:
    """
    The log-density of every row by variable, ``[rows, ...]``, unscaled, 0 where it is masked.

    :param nodes: as for :func:`find_terms`.
    """
    values: dict[str, Tensor] = {}
    for term, name in find_terms(nodes).owners.items():
        value = scale_and_mask(nodes[term]["fn"].log_prob(nodes[term]["value"]), mask=nodes[term]["mask"])
        values[name] = values[name] + value if name in values else value
    return values


def data_rows(nodes: Nodes) -> dict[str, Tensor]:
    """Whether a part of a row is not masked, by variable: bool ``[rows, ...]``."""
    there: dict[str, Tensor] = {}
    for term, name in find_terms(nodes).owners.items():
        fn, value, mask = nodes[term]["fn"], nodes[term]["value"], nodes[term]["mask"]
        holds = torch.as_tensor(_unmasked(fn)).to(value.device) & torch.as_tensor(True if mask is None else mask).to(value.device)
        holds = holds.expand(torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim]))
        there[name] = there[name] | holds if name in there else holds
    return there


def _unmasked(fn: Distribution) -> Tensor | bool:
    """Which entries of a distribution's batch its own masks leave; an event counts if they leave a part of it."""
    if isinstance(fn, dist.MaskedDistribution):
        return torch.as_tensor(_unmasked(fn.base_dist)) & torch.as_tensor(own_mask(fn))
    if isinstance(fn, Independent):
        inner = _unmasked(fn.base_dist)
        if isinstance(inner, Tensor) and fn.reinterpreted_batch_ndims:
            return inner.expand(fn.base_dist.batch_shape).flatten(-fn.reinterpreted_batch_ndims).any(-1)
        return inner
    return _unmasked(fn.base_dist) if isinstance(fn, dist.ExpandedDistribution) else True


class DataRows(NamedTuple):
    """
    The rows of a variable that are data in some draw.

    :ivar there: ``[rows, ...]``, bool, some but not all True.
    """

    there: Tensor

    @property
    def whole_rows(self) -> bool:
        """Whether masks leave rows as a whole; otherwise a flat list of entries is left."""
        rows = self.there.flatten(1).any(1) if self.there.dim() > 1 else self.there
        return bool((self.there == rows.reshape(-1, *(1,) * (self.there.dim() - 1))).all())

    @property
    def numbers(self) -> Tensor:
        """The numbers of the rows (or entries) that are left."""
        if self.whole_rows:
            return self.there.reshape(len(self.there), -1)[:, 0].nonzero().flatten()
        return self.there.flatten().nonzero().flatten()

    def take(self, values: Tensor, sampled: int = 0) -> Tensor:
        """
        :param values: ``[*sampled, rows, ..., *event]``.
        :param int sampled: number of dimensions before the rows.
        """
        if self.whole_rows:
            return values.index_select(sampled, self.numbers.to(values.device))
        event = values.shape[sampled + self.there.dim() :]
        return values.reshape(*values.shape[:sampled], -1, *event).index_select(sampled, self.numbers.to(values.device))

    def labels(self, name: str, rank: int, dims: Sequence[str] | None, coords: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[Any]]:
        """
        The names of a variable's dimensions, and the labels along the first: the rows' numbers, or their labels in ``coords``.

        :param rank: number of dimensions of the variable.
        :param dims: names from the user.
        """
        names = [f"{name}_dim_{i}" for i in range(rank)] if dims is None else list(dims)
        given = coords.get(names[0])
        numbers = self.numbers.tolist()
        return names, numbers if given is None or len(given) == len(numbers) else [given[i] for i in numbers]


def masked_variables(there: Mapping[str, Tensor]) -> dict[str, DataRows | None]:
    """
    Variables with rows that are data in no draw, and what is left of them; None if nothing is.

    :param there: ``[draws, rows, ...]`` by variable.
    """
    some = {name: holds.any(0) for name, holds in there.items()}
    return {name: DataRows(holds) if bool(holds.any()) else None for name, holds in some.items() if not bool(holds.all())}

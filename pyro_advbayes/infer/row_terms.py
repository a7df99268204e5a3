"""The terms of a model's log-likelihood, row by row: which belong together, and which rows are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent

Nodes = Mapping[str, Mapping[str, Any]]


class Terms(NamedTuple):
    """
    Where a model's terms belong.

    :ivar owners: observed sites and factors, each with the variable that it is a part of: a site with itself; a factor with the one site
        that is in the same plates, and with itself if there is none or several.
    :ivar outside: factors that are in no plate of the data, so that they belong to no row.
    """

    owners: dict[str, str]
    outside: list[str]


def is_observed(node: Mapping[str, Any]) -> bool:
    """Whether a node is an observed site: no plate's indices, no deterministic value and no factor."""
    helper = node["infer"].get("_deterministic") or node["infer"].get("is_auxiliary") if node["type"] == "sample" else True
    return not helper and node["is_observed"] and not site_is_subsample(node)


def find_terms(nodes: Nodes) -> Terms:
    """:param nodes: of a run with observations, without the sites that draws give values to."""
    plates = {name: frozenset(f.name for f in node["cond_indep_stack"]) for name, node in nodes.items() if node["type"] == "sample"}
    sites = [name for name, node in nodes.items() if is_observed(node)]
    of_data = frozenset().union(*(plates[name] for name in sites)) or frozenset().union(*plates.values())
    owners, outside = {name: name for name in sites}, []
    for name in [name for name in plates if isinstance(nodes[name]["fn"], dist.Unit)]:
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
    """Whether something of a row is not masked, by variable: bool ``[rows, ...]``."""
    there: dict[str, Tensor] = {}
    for term, name in find_terms(nodes).owners.items():
        fn, value, mask = (nodes[term][key] for key in ("fn", "value", "mask"))
        holds = torch.as_tensor(_unmasked(fn)).to(value.device) & torch.as_tensor(True if mask is None else mask).to(value.device)
        holds = holds.expand(torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim]))
        there[name] = there[name] | holds if name in there else holds
    return there


def _unmasked(fn: Distribution) -> Tensor | bool:
    """Which of a distribution's batch its own masks leave, and of an event if they leave a part of it."""
    if isinstance(fn, dist.MaskedDistribution):
        return torch.as_tensor(_unmasked(fn.base_dist)) & torch.as_tensor(fn._mask)  # for which Pyro has no public name
    if isinstance(fn, Independent):
        inner = _unmasked(fn.base_dist)
        if isinstance(inner, Tensor) and fn.reinterpreted_batch_ndims:
            return inner.expand(fn.base_dist.batch_shape).flatten(-fn.reinterpreted_batch_ndims).any(-1)
        return inner
    return _unmasked(fn.base_dist) if isinstance(fn, dist.ExpandedDistribution) else True


class Kept(NamedTuple):
    """
    The rows of a variable that are data in some draw.

    :ivar there: ``[rows, ...]``, bool, some but not all True.
    """

    there: Tensor

    @property
    def whole_rows(self) -> bool:
        """Whether a row is there or not as a whole; else what is left is a flat list of entries."""
        rows = self.there.flatten(1).any(1) if self.there.dim() > 1 else self.there
        return bool((self.there == rows.reshape(-1, *(1,) * (self.there.dim() - 1))).all())

    @property
    def numbers(self) -> Tensor:
        """Of the rows (or entries) that are left."""
        if self.whole_rows:
            return self.there.reshape(len(self.there), -1)[:, 0].nonzero().flatten()
        return self.there.flatten().nonzero().flatten()

    def take(self, values: Tensor, sampled: int = 0) -> Tensor:
        """
        :param values: ``[*sampled, rows, ..., *event]``.
        :param int sampled: how many dimensions come before the rows.
        """
        if self.whole_rows:
            return values.index_select(sampled, self.numbers.to(values.device))
        event = values.shape[sampled + self.there.dim() :]
        return values.reshape(*values.shape[:sampled], -1, *event).index_select(sampled, self.numbers.to(values.device))

    def labels(self, name: str, rank: int, dims: Sequence[str] | None, coords: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[Any]]:
        """
        The names of a variable's dimensions, and the labels along the first: the numbers that rows had, or what is left of those given.

        :param rank: how many dimensions the variable has.
        :param dims: names that were given.
        """
        names = [f"{name}_dim_{i}" for i in range(rank)] if dims is None else list(dims)
        given = coords.get(names[0])
        numbers = self.numbers.tolist()
        return names, numbers if given is None or len(given) == len(numbers) else [given[i] for i in numbers]


def masked_variables(there: Mapping[str, Tensor]) -> dict[str, Kept | None]:
    """
    Variables with rows that are data in no draw; None for those of which no row is.

    :param there: ``[draws, rows, ...]`` by variable.
    """
    some = {name: holds.any(0) for name, holds in there.items()}
    return {name: Kept(holds) if bool(holds.any()) else None for name, holds in some.items() if not bool(holds.all())}

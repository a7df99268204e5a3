"""Comparison of a guide's sites with those of its model, as declared and as run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform

from pyro_advbayes.infer.conditioned import without_leading_ones
from pyro_advbayes.kinds import is_deterministic, is_subsample, sample_sites
from pyro_advbayes.model.outcomes import follower
from pyro_advbayes.model.structure import Site, same_map
from pyro_advbayes.model.supports import map_onto
from pyro_advbayes.nn.bayesian import declared_sites, map_tensors


def same_sites(one: Sequence[Site], two: Sequence[Site]) -> bool:
    """Whether both describe the same rows."""
    if [site[:4] for site in one] != [site[:4] for site in two]:
        return False
    return all(_maps_like(a, b.transform) for a, b in zip(one, two, strict=True))


def _maps_like(site: Site, transform: Transform) -> bool:
    """Whether a site's map equals this one, on any device."""
    if torch.Size(transform.inverse_shape(site.shape)) != site.unconstrained_shape:
        return False
    one, other = (moved(each, torch.device("cpu")) for each in (site.transform, transform))
    return same_map(one, other, site.unconstrained_shape, torch.empty((), dtype=site.dtype, device="cpu"))


def moved(transform: Transform, device: torch.device) -> Transform:
    """The transform with its bounds on a device."""
    return map_tensors(transform, lambda t: t.to(device))


def check_support(site: Site, prior: Any) -> None:
    """:raises ValueError: if a site is not on the support of its prior."""
    if not _maps_like(site, map_onto(site.name, prior)):
        raise ValueError(
            f"site {site.name!r} has the support {prior.support} in the model, which draws alone do not show: pass the model's "
            "arguments, fit(samples, x, y), or AutoImplicit(..., potential=Potential(model, (x, y)))"
        )


def missing_sites(model: Callable, trace: Trace, own: set[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Latent sites that the guide lacks, each with a site that depends on it; :class:`AutoImplicit` says which are accepted."""
    nodes = {name: node for name, node in sample_sites(trace).items() if not is_deterministic(node)}
    others = [name for name, node in nodes.items() if name not in own and not is_subsample(node)]
    followers = {
        name: follower(model, nodes, name, others[place + 1 :], args, kwargs)
        for place, name in enumerate(others)
        if not nodes[name]["is_observed"]
    }
    plates = {name: {frame.name for frame in nodes[name]["cond_indep_stack"] if frame.vectorized} for name in others}
    of_outcomes = set().union(*(plates[name] for name in others if followers.get(name) is None))
    return {name: follower for name, follower in followers.items() if follower is not None and not plates[name] & of_outcomes}


def declared_priors(model: Callable, shapes: Mapping[str, torch.Size]) -> dict[str, TorchDistributionMixin]:
    """
    Compares the shapes of sites with those that a PyroModule declares as PyroSample, which can be seen without running it.

    :return: the priors that are distributions; those that are functions may depend on the model's arguments.
    """
    if not isinstance(model, PyroModule):  # under an effect handler some sites may be another guide's
        return {}
    declared = declared_sites(model)
    for name in declared:
        if name not in shapes:
            raise ValueError(f"site {name!r} of the model is missing; draws are needed of it, there are {sorted(shapes)}")
    priors = {name: prior for name, prior in declared.items() if isinstance(prior, TorchDistributionMixin)}
    for name, prior in priors.items():
        if not _expands(prior.shape(), without_leading_ones(shapes[name])):
            raise ValueError(f"site {name!r} has shape {tuple(shapes[name])} in the guide and {tuple(prior.shape())} in the model")
    return priors


def refuse_grouped(values: Mapping[str, Tensor], declared: Mapping[str, TorchDistributionMixin], source: str) -> None:
    """Refuses draws with more dimensions than declared if these look like chains rather than a plate."""
    fronts = {values[name].shape[2 : values[name].dim() - len(prior.shape())] for name, prior in declared.items()}
    front = fronts.pop() if len(fronts) == 1 else ()
    name = next(iter(declared), "")
    count = values[name].shape[:2].numel() if name else 0
    if front and front[0] > 1 and front[0] >= count:
        raise ValueError(
            f"{source}: {count} draws of site {name!r}, each of shape {tuple(values[name].shape[2:])}, where the "
            f"model declares {tuple(declared[name].shape())}, look grouped by chain: take get_samples() without group_by_chain=True; or, "
            "if a plate repeats every site, pass the model's arguments, fit(samples, x, y)"
        )


def _expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a value of this shape has the other shape in plates around it."""
    try:
        return torch.broadcast_shapes(without_leading_ones(shape), tuple(to)) == tuple(to)
    except RuntimeError:
        return False

"""Which kind a layer, a distribution or a site is. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, cast

from pyro.distributions import TorchDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMALIZATIONS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
MASKING_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # which multiply by a mask
DROPOUTS = (*MASKING_DROPOUTS, nn.AlphaDropout, nn.FeatureAlphaDropout)


def without_independent(fn: Distribution) -> Distribution:
    """A distribution without ``to_event``."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


class Node(TypedDict):
    """A sample site in a handler or a trace: Pyro's ``Message``, with the types that its entries have at a sample site."""

    type: str
    name: str
    fn: TorchDistribution
    value: Tensor
    is_observed: bool
    scale: Tensor | float
    mask: Tensor | bool | None
    cond_indep_stack: tuple[CondIndepStackFrame, ...]
    infer: dict[str, Any]
    done: bool
    log_prob: Tensor  # this and the next two after Trace.compute_log_prob
    log_prob_sum: Tensor
    unscaled_log_prob: Tensor


class Plate(NamedTuple):
    """
    A vectorised plate.

    :ivar size: number of rows.
    :ivar subsample_size: as the model gave it; None if it gave the indices, ``subsample=``.
    """

    size: int
    subsample_size: int | None


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a node holds the row indices of a plate."""
    return bool(site_is_subsample(cast(Message, site)))  # Pyro's type of a site, which is a plain dict


def plate_of(site: Mapping[str, Any]) -> Plate | None:
    """The plate whose row indices a node holds; None for any other node."""
    return Plate(site["fn"].size, site["fn"].subsample_size) if is_subsample(site) else None


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a sample site was made by ``pyro.deterministic``; Pyro has no public name for it."""
    return bool((site["infer"] or {}).get("_deterministic"))


def sample_sites(trace: Trace) -> dict[str, Node]:
    """The sample sites of a run, observed ones, deterministic ones and plates' indices among them."""
    nodes = cast(Mapping[str, Node], trace.nodes)  # Pyro's type leaves the entries of a site open
    return {name: node for name, node in nodes.items() if node["type"] == "sample"}


def sites(trace: Trace) -> dict[str, Node]:
    """The sample sites of a run, without the indices of plates."""
    return {name: node for name, node in sample_sites(trace).items() if not is_subsample(node)}


def latent_sites(trace: Trace) -> dict[str, Node]:
    """The sites that a run drew or was given, without the indices of plates."""
    return {name: node for name, node in sites(trace).items() if not node["is_observed"]}


def observed_sites(trace: Trace) -> dict[str, Node]:
    """The sites that a run observed, ``pyro.factor`` terms included, without deterministic values."""
    return {name: node for name, node in sites(trace).items() if node["is_observed"] and not is_deterministic(node)}


def subsampling_plates(trace: Trace) -> dict[str, tuple[Plate, Tensor]]:
    """The plates that took a part of their rows, with the rows' indices."""
    found = {name: (plate_of(node), cast(Tensor, node["value"])) for name, node in trace.nodes.items() if is_subsample(node)}
    return {name: (plate, rows) for name, (plate, rows) in found.items() if plate is not None and len(rows) != plate.size}

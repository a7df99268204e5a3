"""Which kind a layer, a distribution or a site is. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pyro.poutine.runtime import Message
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import nn
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


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether a sample site holds the indices of a plate that subsamples."""
    return bool(site_is_subsample(cast(Message, site)))  # Pyro's type of a site, which is a plain dict


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a sample site was made by ``pyro.deterministic``."""
    return bool((site["infer"] or {}).get("_deterministic"))


def sample_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The sample sites of a run, observed ones, deterministic ones and plates' indices among them."""
    nodes = cast(dict[str, dict[str, Any]], trace.nodes)
    return {name: node for name, node in nodes.items() if node["type"] == "sample"}


def latent_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The sites that a run drew, without the indices of plates."""
    return {name: site for name, site in sample_sites(trace).items() if not site["is_observed"] and not is_subsample(site)}

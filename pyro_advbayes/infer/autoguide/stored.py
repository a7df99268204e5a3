"""Sites and their maps from unconstrained space as plain values, for files that are never unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions.transforms as transforms
import torch

from pyro_advbayes.model.structure import Site

# The transforms that biject_to uses, and the arguments of their constructors.
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "AffineTransform": ("loc", "scale", "event_dim"),
    "ComposeTransform": ("parts",),
    "CorrCholeskyTransform": (),
    "CorrMatrixCholeskyTransform": (),
    "ExpTransform": (),
    "IndependentTransform": ("base_transform", "reinterpreted_batch_ndims"),
    "LowerCholeskyTransform": (),
    "OrderedTransform": (),
    "PowerTransform": ("exponent",),
    "SigmoidTransform": (),
    "SoftplusTransform": (),
    "StickBreakingTransform": (),
}


def pack_sites(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """:raises ValueError: naming a site whose transform cannot be stored."""
    packed = []
    for site in sites:
        try:
            transform = _pack(site.transform)
        except KeyError as error:
            raise ValueError(f"site {site.name!r}: its support needs {error.args[0]}, which this package cannot store") from None
        packed.append(
            {
                "name": site.name,
                "shape": list(site.shape),
                "dtype": str(site.dtype).removeprefix("torch."),
                "unconstrained_shape": list(site.unconstrained_shape),
                "transform": transform,
                "start": site.start,
            }
        )
    return packed


def unpack_sites(packed: Sequence[Mapping[str, Any]]) -> tuple[Site, ...]:
    """The inverse of :func:`pack_sites`."""
    return tuple(
        Site(
            entry["name"],
            torch.Size(entry["shape"]),
            getattr(torch, entry["dtype"]),
            torch.Size(entry["unconstrained_shape"]),
            _unpack(entry["transform"]),
            entry["start"],
        )
        for entry in packed
    )


def _pack(value: Any) -> Any:
    if not isinstance(value, torch.distributions.Transform):
        return [_pack(part) for part in value] if isinstance(value, (list, tuple)) else value
    kind = type(value).__name__
    if kind not in _ARGUMENTS or getattr(transforms, kind, None) is not type(value):
        if type(value.inv).__name__ in _ARGUMENTS:
            return {"inverse": _pack(value.inv)}
        raise KeyError(kind)
    return {"transform": kind, "arguments": [_pack(getattr(value, name)) for name in _ARGUMENTS[kind]]}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "inverse" in value:
        return _unpack(value["inverse"]).inv
    kind = value["transform"]
    arguments = [_unpack(part) for part in value["arguments"]]
    return getattr(transforms, kind)(**dict(zip(_ARGUMENTS[kind], arguments, strict=True)))

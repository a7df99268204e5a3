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
_DTYPES = ("float16", "bfloat16", "float32", "float64")


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
    """
    The inverse of :func:`pack_sites`.

    :raises ValueError: naming an entry that no site has.
    """
    sites: list[Site] = []
    for number, entry in enumerate(packed):
        site, start = _unpack_site(entry, f"site {number}"), sum(site.numel for site in sites)
        if site.name in {each.name for each in sites}:
            raise ValueError(f"site {number}: its name {site.name!r} is that of another")
        if type(site.start) is not int or site.start != start:
            raise ValueError(f"site {number}: its start is {str(site.start)[:100]}, and it begins at {start}")
        sites.append(site)
    return tuple(sites)


def _unpack_site(entry: Mapping[str, Any], where: str) -> Site:
    for name in ("shape", "unconstrained_shape"):
        if not isinstance(entry[name], list) or not all(type(size) is int and size >= 0 for size in entry[name]):
            raise ValueError(f"{where}: its {name} is {str(entry[name])[:100]}")
    shape, flat = torch.Size(entry["shape"]), torch.Size(entry["unconstrained_shape"])
    if not isinstance(entry["name"], str) or not entry["name"]:
        raise ValueError(f"{where}: its name is {str(entry['name'])[:100]}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{where}: its dtype is {str(entry['dtype'])[:100]}")
    transform = _unpack(entry["transform"])
    if not isinstance(transform, torch.distributions.Transform) or torch.Size(transform.inverse_shape(shape)) != flat:
        raise ValueError(f"{where}: its transform is none from the shape {list(flat)} to the shape {list(shape)}")
    return Site(entry["name"], shape, getattr(torch, entry["dtype"]), flat, transform, entry["start"])


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
    if not isinstance(value["arguments"], list):
        raise ValueError(f"{kind} has no list of arguments")
    arguments = [_unpack(part) for part in value["arguments"]]
    if any(not bool(torch.as_tensor(each).isfinite().all()) for each in arguments if isinstance(each, (float, torch.Tensor))):
        raise ValueError(f"{kind} has an argument that is not finite")
    return getattr(transforms, kind)(**dict(zip(_ARGUMENTS[kind], arguments, strict=True)))

"""Arrays as ArviZ's container: an ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.given import kind

Array = Tensor | np.ndarray

# Groups whose arrays are [chains, draws, ...]; those in one row must agree in both.
_SAMPLED = (("posterior", "posterior_predictive", "sample_stats", "log_likelihood"), ("prior", "prior_predictive"))
_DATA = ("observed_data", "constant_data")


@checked
def to_inference_data(
    groups: Mapping[str, Mapping[str, Array]],
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """ArviZ's container of samples and data, of the installed version.

    :param groups: from a group to its variables. Those of ``posterior``, ``posterior_predictive``, ``sample_stats``,
        ``log_likelihood``, ``prior`` and ``prior_predictive`` are ``[chains, draws, ...]``; those of ``observed_data`` and
        ``constant_data`` have no such dimensions. Arrays or tensors, on any device; types of less than 32 bits become
        float32, since NetCDF lacks them. Groups without variables are left out.
    :param coords: from a dimension's name to the labels along it.
    :param dims: from a variable's name to the names of its dimensions after ``[chains, draws]``, in every group that has
        it. A log-likelihood may lack the last of them, those of a single event.
    :return: ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x).
    :raises ValueError: if a group is unknown, ``dims`` names no variable or not all of its dimensions, or numbers of
        chains or draws differ; the message names the group and the variable.
    """
    arrays = {group: {name: _array(v) for name, v in variables.items()} for group, variables in groups.items() if variables}
    if unknown := sorted(set(arrays) - {*_SAMPLED[0], *_SAMPLED[1], *_DATA}):
        raise ValueError(f"unknown group {unknown[0]!r}: choose from {', '.join([*_SAMPLED[0], *_SAMPLED[1], *_DATA])}")
    if not arrays:
        raise ValueError("groups holds no variables")
    for together in _SAMPLED:
        _check_samples({group: arrays[group] for group in together if group in arrays})
    _check_dims(arrays, dims or {})

    import arviz  # here, not above: it brings matplotlib and xarray

    names: dict[str, Any] = {"coords": coords and dict(coords), "dims": dims and {name: list(d) for name, d in dims.items()}}
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(arrays, **names)
    each: dict[str, Any] = {**arrays, **names}
    return arviz.from_dict(**each)


@checked
def save_netcdf(data: Any, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes what :func:`to_inference_data` returned to a NetCDF file, which ``arviz.from_netcdf`` reads.

    The file appears whole or not at all.

    :param overwrite: whether a file of that name may be replaced.
    :return: the path.
    :raises FileExistsError: if there is such a file and ``overwrite`` is false.
    :raises FileNotFoundError: if its folder does not exist.
    :raises ValueError: if ``data`` is something else.
    """
    path = Path(path)
    if not hasattr(data, "to_netcdf"):
        raise ValueError(f"data is {kind(data)}: give what to_inference_data or to_arviz returned")
    if not path.name:
        raise ValueError(f"path={str(path)!r}: the name of a file is needed")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another path, or pass overwrite=True to replace it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: make it first, or choose another path")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        data.to_netcdf(str(partial), engine="h5netcdf")  # the engine that is installed with this package
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _array(values: Array) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    values = np.asarray(values)
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _check_samples(groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Whether all variables of groups that belong together have the same numbers of chains and draws."""
    first = None
    for group, variables in groups.items():
        for name, values in variables.items():
            if values.ndim < 2:
                raise ValueError(f"{name!r} in {group!r} must be [chains, draws, ...], not {list(values.shape)}")
            first = first or (group, name, values.shape[:2])
            if values.shape[:2] != first[2]:
                raise ValueError(
                    f"{name!r} in {group!r} is {list(values.shape[:2])} chains and draws, but {first[1]!r} in {first[0]!r} is "
                    f"{list(first[2])}"
                )


def _check_dims(groups: Mapping[str, Mapping[str, np.ndarray]], dims: Mapping[str, Sequence[str]]) -> None:
    """Whether ``dims`` names the dimensions of the variables that it mentions."""
    for name, given in dims.items():
        holders = [group for group, variables in groups.items() if name in variables]
        if not holders:
            raise ValueError(f"dims names {name!r}, which is in no group")
        for group in holders:
            rank = groups[group][name].ndim - (0 if group in _DATA else 2)
            if len(given) < rank or (len(given) > rank and group != "log_likelihood"):
                raise ValueError(f"dims names {len(given)} dimensions of {name!r}, which has {rank} in {group!r}")

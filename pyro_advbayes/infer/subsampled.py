"""Predictions of all rows by a model whose plate takes some of them at a time, ``pyro.plate("data", N, subsample_size=B)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_advbayes.infer.conditioned import ConditionedModel


def subsampling_plate(trace: Trace, samples: Mapping[str, Tensor]) -> str | None:
    """
    The plate that chooses its rows at random, if there is one and ``samples`` don't say which rows it takes.

    :raises ValueError: if there are several, or a site in it is given: of which rows the draws are is not known.
    """
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    plates = [
        name
        for name, node in nodes.items()
        if site_is_subsample(node) and name not in samples and node["fn"].subsample_size not in (None, node["fn"].size)
    ]
    if len(plates) > 1:
        raise ValueError(
            f"plates {', '.join(map(repr, plates))} all subsample themselves: only one plate can, if all rows are to be predicted"
        )
    for plate in plates:
        for site in samples:
            if site in nodes and _frame_dim(nodes[site], plate) is not None:
                raise ValueError(
                    f"site {site!r} in posterior_samples is drawn inside plate {plate!r}, which takes other rows in every run: it is not "
                    "known of which rows its draws are. Leave it out, or predict with a model without subsample_size"
                )
    return plates[0] if plates else None


def predict_all_rows(
    predict: Callable[[ConditionedModel, Sequence[str]], dict[str, Tensor]],
    model: ConditionedModel,
    trace: Trace,
    plate: str,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """
    Predicts as many rows at a time as the plate takes, in order, and puts them together. What is drawn outside the plate is drawn once.

    :param predict: function of a model and names of sites to their values, ``[draws, ..., *site]``.
    :param model: after its :meth:`~ConditionedModel.look`, which gave ``trace``.
    :param plate: what :func:`subsampling_plate` found.
    :param names: of sites, and ``"_RETURN"``.
    """
    fn = trace.nodes[plate]["fn"]
    size, batch = fn.size, fn.subsample_size
    drawn = [name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])]
    outside = [name for name in drawn if name not in model.samples and _frame_dim(trace.nodes[name], plate) is None]
    dims = {name: _row_dim(trace, name, plate, batch) for name in names}
    samples, parts = dict(model.samples), {name: [] for name in names}
    for start in range(0, size, batch):
        first = min(start, size - batch)  # the last ones begin earlier, for the plate takes no fewer
        rows = torch.arange(first, first + batch, device=fn.device).expand(model.num_samples, batch)
        piece = ConditionedModel(model.model, {**samples, plate: rows}, model.num_samples, model.strict)
        found = predict(piece, [*names, *(name for name in outside if start == 0 and name not in names)])
        for name in names:
            if dims[name] is not None:
                parts[name].append(found[name].narrow(dims[name], start - first, first + batch - start))
            elif start == 0:
                parts[name].append(found[name])
        samples |= {name: found[name].detach() for name in outside if start == 0}
    return {name: found[0] if dims[name] is None else torch.cat(found, dims[name]) for name, found in parts.items()}


def _frame_dim(node: Mapping[str, Any], plate: str) -> int | None:
    return next((frame.dim for frame in node["cond_indep_stack"] if frame.name == plate), None)


def _row_dim(trace: Trace, name: str, plate: str, batch: int) -> int | None:
    """Where, counted from the end, a site's value has the plate's rows; None if it has none."""
    value = trace.nodes[name]["value"]
    if name == "_RETURN":
        sites = [site for site, node in trace.nodes.items() if node["type"] == "sample" and node["value"] is value]
        if sites:
            return _row_dim(trace, sites[0], plate, batch)
        return -value.dim() if value.dim() and len(value) == batch else None  # rows come first
    node = trace.nodes[name]
    dim = _frame_dim(node, plate)
    if dim is None or node["fn"].event_dim < value.dim():
        return None if dim is None else dim - node["fn"].event_dim
    # pyro.deterministic takes all dimensions for those of one event, unless it is told
    return next((i - value.dim() for i, length in enumerate(value.shape) if length == batch), None)

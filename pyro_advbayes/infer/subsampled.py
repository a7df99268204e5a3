"""Predictions of all rows by a model whose plate takes B of them at a time, ``pyro.plate("data", N, subsample_size=B)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.kinds import Node, latent_sites, sites, subsampling_plates
from pyro_advbayes.model.program import values_of


def subsampling_plate(trace: Trace, samples: Mapping[str, Tensor]) -> str | None:
    """
    The plate that draws its rows at random, if there is one and ``samples`` hold no indices for it.

    :raises ValueError: if there are several, or a site in it is given: it is unknown of which rows the draws are.
    """
    own = [name for name, (plate, _) in subsampling_plates(trace).items() if plate.subsample_size is not None and name not in samples]
    if len(own) > 1:
        raise ValueError(
            f"plates {', '.join(map(repr, own))} all subsample themselves: only one plate can, if all rows are to be predicted"
        )
    nodes = sites(trace)
    for plate in own:
        for site in samples:
            if site in nodes and _frame_dim(nodes[site], plate) is not None:
                raise ValueError(
                    f"site {site!r} in posterior_samples is drawn inside plate {plate!r}, which takes other rows in every run, so that "
                    "the rows of its draws are unknown. Leave it out, or predict with a model without subsample_size"
                )
    return own[0] if own else None


def predict_all_rows(
    predict: Callable[[ConditionedModel, Sequence[str]], dict[str, Tensor]],
    model: ConditionedModel,
    trace: Trace,
    plate: str,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """
    Predicts the plate's number of rows at a time, in order, and concatenates them. Sites outside the plate are drawn once.

    :param predict: function of a model and names of sites to their values, ``[draws, ..., *site]``.
    :param model: after its :meth:`~ConditionedModel.look`, which gave ``trace``.
    :param plate: from :func:`subsampling_plate`.
    :param names: of sites, and ``"_RETURN"``.
    """
    (size, _), taken = subsampling_plates(trace)[plate]
    batch = len(taken)
    drawn = {name: node for name, node in latent_sites(trace).items() if name not in model.samples}
    outside = [name for name, node in drawn.items() if _frame_dim(node, plate) is None]
    dims = {name: _row_dim(trace, name, plate, batch) for name in names}
    samples = dict(model.samples)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, size, batch):
        first = min(start, size - batch)  # the last piece begins earlier, since the plate takes no fewer rows
        rows = torch.arange(first, first + batch, device=taken.device).expand(model.num_samples, batch)
        piece = ConditionedModel(model.model, {**samples, plate: rows}, model.num_samples, model.strict)
        found = predict(piece, [*names, *(name for name in outside if start == 0 and name not in names)])
        for name, dim in dims.items():
            if dim is not None:
                parts[name].append(found[name].narrow(dim, start - first, first + batch - start))
            elif start == 0:
                parts[name].append(found[name])
        samples |= {name: found[name].detach() for name in outside if start == 0}
    return {name: parts[name][0] if dim is None else torch.cat(parts[name], dim) for name, dim in dims.items()}


def _frame_dim(node: Node, plate: str) -> int | None:
    return next((frame.dim for frame in node["cond_indep_stack"] if frame.name == plate), None)


def _row_dim(trace: Trace, name: str, plate: str, batch: int) -> int | None:
    """The dimension of the plate's rows in a site's value, counted from the end; None if it has none."""
    nodes = sites(trace)
    if name == "_RETURN":
        (value,) = values_of(trace, [name])
        same = [site for site, node in nodes.items() if node["value"] is value]
        if same:
            return _row_dim(trace, same[0], plate, batch)
        return -value.dim() if value.dim() and len(value) == batch else None  # rows come first
    node = nodes[name]
    value, dim = node["value"], _frame_dim(node, plate)
    if dim is None or node["fn"].event_dim < value.dim():
        return None if dim is None else dim - node["fn"].event_dim
    # pyro.deterministic takes all dimensions for those of one event by default
    return next((i - value.dim() for i, length in enumerate(value.shape) if length == batch), None)

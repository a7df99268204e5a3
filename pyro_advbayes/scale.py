"""Whether a factor N / B takes a minibatch's log-likelihood to the whole data set: it must be a sum over rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_advbayes.handlers import UnvalidatedMessenger, kept_random_state

if TYPE_CHECKING:
    from pyro_advbayes.potential import Potential

HALF = 4  # rows in each of the two halves that are compared with the whole
DRAWS = 5  # of each kind, until the likelihood is finite


class Parts(NamedTuple):
    """Row numbers of the whole, and of two parts whose log-likelihoods must add up to ``times`` that of the whole."""

    whole: Tensor
    parts: tuple[Tensor, Tensor]
    times: int = 1


def check_additive(potential: Potential) -> None:
    """
    Compares, at one draw of the latent sites, the log-likelihood of eight rows with the sum over two halves of them.

    Fewer rows where minibatches have fewer. A plate that subsamples itself takes one number of rows only, B: there the log-likelihood of
    half the rows is that of the same rows twice. What depends on B alone (a mean over the minibatch) cannot show then; a second factor
    N / B shows in the scale of the observed sites.

    A draw at which the likelihood of the whole is not finite tells nothing, and another one is taken. Where none is finite, the search for
    a start refuses the model. The state of the random generators stays as it is.

    :param potential: whose data plate was found.
    :raises ValueError: with both numbers, the site, and what usually causes it.
    """
    rows = _choose(potential)
    if rows is None:
        return
    factor = potential.batches.num_data / potential.structure.plate_batch
    with kept_random_state(), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        for strategy in (potential.init_strategy, init_to_sample):
            for _ in range(DRAWS):
                values = _draw(potential, strategy)
                whole = _likelihood(potential, values, rows.whole)
                if all(map(math.isfinite, whole.sums.values())):
                    _compare(potential, rows, values, whole)
                    _check_scale(potential.structure.plate, factor, whole)
                    return


def _choose(potential: Potential) -> Parts | None:
    """Rows that differ between the halves: some at random, the smallest and the largest label, sorted by label."""
    found = potential.structure
    if not potential.places and found.scaling != "indices":  # rows are not cut: a plate with indices that stay
        return None
    tensors = [potential.arguments.tensors[i] for i in potential.places]
    if found.scaling == "indices":
        size, half, odd = found.plate_size, found.plate_batch // 2, found.plate_batch % 2
        if half == 0:  # one row for every plate: no rows that could depend on each other
            return None
        tensors = [t for t in potential.arguments.tensors if t.dim() and len(t) == size]
    else:
        size, odd = len(tensors[0]), 0
        half = min(HALF, found.plate_batch)
    count = 2 * half + odd
    chosen = random.Random(0).sample(range(size), min(count, size))
    rows = torch.tensor((chosen * count)[:count], device="cpu")
    labels = [t.flatten() for t in tensors if t.numel() == len(t) == size]
    if labels:
        label = labels[-1].float()
        rows[0], rows[-1] = int(label.argmin()), int(label.argmax())
        rows = rows[label[rows.to(label.device)].cpu().argsort(stable=True)]
    first, second, rest = rows[:half], rows[half : 2 * half], rows[2 * half :]
    if found.scaling == "indices":
        return Parts(rows, (torch.cat([first, first, rest]), torch.cat([second, second, rest])), 2)
    return Parts(rows, (first, second))


def _draw(potential: Potential, strategy: Callable) -> dict[str, Tensor]:
    args, kwargs = potential.example_arguments()
    trace = poutine.trace(InitMessenger(strategy)(potential.model)).get_trace(*args, **kwargs)
    return {site.name: trace.nodes[site.name]["value"].detach() for site in potential.sites}


class _Likelihood(NamedTuple):
    """Sums over rows by observed site; of the absolute values, too; and the coarsest rounding on the way."""

    sums: dict[str, float]
    sizes: dict[str, float]
    eps: float
    scales: Mapping[str, Any]


def _likelihood(potential: Potential, values: Mapping[str, Tensor], rows: Tensor) -> _Likelihood:
    plate, given = potential.structure.plate, dict(values)
    arguments = potential.arguments
    tensors, dtypes = arguments.tensors, {value.dtype for value in values.values()}
    if potential.structure.scaling == "indices":
        given[plate] = rows.to(potential.device)
    else:
        length = len(tensors[potential.places[0]])
        cut = [i for i in potential.places if len(tensors[i]) == length]
        tensors = [t.index_select(0, rows.to(t.device)) if i in cut else t for i, t in enumerate(tensors)]
    args, kwargs = arguments.replace(tensors)
    try:
        with UnvalidatedMessenger(), potential.covering():
            trace = poutine.trace(poutine.condition(potential.model, given)).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, node: _is_data(name, node, given, potential.structure.prior_factors))
    except Exception as error:  # whatever a model's Python does with other rows than those of the first look
        raise ValueError(
            f"the model runs on the first {potential.structure.plate_batch} rows and fails on {len(rows)} others: "
            f"{str(error).splitlines()[0]}. It must run on any minibatch; batch_dependent=True takes it untried"
        ) from error
    sums, sizes, scales = {}, {}, {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not _is_data(name, node, given, potential.structure.prior_factors):
            continue
        own = 1.0
        for frame in node["cond_indep_stack"]:
            if frame.name == plate and frame.full_size is not None:
                own = frame.full_size / frame.size  # the plate's own scale: right for any number of rows
        log_prob = node["log_prob"].detach().cpu().double() / own
        sums[name], sizes[name] = float(log_prob.sum()), float(log_prob.abs().sum()) + 0.1 * log_prob.numel()
        scales[name] = (node["scale"], own)
        dtypes.add(node["log_prob"].dtype)
    return _Likelihood(sums, sizes, _rounding(dtypes, tensors, potential.device), scales)


def _is_data(name: str, node: Mapping[str, Any], given: Mapping[str, Tensor], prior_factors: Sequence[str]) -> bool:
    return (
        node["is_observed"]
        and name not in given
        and name not in prior_factors
        and not site_is_subsample(node)
        and not node["infer"].get("_deterministic")
    )


def _rounding(dtypes: set[torch.dtype], tensors: Sequence[Tensor], device: torch.device) -> float:
    """The coarsest of the numbers' precisions; on a GPU, convolutions and products round float32 to 10 bits by default."""
    dtypes = {dtype for dtype in dtypes | {t.dtype for t in tensors} if dtype.is_floating_point}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return max(eps, 2.0**-10) if device.type == "cuda" and torch.float32 in dtypes else eps


def _compare(potential: Potential, rows: Parts, values: dict[str, Tensor], whole: _Likelihood) -> None:
    parts = [_likelihood(potential, values, each) for each in rows.parts]
    tolerance = max(1e-10, *(each.eps for each in (whole, *parts))) ** 0.5
    names = list({name: None for each in (whole, *parts) for name in each.sums})
    worst = max(names, key=lambda name: _difference(whole, parts, rows.times, name, tolerance), default=None)
    if worst is None or _difference(whole, parts, rows.times, worst, tolerance) <= 1.0:
        return
    again = _likelihood(potential, values, rows.whole)
    if _difference(whole, [again], 1, worst, tolerance) <= 1.0:  # else it draws random numbers, which is looked at where chains start
        raise _refusal(worst, whole, parts, rows, tolerance)


def _difference(whole: _Likelihood, parts: Sequence[_Likelihood], times: int, site: str, tolerance: float) -> float:
    """Of one site's sums, in units of what rounding may do."""
    size = times * whole.sizes.get(site, 0.0) + sum(part.sizes.get(site, 0.0) for part in parts)
    found = abs(times * whole.sums.get(site, 0.0) - sum(part.sums.get(site, 0.0) for part in parts))
    return found / (tolerance * size) if math.isfinite(found) else math.inf


def _check_scale(plate: str, factor: float, likelihood: _Likelihood) -> None:
    """Refuses a second factor N / B: one that is the same number for all batches leaves a sum over rows such a sum."""
    for name, (scale, own) in likelihood.scales.items():
        given = torch.as_tensor(scale, dtype=torch.float64, device="cpu") / own
        if factor > 1.0 and bool(torch.isclose(given, torch.full_like(given, factor), rtol=1e-5).all()):
            raise ValueError(
                f"observed site {name!r} is scaled twice: the rows of plate {plate!r} are scaled by N / B = {factor:g} already, and a "
                "poutine.scale in the model does so again. Drop the poutine.scale; batch_dependent=True accepts the model as it is"
            )


def _refusal(site: str, whole: _Likelihood, parts: Sequence[_Likelihood], rows: Parts, tolerance: float) -> ValueError:
    whole_sum, part_sum = whole.sums.get(site, 0.0), sum(part.sums.get(site, 0.0) for part in parts) / rows.times
    how = "but its halves add up to" if rows.times == 1 else "but its halves, each taken twice, add up to twice"
    if abs(part_sum - 2.0 * whole_sum) <= 3.0 * tolerance * whole.sizes.get(site, 0.0):
        cause = (
            "The model divides by the number of rows itself: drop its poutine.scale(scale=N / len(x)), since minibatches are scaled "
            "already, and give every row its own loss (reduction='none') in place of a mean"
        )
    else:
        cause = (
            "A row's term depends on the other rows of its batch, mostly through x standardised by the batch's own mean and deviation, "
            "class weights from bincount(y), or a number of classes y.max() + 1: take these from the whole data set, before the run"
        )
    return ValueError(
        f"observed site {site!r}: the log-likelihood of {len(rows.whole)} rows is {whole_sum:.6g}, {how} {part_sum:.6g} (at the same "
        f"values of the latent sites), so that no factor N / B takes a minibatch to the whole data set. {cause}. batch_dependent=True "
        "accepts the model as it is"
    )

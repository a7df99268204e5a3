"""Compares the log-likelihood of some rows with those of two halves of them: their sum, if every row has its own term."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_advbayes.kinds import observed_sites
from pyro_advbayes.model.program import Call, Values, run
from pyro_advbayes.tracing.guard import RandomState

HALF = 4  # rows in each of the two halves that are compared with the whole


class Failed(Exception):
    """
    A model does not run on some rows.

    :param rows: how many.
    :param cause: the model's error.
    """

    def __init__(self, rows: int, cause: Exception) -> None:
        super().__init__(rows)
        self.cause = cause


class Parts(NamedTuple):
    """Row numbers of the whole, and of two parts whose log-likelihoods must add up to ``times`` that of the whole."""

    whole: Tensor
    parts: tuple[Tensor, Tensor]
    times: int = 1


class RowSums(NamedTuple):
    """Sums over rows, and sums of absolute values, by observed site; the coarsest rounding on the way; and the sites' scales."""

    sums: dict[str, float]
    sizes: dict[str, float]
    eps: float
    scales: Mapping[str, Any]

    @property
    def finite(self) -> bool:
        """Whether it tells something."""
        return all(map(math.isfinite, self.sums.values()))


class Subject(NamedTuple):
    """
    A model under comparison.

    :ivar model: a Pyro model.
    :ivar cut: from row numbers to its arguments, and to the indices of a plate that subsamples itself, by the plate's name.
    :ivar prior_factors: ``pyro.factor`` terms that belong to no row.
    :ivar covering: makes the handler under which masked observations may be NaN.
    """

    model: Callable
    cut: Callable[[Tensor], tuple[Call, Values]]
    prior_factors: Sequence[str] = ()
    covering: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def likelihood(self, values: Values, rows: Tensor, scaled: bool = True) -> RowSums:
        """
        :param values: of the latent sites.
        :param scaled: whether the model's own scales count.
        :raises Failed: if the model does not run on these rows.
        """
        call, indices = self.cut(rows)
        try:
            trace = run(self.model, call, {**values, **indices}, self.covering(), validated=False)
            nodes = {name: node for name, node in observed_sites(trace).items() if name not in self.prior_factors}
            trace.compute_log_prob(lambda name, _: name in nodes)
        except Exception as error:  # whatever a model's Python does with other rows than it was written for
            raise Failed(len(rows), error) from error
        sums, sizes, scales = {}, {}, {}
        dtypes, device = {value.dtype for value in values.values()}, torch.device("cpu")
        for name, node in nodes.items():
            own = 1.0
            for frame in node["cond_indep_stack"]:
                if frame.full_size is not None:
                    own *= frame.full_size / frame.size  # the plate's own scale: right for any number of rows
            log_prob = (node["log_prob"] if scaled else node["unscaled_log_prob"]).detach().cpu().double() / (own if scaled else 1.0)
            sums[name], sizes[name] = float(log_prob.sum()), float(log_prob.abs().sum()) + 0.1 * log_prob.numel()
            scales[name] = (node["scale"], own)
            dtypes.add(node["log_prob"].dtype)
            device = node["log_prob"].device
        args, kwargs = call
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return RowSums(sums, sizes, _rounding(dtypes, tensors, device), scales)


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """Within it, models run without gradients and validation, hidden from handlers and random generators outside."""
    with RandomState().again(), torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        yield


def pick_rows(tensors: Sequence[Tensor], size: int, half: int, odd: int = 0, seed: int = 0) -> Parts:
    """
    Rows that differ between the halves: some at random, the smallest and the largest label, sorted by label.

    :param tensors: the data, with ``size`` rows each.
    :param half: rows in a half; some come twice where there are fewer than two halves.
    :param odd: number of further rows of the whole.
    """
    count = 2 * half + odd
    chosen = random.Random(seed).sample(range(size), min(count, size))
    rows = torch.tensor((chosen * count)[:count], device="cpu")
    labels = [t.flatten() for t in tensors if t.numel() == len(t) == size]
    if labels:
        label = labels[-1].float()
        rows[0], rows[-1] = int(label.argmin()), int(label.argmax())
        rows = rows[label[rows.to(label.device)].cpu().argsort(stable=True)]
    first, second = rows[:half], rows[half : 2 * half]
    return Parts(rows, (first, second))


def check(subject: Subject, rows: Parts, draws: Iterable[Values], factor: float) -> None:
    """
    Compares at the first draw at which the likelihood of the whole is finite.

    :param factor: N / B, by which rows are scaled.
    :raises ValueError: with both numbers, the site, and what usually causes it.
    :raises Failed: if the model does not run on the rows.
    """
    for values in draws:
        whole = subject.likelihood(values, rows.whole)
        if whole.finite:
            _compare(subject, rows, values, whole)
            _check_scale(factor, whole)
            return


def means(subject: Subject, rows: Parts, values: Values) -> dict[str, tuple[float, float, bool]]:
    """
    Sites whose log-likelihood of the whole is the mean of the halves': that number, the halves' sum, and whether the halves differ (a
    term of the prior is the same for all rows). The model's own scales are left out: N / len(x) is 1 for all rows of the data.
    """
    whole, first, second = (subject.likelihood(values, each, scaled=False) for each in (rows.whole, *rows.parts))
    tolerance, found = _tolerance(whole, first, second), {}
    for name, value in whole.sums.items():
        one, two = first.sums.get(name, math.nan), second.sums.get(name, math.nan)
        near = tolerance * whole.sizes[name]
        if abs(value - (one + two) / 2) <= near:
            found[name] = (value, one + two, abs(one - two) > 20 * near)
    return found


def _rounding(dtypes: set[torch.dtype], tensors: Sequence[Tensor], device: torch.device) -> float:
    """The coarsest precision of the numbers. On a GPU, convolutions and products round float32 to 10 bits by default."""
    dtypes = {dtype for dtype in dtypes | {t.dtype for t in tensors} if dtype.is_floating_point}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return max(eps, 2.0**-10) if device.type == "cuda" and torch.float32 in dtypes else eps


def _tolerance(*likelihoods: RowSums) -> float:
    return max(1e-10, *(each.eps for each in likelihoods)) ** 0.5


def _compare(subject: Subject, rows: Parts, values: Values, whole: RowSums) -> None:
    parts = [subject.likelihood(values, each) for each in rows.parts]
    tolerance = _tolerance(whole, *parts)
    names = list({name: None for each in (whole, *parts) for name in each.sums})
    worst = max(names, key=lambda name: _difference(whole, parts, rows.times, name, tolerance), default=None)
    if worst is None or _difference(whole, parts, rows.times, worst, tolerance) <= 1.0:
        return
    again = subject.likelihood(values, rows.whole)
    if _difference(whole, [again], 1, worst, tolerance) <= 1.0:  # else the model draws random numbers, which the search for a start refuses
        raise _refusal(worst, whole, parts, rows, tolerance)


def _difference(whole: RowSums, parts: Sequence[RowSums], times: int, site: str, tolerance: float) -> float:
    """The difference of one site's sums, in units of the largest difference by rounding."""
    size = times * whole.sizes.get(site, 0.0) + sum(part.sizes.get(site, 0.0) for part in parts)
    found = abs(times * whole.sums.get(site, 0.0) - sum(part.sums.get(site, 0.0) for part in parts))
    return found / (tolerance * size) if math.isfinite(found) else math.inf


def _check_scale(factor: float, likelihood: RowSums) -> None:
    """Refuses a second factor N / B: a factor that is the same for all batches keeps a sum over rows a sum over rows."""
    for name, (scale, own) in likelihood.scales.items():
        given = torch.as_tensor(scale, dtype=torch.float64, device="cpu") / own
        if factor > 1.0 and bool(torch.isclose(given, torch.full_like(given, factor), rtol=1e-5).all()):
            raise ValueError(
                f"observed site {name!r} is scaled twice: the rows of its plate are scaled by N / B = {factor:g} already, and a "
                "poutine.scale in the model does so again. Drop the poutine.scale; batch_dependent=True accepts the model as it is"
            )


def _refusal(site: str, whole: RowSums, parts: Sequence[RowSums], rows: Parts, tolerance: float) -> ValueError:
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

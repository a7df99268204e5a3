"""The comparison of a distilled guide with its draws, or of two sets of draws: :func:`compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics.two_sample import MMDTest, mmd_test, sliced_wasserstein
from pyro_advbayes.diagnostics.uncertainty import mutual_information
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.generators import RowGenerator
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit, model_sites_of
from pyro_advbayes.infer.autoguide.rows import READY, Rows, SampleRows, constrained, read_samples, row_dtype, sites_of
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.model.outcomes import Origins
from pyro_advbayes.model.program import run
from pyro_advbayes.model.readout import Readout
from pyro_advbayes.model.refusals import signature_of
from pyro_advbayes.model.structure import Site


class Against(NamedTuple):
    """``value``: between the draws and the guide; ``floor``: the same between two halves of the draws."""

    value: float
    floor: float


class Moments(NamedTuple):
    """
    Of one site, over its elements in unconstrained space. ``mean``: root mean square of the difference of means, in standard
    deviations of the draws; ``sd``: root mean square of the logarithm of the ratio of standard deviations.
    """

    mean: Against
    sd: Against


class FunctionSpace(NamedTuple):
    """
    Of the predicted probabilities, mean over inputs. ``kl``: KL divergence, in nats, of the guide's mean prediction from that of the
    draws; ``total_variation``: half the sum of the absolute differences of the two; ``mutual_information``: the absolute difference of the
    mutual information, in nats; ``mutual_information_correlation``: the correlation of the two mutual informations over inputs, nan for a
    single input.
    """

    kl: Against
    total_variation: Against
    mutual_information: Against
    mutual_information_correlation: Against


class Comparison(NamedTuple):
    """The result of :func:`compare`; ``str(...)`` makes a table of it."""

    num_samples: int
    sliced_wasserstein: Against
    mmd: MMDTest
    mmd_floor: MMDTest
    moments: dict[str, Moments]
    functions: FunctionSpace | None

    def __str__(self) -> str:
        rows = [("sliced Wasserstein", self.sliced_wasserstein), ("MMD²", Against(self.mmd.mmd2, self.mmd_floor.mmd2))]
        rows.append(("  p-value", Against(self.mmd.p_value, self.mmd_floor.p_value)))
        for name, moments in self.moments.items():
            rows += [(f"{name}: means", moments.mean), (f"{name}: sds", moments.sd)]
        if self.functions is not None:
            rows += [(name.replace("_", " "), against) for name, against in self.functions._asdict().items()]
        width = max(len(name) for name, _ in rows)
        head = f"{'':{width}}  {'guide':>9}  {'halves':>9}   ({self.num_samples} draws of each)"
        return "\n".join([head, *(f"{name:{width}}  {against.value:9.4f}  {against.floor:9.4f}" for name, against in rows)])


@checked
def compare(
    samples: Mapping[str, Tensor] | str | Path,
    guide: AutoImplicit | Mapping[str, Tensor] | str | Path,
    *args: Any,
    model: Callable | None = None,
    num_samples: int | None = None,
    num_projections: int = 128,
    num_permutations: int = 500,
    return_site: str = "_RETURN",
    **kwargs: Any,
) -> Comparison:
    """
    Compares a guide with the draws that it was fitted to, or two sets of draws: their laws in standardised, unconstrained space, their
    marginal moments and their predictions. No distance between finite sets of draws is 0: the floor is that between the first and the
    second half of the draws. If chains have not mixed, the floor is large, and an error of the guide does not show. ::

        print(distill.compare(mcmc.get_samples(), guide, x_test))
        print(distill.compare(mcmc.get_samples(), nuts.get_samples(), x_test, model=model))

    A p-value assumes independent draws: thin the chains, or compare it with that of the halves.

    :param samples: as for :meth:`APD.fit <pyro_advbayes.infer.distill.APD>`.
    :param guide: a fitted guide, or a second set of draws in one of the forms of ``samples``.
    :param args: the model's arguments without observations: inputs at which predictions are compared. The predictions are the
        probabilities of a classifier's likelihood, as in :class:`~pyro_advbayes.PosteriorClassifier`. Without inputs none are compared.
    :param model: of two sets of draws, for predictions and for the supports that it declares (as ``PyroSample``); without it sites are
        compared in the model's own space. A guide has a model.
    :param num_samples: draws of each half and of the guide, from 2 to half the draws; evenly spaced. By default at most 1000.
    :param num_projections: directions of the sliced Wasserstein distance, >= 1.
    :param num_permutations: relabellings of the MMD test, >= 1.
    :param str return_site: as in :class:`~pyro_advbayes.PosteriorClassifier`.
    :raises ValueError: if the draws are not those of the guide's sites, are too few or not finite; if the guide's sites are not those of
        the model; if the model is not a classifier or is missing; or naming a number out of range.
    """
    values, source = read_samples(samples)
    sites, made = _compared(values, guide, model, args, kwargs)
    if isinstance(guide, AutoImplicit):
        dtype, device, model = guide.dtype, guide.device, guide.model
    else:
        dtype, device = row_dtype(sites), next(iter(values.values())).device
    rows = SampleRows(values, sites, dtype, device, source)
    most = min(len(rows) // 2, len(made) if isinstance(made, Rows) else len(rows))
    if num_samples is None:
        num_samples = min(most, 1000, max(50, READY // rows.size))
    limit = f"at most half of the {len(rows)} draws" + (f", and the {len(made)} of the second set" if isinstance(made, Rows) else "")
    check_int(num_samples, "num_samples", 2, limit, most)
    mean, sd = rows.moments()
    other = made.take(_spaced(len(made), num_samples)).to(device, dtype) if isinstance(made, Rows) else made.sample(num_samples)
    sets = [*_halves(rows, num_samples), other]
    scale = torch.where(sd > 0, sd, torch.ones_like(sd))
    one, two, third = ((part - mean) / scale for part in sets)
    sliced = _against(lambda a, b: sliced_wasserstein(a, b, num_projections), one, two, third)
    mixed = torch.cat([one[::2], two[::2]])[:num_samples]
    return Comparison(
        num_samples,
        sliced,
        mmd_test(mixed, third, num_permutations),
        mmd_test(one, two, num_permutations),
        {site.name: _moments(*(part[:, site.start : site.start + site.numel] for part in (one, two, third))) for site in rows.sites},
        _functions([constrained(sites, part) for part in sets], model, args, kwargs, return_site) if model and (args or kwargs) else None,
    )


def _compared(
    values: Mapping[str, Tensor], guide: AutoImplicit | Mapping[str, Tensor] | str | Path, model: Callable | None, args: Any, kwargs: Any
) -> tuple[tuple[Site, ...], Rows | RowGenerator]:
    """The sites, and what the draws are compared with."""
    if isinstance(guide, AutoImplicit):
        if model is not None:
            raise ValueError("model=: an AutoImplicit has a model; model= is for two sets of draws")
        guide.sample(1)  # raises if the guide has not been fitted
        guide.check(*args, **kwargs)
        return guide.sites, guide.network
    if model is None and (args or kwargs):
        raise ValueError("model: two sets of draws have none, and predictions at inputs need it: give model=..., or leave the inputs out")
    sites = sites_of(values) if model is None else model_sites_of(model, values)
    others, _ = read_samples(guide)
    return sites, SampleRows(others, sites, row_dtype(sites), next(iter(others.values())).device, "guide")


def _spaced(length: int, count: int) -> Tensor:
    """Evenly spaced places."""
    return torch.linspace(0, length - 1, count).round().long()


def _halves(rows: Rows, count: int) -> list[Tensor]:
    half = len(rows) // 2
    steps = _spaced(half, count)
    return [rows.take(steps), rows.take(steps + len(rows) - half)]


def _against(distance: Any, one: Tensor, two: Tensor, made: Tensor) -> Against:
    return Against(float(distance(one, made) + distance(two, made)) / 2, float(distance(one, two)))


def _moments(one: Tensor, two: Tensor, made: Tensor) -> Moments:
    def means(a: Tensor, b: Tensor) -> Tensor:
        return (a.mean(0) - b.mean(0)).square().mean().sqrt()

    def sds(a: Tensor, b: Tensor) -> Tensor:
        tiny = torch.finfo(a.dtype).tiny
        return (a.std(0).clamp_min(tiny) / b.std(0).clamp_min(tiny)).log().square().mean().sqrt()

    return Moments(_against(means, one, two, made), _against(sds, one, two, made))


class _Probabilities:
    """A model that returns the probabilities ``[N, K]`` of its classes."""

    def __init__(self, model: Callable, given: Collection[str], return_site: str) -> None:
        self._model, self._given, self._return_site = model, given, return_site
        self._readout: Readout | None = None
        self.__signature__ = signature_of(model)  # names in messages

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with Origins() as origins:
            trace = run(self._model, (args, kwargs), hidden=False)
            if self._readout is None:
                with poutine.block():
                    self._readout = Readout(
                        self._model, trace, args, kwargs, self._given, self._return_site, "compare", "leave its inputs out"
                    )
            return self._readout.logits(trace, origins).double().softmax(-1)


def _functions(sets: list[dict[str, Tensor]], model: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], site: str) -> FunctionSpace:
    predicted = _Probabilities(model, sets[0], site)
    probs = [Predictive(predicted, samples, return_sites=["_RETURN"])(*args, **kwargs)["_RETURN"] for samples in sets]

    def kl(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.mean(0), b.mean(0)
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1).mean()

    def variation(a: Tensor, b: Tensor) -> Tensor:
        return (a.mean(0) - b.mean(0)).abs().sum(-1).mean() / 2

    def information(a: Tensor, b: Tensor) -> Tensor:
        return (mutual_information(a) - mutual_information(b)).abs().mean()

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        both = torch.stack([mutual_information(a), mutual_information(b)])
        return torch.corrcoef(both)[0, 1] if both.shape[1] > 1 else both.new_tensor(math.nan)

    return FunctionSpace(*(_against(distance, *probs) for distance in (kl, variation, information, correlation)))

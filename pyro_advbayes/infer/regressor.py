"""The predictive law of a Bayesian regression: :class:`PosteriorRegressor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from pyro_advbayes.checked import checked
from pyro_advbayes.infer.likelihood import read_likelihood
from pyro_advbayes.infer.predictive import Predictive, refuse_nan
from pyro_advbayes.kinds import sample_sites
from pyro_advbayes.model.outcomes import Likelihood, without_wrappers
from pyro_advbayes.model.program import run


@checked
class PosteriorRegressor:
    r"""
    The predictive law of a model with a Normal likelihood, :math:`\frac1S \sum_s \mathrm{Normal}(\mu_s(x), \sigma_s(x))`, by the means
    and standard deviations of its S draws. ::

        law = PosteriorRegressor(model, mcmc.get_samples())
        mean, scale = law(x_test)                                       # [draws, N] each
        print(ab.diagnostics.regression_scores(mean, scale, y_test))

    Both come from the distribution at the model's observed site, not from its return value. For other likelihoods draw the target with
    :class:`Predictive`; ``ab.diagnostics.crps`` and ``central_intervals`` take draws.

    :param model: a Pyro model, e.g. ``models.heteroscedastic_regression``, with one observed number for each input.
    :param dict posterior_samples: site -> ``[draws, *site]``, of any inference, of :func:`deep_ensemble` too.
    :param guide: a guide in place of ``posterior_samples``, e.g. of :func:`bayes_adapter`; it draws anew at every call.
    :param int num_samples: number of draws from the guide.
    :param int chunk_size: as in :class:`Predictive`.
    :param str site: the observed site, where there are several.
    :raises ValueError: if draws hold NaN; at the first call, if they do not fit the model, or the likelihood is no Normal of one number
        for each input.
    """

    def __init__(
        self,
        model: Callable,
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable | None = None,
        num_samples: int | None = None,
        chunk_size: int | None = None,
        site: str | None = None,
    ) -> None:
        if not posterior_samples and guide is None:
            raise ValueError("PosteriorRegressor needs posterior_samples, or a guide and num_samples")
        self._moments = _Moments(model, site)
        self._predictive = Predictive(self._moments, posterior_samples, guide, num_samples, ("_RETURN",), chunk_size=chunk_size)
        refuse_nan(self._predictive.posterior_samples or {})
        self._checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """
        :param args: the model's arguments, without observations: ``x``, of N rows.
        :param kwargs: its keyword arguments.
        :return: means and standard deviations, ``[draws, N]``; attached to arguments that require a gradient.
        """
        if not self._checked:
            moments = self._moments
            likelihood = read_likelihood(moments.model, args, kwargs, self._predictive.posterior_samples, moments.site)
            moments.site = _check(likelihood).site
            self._checked = True
        mean, scale = self._predictive(*args, **kwargs)["_RETURN"].unbind(1)
        return mean, scale


class _Moments:
    """A model that returns the mean and the standard deviation of its observed site, ``[2, N]``."""

    def __init__(self, model: Callable, site: str | None) -> None:
        self.model, self.site = model, site

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        sites = sample_sites(run(self.model, (args, kwargs), hidden=False))
        assert self.site is not None  # by now it is known
        fn = sites[self.site]["fn"]
        normal = without_wrappers(fn)
        assert isinstance(normal, Normal)  # which was checked
        return torch.stack([value.expand(fn.shape()).flatten() for value in (normal.loc, normal.scale)])


def _check(likelihood: Likelihood | None) -> Likelihood:
    if likelihood is None:
        raise ValueError(
            "PosteriorRegressor: the model observes nothing in a plate of as many rows as its inputs; it needs an observed site, "
            "pyro.sample('obs', dist.Normal(mean, scale), obs=y)"
        )
    place = f"PosteriorRegressor: the likelihood at observed site {likelihood.site!r}, {type(likelihood.fn).__name__},"
    if not isinstance(likelihood.fn, Normal):
        remedy = "PosteriorClassifier is for classes" if likelihood.kind == "classes" else "draw the target with Predictive"
        raise ValueError(f"{place} is no Normal: {remedy}")
    if likelihood.shape.numel() != likelihood.rows:
        raise ValueError(
            f"{place} is of {likelihood.shape.numel()} numbers for {likelihood.rows} inputs, and not one for each: take "
            "squeeze(-1) of a network's column, and an observed site for each of several targets"
        )
    return likelihood

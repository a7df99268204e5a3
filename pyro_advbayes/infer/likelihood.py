"""The likelihood of a Pyro model: its observed site, and what kind of outcome that is (:func:`read_likelihood`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.infer.predictive import RandomState
from pyro_advbayes.model.outcomes import Likelihood, find_outcomes, likelihood_at, one_outcome, rows_of
from pyro_advbayes.model.structure import kept_statistics


def read_likelihood(
    model: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    posterior_samples: Mapping[str, Tensor] | None = None,
    site: str | None = None,
) -> Likelihood | None:
    """
    Runs a model once, to see the distribution of its outcomes. ::

        likelihood = read_likelihood(model, (x,))
        if likelihood is not None and likelihood.kind == "classes":
            probs = likelihood.logits().softmax(-1)   # [N, K], under a draw from the prior

    :param model: a Pyro model.
    :param args: its arguments. The first tensor among them has a row for each outcome. Observations may be there or not.
    :param kwargs: its keyword arguments.
    :param posterior_samples: ``[draws, *shape]`` by site, of which the first draw is taken; by default the prior is drawn from.
    :param site: which observed site, where there are several.
    :return: None if no outcome is observed in a plate of as many rows: a plain network with priors, whose return value says it all, or a
        likelihood by ``pyro.factor``.
    :raises ValueError: if there are several, and ``site`` names none of them.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad(), poutine.block(), kept_statistics(), pyro.validation_enabled(False), RandomState().again():
        if posterior_samples:
            trace = ConditionedModel(model, posterior_samples, len(next(iter(posterior_samples.values())))).look(*args, **kwargs)
        else:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        outcomes = find_outcomes(model, trace, args, kwargs, posterior_samples or ())
    if not outcomes:
        return None
    return likelihood_at(trace, one_outcome(trace, outcomes, site), rows_of(args, kwargs))

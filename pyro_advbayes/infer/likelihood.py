"""The likelihood of a Pyro model: its observed site, and what kind of outcome that is (:func:`read_likelihood`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_advbayes.infer.conditioned import ConditionedModel
from pyro_advbayes.model.layers import kept_statistics
from pyro_advbayes.model.outcomes import Likelihood, find_outcomes, likelihood_at, one_outcome, rows_of
from pyro_advbayes.model.program import run
from pyro_advbayes.tracing.guard import RandomState


def read_likelihood(
    model: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    posterior_samples: Mapping[str, Tensor] | None = None,
    site: str | None = None,
) -> Likelihood | None:
    """
    The distribution of a model's outcomes, from one run. ::

        likelihood = read_likelihood(model, (x,))
        if likelihood is not None and likelihood.kind == "classes":
            probs = likelihood.logits().softmax(-1)   # [N, K], under a draw from the prior

    :param model: a Pyro model.
    :param args: its arguments, with or without observations. The first tensor among them has a row for each outcome.
    :param kwargs: its keyword arguments.
    :param posterior_samples: ``[draws, *shape]`` by site; the first draw is used, by default a draw from the prior.
    :param site: name of the observed site, if there are several.
    :return: None if no outcome is observed in a plate of as many rows: a plain network with priors, or a likelihood by ``pyro.factor``.
    :raises ValueError: if there are several, and ``site`` names none of them.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad(), poutine.block(), kept_statistics(), pyro.validation_enabled(False), RandomState().again():
        if posterior_samples:
            trace = ConditionedModel(model, posterior_samples, len(next(iter(posterior_samples.values())))).look(*args, **kwargs)
        else:
            trace = run(model, (args, kwargs))
        outcomes = find_outcomes(model, trace, args, kwargs, posterior_samples or ())
    if not outcomes:
        return None
    return likelihood_at(trace, one_outcome(trace, outcomes, site), rows_of(args, kwargs))

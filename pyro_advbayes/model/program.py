"""The one place that runs a model: at given values of its sites, on given arguments; and the sites of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pyro
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_advbayes.handlers import GivenMessenger, UnvalidatedMessenger
from pyro_advbayes.kinds import latent_sites

Call = tuple[Sequence[Any], Mapping[str, Any]]
Values = dict[str, Tensor]


def run(
    model: Callable,
    call: Call,
    values: Mapping[str, Tensor] | None = None,
    *handlers: contextlib.AbstractContextManager[Any],
    hidden: bool = True,
    validated: bool = True,
) -> Trace:
    """
    Runs a model once.

    :param model: a Pyro model; effect handlers around it (:func:`~pyro_advbayes.minibatch`) see its sites first.
    :param call: its ``(args, kwargs)``.
    :param values: value by latent site, row indices by plate; the model draws the others.
    :param handlers: further effect handlers and contexts, entered in this order.
    :param hidden: whether handlers outside do not see the run.
    :param validated: whether distributions check values, which ``torch.func`` transforms and recordings do not allow.
    :return: the trace, without log-densities; the node ``"_RETURN"`` holds the return value.
    """
    args, kwargs = call
    with contextlib.ExitStack() as stack:
        if hidden:
            stack.enter_context(poutine.block())
        if not validated:
            stack.enter_context(pyro.validation_enabled(False))
            stack.enter_context(UnvalidatedMessenger())
        for handler in handlers:
            stack.enter_context(handler)
        if values:
            stack.enter_context(GivenMessenger(values))
        return poutine.trace(model).get_trace(*args, **kwargs)


def draw(model: Callable, call: Call, strategy: Callable) -> Values:
    """Values of a model's latent sites from a per-site function, as in ``pyro.infer.autoguide.initialization``."""
    return {name: node["value"].detach() for name, node in latent_sites(run(model, call, None, InitMessenger(strategy))).items()}


def log_likelihood(trace: Trace) -> Tensor:
    """The log-density of the observed sites, a sum over sites and rows, scaled and masked."""
    trace.compute_log_prob(lambda _, node: node["is_observed"])
    return cast(Tensor, sum(trace.nodes[name]["log_prob_sum"] for name in trace.observation_nodes))


def values_of(trace: Trace, names: Iterable[str]) -> list[Tensor]:
    """The values of sites, or of ``"_RETURN"``."""
    return [cast(Tensor, trace.nodes[name]["value"]) for name in names]

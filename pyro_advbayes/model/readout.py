"""The logits of a classifier in a run of its model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_advbayes.model.outcomes import CLASSES, Likelihood, Origins, find_outcomes, is_outcome, likelihood_at, one_outcome, rows_of
from pyro_advbayes.model.program import values_of


class Readout:
    """
    Logits ``[N, K]`` of a model's runs: those of its likelihood, and of a model without one its return value.

    :param model: a Pyro model.
    :param trace: a run of it on a draw.
    :param args: arguments of that run; the first tensor among them has a row for each outcome.
    :param kwargs: its keyword arguments.
    :param given: the sites that a draw holds.
    :param str return_site: as in :class:`~pyro_advbayes.PosteriorClassifier`.
    :param who: beginning of the message, which takes classifiers only.
    :param instead: end of the message, a remedy for a regression.
    :raises ValueError: if there are no such logits; the message says what there is.
    """

    def __init__(
        self,
        model: Callable,
        trace: Trace,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: Collection[str],
        return_site: str,
        who: str,
        instead: str = "take Predictive for its predictions",
    ) -> None:
        if return_site not in trace.nodes:
            raise ValueError(f"return_site={return_site!r}: the model has no such site")
        self._rows, self._site, self._observed = rows_of(args, kwargs), return_site, True
        if return_site in given or not is_outcome(trace.nodes[return_site]):
            outcomes = find_outcomes(model, trace, args, kwargs, given)
            self._observed = bool(outcomes)
            if outcomes:
                self._site = self._choose(trace, outcomes, return_site)
        if self._observed:
            self._likelihood(trace).check_classes(who, instead)
        else:
            _check_logits(trace.nodes[return_site]["value"], self._rows, f"{who}: {return_site!r}")

    def logits(self, trace: Trace, origins: Origins) -> Tensor:
        """
        :param trace: a run on inputs of the same shape.
        :param origins: entered around the run and this call.
        """
        return self._likelihood(trace).logits(origins) if self._observed else values_of(trace, [self._site])[0]

    def _likelihood(self, trace: Trace) -> Likelihood:
        return likelihood_at(trace, self._site, self._rows)

    def _choose(self, trace: Trace, outcomes: list[str], return_site: str) -> str:
        if return_site == "_RETURN":
            return one_outcome(trace, outcomes, None, "return_site")
        likelihoods = [likelihood_at(trace, site, self._rows) for site in outcomes]
        classes = [each for each in likelihoods if each.kind == CLASSES]
        if not classes:
            return outcomes[0]
        value = trace.nodes[return_site]["value"]
        same = [each.site for each in classes if _tells(value, each)]
        if not same:
            raise ValueError(
                f"return_site={return_site!r} holds neither the logits nor the probabilities of the likelihood at observed site "
                f"{classes[0].site!r}, from which they are taken: leave return_site out, or hide the observed site "
                f"(poutine.block(model, hide=[{classes[0].site!r}])) if others are meant"
            )
        return one_outcome(trace, same, None, "return_site")


def _tells(value: Any, likelihood: Likelihood) -> bool:
    """Whether a value holds the logits, log-probabilities or probabilities of the classes, or the one logit of two classes."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    value, expected = value.detach(), likelihood.logits().detach().log_softmax(-1)
    if value.numel() == len(expected):
        value = torch.stack([torch.zeros_like(value), value], -1).reshape(-1, 2)
    if value.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    size = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    forms = (value.log_softmax(-1), value.log())
    return any(torch.allclose(each.to(expected), expected, tolerance, tolerance * size, equal_nan=True) for each in forms)


def _check_logits(logits: Any, rows: int, what: str) -> None:
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2 or len(logits) != rows:
        raise ValueError(f"{what} must hold logits [N, K], one row for each of the {rows} inputs; it is {shape}")
    if logits.shape[1] < 2:
        raise ValueError(
            f"{what} holds one number for each input: give one logit a class, or observe a Bernoulli of that number, whose two classes "
            "are [0, logit]"
        )

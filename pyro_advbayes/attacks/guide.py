"""A posterior that is drawn anew at every call: :class:`GuideClassifier`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_advbayes.given import need_tensor
from pyro_advbayes.refusals import told


class GuideClassifier(nn.Module):
    r"""
    A model whose weights a guide draws afresh at every call, as a random classifier:

    .. math:: x \mapsto \log \frac{1}{S} \sum_{s=1}^{S} \mathrm{softmax}\, f(x, \theta_s), \qquad \theta_s \sim q.

    An attack on it has to average over many draws to see a direction at all, since the draws that it is judged by are others:
    ``PGD(eps=0.1, eot=10)``. For draws that stay, and far less time, take :class:`~pyro_advbayes.PosteriorClassifier`.

    :param model: a Pyro model of ``x`` that returns logits ``[N, K]``.
    :param guide: its guide; called with ``x``.
    :param int num_samples: S, the draws of one call, >= 1.
    :raises ValueError: if ``num_samples`` is below 1.
    """

    def __init__(self, model: Callable, guide: Callable, num_samples: int = 1) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}: how many draws a call makes, >= 1")
        super().__init__()
        self.model, self.guide, self.num_samples = model, guide, num_samples

    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: inputs ``[N, ...]``.
        :return: log mean probabilities ``[N, K]`` of new draws.
        """
        return torch.cat(list(self.log_probs(x))).logsumexp(0) - math.log(self.num_samples)

    def log_probs(self, x: Tensor) -> Iterator[Tensor]:
        """Log-probabilities ``[1, N, K]`` of new draws, one by one."""
        need_tensor(x, "x", inputs=True)
        for _ in range(self.num_samples):
            yield told(self._drawn, {"x": x}).log_softmax(-1).unsqueeze(0)

    def _drawn(self, given: Mapping[str, Tensor]) -> Tensor:
        with poutine.block(), poutine.mask(mask=False):
            trace = poutine.trace(self.guide).get_trace(given["x"])
            return poutine.replay(self.model, trace=trace)(given["x"])

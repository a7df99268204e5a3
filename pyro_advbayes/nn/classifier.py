"""A classifier with a Bayesian network: :class:`Classifier`."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_advbayes.checked import checked


@checked
class Classifier(PyroModule):
    """
    y_n ~ Categorical(softmax(net(x_n))), the weights of ``net`` drawn once for all rows.

    :param net: a network with priors, as :func:`pyro_advbayes.nn.bayesianize` makes it, from inputs ``[N, ...]`` to
        logits ``[N, K]``.
    """

    def __init__(self, net: PyroModule):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param x: inputs ``[N, ...]``.
        :param y: classes ``[N]``, integers from 0 to K - 1, or None to draw them.
        :returns: logits ``[N, K]``.
        """
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits

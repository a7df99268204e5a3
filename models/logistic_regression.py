"""Bayesian logistic regression: two classes, one logit."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_advbayes.nn import bayesianize


class LogisticRegression(PyroModule):
    """
    y_n ~ Bernoulli(sigmoid(w·x_n + b)), with w and b ~ Normal(0, prior_scale), independently.

    The sites are ``net.weight`` ``[1, D]`` and ``net.bias`` ``[1]``. For more than two classes take
    :func:`models.mlp.mlp` with no hidden layer.

    :param int num_features: D, the number of inputs.
    :param float prior_scale: standard deviation of every weight, > 0.
    """

    def __init__(self, num_features: int, prior_scale: float = 1.0):
        super().__init__()
        self.net = bayesianize(nn.Linear(num_features, 1), prior=dist.Normal(0.0, prior_scale))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param x: inputs ``[N, D]``.
        :param y: 0 or 1, ``[N]``, in the dtype of ``x``; or None to draw them.
        :returns: logits of y = 1, ``[N]``.
        """
        logits = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)
        return logits

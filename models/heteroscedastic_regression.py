"""A network that predicts a mean and its own noise; by default the 16-16-2 of sampling-based Bayesian regression on UCI sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from models.mlp import mlp_network
from pyro_advbayes.nn import Prior, bayesianize

LARGEST_LOG_SCALE = math.log(1e6)  # beyond, and below its negative, float32 has no density: draws from a wide prior go there


class HeteroscedasticRegression(PyroModule):
    r"""
    y_n ~ Normal(m_n, s_n), where :math:`(m_n, \log s_n) = \mathrm{net}(x_n)` and s is kept between 1e-6 and 1e6: give targets of about
    unit size, as :func:`pyro_advbayes.datasets.uci` does.

    The sites are those of the network, ``net.1.weight`` ``[hidden[0], D]`` and so on. ::

        mean, scale = ab.Predictive(model, draws, return_sites=["_RETURN"])(x_test)["_RETURN"].unbind(-1)  # [draws, N] each
        print(ab.diagnostics.regression_scores(mean, scale, y_test))

    The default network, ReLU and Normal(0, 1) priors are those of Sommer et al. (Microcanonical Langevin Ensembles, ICLR 2025).

    :param int num_features: D, the number of inputs.
    :param hidden: sizes of the hidden layers.
    :param activation: the class of the activation between layers.
    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`.
    """

    def __init__(
        self,
        num_features: int,
        hidden: Sequence[int] = (16, 16),
        activation: type[nn.Module] = nn.ReLU,
        prior: Prior = dist.Normal(0.0, 1.0),
    ):
        super().__init__()
        self.net = bayesianize(mlp_network((num_features, *hidden, 2), activation), prior)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param x: inputs ``[N, D]``.
        :param y: observations ``[N]``, or None to draw them.
        :returns: means and standard deviations, ``[N, 2]``.
        """
        mean, log_scale = self.net(x).unbind(-1)
        scale = log_scale.clamp(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE).exp()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)
        return torch.stack([mean, scale], -1)

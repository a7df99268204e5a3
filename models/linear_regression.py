"""Bayesian linear regression with known noise: the model whose posterior is known exactly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_advbayes.nn import bayesianize


class LinearRegression(PyroModule):
    """
    y_n ~ Normal(w·x_n + b, noise_scale), with w and b ~ Normal(0, prior_scale), independently.

    The sites are ``net.weight`` ``[1, D]`` and ``net.bias`` ``[1]``.

    :param int num_features: D, the number of inputs.
    :param float prior_scale: standard deviation of every weight, > 0.
    :param float noise_scale: standard deviation of an observation, > 0.
    """

    def __init__(self, num_features: int, prior_scale: float = 1.0, noise_scale: float = 1.0):
        super().__init__()
        self.net = bayesianize(nn.Linear(num_features, 1), prior=dist.Normal(0.0, prior_scale))
        self.prior_scale = prior_scale
        self.noise_scale = noise_scale

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """
        :param x: inputs ``[N, D]``.
        :param y: observations ``[N]``, or None to draw them.
        :returns: means ``[N]``.
        """
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, self.noise_scale), obs=y)
        return mean

    def exact_posterior(self, x: torch.Tensor, y: torch.Tensor) -> dist.MultivariateNormal:
        r"""
        p(w, b | x, y), a Gaussian over ``[D + 1]`` numbers: the weights in order, then the bias. With
        :math:`\Phi = [x, 1]`,

        .. math::
            \Lambda = \Phi^\top \Phi / \text{noise\_scale}^2 + I / \text{prior\_scale}^2, \qquad
            \mu = \Lambda^{-1} \Phi^\top y / \text{noise\_scale}^2.

        It is worked out in float64 and returned in the dtype of ``x``.
        """
        design = _design(x).double()
        precision = design.T @ design / self.noise_scale**2
        precision.diagonal().add_(self.prior_scale**-2)
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        mean = covariance @ design.T @ y.double() / self.noise_scale**2
        return dist.MultivariateNormal(mean.to(x.dtype), covariance.to(x.dtype))

    def exact_predictive(self, x: torch.Tensor, y: torch.Tensor, x_new: torch.Tensor) -> dist.Normal:
        """
        p(y_new | x_new, x, y) for each row of ``x_new`` ``[M, D]`` by itself: a Normal of batch shape ``[M]`` with
        the noise of an observation in its variance.
        """
        posterior = self.exact_posterior(x, y)
        design = _design(x_new)
        variance = (design @ posterior.covariance_matrix * design).sum(-1) + self.noise_scale**2
        return dist.Normal(design @ posterior.mean, variance.sqrt())


def _design(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], -1)

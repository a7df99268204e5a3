"""A variational autoencoder whose weights have priors, and whose noise is data."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from models.mlp import mlp_network
from pyro_advbayes.nn import FanIn, Prior, bayesianize

WEIGHTS = FanIn(scale=2**0.5)


class VAE(PyroModule):
    r"""
    A variational autoencoder (Kingma and Welling, 2014) as a model of its weights: with :math:`z_n = \mu(x_n) + \sigma(x_n)\, e_n`,

    .. math:: \log p(\theta, D) = \log p(\theta) + \sum_n \Bigl[ \log p(x_n \mid z_n, \theta)
        - \mathrm{KL}\bigl(\mathrm{Normal}(\mu(x_n), \sigma(x_n)^2) \,\|\, \mathrm{Normal}(0, I)\bigr) \Bigr].

    The noise :math:`e` is an argument, so that every row's ELBO is a fixed function of the weights: a code drawn in the data plate
    would be a latent site for each row, which a sampler on minibatches cannot have. Draw the noise once with the data (as many rows),
    or anew for every call in SVI.

    The sites are ``encoder.*`` and ``decoder.*``, and in the plate "data" the observed "obs" and the factor "minus_kl". Pixels between
    0 and 1 count as probabilities of a Bernoulli (cross-entropy), as is usual.

    :param num_pixels: D, numbers in an input.
    :param hidden: sizes of the hidden layers of the encoder, in reverse those of the decoder.
    :param num_latents: L, numbers in a code.
    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`.
    """

    def __init__(self, num_pixels: int = 784, hidden: Sequence[int] = (100,), num_latents: int = 8, prior: Prior = WEIGHTS):
        super().__init__()
        self.encoder = bayesianize(mlp_network((num_pixels, *hidden, 2 * num_latents)), prior)
        self.decoder = bayesianize(mlp_network((num_latents, *reversed(hidden), num_pixels)), prior)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """
        :param x: images ``[N, ...]`` of D pixels in [0, 1].
        :param noise: standard normal, ``[N, L]``.
        :returns: logits of the pixels, ``[N, D]``.
        """
        mean, scale = self.encode(x)
        logits = self.decoder(mean + scale * noise)
        kl = 0.5 * (mean.square() + scale.square() - 1) - scale.log()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x.flatten(1))
            pyro.factor("minus_kl", -kl.sum(-1))
        return logits

    @pyro_method
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        The law of the code given an image: ``pyro.poutine.condition(model.encode, weights)(x)``.

        :param x: as for :meth:`forward`.
        :returns: mean and standard deviation, ``[N, L]`` each.
        """
        mean, log_scale = self.encoder(x).chunk(2, dim=-1)
        return mean, log_scale.exp()

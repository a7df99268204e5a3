"""The convolutional network that Bayesian Adversarial Learning uses on MNIST and Fashion-MNIST."""

from __future__ import annotations

from pyro.distributions import Normal
from torch import Tensor, nn

from pyro_advbayes.nn import Prior, bayesianize
from pyro_advbayes.nn.classifier import Classifier


class ChannelsLast(nn.Module):
    """
    Grey images ``[N, 1, H, W]``, of the same values, laid out so that what follows keeps the channels of a pixel together: convolution
    and pooling on a CPU are faster that way. (With one channel ``contiguous(memory_format=...)`` sees nothing to do.)
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(*images.shape[:-3], *images.shape[-2:], 1).movedim(-1, -3)


def bal_convnet_network() -> nn.Sequential:
    """
    The plain network: two 3x3 convolutions of 32 channels, each with ReLU and 2x2 max-pooling, then 1568-64-10. Pooling comes before
    ReLU, with which it commutes and which then has a quarter of the numbers to look at.

    Source: N. Ye and Z. Zhu, Bayesian Adversarial Learning, NeurIPS 2018. The authors have Dropout(0.5) before the
    first linear layer. It is left out: in train mode it makes the log-likelihood random, in eval mode it does nothing,
    and what it stood in for, averaging over networks, is here done by the posterior.

    :returns: a network from images ``[N, 1, 28, 28]`` with values in [0, 1] to logits ``[N, 10]``.
    """
    return nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def bal_convnet(prior: Prior = Normal(0.0, 1.0)) -> Classifier:
    """
    The Bayesian classifier around :func:`bal_convnet_network`, with 110 634 weights.

    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`.
    """
    return Classifier(bayesianize(bal_convnet_network(), prior))

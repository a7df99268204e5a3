"""VGG-16 for images of 32x32."""

from __future__ import annotations

from pyro.distributions import Normal
from torch import nn

from models.classifier import Classifier
from models.normalization import affine_parameters, normalization
from pyro_advbayes.nn import Prior, bayesianize

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg_network(num_classes: int = 10, norm: str = "batch") -> nn.Sequential:
    """
    The plain network: thirteen normalised 3x3 convolutions in five stages, each with 2x2 max-pooling at its end, and one linear layer.

    Source: K. Simonyan and A. Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015, configuration D,
    whose three linear layers are for larger images.

    :param int num_classes: K >= 2.
    :param str norm: see :func:`models.normalization.normalization`.
    :returns: a network from images ``[N, 3, 32, 32]`` to logits ``[N, K]``.
    :raises ValueError: if there is no such normalisation.
    """
    layer, activation = normalization(norm)
    layers: list[nn.Module] = []
    inputs = 3
    for stage in STAGES:
        for outputs in stage:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), layer(outputs), activation(outputs)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, num_classes))


def vgg(
    num_classes: int = 10,
    norm: str = "batch",
    prior: Prior = Normal(0.0, 0.15),
    *,
    bayesian_norm: bool = True,
    eval_only: bool = True,
) -> Classifier:
    """
    The Bayesian classifier around :func:`vgg_network`.

    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`, likewise ``eval_only``: False where BatchNorm's statistics are to be learnt.
    :param bool bayesian_norm: whether gains and shifts of normalisation have priors too; else they are parameters.
    """
    net = vgg_network(num_classes, norm)
    return Classifier(bayesianize(net, prior, exclude=[] if bayesian_norm else affine_parameters(net), eval_only=eval_only))

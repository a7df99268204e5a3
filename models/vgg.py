"""VGG-16 for images of 32x32."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.normalization import normalization, normalized_classifier
from pyro_advbayes.nn import Classifier

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


def vgg(num_classes: int = 10, norm: str = "batch", **options: Any) -> Classifier:
    """The Bayesian classifier around :func:`vgg_network`; for ``options`` see :func:`models.normalization.normalized_classifier`."""
    return normalized_classifier(vgg_network(num_classes, norm), **options)

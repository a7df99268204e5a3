"""A fully connected classifier; by default the 784-400-400-10 of Adversarial Posterior Distillation (fcNN2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pyro.distributions import Normal
from torch import nn

from pyro_advbayes.nn import Prior, bayesianize
from pyro_advbayes.nn.classifier import Classifier


def mlp_network(sizes: Sequence[int] = (784, 400, 400, 10), activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """
    The plain network: linear layers with an activation between them.

    :param sizes: numbers of units, from the inputs to the classes; two or more.
    :param activation: the class of the activation, made anew for each hidden layer.
    :returns: a network from ``[N, ...]``, whose rows are flattened to ``sizes[0]`` numbers, to ``[N, sizes[-1]]``.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must name at least the inputs and the outputs, got {tuple(sizes)}.")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def mlp(
    sizes: Sequence[int] = (784, 400, 400, 10),
    activation: type[nn.Module] = nn.ReLU,
    prior: Prior = Normal(0.0, 1.0),
) -> Classifier:
    """
    The Bayesian classifier around :func:`mlp_network`; the default has 478 410 weights.

    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`.
    """
    return Classifier(bayesianize(mlp_network(sizes, activation), prior))

"""Neural networks as Pyro models, and how their weights are drawn."""

from __future__ import annotations

from pyro_advbayes.nn.bayesian import FanIn, LearnedScale, Prior, bayesianize
from pyro_advbayes.nn.classifier import Classifier
from pyro_advbayes.nn.dropout import dropout_guide, mc_dropout
from pyro_advbayes.nn.reparameterization import ExemplarReparameterization, Flipout, LocalReparameterization

__all__ = [
    "Classifier",
    "ExemplarReparameterization",
    "FanIn",
    "Flipout",
    "LearnedScale",
    "LocalReparameterization",
    "Prior",
    "bayesianize",
    "dropout_guide",
    "mc_dropout",
]

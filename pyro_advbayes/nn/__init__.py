"""Neural networks as Pyro models."""

from __future__ import annotations

from pyro_advbayes.nn.bayesian import FanIn, Prior, bayesianize
from pyro_advbayes.nn.dropout import dropout_guide, mc_dropout

__all__ = ["FanIn", "Prior", "bayesianize", "dropout_guide", "mc_dropout"]

"""Neural networks as Pyro models."""

from __future__ import annotations

from pyro_advbayes.nn.bayesian import FanIn, Prior, bayesianize
from pyro_advbayes.nn.reparameterization import ExemplarReparameterization, Flipout, LocalReparameterization

__all__ = ["ExemplarReparameterization", "FanIn", "Flipout", "LocalReparameterization", "Prior", "bayesianize"]

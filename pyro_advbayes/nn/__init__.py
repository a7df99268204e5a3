"""Neural networks as Pyro models."""

from __future__ import annotations

from pyro_advbayes.nn.bayesian import FanIn, Prior, bayesianize

__all__ = ["FanIn", "Prior", "bayesianize"]

"""Bayesian deep learning that holds up under attack, in Pyro."""

__version__ = "0.1.0"

"""Bayesian deep learning that holds up under attack, in Pyro."""

from pyro_advbayes.handlers import minibatch
from pyro_advbayes.infer.mcmc.runner import SGMCMC
from pyro_advbayes.infer.mcmc.sgadald import SGAdaLD
from pyro_advbayes.infer.mcmc.sghmc import SGHMC
from pyro_advbayes.infer.mcmc.sgld import SGLD
from pyro_advbayes.potential import Potential

__version__ = "0.1.0"

__all__ = ["SGHMC", "SGLD", "SGMCMC", "Potential", "SGAdaLD", "minibatch"]

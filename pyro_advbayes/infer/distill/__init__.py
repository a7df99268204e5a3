"""Adversarial Posterior Distillation of a posterior's draws into a generator, and its comparison with the draws."""

from pyro_advbayes.infer.autoguide.factored import FactoredGenerator
from pyro_advbayes.infer.autoguide.generators import MLPGenerator
from pyro_advbayes.infer.autoguide.hyper import HyperGenerator
from pyro_advbayes.infer.distill.apd import APD, PRESETS, Fit
from pyro_advbayes.infer.distill.compare import Comparison, compare
from pyro_advbayes.infer.distill.online import OnlineAPD

__all__ = ["APD", "PRESETS", "Comparison", "FactoredGenerator", "Fit", "HyperGenerator", "MLPGenerator", "OnlineAPD", "compare"]

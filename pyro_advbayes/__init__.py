"""Bayesian deep learning that holds up under attack, in Pyro."""

from pyro_advbayes import attacks, datasets, diagnostics, nn
from pyro_advbayes.infer import distill
from pyro_advbayes.infer.active import active_learning
from pyro_advbayes.infer.adapter import UncertaintyRegularizer, bayes_adapter, weight_decay_prior
from pyro_advbayes.infer.arviz import to_arviz
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal, BaseNoise
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.classifier import PosteriorClassifier
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from pyro_advbayes.infer.elbo.robust import TraceRobust_ELBO
from pyro_advbayes.infer.ensemble import deep_ensemble
from pyro_advbayes.infer.ensemble_start import EnsembleStart, ensemble_start
from pyro_advbayes.infer.mcmc import adversary, schedules
from pyro_advbayes.infer.mcmc.adversary import L2, Box, Flow, Generator
from pyro_advbayes.infer.mcmc.assessment import SamplingWarning
from pyro_advbayes.infer.mcmc.bal import BAL
from pyro_advbayes.infer.mcmc.mclmc import MCLMC
from pyro_advbayes.infer.mcmc.runner import SGMCMC
from pyro_advbayes.infer.mcmc.sgadald import SGAdaLD
from pyro_advbayes.infer.mcmc.sghmc import SGHMC
from pyro_advbayes.infer.mcmc.sgld import SGLD
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.infer.prior import PriorPredictive, prior_predictive
from pyro_advbayes.infer.regressor import PosteriorRegressor
from pyro_advbayes.model.initialization import init_to_fan_in
from pyro_advbayes.model.notices import TemperedLikelihoodWarning
from pyro_advbayes.model.potential import Potential
from pyro_advbayes.model.scale import minibatch
from pyro_advbayes.storage.draws import read_draws

__version__ = "0.1.0"

__all__ = [
    "BAL",
    "L2",
    "MCLMC",
    "SGHMC",
    "SGLD",
    "SGMCMC",
    "AutoAdversarialNormal",
    "AutoImplicit",
    "BaseNoise",
    "Box",
    "EnsembleStart",
    "Flow",
    "Generator",
    "PosteriorClassifier",
    "PosteriorRegressor",
    "Potential",
    "Predictive",
    "PriorPredictive",
    "SGAdaLD",
    "SamplingWarning",
    "TemperedLikelihoodWarning",
    "TraceAdversarial_ELBO",
    "TraceRobust_ELBO",
    "UncertaintyRegularizer",
    "active_learning",
    "adversary",
    "attacks",
    "bayes_adapter",
    "datasets",
    "deep_ensemble",
    "diagnostics",
    "distill",
    "ensemble_start",
    "init_to_fan_in",
    "minibatch",
    "nn",
    "prior_predictive",
    "read_draws",
    "schedules",
    "to_arviz",
    "weight_decay_prior",
]


def __dir__() -> list[str]:
    """What is public."""
    return [*__all__, "__version__"]

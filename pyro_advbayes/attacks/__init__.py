"""
Attacks on classifiers and posteriors, one file each over one base; :func:`evaluate` runs several and warns where they are unreliable.

::

    classifier = PosteriorClassifier(model, mcmc.get_samples())
    x_adv = PGD(eps=0.3, steps=40, objective="mean_loss")(classifier, x, y)
    print(evaluate(classifier, x, y, attacks=[FGSM(0.3), PGD(0.3), APGD(0.3, loss="dlr"), Square(0.3)]))
"""

from pyro_advbayes.attacks.apgd import APGD
from pyro_advbayes.attacks.base import Attack
from pyro_advbayes.attacks.carlini_wagner import CarliniWagner, OneStepCarliniWagner
from pyro_advbayes.attacks.distribution import AdversarialDistribution
from pyro_advbayes.attacks.evaluate import Report, evaluate
from pyro_advbayes.attacks.feature import FeatureAttack
from pyro_advbayes.attacks.fgsm import FGSM
from pyro_advbayes.attacks.guide import GuideClassifier
from pyro_advbayes.attacks.ifgsm import IFGSM
from pyro_advbayes.attacks.mim import MIM
from pyro_advbayes.attacks.pgd import PGD
from pyro_advbayes.attacks.square import Square
from pyro_advbayes.attacks.uniform import Uniform
from pyro_advbayes.attacks.wrm import WRM

__all__ = [
    "APGD",
    "FGSM",
    "IFGSM",
    "MIM",
    "PGD",
    "WRM",
    "AdversarialDistribution",
    "Attack",
    "CarliniWagner",
    "FeatureAttack",
    "GuideClassifier",
    "OneStepCarliniWagner",
    "Report",
    "Square",
    "Uniform",
    "evaluate",
]

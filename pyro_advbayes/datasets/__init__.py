"""Data as tensors: every function returns :class:`Examples`, which unpacks to ``x, y``, but for :func:`mnist_ood`, whose
images have no labels, and for the regression sets :func:`uci` and :func:`metro_traffic`, which return a :class:`RegressionSplit`:
training and test rows, standardised.

:func:`digits` and :func:`two_moons` come from scikit-learn, the extra ``sklearn``. The image and regression sets are read from files in a
data folder, ``root=`` or the environment variable ``PYRO_ADVBAYES_DATA``; image sets need the extra ``images``. Nothing is downloaded, and
an error about a missing file says how to get it.
"""

from pyro_advbayes.datasets.digits import digits
from pyro_advbayes.datasets.examples import Examples
from pyro_advbayes.datasets.images import cifar10, cifar10_grey, fashion_mnist, mnist, notmnist, omniglot
from pyro_advbayes.datasets.ood import mnist_ood
from pyro_advbayes.datasets.regression import RegressionSplit, metro_traffic, uci
from pyro_advbayes.datasets.toy import two_gaussians, two_moons

__all__ = [
    "Examples",
    "RegressionSplit",
    "cifar10",
    "cifar10_grey",
    "digits",
    "fashion_mnist",
    "metro_traffic",
    "mnist",
    "mnist_ood",
    "notmnist",
    "omniglot",
    "two_gaussians",
    "two_moons",
    "uci",
]

"""
Data sets as tensors. The functions return :class:`Examples`, which unpacks to ``x, y``, with three exceptions: :func:`mnist_ood` returns
images without labels, and the regression sets :func:`uci` and :func:`metro_traffic` return a :class:`RegressionSplit` of standardised
training and test rows.

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

"""The kinds of normalisation that the networks for CIFAR come with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pyro_advbayes.nn import Classifier, Prior, bayesianize


class FilterResponseNorm(nn.Module):
    r"""
    Divides each channel of an image by its root mean square over positions: :math:`y = \gamma x / \sqrt{\nu^2 + 10^{-6}} + \beta`,
    :math:`\nu^2` the mean of :math:`x^2`. What one image gives depends on no other, in either mode.

    Source: S. Singh and S. Krishnan, Filter Response Normalization Layer, CVPR 2020, Eq. 1 to 4.

    :param int num_channels: of images ``[N, num_channels, H, W]``.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, images: Tensor) -> Tensor:
        scale = images.square().mean((-2, -1), keepdim=True).add(1e-6).rsqrt()
        return images * scale * self.weight[:, None, None] + self.bias[:, None, None]


class ThresholdedLinearUnit(nn.Module):
    """
    ReLU with a threshold per channel that is learnt, :math:`\\max(x, \\tau)`, which goes with :class:`FilterResponseNorm`.

    :param int num_channels: of images ``[N, num_channels, H, W]``.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(num_channels))

    def forward(self, images: Tensor) -> Tensor:
        return torch.maximum(images, self.threshold[:, None, None])


def _relu(num_channels: int) -> nn.Module:
    return nn.ReLU()


def _groups(num_channels: int) -> nn.Module:
    return nn.GroupNorm(min(8, num_channels), num_channels)


Layer = Callable[[int], nn.Module]
KINDS: dict[str, tuple[Layer, Layer]] = {
    "batch": (nn.BatchNorm2d, _relu),
    "group": (_groups, _relu),
    "filter_response": (FilterResponseNorm, ThresholdedLinearUnit),
}


def normalization(kind: str) -> tuple[Layer, Layer]:
    """
    :param str kind: ``"batch"``; ``"group"``, up to 8 groups of channels; or ``"filter_response"``.
    :returns: what makes the normalisation and the activation for a number of channels.
    :raises ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"norm={kind!r}: choose one of {', '.join(map(repr, KINDS))}")
    return KINDS[kind]


def affine_parameters(net: nn.Module) -> list[str]:
    """The names of the gains, shifts and thresholds of a network's normalisation."""
    layers = nn.BatchNorm2d | nn.GroupNorm | FilterResponseNorm | ThresholdedLinearUnit
    return [
        f"{name}.{parameter}"
        for name, module in net.named_modules()
        if isinstance(module, layers)
        for parameter, _ in module.named_parameters(recurse=False)
    ]


def normalized_classifier(
    net: nn.Module, prior: Prior = Normal(0.0, 0.15), *, bayesian_norm: bool = True, eval_only: bool = True
) -> Classifier:
    """
    The Bayesian classifier around a network with normalisation.

    :param net: from images to logits.
    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`; that of Adversarial Sampling by default.
    :param bool bayesian_norm: whether gains, shifts and thresholds of normalisation have priors too; else they are parameters.
    :param bool eval_only: as for ``bayesianize``; False where BatchNorm's statistics are to be learnt.
    """
    return Classifier(bayesianize(net, prior, exclude=() if bayesian_norm else affine_parameters(net), eval_only=eval_only))

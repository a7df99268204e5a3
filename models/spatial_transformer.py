"""The network that Bayesian Adversarial Learning uses on traffic signs: a spatial transformer before three convolutions."""

from __future__ import annotations

import torch
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from pyro_advbayes.nn import FanIn, Prior, bayesianize
from pyro_advbayes.nn.classifier import Classifier

LAST_LOCATING_LAYER = "locate.9."


class SpatialTransformer(nn.Module):
    r"""
    Looks at an image, and gives it back shifted, turned and scaled, by bilinear interpolation at

    .. math:: (u, v) \mapsto (I + A) (u, v)^\top + b, \qquad (A, b) = \text{locate}(\text{image}),

    so that where ``locate`` gives zeros, as it does before training, the image stays as it is. It has two convolutions of 10 channels,
    each with 2x2 max-pooling and ReLU, and 10 hidden units.

    Source: M. Jaderberg et al., Spatial Transformer Networks, NeurIPS 2015; sizes after N. Ye and Z. Zhu, Bayesian Adversarial Learning,
    NeurIPS 2018. The kernels, 7 and 5, are those of PyTorch's tutorial.
    """

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(
            nn.Conv2d(1, 10, kernel_size=7),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 10, kernel_size=5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(160, 10),
            nn.ReLU(),
            nn.Linear(10, 6),
        )
        nn.init.zeros_(self.locate[-1].weight)
        nn.init.zeros_(self.locate[-1].bias)

    def forward(self, images: Tensor) -> Tensor:
        """
        :param images: ``[N, 1, 32, 32]``.
        :returns: images of that shape; what lies outside an image is 0.
        """
        moved = self.locate(images).view(-1, 2, 3) + torch.eye(2, 3, dtype=images.dtype, device=images.device)
        return grid_sample(images, affine_grid(moved, images.shape, align_corners=False), align_corners=False)


def spatial_transformer_network(num_classes: int = 43) -> nn.Sequential:
    """
    The plain network: a spatial transformer; convolutions of 50, 100 and 150 channels with kernels 5, 3 and 1, each with leaky ReLU, 2x2
    max-pooling and normalisation; 1350-350-``num_classes``.

    Source: N. Ye and Z. Zhu, Bayesian Adversarial Learning, NeurIPS 2018, section 4.1. The authors normalise by the batch. Here it is
    GroupNorm with 10 groups: a row's likelihood must not depend on the other rows, and BatchNorm in eval mode is an affine map with
    statistics that no sampler updates.

    :param num_classes: 43 in the German traffic sign benchmark.
    :returns: a network from grey images ``[N, 1, 32, 32]`` with values in [0, 1] to logits ``[N, num_classes]``.
    """
    layers: list[nn.Module] = [SpatialTransformer()]
    for inputs, outputs, kernel in ((1, 50, 5), (50, 100, 3), (100, 150, 1)):
        layers += [nn.Conv2d(inputs, outputs, kernel), nn.LeakyReLU(), nn.MaxPool2d(2), nn.GroupNorm(10, outputs)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1350, 350), nn.LeakyReLU(), nn.Linear(350, num_classes))


def transformer_prior(name: str, value: Tensor) -> TorchDistributionMixin:
    """
    What images are shifted, turned and scaled by is small a priori: Normal(0, 0.01) on the layer that says how much. All other tensors
    have ``FanIn(scale=√2)``, and the gains of normalisation layers Normal(1, 0.1).
    """
    if LAST_LOCATING_LAYER in name:
        return Normal(0.0, 0.01)
    if value.dim() == 1 and name.endswith("weight"):
        return Normal(1.0, 0.1)
    return FanIn(scale=2**0.5, bias_scale=0.1)(name, value)


def spatial_transformer(num_classes: int = 43, prior: Prior = transformer_prior) -> Classifier:
    """
    The Bayesian classifier around :func:`spatial_transformer_network`, with 554 779 weights.

    :param prior: as for :func:`pyro_advbayes.nn.bayesianize`. Under the same wide prior for all weights, images would be shifted out
        of sight.
    """
    return Classifier(bayesianize(spatial_transformer_network(num_classes), prior))

"""Residual networks for images of 32x32: ResNet-20, ResNet-56 and their kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from models.normalization import Layer, normalization, normalized_classifier
from pyro_advbayes.nn import Classifier


class ResidualBlock(nn.Module):
    """
    Two 3x3 convolutions, each normalised, around which the images are passed by: where the block halves their size they are thinned
    out, and where it has more channels those are filled with zeros.

    :param int inputs: channels that come in.
    :param int outputs: channels that go out.
    :param int stride: 1, or 2 to halve the size.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Layer, activation: Layer) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm(outputs),
            activation(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
        )
        self.activation = activation(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        passed = images[..., :: self.stride, :: self.stride]
        half = self.more // 2
        return self.activation(pad(passed, (0, 0, 0, 0, half, self.more - half)) + self.branch(images))


def resnet_network(depth: int = 20, num_classes: int = 10, norm: str = "batch") -> nn.Sequential:
    """
    The plain network: a 3x3 convolution, three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels, the mean over positions, a
    linear layer.

    Source: K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, shortcuts A; initial weights as there.

    :param int depth: 6 n + 2: 20, 32, 44, 56, 110.
    :param int num_classes: K >= 2.
    :param str norm: see :func:`models.normalization.normalization`.
    :returns: a network from images ``[N, 3, 32, 32]`` to logits ``[N, K]``.
    :raises ValueError: if there is no network of that depth, or no such normalisation.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth={depth}: these networks have 6 n + 2 layers, 20 or 56 for instance")
    layer, activation = normalization(norm)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), layer(16), activation(16)]
    channels = 16
    for stage, outputs in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            layers.append(ResidualBlock(channels, outputs, 2 if stage and not block else 1, layer, activation))
            channels = outputs
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    initialize(net)
    return net


def initialize(net: nn.Module) -> None:
    """Draws the convolutions' weights with variance 2 / fan_out, as He et al. (2015) do."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(depth: int = 20, num_classes: int = 10, norm: str = "batch", **options: Any) -> Classifier:
    """The Bayesian classifier around :func:`resnet_network`; for ``options`` see :func:`models.normalization.normalized_classifier`."""
    return normalized_classifier(resnet_network(depth, num_classes, norm), **options)

"""Wide residual networks for images of 32x32: WideResNet-28-10 and its kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.normalization import Layer, normalization, normalized_classifier
from models.resnet import initialize
from pyro_advbayes.nn import Classifier


class WideBlock(nn.Module):
    """
    Two 3x3 convolutions, each behind its normalisation and activation. Where the block changes size or channels, a 1x1 convolution of
    what the first convolution sees takes the place of what is passed by.

    :param int inputs: channels that come in.
    :param int outputs: channels that go out.
    :param int stride: 1, or 2 to halve the size.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Layer, activation: Layer) -> None:
        super().__init__()
        self.before = nn.Sequential(norm(inputs), activation(inputs))
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            norm(outputs),
            activation(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.shortcut = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.before(images)
        return (images if self.shortcut is None else self.shortcut(seen)) + self.branch(seen)


def wide_resnet_network(depth: int = 28, width: int = 10, num_classes: int = 10, norm: str = "batch") -> nn.Sequential:
    """
    The plain network: a 3x3 convolution, three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels, normalisation,
    the mean over positions, a linear layer. Without dropout.

    Source: S. Zagoruyko and N. Komodakis, Wide Residual Networks, BMVC 2016.

    :param int depth: 6 n + 4: 16, 28, 40.
    :param int width: >= 1.
    :param int num_classes: K >= 2.
    :param str norm: see :func:`models.normalization.normalization`.
    :returns: a network from images ``[N, 3, 32, 32]`` to logits ``[N, K]``.
    :raises ValueError: if there is no network of that size, or no such normalisation.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth={depth}: these networks have 6 n + 4 layers, 28 for instance")
    if width < 1:
        raise ValueError(f"width={width}: how many times 16 channels, >= 1")
    layer, activation = normalization(norm)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            layers.append(WideBlock(channels, outputs, 2 if stage and not block else 1, layer, activation))
            channels = outputs
    layers += [layer(channels), activation(channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    net = nn.Sequential(*layers)
    initialize(net)
    return net


def wide_resnet(depth: int = 28, width: int = 10, num_classes: int = 10, norm: str = "batch", **options: Any) -> Classifier:
    """The Bayesian classifier around :func:`wide_resnet_network`; ``options`` go to :func:`models.normalization.normalized_classifier`."""
    return normalized_classifier(wide_resnet_network(depth, width, num_classes, norm), **options)

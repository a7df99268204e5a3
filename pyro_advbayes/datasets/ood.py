"""Out-of-distribution images for networks trained on MNIST: :func:`mnist_ood`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.datasets.images import cifar10_grey, notmnist, omniglot
from pyro_advbayes.given import check_int


@checked
def mnist_ood(
    root: str | Path | None = None, scale: float = 1.0, *, num_images: int = 2000, seed: int = 0, flatten: bool = False
) -> dict[str, Tensor]:
    r"""
    The out-of-distribution sets of Adversarial Posterior Distillation (Wang et al., ICML 2018, section 5.2), for a network trained on
    MNIST in [-1, 1]. All inputs are multiplied by ``scale``: 1 keeps the range of the digits; the paper's setting, 5, makes the sets easier
    to tell from digits.

    - ``"notMNIST"``: letters, in [-scale, scale];
    - ``"Omniglot"``: characters, in [-scale, scale];
    - ``"Omniglot in 0..255"``: the same in [0, 255 scale], as in the authors' code, far outside the range of all other sets;
    - ``"CIFAR10bw"``: grey photographs, in [-scale, scale];
    - ``"Gaussian"``: scale · Normal(0, 1);
    - ``"Uniform"``: scale · Uniform(0, 1).

    The file of notMNIST is in random order, and its first images are taken. The files of Omniglot and CIFAR-10 are sorted, and images are
    drawn at random. Omniglot is its evaluation set; the authors take alphabets of the background set.

    :param root: the data folder; ``None`` reads it from the environment variable ``PYRO_ADVBAYES_DATA``.
    :param float scale: > 0.
    :param int num_images: of each set, 1 to 10 000.
    :param int seed: of the images that are drawn and of the noise; one seed gives the same images at all scales.
    :param bool flatten: ``[N, 784]`` instead of ``[N, 1, 28, 28]``.
    :return: set -> images, float32.
    :raises ValueError: if ``scale`` or ``num_images`` is out of range.
    :raises FileNotFoundError: if a set is missing; says how to get it.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r}: what inputs are multiplied by, > 0")
    check_int(num_images, "num_images", 1, "images of each set", most=10_000)
    signed = (-scale, scale)
    generator = torch.Generator().manual_seed(seed)
    letters, photographs = notmnist(root, scale=signed).x, cifar10_grey(root, scale=signed).x
    characters, far = omniglot(root, scale=signed).x, omniglot(root, scale=(0.0, 255.0 * scale)).x
    rows = torch.randperm(len(characters), generator=generator)[:num_images]
    shape = (num_images, 1, 28, 28)
    sets = {
        "notMNIST": letters[:num_images],
        "Omniglot": characters[rows],
        "Omniglot in 0..255": far[rows],
        "CIFAR10bw": photographs[torch.randperm(len(photographs), generator=generator)[:num_images]],
        "Gaussian": scale * torch.randn(shape, generator=generator),
        "Uniform": scale * torch.rand(shape, generator=generator),
    }
    for name, images in sets.items():
        if len(images) < num_images:
            raise ValueError(f"num_images={num_images}: the files of {name} hold {len(images)}")
    return {name: images.flatten(1) if flatten else images for name, images in sets.items()}

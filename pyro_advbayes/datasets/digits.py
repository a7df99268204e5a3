"""The digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from pyro_advbayes.checked import checked
from pyro_advbayes.datasets.examples import Examples, check_split, image_examples
from pyro_advbayes.given import SEEDS, check_int, need_extra


@checked
def digits(
    split: str = "train",
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    scale: tuple[float, float] = (0.0, 1.0),
    flatten: bool = False,
) -> Examples:
    """1797 handwritten digits, 8x8, in ten classes: the test part of the UCI set "Optical Recognition of Handwritten
    Digits", as scikit-learn ships it, split into training and test images with the same share of each class.

    :param split: ``"train"`` (1437 images by default) or ``"test"`` (360).
    :param test_fraction: share of the images in the test split, in (0, 1).
    :param seed: of the split and of the order of its rows. The two splits of one seed are disjoint.
    :param scale: ``(low, high)``, the values of a pixel without ink and of a full one.
    :param flatten: ``[N, 64]`` instead of ``[N, 1, 8, 8]``.
    :raises ModuleNotFoundError: without scikit-learn, the extra ``sklearn``.
    :raises ValueError: on a split of another name, or a ``test_fraction`` outside (0, 1).
    """
    train = check_split(split)
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    check_int(seed, "seed", 0, most=SEEDS)
    found = need_extra("sklearn.datasets", "sklearn").load_digits()
    pixels, labels = found.images, found.target
    cut = need_extra("sklearn.model_selection", "sklearn").train_test_split
    rows = cut(np.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels)
    rows = rows[0] if train else rows[1]
    return image_examples(torch.from_numpy(pixels[rows]), torch.from_numpy(labels[rows]), white=16, scale=scale, flatten=flatten)

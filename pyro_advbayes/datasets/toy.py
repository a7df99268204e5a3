"""Toy problems: two-dimensional classification."""

from __future__ import annotations

import torch

from pyro_advbayes.checked import checked
from pyro_advbayes.datasets.examples import Examples
from pyro_advbayes.given import SEEDS, check_int, need_extra


@checked
def two_moons(num_data: int = 200, noise: float = 0.1, seed: int | None = None) -> Examples:
    """Two interleaved half circles, by scikit-learn's ``make_moons``, shuffled.

    :param num_data: number of points, both classes together, at least 2.
    :param noise: standard deviation of the Gaussian noise on each coordinate; the circles have radius 1.
    :param seed: ``None`` draws from torch's global generator, which ``pyro.set_rng_seed`` governs.
    :return: ``x`` is ``[num_data, 2]``, ``y`` is 0 (upper moon) or 1 (lower).
    :raises ModuleNotFoundError: without scikit-learn, the extra ``sklearn``.
    :raises ValueError: if ``num_data`` is below 2 or ``noise`` or ``seed`` negative.
    """
    check_int(num_data, "num_data", 2, "one point of each class or more")
    if noise < 0.0:
        raise ValueError(f"noise={noise!r}: a standard deviation, >= 0")
    if seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    check_int(seed, "seed", 0, most=SEEDS)
    x, y = need_extra("sklearn.datasets", "sklearn").make_moons(num_data, noise=noise, random_state=seed)
    return Examples(torch.from_numpy(x).float(), torch.from_numpy(y).long())


@checked
def two_gaussians(num_per_class: int = 10, seed: int | None = None) -> Examples:
    """The toy problem of Adversarial Posterior Distillation (Wang et al., ICML 2018): N(m, 0.3 I) at (-2, -2), (2, 2).

    :param num_per_class: number of points in each class, at least 1; the paper's code uses 10.
    :param seed: ``None`` draws from torch's global generator, which ``pyro.set_rng_seed`` governs.
    :return: ``x`` is ``[2 num_per_class, 2]``; ``y`` is 0 for the points round (-2, -2), which come first, and 1 for
        those round (2, 2).
    :raises ValueError: if ``num_per_class`` is below 1.
    """
    check_int(num_per_class, "num_per_class", 1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    y = torch.arange(2).repeat_interleave(num_per_class)
    means = torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=torch.float32)
    noise = torch.randn(2 * num_per_class, 2, generator=generator, dtype=torch.float32)
    return Examples(means[y] + 0.3**0.5 * noise, y)

r"""
A generator trained on the energy distance between what it makes and what it is to make (Székely and Rizzo, 2013),

.. math:: 2\, \mathrm E |\tilde c - c| - \mathrm E |\tilde c - \tilde c'| - \mathrm E |c - c'|,

which is 0 for two equal laws only. Its estimate from batches has an unbiased gradient, so that there is no critic to be trained: on
codes of few numbers a fit takes a tenth of the time of a Wasserstein GAN's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pyro_advbayes.infer.distill.training import Training

# Longer rows are compared by matrix products, which lose digits where points are much nearer to each other than to 0: codes are not.
SHORT = 64


def energy_loss(made: Tensor, real: Tensor) -> Tensor:
    """
    The part of the energy distance that depends on what is made, without bias.

    :param made: ``[n, d]``, n >= 2.
    :param real: ``[m, d]``.
    """
    n = len(made)
    if made.shape[1] <= SHORT:
        within = torch.cdist(made, made, compute_mode="donot_use_mm_for_euclid_dist").sum()
        between = torch.cdist(made, real, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        here, there = (points.square().sum(-1) for points in (made, real))
        squares = here[:, None] + here - 2.0 * made @ made.mT
        # the root has no slope at 0, where points coincide: on the diagonal, say
        apart = (squares > 0.0) & ~torch.eye(n, dtype=torch.bool, device=made.device)
        within = squares.where(apart, squares.new_zeros(())).sqrt().sum()
        between = (here[:, None] + there - 2.0 * made @ real.mT).clamp_min(1e-12).sqrt()
    return 2.0 * between.mean() - within / (n * (n - 1))


class Energy(Training):
    """A generator, and the energy distance that it lowers; see :class:`~pyro_advbayes.infer.distill.training.Training`."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)
    half_life: ClassVar[float | None] = 500.0

    def _step(self) -> Tensor:
        real = self.draw(self.settings.batch_size)
        loss = energy_loss(self.made(len(real)), real)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        self._keep_average()
        return loss.detach()

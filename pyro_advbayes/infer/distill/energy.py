r"""
A generator trained on the energy distance between what it makes and what it is to make (Székely and Rizzo, 2013),

.. math:: 2\, \mathrm E |\tilde c - c| - \mathrm E |\tilde c - \tilde c'| - \mathrm E |c - c'|,

which is 0 for two equal laws only. Its estimate from batches has an unbiased gradient, so that there is no critic to be trained: on
codes of few numbers a fit takes a tenth of the time of a Wasserstein GAN's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.infer.distill.training import Training


def energy_loss(made: Tensor, real: Tensor) -> Tensor:
    """
    The part of the energy distance that depends on what is made, without bias.

    :param made: ``[n, d]``, n >= 2.
    :param real: ``[m, d]``.
    """
    n = len(made)
    return 2.0 * _distances(made, real).mean() - _distances(made, made).sum() / (n * (n - 1))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # the difference of squares of long rows by a matrix product; of short ones exactly, which costs less there
    exact = "donot_use_mm_for_euclid_dist" if a.shape[1] <= 64 else "use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=exact)


class Energy(Training):
    """A generator, and the energy distance that it lowers; see :class:`~pyro_advbayes.infer.distill.training.Training`."""

    def _step(self) -> Tensor:
        real = self.draw(self.settings.batch_size)
        loss = energy_loss(self.made(len(real)), real)
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        self._keep_average()
        return loss.detach()

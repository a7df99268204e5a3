r"""
The scale of the independent noise of a factored generator.

The variance that principal components leave is not independent across weights: the data determine some combinations of weights, and noise
along these ruins predictions. So the noise is scaled by the largest :math:`\kappa \le 1` with which the generator's samples fit the data as
well as the draws,

.. math:: \mathrm E\,[-\log p(D \mid \mu + B g(z) + \kappa\, \sigma \odot \epsilon)] \le \mathrm E\,[-\log p(D \mid \theta)].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_advbayes.given import warn
from pyro_advbayes.infer.autoguide.factored import FactoredGenerator
from pyro_advbayes.infer.autoguide.rows import Rows
from pyro_advbayes.model.potential import Potential

DRAWS, HALVINGS = 64, 7


@torch.no_grad()
def fit_noise(generator: FactoredGenerator, rows: Rows, potential: Potential) -> float | None:
    r"""
    Scales the generator's noise by :math:`\kappa`, by bisection on one set of random numbers. Warns if samples without noise fit
    significantly worse than the draws, so that no :math:`\kappa` suffices.

    :param generator: trained.
    :param rows: the draws.
    :param potential: of the model on data; a few hundred rows suffice.
    :return: :math:`\kappa`, in [0, 1]; None, with the noise unchanged, if there are no data, or the model subsamples them itself.
    """
    if not potential.arguments.tensors or potential.structure.scaling == "indices":
        return None
    index = torch.linspace(0, len(rows) - 1, min(DRAWS, len(rows))).round().long()
    drawn = _misfits(potential, rows.take(index))
    quiet, loud = generator.parts(generator.latent(DRAWS))

    def fits(scale: float) -> bool:
        return bool(_misfits(potential, quiet + scale * loud).mean() <= drawn.mean())

    low, high = 0.0, 1.0
    if fits(1.0):
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    generator.scale_noise(low)
    if low == 0.0:
        _warn_of_misfit(_misfits(potential, quiet), drawn)
    return low


def _warn_of_misfit(made: Tensor, drawn: Tensor) -> None:
    """Warns if the misfits ``[n]`` of samples without noise exceed those of the draws by more than three standard errors."""
    excess = made.mean() - drawn.mean()
    if excess > 3.0 * (made.var() / len(made) + drawn.var() / len(drawn)).sqrt():
        warn(
            f"FactoredGenerator misfits the data by {excess:.3g} nats more than the draws do, although all of its noise was removed: its "
            "directions or its network do not represent combinations of weights that the data determine. Judge its predictions with "
            "distill.compare; take a larger rank, or hidden=None, which keeps the draws' codes",
        )


def _misfits(potential: Potential, rows: Tensor) -> Tensor:
    """The negative log-likelihood of the potential's probes under each of rows ``[n, P]``, in nats."""
    one, total = potential.scalar(1.0), torch.zeros(len(rows), dtype=torch.float64)
    for tensors in potential.probes(0):
        total += torch.tensor([float(potential.data_loss(row, one, *tensors)) for row in rows.to(potential.dtype)], dtype=torch.float64)
    return total

"""Control variates: minibatch gradients with less noise near an anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_advbayes.given import need_tensor
from pyro_advbayes.model.batches import Batch
from pyro_advbayes.model.potential import Potential


class ControlVariate:
    r"""
    A correction of the minibatch gradient at :math:`\theta` with an anchor :math:`\hat\theta` (Baker et al., 2019):

    .. math:: \nabla U(\hat\theta) - \nabla \hat U(\hat\theta),

    the full-data gradient at the anchor less that of the same minibatch. Its mean is 0, and near the anchor it cancels most of the
    minibatch noise. The temperature weighs the Jacobian of a constrained site alike in both gradients, and cancels.

    :param potential: the potential.
    :param anchor: :math:`\hat\theta`, values by site in the model's own space.
    :raises ValueError: if a site is missing, or a loader leaves rows out.
    """

    def __init__(self, potential: Potential, anchor: Mapping[str, Tensor]) -> None:
        self.potential = potential
        self.anchor = potential.unconstrain(
            {name: need_tensor(value, f"control_variate[{name!r}]").detach().unsqueeze(0) for name, value in anchor.items()}
        )[0]
        total, seen = torch.zeros_like(self.anchor), 0
        for batch, rows in potential.batches.epoch():
            # each batch's gradient stands for the whole data set: weigh it by its share of the rows
            total += rows * potential.shared_gradient(self.anchor, batch)
            seen += rows
        expected = potential.batches.num_data
        if expected not in (None, seen):
            raise ValueError(
                f"control_variate: one run through the loader gave {seen} rows where the data set has {expected}, so that the "
                "gradient at the anchor would not be that of all data: give a loader that runs through every row once (drop_last=False)"
            )
        self.full = total / seen

    def correction(self, rows: Any, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        """A function of the tensors of one chunk of chains."""
        anchor = self.anchor if isinstance(rows, int) else self.anchor.expand(rows.stop - rows.start, -1)
        gradient = self.potential.function("gradient", anchor, tensors)
        full, one = self.full, torch.ones((), dtype=self.anchor.dtype, device=self.anchor.device)

        def correct(*tensors: Tensor) -> Tensor:
            return full - gradient(anchor, one, *tensors)

        return correct

    def evaluate(self, theta: Tensor, batch: Batch) -> Tensor:
        """The correction for all chains, ``[chains, size]``."""
        return self.full - self.potential.gradient(self.anchor.expand_as(theta), batch)

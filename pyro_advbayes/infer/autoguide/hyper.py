"""A generator that makes every layer row by row: :class:`HyperGenerator`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.generators import StandardizedGenerator, as_widths, mlp, mlp_numbers, numel


@checked
class HyperGenerator(StandardizedGenerator):
    r"""
    A hypernetwork with a trunk that all layers share. The trunk makes :math:`t = g(z)`, ``[w]``; row j (an output unit) of a site s of two
    dimensions or more is, in standardised units,

    .. math:: H_s\, \mathrm{relu}(a_{sj} \odot t + b_{sj}),

    with two vectors of w numbers for each row and one matrix :math:`H_s` for all rows of the site; a site of one dimension is one row. The
    generator holds 2P numbers for mean and scale of the draws, w·(2·rows + columns) for each site, and those of the trunk: for
    784-400-400-10 and w = 32, (2 + 0.2)·P.

    :param int noise: dimension of z, >= 1.
    :param hidden: widths of the trunk's hidden layers.
    :param int width: w, >= 1.
    """

    def __init__(self, noise: int = 32, hidden: Sequence[int] = (64,), width: int = 32) -> None:
        super().__init__(noise)
        self.hidden, self.width = as_widths(hidden), check_int(width, "width", 1, "the numbers that a row is made of")
        self.trunk, self.gains, self.shifts, self.heads = nn.Sequential(), nn.ParameterList(), nn.ParameterList(), nn.ParameterList()

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        super().build(shapes, dtype, device)
        w = self.width
        self.trunk = mlp((self.noise, *self.hidden, w), dtype, device)
        tables = [_table(shape) for shape in shapes]
        self.gains = nn.ParameterList([torch.randn(rows, w, dtype=dtype, device=device) for rows, _ in tables])
        self.shifts = nn.ParameterList([torch.randn(rows, w, dtype=dtype, device=device) for rows, _ in tables])
        heads = [torch.randn(w, columns, dtype=dtype, device=device) / math.sqrt(w) for _, columns in tables]
        self.heads = nn.ParameterList(heads)

    def settings(self) -> dict[str, Any]:
        return {"noise": self.noise, "hidden": list(self.hidden), "width": self.width}

    def numbers(self, shapes: Sequence[Sequence[int]]) -> int:
        tables = (_table(shape) for shape in shapes)
        made = sum(self.width * (2 * rows + columns) for rows, columns in tables)
        return 2 * numel(shapes) + made + mlp_numbers((self.noise, *self.hidden, self.width))

    def code(self, z: Tensor) -> Tensor:
        t = self.trunk(z).unsqueeze(1)
        made = zip(self.gains, self.shifts, self.heads, strict=True)
        return torch.cat([((t * gain + shift).relu() @ head).flatten(1) for gain, shift, head in made], dim=-1)


def _table(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a site."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))

"""A generator of low rank, with r + 2 numbers for each weight: :class:`FactoredGenerator`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.generators import RowGenerator, as_widths, linears, mlp, mlp_numbers, numel
from pyro_advbayes.infer.autoguide.rows import Rows
from pyro_advbayes.infer.mcmc.noise import NormalNoise

OVERSAMPLING, PASSES = 8, 2
# The number of weights of a packed basis that are unpacked together, so that they stay in the processor's cache.
PIECE = 2**16


def principal_components(rows: Rows, mean: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""
    The leading directions of draws, by a streaming randomised singular value decomposition: with the centred rows
    :math:`A`, ``[n, P]``, a sketch :math:`\Omega^\top A` of random combinations, then :math:`Q \leftarrow \mathrm{orth}(A^\top A Q)`
    twice, then the decomposition of :math:`A Q`. Four passes; memory for r + 8 rows. (Halko, Martinsson and Tropp, SIAM Review 2011.)

    :param mean: of the rows, ``[P]``.
    :param rank: r, >= 1.
    :return: directions ``[P, r]``, orthonormal, and the standard deviations ``[r]`` of the rows along them, largest first.
    """
    width = min(rank + OVERSAMPLING, len(rows), rows.size)
    sketch = torch.zeros(width, rows.size, dtype=rows.dtype, device=rows.device)
    for part in rows.chunks():
        mixing = torch.randn(len(part), width, dtype=rows.dtype, device=rows.device)
        sketch.addmm_(mixing.mT, part - mean)
    basis = torch.linalg.qr(sketch.mT).Q
    for _ in range(PASSES):
        sketch.zero_()
        for part in rows.chunks():
            centred = part - mean
            sketch.addmm_((centred @ basis).mT, centred)
        basis = torch.linalg.qr(sketch.mT).Q
    # singular vectors of A Q from its small Gram matrix, so that its n rows are never in memory
    gram = torch.zeros(width, width, dtype=torch.float64, device=rows.device)
    for part in rows.chunks():
        projected = ((part - mean) @ basis).double()
        gram.addmm_(projected.mT, projected)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return basis @ vectors.to(basis), (values.clamp_min(0.0) / max(1, len(rows) - 1)).sqrt().to(basis)


@checked
class FactoredGenerator(RowGenerator):
    r"""
    A nonlinear law along few directions, and independent noise along all:

    .. math:: \theta = \mu + B\, g(z) + \sigma \odot \epsilon, \qquad z, \epsilon \sim \mathcal N(0, I).

    The mean :math:`\mu`, the basis :math:`B` ``[P, r]`` (leading principal components of the draws, by a streaming randomised SVD) and
    the noise :math:`\sigma` (the remaining variance of each weight, so that all variances equal those of the draws) come from the draws in
    closed form. Only :math:`g`, a small network with r outputs, is trained, on codes of r numbers instead of P. The generator holds
    (r + 2)·P numbers and those of :math:`g`; :class:`MLPGenerator` holds 101·P.

    Independent noise in all weights may ruin the predictions of a network. Where :meth:`APD.fit
    <pyro_advbayes.infer.distill.APD.fit>` is given data, it is scaled down until the samples fit them as well as the draws do, see
    :mod:`pyro_advbayes.infer.distill.noise`.

    :param int rank: r, >= 1; at most one less than there are draws, and no more than there are weights.
    :param int noise: dimension of z, >= 1.
    :param hidden: widths of the hidden layers of g. None stores the codes of the n draws in place of g, r·n numbers, and samples among
        them: nothing is trained, and the law along these directions is that of the draws.
    :param bool packed: after training, stores basis and noise as integers from -127 to 127 times a step for each direction, one byte each
        in place of four. The rounding is 1 % of a direction's contribution to a weight; three times the rank takes the same storage.
    """

    # [r + 1, P]: the basis and the mean, so that one product makes both; the mean alone in a packed generator that is finished
    factors: Tensor
    sd: Tensor  # [P]
    codes: Tensor  # of the draws, where there is no g: [n, r]
    levels: Tensor  # of a packed generator: the basis and sd, [r + 1, P], in steps
    steps: Tensor  # [r + 1]

    def __init__(self, rank: int = 8, noise: int = 32, hidden: Sequence[int] | None = (64, 64), packed: bool = False) -> None:
        super().__init__(noise)
        check_int(rank, "rank", 1, "the number of directions")
        if not isinstance(packed, bool):
            raise ValueError(f"packed={packed!r}: True or False")
        self.rank, self.hidden, self.packed = rank, None if hidden is None else as_widths(hidden), packed
        self.layers = nn.Sequential()
        self.register_buffer("factors", torch.zeros(0))
        self.register_buffer("sd", torch.zeros(0))
        self.register_buffer("codes", torch.zeros(0, rank))
        self.register_buffer("levels", torch.zeros(0, dtype=torch.int8))
        self.register_buffer("steps", torch.zeros(0))

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        size = numel(shapes)
        if self.rank > size:
            raise ValueError(f"rank={self.rank}: the sites hold {size} numbers, so that the rank is at most {size}")
        self.size, self.codes = size, torch.zeros(0, self.rank, dtype=dtype, device=device)
        if self.hidden is not None:
            self.layers = mlp((self.noise, *self.hidden, self.rank), dtype, device)
        self.factors = torch.zeros(self.rank + 1, size, dtype=dtype, device=device)
        self.sd = torch.zeros(size, dtype=dtype, device=device)
        self.levels, self.steps = self.levels[:0].to(device), self.steps[:0].to(device, dtype)

    def settings(self) -> dict[str, Any]:
        hidden = None if self.hidden is None else list(self.hidden)
        return {"rank": self.rank, "noise": self.noise, "hidden": hidden, "packed": self.packed}

    def numbers(self, shapes: Sequence[Sequence[int]]) -> int:
        made = self.codes.numel() if self.hidden is None else mlp_numbers((self.noise, *self.hidden, self.rank))
        return (self.rank + 2) * numel(shapes) + made + self.packed * (self.rank + 1)

    @torch.no_grad()
    def prepare(self, rows: Rows, mean: Tensor, sd: Tensor) -> None:
        if self.rank >= len(rows):
            raise ValueError(f"rank={self.rank}: {len(rows)} draws determine at most {len(rows) - 1} directions")
        directions, spread = principal_components(rows, mean, self.rank)
        if not bool((spread > 1e-6 * spread[0]).all()):
            raise ValueError(f"rank={self.rank}: the draws lie in {int((spread > 1e-6 * spread[0]).sum())} directions: take a smaller rank")
        old_basis, old_mean = self.basis, self.factors[-1]
        self.factors = torch.cat([(directions * spread).mT, mean.unsqueeze(0)])
        self.sd = (sd.square() - self.factors[:-1].square().sum(0)).clamp_min(0.0).sqrt()
        self.levels, self.steps = self.levels[:0], self.steps[:0]
        if self.hidden is None:
            self.codes = torch.cat([self.encode(part) for part in rows.chunks()])
        elif bool(linears(self.layers)[-1].bias.any()):
            self._keep_rows(old_basis, old_mean)

    def _keep_rows(self, old_basis: Tensor, old_mean: Tensor) -> None:
        """
        Keeps a trained generator's rows in the new basis, as far as it spans them: signs and order of its directions are arbitrary. (A new
        generator's biases are all 0.)
        """
        last, turn = linears(self.layers)[-1], self.encode(old_basis + self.factors[-1])
        last.weight.copy_(turn.mT @ last.weight)
        last.bias.copy_(last.bias @ turn + self.encode(old_mean))

    def latent(self, count: int) -> Tensor:
        """Noise ``[count, noise]``, or indices of draws ``[count]``."""
        return super().latent(count) if self.hidden is not None else torch.randint(len(self.codes), (count,), device=self.codes.device)

    @torch.no_grad()
    def finish(self) -> None:
        if self.packed:
            whole = torch.cat([self.factors[:-1], self.sd.unsqueeze(0)])
            self.steps = whole.abs().amax(1) / 127
            self.levels = (whole / self.steps.clamp_min(torch.finfo(whole.dtype).tiny).unsqueeze(1)).round().to(torch.int8)
            self.factors, self.sd = self.factors[-1:].clone(), self.sd[:0].clone()

    @property
    def basis(self) -> Tensor:
        """``[r, P]``."""
        return self.levels[:-1] * self.steps[:-1, None] if len(self.levels) else self.factors[:-1]

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the noise, ``[P]``."""
        return self.levels[-1] * self.steps[-1] if len(self.levels) else self.sd

    def scale_noise(self, factor: float) -> None:
        """Multiplies the noise by a number >= 0."""
        if len(self.levels):
            self.steps[-1] *= factor
        else:
            self.sd.mul_(factor)

    def encode(self, rows: Tensor) -> Tensor:
        basis = self.basis
        return (rows - self.factors[-1]) @ (basis / basis.square().sum(-1, keepdim=True)).mT

    def code(self, z: Tensor) -> Tensor:
        return self.layers(z) if self.hidden is not None else self.codes[z]

    def forward(self, z: Tensor) -> Tensor:
        quiet, noise = self.parts(z)
        return quiet + noise

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The two terms of the rows: the part along the basis, and the noise, ``[n, P]`` each."""
        quiet = self.code(z) @ self.basis + self.factors[-1]
        return quiet, self.deviation * torch.randn_like(quiet)

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        code = self.code(self.latent(count))
        rows, deviation = code.new_empty(count, self.size), self.deviation
        noise = NormalNoise(rows)
        for row in rows.split(1):  # row by row, so that it is scaled in the processor's cache
            noise.fill(row)
            row.mul_(deviation)
        packed = len(self.levels) > 0
        if packed:  # scale the r numbers of a draw instead of the whole basis
            code = code * self.steps[:-1]
        code = torch.cat([code, code.new_ones(count, 1)], dim=1)
        if not packed:
            return rows.addmm_(code, self.factors)
        pieces = (tensor.split(PIECE, dim=1) for tensor in (rows, self.levels[:-1], self.factors))
        for part, levels, mean in zip(*pieces, strict=True):
            part.addmm_(code, torch.cat([levels.to(mean.dtype), mean]))
        return rows

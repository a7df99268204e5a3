r"""Two-sample distances and tests of points ``x`` ``[n, d]`` and ``y`` ``[m, d]``, in the same units.

A distance is never 0 between finite sets: compare it with that between two halves of one set. Standardise coordinates of different units,
since larger ones dominate. Every function raises ``ValueError`` where the points are not finite matrices of as
many columns, or a number of repetitions is not an int >= 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int, need_tensor


class MMDTest(NamedTuple):
    """``mmd2``: the unbiased estimate of the squared distance, which can be negative; ``p_value``: of the hypothesis that it is 0."""

    mmd2: float
    p_value: float


@checked
def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int = 128, generator: torch.Generator | None = None) -> float:
    r"""
    Mean over random directions :math:`u` of the one-dimensional Wasserstein distance,
    :math:`\mathrm E_u\, W_1(u \cdot x, u \cdot y) \sqrt d`, with :math:`\sqrt d` so that a shift of Euclidean length one counts about
    :math:`\sqrt{2/\pi}` whatever the dimension is. (Rabin et al., 2012.)

    :param x: ``[n, d]``.
    :param y: ``[m, d]``.
    :param num_projections: number of directions, >= 1.
    :param generator: for the directions; PyTorch's own by default.
    """
    x, y = _checked(x, y)
    check_int(num_projections, "num_projections", 1)
    dim = x.shape[1]
    directions = torch.randn(dim, num_projections, generator=generator, dtype=x.dtype).to(x.device)
    directions /= directions.norm(dim=0) / dim**0.5
    a, b = (x @ directions).sort(dim=0).values, (y @ directions).sort(dim=0).values
    if len(a) == len(b):
        return float((a - b).abs().mean())
    # W1 is the area between the quantile functions, which change at multiples of 1/n and of 1/m
    steps = torch.cat([torch.arange(1, len(t) + 1, dtype=torch.float64, device=x.device) / len(t) for t in (a, b)]).sort().values
    widths = steps.diff(prepend=steps.new_zeros(1))
    middle = steps - widths / 2
    rows = ((middle * len(t)).long().clamp_max(len(t) - 1) for t in (a, b))
    gap = (a[next(rows)] - b[next(rows)]).abs()
    return float((gap.double() * widths.unsqueeze(-1)).sum(0).mean())


@checked
def mmd_test(x: Tensor, y: Tensor, num_permutations: int = 500, generator: torch.Generator | None = None) -> MMDTest:
    r"""
    Maximum mean discrepancy with a Gaussian kernel :math:`k(a, b) = e^{-|a - b|^2 / 2 s^2}`, s the median distance of all points, and the
    share of random relabellings that make it as large (Gretton et al., JMLR 2012). The points of each set must be independent: the draws
    of a chain that has not mixed are rejected against any set.

    :param x: ``[n, d]``, n >= 2.
    :param y: ``[m, d]``, m >= 2.
    :param num_permutations: number of relabellings, >= 1.
    :param generator: for the relabellings; PyTorch's own by default.
    """
    x, y = _checked(x, y)
    check_int(num_permutations, "num_permutations", 1)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"mmd_test needs two points or more of each set, not {len(x)} and {len(y)}")
    # in float64, since equal labellings must tie; not by products of the points, which cancel far from 0
    points, n = torch.cat([x, y]).double(), len(x)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    off = ~torch.eye(len(points), dtype=torch.bool, device=x.device)
    kernel = (-distances / distances[off].median().clamp_min(torch.finfo(points.dtype).tiny) / 2).exp().mul_(off)
    labels = torch.zeros(num_permutations + 1, len(points), dtype=points.dtype, device=x.device)
    labels[0, :n] = 1.0
    for row in labels[1:]:
        row[torch.randperm(len(points), generator=generator)[:n].to(x.device)] = 1.0
    values = _mmd2(kernel, labels, n)
    # the given labelling counts as one of the relabellings, so that p is never 0
    p_value = float((values >= values[0] - 1e-9).double().mean())
    return MMDTest(float(values[0]), p_value)


def _mmd2(kernel: Tensor, labels: Tensor, n: int) -> Tensor:
    """For every row of labels ``[k, n + m]``, 1 for points of the first set; the kernel's diagonal is 0."""
    m = kernel.shape[0] - n
    first = labels @ kernel
    xx, total = (first * labels).sum(-1), first.sum(-1)
    yy = kernel.sum() - 2 * total + xx
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * (total - xx) / (n * m)


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, points in (("x", x), ("y", y)):
        if need_tensor(points, name).dim() != 2 or 0 in points.shape or not points.is_floating_point():
            raise ValueError(f"{name} must be points [n, d] of floating type, not {points.shape}")
        if not bool(points.isfinite().all()):
            raise ValueError(f"{name} has entries that are NaN or infinite")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} coordinates and y {y.shape[1]}: they must be points of one space")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.detach().to(dtype), y.detach().to(x.device, dtype)

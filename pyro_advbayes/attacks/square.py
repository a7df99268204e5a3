"""The Square attack: random search, without gradients."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pyro_advbayes.attacks.base import BallAttack, Best
from pyro_advbayes.attacks.geometry import Ball
from pyro_advbayes.attacks.problem import Problem
from pyro_advbayes.checked import checked

# Of ten thousand queries: those after which the share of changed pixels halves.
HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)


@checked
@dataclass(frozen=True, repr=False)
class Square(BallAttack):
    r"""
    Random search on the surface of the :math:`L_\infty` ball. Each query sets a square window of every image to :math:`x \pm \epsilon`,
    with one sign for each channel, and keeps the change where it raises the margin. The share of pixels in the window starts at ``share``
    and is halved eight times. Images ``[N, C, H, W]`` begin with vertical stripes. For inputs of any other shape each query changes a
    random subset of the entries, each with its own sign.

    It needs no gradient: where it is stronger than gradient attacks, gradients are masked.

    Further settings: :class:`~pyro_advbayes.attacks.base.Attack`.

    Source: M. Andriushchenko et al., Square attack: a query-efficient black-box adversarial attack via random search, ECCV 2020,
    Algorithms 1 and 2.

    :param float eps: radius of the ball, > 0, in the units of the inputs.
    :param int queries: number of predictions, >= 1.
    :param float share: share of the pixels in the first windows, in (0, 1].
    """

    queries: int = 1000
    share: float = 0.8
    norm: str = field(default="linf", init=False)

    loss: ClassVar[str] = "margin"
    uses_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("queries")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share!r}: a number in (0, 1]")

    def run(self, problem: Problem, region: Ball) -> Tensor:
        """Random search, which keeps a proposal where it is better."""
        best, clean = Best(), region.center
        images = clean.dim() == 4
        signs = _signs(clean, (len(clean), clean.shape[1], 1, clean.shape[3]) if images else clean.shape)
        x = region.restrict(clean + self.eps * signs)
        best.offer(x, *problem.examine(x))
        for query in range(1, self.queries):
            share = self.share * 0.5 ** bisect_left(HALVINGS, int(query * 10_000 / self.queries))
            if images:
                chosen, signs = _windows(clean, share), _signs(clean, (*clean.shape[:2], 1, 1))
            else:
                chosen, signs = _entries(clean, share), _signs(clean, clean.shape)
            x = torch.where(chosen, region.restrict(clean + self.eps * signs), best.x)
            best.offer(x, *problem.examine(x))
        return best.x


def _signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2, shape, device=like.device).to(like.dtype) * 2 - 1


def _windows(images: Tensor, share: float) -> Tensor:
    """A mask ``[N, 1, H, W]`` with one square window at a random place of every image."""
    count, _, height, width = images.shape
    side = min(max(1, round((share * height * width) ** 0.5)), height, width)
    inside = []
    for length in (height, width):
        start = torch.randint(length - side + 1, (count, 1), device=images.device)
        place = torch.arange(length, device=images.device)
        inside.append((place >= start) & (place < start + side))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)


def _entries(x: Tensor, share: float) -> Tensor:
    """A mask like ``x`` with the same number of random entries in every row."""
    scores = torch.rand(len(x), x[0].numel(), device=x.device)
    chosen = scores.topk(max(1, round(share * scores.shape[1])), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True).view_as(x)

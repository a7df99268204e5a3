"""The allowed inputs of an attack: regions and balls around the clean inputs, with projection and steepest steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Clip = tuple[float, float] | None


def rows(values: Tensor, like: Tensor) -> Tensor:
    """``[N]`` reshaped to ``[N, 1, ...]``, which broadcasts against ``like`` ``[N, ...]``."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def flat(x: Tensor) -> Tensor:
    """``[N, ...]``, or ``[N]``, reshaped to ``[N, D]``."""
    return x.reshape(len(x), -1)


def l2_size(delta: Tensor) -> Tensor:
    """Euclidean length of every row, ``[N]``."""
    return torch.linalg.vector_norm(flat(delta), dim=1)


def linf_size(delta: Tensor) -> Tensor:
    """Largest absolute entry of every row, ``[N]``."""
    return flat(delta).abs().amax(1)


def of_largest_1(gradient: Tensor) -> Tensor:
    """The gradient scaled so that the largest absolute entry of every row is 1; rows of zeros do not change."""
    largest = linf_size(gradient)
    return gradient / rows(torch.where(largest > 0, largest, 1), gradient)


class Region:
    """
    All inputs within the data's range.

    :param center: the clean inputs ``[N, ...]``, within the range.
    :param clip: the range (low, high); None for none.
    """

    def __init__(self, center: Tensor, clip: Clip) -> None:
        self.center, self.clip = center, clip

    def restrict(self, x: Tensor) -> Tensor:
        """The nearest point of the set."""
        return x if self.clip is None else x.clamp(*self.clip)


class Ball(Region, ABC):
    """
    The inputs within the data's range that are at most ``eps`` from the clean ones.

    :param center: as for :class:`Region`.
    :param eps: radius, > 0, in the units of the inputs.
    :param clip: as for :class:`Region`.
    """

    def __init__(self, center: Tensor, eps: float, clip: Clip) -> None:
        super().__init__(center, clip)
        self.eps = eps

    @abstractmethod
    def random(self) -> Tensor:
        """A point drawn uniformly from the ball, then clipped to the range."""

    @staticmethod
    @abstractmethod
    def steepest(gradient: Tensor) -> Tensor:
        """The step of size 1 along which a linear function with this gradient rises most; 0 where the gradient is 0."""


class LinfBall(Ball):
    r""":math:`\max_i |\tilde x_i - x_i| \le \epsilon`."""

    def __init__(self, center: Tensor, eps: float, clip: Clip) -> None:
        super().__init__(center, eps, clip)
        # bounds, so that projecting twice gives the bits of projecting once
        self._low, self._high = (super(LinfBall, self).restrict(bound) for bound in (center - eps, center + eps))

    def restrict(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self._low, self._high)

    def random(self) -> Tensor:
        return self.restrict(self.center + torch.empty_like(self.center).uniform_(-self.eps, self.eps))

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        return gradient.sign()


class L2Ball(Ball):
    r""":math:`\|\tilde x - x\|_2 \le \epsilon`."""

    def restrict(self, x: Tensor) -> Tensor:
        """Projects onto the ball, then clips to the range."""
        delta = x - self.center
        size = l2_size(delta)
        inside = self.center + delta * rows(self.eps / size.clamp_min(self.eps), delta)
        # clipping comes last: since the centre is within the range, it moves no entry away from the centre
        return super().restrict(torch.where(rows(size > self.eps, x), inside, x))

    def random(self) -> Tensor:
        direction = self.steepest(torch.randn_like(self.center))
        dimensions = self.center[0].numel()
        radius = self.eps * torch.rand(len(self.center), dtype=self.center.dtype, device=self.center.device) ** (1 / dimensions)
        return self.restrict(self.center + direction * rows(radius, direction))

    @staticmethod
    def steepest(gradient: Tensor) -> Tensor:
        gradient = of_largest_1(gradient)  # since the squares of small gradients underflow
        return gradient / rows(l2_size(gradient).clamp_min(1.0), gradient)


BALLS: dict[str, type[Ball]] = {"linf": LinfBall, "l2": L2Ball}
SIZES = {"linf": linf_size, "l2": l2_size}

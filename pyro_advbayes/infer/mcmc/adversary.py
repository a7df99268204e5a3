"""BAL's adversaries, which perturb inputs, and their costs: the parts of the law of perturbed inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pyro_advbayes.checked import checked

# ------------------------------------------------------------------------------------------------------------------- costs


class Cost(ABC):
    """The cost of a perturbed input for the adversary, in nats; all tensors ``[rows, ...]``."""

    @abstractmethod
    def gradient(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """The gradient of the cost with respect to ``perturbed``."""

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """The nearest input that the cost allows; may work in place."""
        return perturbed


@checked
@dataclass(frozen=True)
class L2(Cost):
    r"""
    The squared Euclidean distance, :math:`\alpha |\tilde x - x|^2`, which pulls towards :math:`x`.

    :param weight: :math:`\alpha` >= 0, in nats per squared unit of the input. At temperature :math:`T` and a constant loss every
        coordinate has standard deviation :math:`\sqrt{T / 2\alpha}`.
    """

    weight: float

    def __post_init__(self) -> None:
        if not self.weight >= 0.0:
            raise ValueError(f"L2(weight={self.weight!r}): nats per squared unit, a number >= 0")

    def gradient(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        return (perturbed - clean).mul_(2.0 * self.weight)


@checked
@dataclass(frozen=True)
class Box(Cost):
    r"""
    A cost of 0 within :math:`|\tilde x - x|_\infty \le r`, and infinite outside.

    :param radius: r > 0, in units of the input.
    """

    radius: float

    def __post_init__(self) -> None:
        if not self.radius > 0.0:
            raise ValueError(f"Box(radius={self.radius!r}): how far a coordinate may move, a number > 0")

    def gradient(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        return torch.zeros_like(perturbed)

    def project(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(perturbed, clean - self.radius), clean + self.radius)


def check_one_a_row(value: Any, name: str, rows: int) -> None:
    """:raises ValueError: unless a user's function gave ``[rows]``."""
    if not isinstance(value, Tensor) or value.shape != (rows,):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return one number for each of the {rows} rows, [rows]; it returned {shape}")


@dataclass(frozen=True)
class _Callable(Cost):
    fn: Callable[[Tensor, Tensor], Tensor]

    def gradient(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        with torch.enable_grad():
            perturbed = perturbed.detach().requires_grad_()
            cost = self.fn(perturbed, clean)
            check_one_a_row(cost, "cost", len(clean))
            return torch.autograd.grad(cost.sum(), perturbed)[0]


def as_cost(cost: Cost | Callable[[Tensor, Tensor], Tensor]) -> Cost:
    """:raises ValueError: unless it is a cost, or a function of ``(perturbed, clean)``."""
    if isinstance(cost, Cost):
        return cost
    if not callable(cost):
        raise ValueError(f"cost={cost!r}: L2(weight), Box(radius), or a function of (perturbed, clean) to [rows] is needed")
    return _Callable(cost)


# ------------------------------------------------------------------------------------------------------------- adversaries


class Adversary(ABC):
    """
    The map from sampled numbers :math:`z` to perturbed inputs. Rows are ``[rows, ...]``.

    :ivar lasting: whether ``z`` is shared by all rows, and kept from minibatch to minibatch.
    """

    lasting = False

    @abstractmethod
    def start(self, clean: Tensor) -> Tensor:
        """``z`` of unperturbed inputs."""

    @abstractmethod
    def inputs(self, z: Tensor, clean: Tensor) -> Tensor:
        """The perturbed inputs, differentiable in ``z``."""

    def energy(self, z: Tensor) -> Tensor:
        """The cost of ``z`` itself, in nats, one number."""
        return z.new_zeros(())

    def gradient(self, z: Tensor, clean: Tensor, outward: Callable[[Tensor], Tensor]) -> Tensor:
        """
        The gradient of the energy with respect to ``z``.

        :param outward: a function of perturbed inputs that gives the energy's gradient with respect to them.
        """
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            perturbed, energy = self.inputs(z, clean), self.energy(z)
            outputs, slopes = [perturbed], [outward(perturbed.detach())]
            if energy.requires_grad:  # by default it does not depend on z
                outputs, slopes = [*outputs, energy], [*slopes, torch.ones_like(energy)]
            (gradient,) = torch.autograd.grad(outputs, z, slopes)
        return gradient

    def project(self, z: Tensor, onto: Callable[[Tensor], Tensor]) -> Tensor:
        """``z`` projected onto the allowed range and cost, if these constrain ``z`` directly."""
        return z


class Pixels(Adversary):
    """Moves every number of an input; ``z`` is the perturbed input."""

    def __repr__(self) -> str:
        return "Pixels()"

    def start(self, clean: Tensor) -> Tensor:
        return clean.clone()

    def inputs(self, z: Tensor, clean: Tensor) -> Tensor:
        return z

    def gradient(self, z: Tensor, clean: Tensor, outward: Callable[[Tensor], Tensor]) -> Tensor:
        return outward(z)

    def project(self, z: Tensor, onto: Callable[[Tensor], Tensor]) -> Tensor:
        return onto(z)


@checked
@dataclass(frozen=True)
class Flow(Adversary):
    r"""
    A flow field that moves the pixels of images ``[rows, channels, height, width]``, after Xiao et al. (2018). The perturbed image at a
    point is the image, bilinearly interpolated, at that point plus :math:`z` ``[rows, 2, height, width]``, in pixels. Its energy is

    .. math:: \alpha \sum |z|^2 + \beta \sum_{\text{neighbours}} |z_p - z_q|^2.

    :param weight: :math:`\alpha` > 0, in nats per squared pixel.
    :param smoothness: :math:`\beta` >= 0, likewise.
    """

    weight: float = 1.0
    smoothness: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0.0 and self.smoothness >= 0.0):
            raise ValueError(f"{self}: weight must be > 0 and smoothness >= 0, in nats per squared pixel")

    def start(self, clean: Tensor) -> Tensor:
        if clean.dim() != 4:
            raise ValueError(f"Flow moves the pixels of images [rows, channels, height, width]; the argument is {tuple(clean.shape)}")
        return clean.new_zeros(len(clean), 2, *clean.shape[-2:])

    def inputs(self, z: Tensor, clean: Tensor) -> Tensor:
        height, width = clean.shape[-2:]
        identity = torch.eye(2, 3, dtype=clean.dtype, device=clean.device).expand(len(clean), 2, 3)
        grid = F.affine_grid(identity, list(clean.shape), align_corners=False)
        pixel = torch.tensor([2.0 / width, 2.0 / height], dtype=clean.dtype, device=clean.device)  # a pixel on grid_sample's [-1, 1]
        return F.grid_sample(clean, grid + z.permute(0, 2, 3, 1) * pixel, padding_mode="border", align_corners=False)

    def energy(self, z: Tensor) -> Tensor:
        down, right = z.diff(dim=-2), z.diff(dim=-1)
        return self.weight * z.square().sum() + self.smoothness * (down.square().sum() + right.square().sum())


@checked
@dataclass(frozen=True)
class Generator(Adversary):
    r"""
    A network :math:`G_z` that perturbs all inputs, :math:`\tilde x = x + r \tanh G_z(x)`. BAL samples its parameters under a standard
    normal prior, and keeps them from minibatch to minibatch.

    :param network: from inputs ``[rows, ...]`` to outputs of the same shape, in eval mode; not changed. Its parameters are the start.
    :param radius: r > 0, how far a number can move, in units of the input.
    """

    network: nn.Module = field(repr=False)
    radius: float

    lasting = True

    def __post_init__(self) -> None:
        if not self.radius > 0.0:
            raise ValueError(f"Generator(radius={self.radius!r}): how far a number can move, > 0")

    def start(self, clean: Tensor) -> Tensor:
        with torch.no_grad():
            shape = self.network(clean).shape
        if shape != clean.shape:
            raise ValueError(f"Generator: the network makes {tuple(shape)} of inputs {tuple(clean.shape)}: the same shape is needed")
        return nn.utils.parameters_to_vector(self.network.parameters()).detach().clone()

    def inputs(self, z: Tensor, clean: Tensor) -> Tensor:
        named = dict(self.network.named_parameters())
        parts = z.split([p.numel() for p in named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return clean + self.radius * torch.tanh(functional_call(self.network, values, (clean,)))

    def energy(self, z: Tensor) -> Tensor:
        return 0.5 * z.square().sum()

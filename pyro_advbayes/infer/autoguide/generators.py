"""Generators: networks from noise to draws of all weights, into which a posterior is distilled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_advbayes.checked import checked
from pyro_advbayes.given import check_int
from pyro_advbayes.infer.autoguide.rows import Rows
from pyro_advbayes.kinds import BATCH_NORMS, DROPOUTS
from pyro_advbayes.storage import reference


class RowGenerator(nn.Module):
    r"""
    Base: noise :math:`z \sim \mathcal N(0, I)`, ``[n, noise]``, becomes rows ``[n, P]`` in unconstrained space in two steps, a code
    :math:`c = g(z)` and :math:`\theta = \mathrm{decode}(c)`. Training compares codes.

    A generator is built when the draws, and so P, are known.

    :param int noise: dimension of z, >= 1.
    """

    def __init__(self, noise: int) -> None:
        super().__init__()
        self.noise, self.size = check_int(noise, "noise", 1, "the dimension of the generator's noise"), 0

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        """Makes the parameters, for rows of sites of these unconstrained shapes."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as plain values."""
        raise NotImplementedError

    def numbers(self, shapes: Sequence[Sequence[int]]) -> int:
        """The number of stored numbers of a finished generator, for sites of these unconstrained shapes."""
        raise NotImplementedError

    def prepare(self, rows: Rows, mean: Tensor, sd: Tensor) -> None:
        """Prepares for draws, before the codes are trained: ``mean`` and ``sd`` ``[P]`` are those of the ``rows``."""
        raise NotImplementedError

    def encode(self, rows: Tensor) -> Tensor:
        """The codes of rows ``[n, P]``."""
        raise NotImplementedError

    def code(self, z: Tensor) -> Tensor:
        """Codes ``[n, code]`` of noise ``[n, noise]``: the trained part."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        """Rows ``[n, P]`` of noise ``[n, noise]``."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called when training is over."""

    @property
    def like(self) -> Tensor:
        """A tensor of the rows' dtype, on the generator's device."""
        return next(iter(self.state_dict().values()))

    @property
    def trainable(self) -> bool:
        """Whether there are parameters to train."""
        return next(self.parameters(), None) is not None

    def stored(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """
        The state for a file, optionally in half precision.

        :param dtype: ``torch.float16`` or ``torch.bfloat16``; None keeps the dtypes.
        :raises ValueError: for another dtype, or if a number is too large for it.
        """
        state = dict(self.state_dict())
        if dtype is None:
            return state
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: torch.float16, torch.bfloat16, or None to keep the dtypes")
        rounded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        for name, value in rounded.items():
            if bool((value.isinf() & state[name].isfinite()).any()):
                raise ValueError(
                    f"dtype={dtype}: {name} of the generator holds {float(state[name].abs().max()):.3g}, which is beyond its range; "
                    "take torch.bfloat16"
                )
        return rounded

    def restore(self, state: dict[str, Tensor]) -> None:
        """:meth:`load_state_dict` for buffers whose shapes depend on the draws or on the progress of training."""
        for name, buffer in self.named_buffers(recurse=False):
            if name in state:  # in the buffer's dtype: a file may hold half precision
                setattr(self, name, buffer.new_empty(state[name].shape))
        self.load_state_dict(state)

    def latent(self, count: int) -> Tensor:
        """Noise ``[count, noise]``."""
        return torch.randn(count, self.noise, dtype=self.like.dtype, device=self.like.device)

    @torch.no_grad()
    def reference(self) -> dict[str, Tensor]:
        """
        What the generator computes on fixed noise, see :func:`~pyro_advbayes.storage.reference.check`: settings do not tell the activations
        of a custom network.
        """

        def codes() -> list[Tensor]:
            pyro.set_rng_seed(0)
            return [self.code(self.latent(2))]

        return {"generator": reference.computed(codes, self.like.device, rtol=1e-3)}  # TF32 rounds so

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """``[count, P]``."""
        return self(self.latent(count))


class StandardizedGenerator(RowGenerator):
    r"""
    Base: a code is a row in standardised units, :math:`\theta = \mathrm{loc} + \mathrm{scale} \cdot g(z)` with mean and standard
    deviation of the draws.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, noise: int) -> None:
        super().__init__(noise)
        self.register_buffer("loc", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        self.size = numel(shapes)
        self.loc, self.scale = (torch.full((), value, dtype=dtype, device=device) for value in (0.0, 1.0))

    @torch.no_grad()
    def prepare(self, rows: Rows, mean: Tensor, sd: Tensor) -> None:
        self.standardize(mean.clone(), sd.clone())

    def restore(self, state: dict[str, Tensor]) -> None:
        for name in {"loc", "scale"} & set(state):
            value = state[name]
            if tuple(value.shape) not in ((), (self.size,)) or not bool(value.isfinite().all()):
                raise ValueError(f"{name} is {str(value)[:100]}, for rows of {self.size} numbers")
        super().restore(state)

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Sets the units, ``[P]`` each or one number for all."""
        self.loc, self.scale = loc, scale

    def encode(self, rows: Tensor) -> Tensor:
        return (rows - self.loc) / self.scale

    def forward(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.loc, self.scale, self.code(z))


class NetworkGenerator(StandardizedGenerator):
    r"""
    A custom network, from noise ``[n, noise]`` to rows ``[n, P]`` in standardised units. The generator holds 2P numbers beside the
    network's.

    :param network: any module with an attribute ``noise``, the dimension of its input. It may have no layer with a training mode that mixes
        the rows of a batch or is random (BatchNorm, Dropout), since training and sampling would differ.
    :raises ValueError: if it has no such attribute, or naming such a layer.
    """

    def __init__(self, network: nn.Module) -> None:
        noise = getattr(network, "noise", None)
        if noise is None:
            raise ValueError(f"generator: {type(network).__name__} has no attribute noise, the dimension of its input: set one (an int)")
        super().__init__(noise)
        for label, layer in network.named_modules():
            if isinstance(layer, BATCH_NORMS):
                why = "makes a row depend on the others of its batch, or on running statistics: take LayerNorm"
            elif isinstance(layer, DROPOUTS) and layer.p > 0.0:
                why = "draws masks in training mode only: leave it out"
            else:
                continue
            raise ValueError(f"generator: layer {label!r} ({type(layer).__name__}) of {type(network).__name__} {why}")
        self.network = network

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        self.network.to(device, dtype)
        name = type(self.network).__name__
        try:
            with torch.no_grad():
                made = self.network(torch.zeros(2, self.noise, dtype=dtype, device=device))
        except RuntimeError as error:
            raise ValueError(f"generator: {name} does not take noise (2, {self.noise}), which its attribute says: {error}") from error
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        if shape != (2, numel(shapes)):
            raise ValueError(
                f"generator: {name} makes {shape} of noise (2, {self.noise}): (2, {numel(shapes)}) is needed, a number for each element "
                "of the sites"
            )
        super().build(shapes, dtype, device)

    def settings(self) -> dict[str, Any]:
        return {"network": type(self.network).__name__, "noise": self.noise}

    def numbers(self, shapes: Sequence[Sequence[int]]) -> int:
        return sum(p.numel() for p in self.network.state_dict().values()) + 2 * numel(shapes)

    def code(self, z: Tensor) -> Tensor:
        return self.network(z)


@checked
class MLPGenerator(StandardizedGenerator):
    r"""
    The generator of Adversarial Posterior Distillation (Wang et al., ICML 2018): noise → hidden layers with ReLU → the vector of all
    weights, He initialisation. Beside its hidden layers it holds (h + 1)·P numbers, with h the width of the last hidden layer: for 100 as
    many as 101 stored draws. After training, the standardisation of the draws is merged into the last layer.

    :param int noise: dimension of the noise, >= 1; 32 in the paper's experiments on MNIST, 100 in its others.
    :param hidden: widths of the hidden layers.
    """

    def __init__(self, noise: int = 32, hidden: Sequence[int] = (100, 100, 100)) -> None:
        super().__init__(noise)
        self.hidden = as_widths(hidden)
        self.layers = nn.Sequential()

    def build(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        super().build(shapes, dtype, device)
        self.layers = mlp((self.noise, *self.hidden, self.size), dtype, device)

    def settings(self) -> dict[str, Any]:
        return {"noise": self.noise, "hidden": list(self.hidden)}

    def numbers(self, shapes: Sequence[Sequence[int]]) -> int:
        return mlp_numbers((self.noise, *self.hidden, numel(shapes))) + 2

    def standardize(self, loc: Tensor, scale: Tensor) -> None:
        """Sets the units without changing a trained generator's rows. (A new generator's biases are all 0.)"""
        last = linears(self.layers)[-1]
        if bool(last.bias.any()):
            last.bias.copy_((self.loc + self.scale * last.bias - loc) / scale)
            last.weight.mul_((self.scale / scale).expand(self.size).unsqueeze(-1))
        super().standardize(loc, scale)

    @torch.no_grad()
    def finish(self) -> None:
        self.standardize(self.loc.new_zeros(()), self.scale.new_ones(()))

    def code(self, z: Tensor) -> Tensor:
        return self.layers(z)


def numel(shapes: Sequence[Sequence[int]]) -> int:
    """Number of elements in all of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def mlp(widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    """Linear layers with ReLU between them, He initialisation, biases 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out, dtype=dtype, device=device)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def linears(network: nn.Sequential) -> list[nn.Linear]:
    """The linear layers of a :func:`mlp`."""
    return [layer for layer in network if isinstance(layer, nn.Linear)]


def mlp_numbers(widths: Sequence[int]) -> int:
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))


def as_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    return tuple(check_int(width, "hidden", 1, "the width of each hidden layer") for width in hidden)

"""The networks and data that everything is measured on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.bal_convnet import bal_convnet, bal_convnet_network
from models.mlp import mlp, mlp_network
from pyro_advbayes.nn.classifier import Classifier

ROWS = 60_000
BATCH = 100
STEP_SIZE = 1e-7  # small enough that no sampler leaves the region where all of them do the same arithmetic


@dataclass(frozen=True)
class Network:
    """
    A network twice: as a plain module, for code written by hand, and as a Pyro model.

    :ivar inputs: shape of one row.
    """

    name: str
    plain: Callable[[], nn.Sequential]
    model: Callable[[], Classifier]
    inputs: tuple[int, ...]
    classes: int


def mlp_of(*sizes: int) -> Network:
    """A fully connected network; the plain one has no Flatten in front, which rows that are flat already do not need."""
    return Network("-".join(map(str, sizes)), lambda: mlp_network(sizes)[1:], lambda: mlp(sizes), (sizes[0],), sizes[-1])


LARGE = mlp_of(784, 400, 400, 10)
SMALL = mlp_of(2, 20, 20, 2)
CONVNET = Network("BAL's ConvNet", bal_convnet_network, bal_convnet, (1, 28, 28), 10)


def width(hidden: int) -> Network:
    """A network with two hidden layers of this many units and as many inputs."""
    return mlp_of(hidden, hidden, hidden, 10)


@functools.lru_cache(maxsize=8)
def data(inputs: tuple[int, ...], classes: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random rows ``[rows, *inputs]`` in [0, 1] and classes ``[rows]``; the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, *inputs, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    return x.to(device), y.to(device)

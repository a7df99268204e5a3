"""Small posteriors to attack, and the plain networks that they are made of."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from models.mlp import mlp_network
from pyro_advbayes import datasets
from pyro_advbayes.infer.classifier import PosteriorClassifier
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier

SIZES = (6, 16, 4)


def posterior(
    count: int = 12, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.double, **options
) -> tuple[PosteriorClassifier, list[nn.Module]]:
    """A posterior of random draws of a smooth network, and one plain network for each draw."""
    net = mlp_network(sizes, nn.Tanh).to(dtype)
    draws = {name: torch.randn(count, *p.shape, dtype=dtype) for name, p in net.named_parameters()}
    networks = []
    for i in range(count):
        network = copy.deepcopy(net)
        network.load_state_dict({name: values[i] for name, values in draws.items()})
        networks.append(network)
    model = Classifier(bayesianize(net))
    return PosteriorClassifier(model, {f"net.{name}": values for name, values in draws.items()}, **options), networks


def examples(rows: int = 10, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] and labels."""
    return torch.rand(rows, sizes[0], dtype=dtype), torch.randint(sizes[-1], (rows,))


@functools.cache
def digits_network(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """A network trained on the digits, 97 % right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = datasets.digits(flatten=True)
        net = mlp_network((64, 32, 10), activation)
        adam = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(150):
            adam.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            adam.step()
        adam.zero_grad()
    return net.eval()


def digits_examples(rows: int = 100) -> tuple[Tensor, Tensor]:
    """Test images ``[rows, 64]`` and their labels."""
    x, y = datasets.digits("test", flatten=True)
    return x[:rows], y[:rows]

"""Small models and their data, importable by name, so that other processes can unpickle them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_advbayes as ab

ROWS = 60


def data(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``[rows, 3]`` and labels 0 or 1 in float ``[rows]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    noise = torch.randn(rows, generator=generator)
    return x, (x[:, 0] + 0.5 * noise > 0).float()


def weights() -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Sites ``w [3]`` and ``b []``."""
    logits = x @ weights() + pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)
    return logits


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``w [3]``, ``scale []`` around 20 and ``b []`` around -100: values that cannot be taken for each other."""
    mean = x @ weights()
    scale = pyro.sample("scale", dist.LogNormal(3.0, 0.1))
    mean = mean + pyro.sample("b", dist.Normal(-100.0, 1.0)) + 100.0
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, scale), obs=y)
    return mean


def mixed(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``w [3]`` in float32, ``b []`` in float64."""
    mean = x @ weights() + pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)
    return mean


def subsampling(x: Tensor, y: Tensor | None = None) -> None:
    """Takes its own minibatches of 10 rows."""
    w = weights()
    with pyro.plate("data", len(x), subsample_size=10) as rows:
        pyro.sample("obs", dist.Bernoulli(logits=x[rows] @ w), obs=None if y is None else y[rows])


def no_plate(x: Tensor, y: Tensor) -> None:
    """Observations that no minibatch can be scaled for."""
    pyro.sample("obs", dist.Bernoulli(logits=x @ weights()).to_event(1), obs=y)


def sequential(x: Tensor, y: Tensor) -> None:
    """A plate that is a for loop."""
    w = weights()
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(logits=x[i] @ w), obs=y[i])


def no_inputs(x: Tensor, y: Tensor) -> None:
    """``weight []``: an outcome that does not depend on the inputs, so that only a custom loss moves these."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(weight, 1.0), obs=y)


def energy(model: Callable, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """U at one point on all rows, and its mean over the minibatches of an epoch, 10 rows each."""
    full = ab.Potential(model, args, backend="handlers")
    batched = ab.Potential(model, args, batch_size=10, backend="handlers", **options)
    state = torch.linspace(-1.0, 1.0, full.size).unsqueeze(0)
    parts = [batched.energy(state, batch) for batch, _ in batched.batches.epoch()]
    return full.energy(state), torch.stack(parts).mean(0)

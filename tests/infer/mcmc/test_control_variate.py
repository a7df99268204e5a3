"""Anchored gradients: the same mean, less noise near the anchor, and a full-data gradient that counts every row once."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab

N, B = 70, 8  # B does not divide N: the last batch of an epoch is shorter


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x @ w).tanh(), s), obs=y)


@pytest.fixture
def data():
    x = torch.randn(N, 3, dtype=torch.float64)
    return x, (x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)).tanh() + 0.3 * torch.randn(N, dtype=torch.float64)


ANCHOR = {"w": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), "s": torch.tensor(0.3, dtype=torch.float64)}


def kernel_on(data, num_chains=4, start=None, loader=False, **options):
    kernel = ab.SGLD(model, step_size=1e-4, batch_size=None if loader else B, control_variate=ANCHOR, **options)
    args = (DataLoader(TensorDataset(*data), B, shuffle=True),) if loader else data
    kernel.setup_chains(num_chains, 0, args, {})
    if start is not None:
        kernel.theta.copy_(start)
    return kernel


@pytest.mark.parametrize("loader", [False, True])
def test_the_full_gradient_counts_every_row_once(data, loader):
    kernel = kernel_on(data, loader=loader)
    full = ab.Potential(model, data)
    anchor = full.unconstrain({name: value.unsqueeze(0) for name, value in ANCHOR.items()})
    assert torch.allclose(kernel._updates.anchor.full, full.gradient(anchor)[0], rtol=1e-10)


@pytest.mark.parametrize("backend", ["graph", "handlers"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_at_the_anchor_every_minibatch_gives_the_full_gradient(data, backend, chunk_size):
    kernel = kernel_on(data, backend=backend, chunk_size=chunk_size)
    kernel.theta.copy_(kernel._updates.anchor.anchor.expand_as(kernel.theta))
    for _ in range(3):
        assert torch.allclose(kernel.gradient(), kernel._updates.anchor.full.expand(4, -1), rtol=1e-8, atol=1e-8)


def test_near_the_anchor_it_is_unbiased_and_has_less_noise(data):
    kernel = kernel_on(data, num_chains=2)
    near = kernel._updates.anchor.anchor + 0.05 * torch.randn(2, kernel.potential.size, dtype=torch.float64)
    kernel.theta.copy_(near)
    draws = torch.stack([kernel.gradient() for _ in range(600)])
    plain = torch.stack([kernel.potential.gradient(near) for _ in range(600)])
    exact = ab.Potential(model, data, num_chains=2).gradient(near)
    error = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - exact).abs() < 4.5 * error).all()
    assert (draws.var(0) < 0.2 * plain.var(0)).all()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_at_the_anchor_an_update_follows_the_full_gradient_of_its_temperature(data, temperature):
    """Whatever the minibatch; the temperature weighs the Jacobian of a constrained site, in the minibatch and in the full gradient."""
    kernel = kernel_on(data, temperature=temperature)
    kernel.theta.copy_(kernel._updates.anchor.anchor.expand_as(kernel.theta))
    start = kernel.theta.clone()
    exact = ab.Potential(model, data).gradient(start[:1], temperature=temperature)
    assert torch.allclose(kernel.gradient(), exact.expand(4, -1), rtol=1e-9)
    torch.manual_seed(3)
    kernel._iterate("gradient")
    torch.manual_seed(3)
    noise = (2.0 * 1e-4 * temperature) ** 0.5 * torch.randn_like(start)
    assert torch.allclose(kernel.theta, start - 1e-4 * exact + noise, rtol=1e-9, atol=1e-12)


def test_an_anchor_without_a_site_is_refused_by_name(data):
    kernel = ab.SGLD(model, batch_size=B, control_variate={"w": ANCHOR["w"]})
    with pytest.raises(ValueError, match="'s' is missing"):
        kernel.setup_chains(1, 0, data, {})


def test_a_loader_that_leaves_rows_out_is_refused(data):
    loader = DataLoader(TensorDataset(*data), B, drop_last=True)
    kernel = ab.SGLD(model, step_size=1e-4, control_variate=ANCHOR)
    with pytest.raises(ValueError, match=r"gave 64 rows where the data set has 70.*drop_last=False"):
        kernel.setup_chains(1, 0, (loader,), {})

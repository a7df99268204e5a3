"""A Pyro model as U and its gradient: the same numbers from every backend, for one chain or many, and an unbiased estimate of U."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from models.bal_convnet import bal_convnet
from models.mlp import mlp
from pyro_advbayes.tracing.replay import SIDE_BY_SIDE_WEIGHTS
from tests.small_models import data, logistic, mixed, regression, subsampling, weights

X, Y = data()
N = len(X)


def potential(model=logistic, *args, backend="handlers", **options):
    return ab.Potential(model, args or (X, Y), backend=backend, **options)


# --------------------------------------------------------------------------------------------------------------- what U is


def by_hand(state, temperature, dtype):
    """U of ``regression`` in float64, written out: w [3], log scale, b."""
    w, log_scale, b = state.double().split([3, 1, 1])
    normal = lambda value, mean, sd: -0.5 * ((value - mean) / sd) ** 2 - torch.log(torch.as_tensor(sd)) - 0.5 * math.log(2 * math.pi)  # noqa: E731
    prior = normal(w, 0.0, 1.0).sum() + normal(b, -100.0, 1.0).sum()
    prior = prior + (normal(log_scale, 3.0, 0.1) - log_scale).sum()  # LogNormal, a density of the scale
    likelihood = normal(Y.double(), X.double() @ w + b + 100.0, log_scale.exp()).sum()
    return (-(prior + likelihood) - temperature * log_scale.sum()).to(dtype)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["handlers", "graph"])
def test_u_is_minus_the_log_joint_and_the_jacobian_is_weighted_by_the_temperature(temperature, backend):
    state = torch.tensor([[0.5, -1.0, 0.3, 2.0, -99.0], [0.0, 0.2, 0.1, 3.0, -101.0]])
    target = potential(regression, backend=backend, num_chains=2)
    expected = torch.stack([by_hand(row, temperature, torch.float32) for row in state])
    torch.testing.assert_close(target.energy(state, temperature=temperature), expected)
    exact = torch.stack([torch.func.grad(lambda row: by_hand(row, temperature, torch.float64))(row.double()) for row in state])
    torch.testing.assert_close(target.gradient(state, temperature=temperature), exact.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5, 10, 60])
def test_minibatch_gradients_average_over_an_epoch_to_the_full_gradient(batch_size):
    """Over one shuffled epoch of the sampler's own batches, where the batch size divides the number of rows."""
    batched, state = potential(batch_size=batch_size), torch.tensor([[0.5, -1.0, 0.3, 0.2]])
    batched.batches._rows.position = 0
    gradients = [batched.gradient(state) for _ in range(N // batch_size)]
    energies = [batched.energy(state, batch) for batch, _ in batched.batches.epoch()]
    torch.testing.assert_close(torch.stack(gradients).mean(0), potential().gradient(state))
    torch.testing.assert_close(torch.stack(energies).mean(0), potential().energy(state))
    assert batch_size == N or torch.stack(gradients).std(0).min() > 0


def test_a_plate_that_subsamples_itself_is_scaled_once():
    full = potential(lambda x, y: likelihood(x, y))
    batched, state = potential(subsampling), torch.tensor([[0.5, -1.0, 0.3]])
    batched.batches._rows.position = 0
    gradients = torch.stack([batched.gradient(state) for _ in range(6)])
    torch.testing.assert_close(gradients.mean(0), full.gradient(state))
    assert gradients.std(0).min() > 0


def likelihood(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


def test_a_loaders_short_batch_is_scaled_by_its_own_length():
    batched, state = potential(logistic, DataLoader(TensorDataset(X, Y), 25)), torch.tensor([[0.5, -1.0, 0.3, 0.2]])
    parts = [rows / N * batched.gradient(state, batch) for batch, rows in batched.batches.epoch()]
    assert [len(batch[0]) for batch, _ in batched.batches.epoch()] == [25, 25, 10]
    torch.testing.assert_close(sum(parts), potential().gradient(state))


def test_chains_see_different_rows_and_each_its_own():
    batched, state = potential(num_chains=3, batch_size=10), torch.randn(3, 4)
    x, y = batched.batches.next()
    assert x.shape == (3, 10, 3) and not torch.equal(x[0], x[1])
    gradient = batched.gradient(state, (x, y))
    for chain in range(3):
        alone = potential(batch_size=10).gradient(state[chain : chain + 1], (x[chain], y[chain]))
        torch.testing.assert_close(gradient[chain : chain + 1], alone)


def test_all_chains_see_a_loaders_batch():
    batched, state = potential(logistic, DataLoader(TensorDataset(X, Y), 10), num_chains=2), torch.randn(2, 4)
    batch = batched.batches.next()
    gradient = batched.gradient(state, batch)
    torch.testing.assert_close(gradient, torch.cat([potential(batch_size=10).gradient(row[None], batch) * 1.0 for row in state]))


# --------------------------------------------------------------------------------------------------------- backends and chunks

ARGUMENTS = {
    "full data": (logistic, lambda: (X, Y), {}),
    "minibatches": (regression, lambda: (X, Y), {"batch_size": 10}),
    "a subsampling plate": (subsampling, lambda: (X, Y), {}),
    "a loader": (logistic, lambda: (DataLoader(TensorDataset(X, Y), 25, shuffle=True),), {}),
    "mixed dtypes": (mixed, lambda: (X, Y), {"batch_size": 10}),
}


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_graph_and_handlers_agree_to_rounding_however_chains_are_grouped(name, chunk_size):
    model, arguments, options = ARGUMENTS[name]
    chains = 5 if chunk_size == 2 else 3  # chunks of 2, 2 and 1
    traced = ab.Potential(model, arguments(), num_chains=chains, chunk_size=chunk_size, **options)
    exact = ab.Potential(model, arguments(), num_chains=chains, backend="handlers", **options)
    state = traced.init()
    for kind in ("energy", "gradient", "both") if chunk_size == 1 else ("both",):
        for _ in range(2):
            batch = traced.batches.next()
            ours, theirs = traced.evaluate(kind, state, batch, 0.5), exact.evaluate(kind, state, batch, 0.5)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert traced.backend == "graph", "the graph was given up"


def test_both_gives_the_gradient_and_the_energy():
    state, batched = torch.randn(2, 4), potential(num_chains=2, batch_size=10)
    batch = batched.batches.next()
    gradient, energy = batched.evaluate("both", state, batch)
    assert torch.equal(gradient, batched.gradient(state, batch)) and torch.equal(energy, batched.energy(state, batch))
    assert energy.shape == (2,) and gradient.shape == (2, 4)


@pytest.mark.parametrize(
    "make,chains,expected",
    [
        (lambda: mlp((2, 20, 20, 2)), 7, 7),
        (lambda: mlp((2, 800, 700, 2)), 7, 1),
        (bal_convnet, 7, 1),
        (lambda: mlp((2, 20, 20, 2)), 1, 1),
    ],
    ids=["small", "large", "convolutions", "one chain"],
)
def test_how_many_chains_go_side_by_side_is_a_fixed_rule(make, chains, expected):
    x = torch.rand(4, 1, 28, 28) if make is bal_convnet else torch.randn(4, 2)
    target = ab.Potential(make(), (x, torch.tensor([0, 1, 0, 1])), num_chains=chains)
    assert target.chunk_size == expected
    assert (target.size > SIDE_BY_SIDE_WEIGHTS or make is bal_convnet) == (expected == 1 < chains)


def test_more_chains_in_a_chunk_than_there_are_is_all_of_them():
    assert potential(num_chains=2, chunk_size=10).chunk_size == 2


def test_energies_are_finite_and_agree_in_both_precisions():
    model = mlp((3, 8, 2))
    single = ab.Potential(model, (X, Y.long()), backend="handlers")
    state = single.init()
    energy = single.energy(state)
    double = ab.Potential(model.double(), (X.double(), Y.long()), backend="handlers")
    assert energy.dtype == torch.float32 and double.energy(state.double()).dtype == torch.float64
    torch.testing.assert_close(double.energy(state.double()).float(), energy)
    assert double.dtype == torch.float64 and double.gradient(state.double()).isfinite().all()


def test_the_hessian_product_is_the_derivative_of_the_gradient():
    target = ab.Potential(mlp((3, 8, 2), torch.nn.Tanh).double(), (X.double(), Y.long()), backend="handlers")
    row, direction = target.init()[0], torch.randn(target.size, dtype=torch.float64)
    above, below = (target.gradient((row + step * direction)[None], temperature=1.0)[0] for step in (1e-5, -1e-5))
    torch.testing.assert_close(target.hessian_product(row, direction, target.probes(0)[0]), (above - below) / 2e-5, rtol=1e-6, atol=1e-6)


def test_a_linear_energy_has_no_curvature():
    def model():
        pyro.factor("slope", 3.0 * pyro.sample("w", dist.Normal(0.0, 1.0).mask(False)))

    target = ab.Potential(model)
    assert torch.equal(target.hessian_product(torch.zeros(1), torch.ones(1), target.probes(0)[0]), torch.zeros(1))


# ----------------------------------------------------------------------------------------------------------------------- rows


def simplex():
    pyro.sample("parts", dist.Dirichlet(torch.ones(4)))
    pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    pyro.sample("share", dist.Beta(2.0, 2.0).expand([2]).to_event(1))


def test_splitting_and_constraining_a_state_can_be_undone():
    target = ab.Potential(simplex, num_chains=3)
    state = torch.randn(3, target.size)
    assert torch.equal(target.join(target.split(state)), state)
    values = target.constrain(state)
    assert {name: value.shape for name, value in values.items()} == {"parts": (3, 4), "factor": (3, 3, 3), "share": (3, 2)}
    torch.testing.assert_close(values["parts"].sum(-1), torch.ones(3))
    torch.testing.assert_close(target.unconstrain(values), state, rtol=1e-3, atol=1e-3)
    for name, transform in target.transforms.items():
        torch.testing.assert_close(transform(values[name]), target.split(state)[name], rtol=1e-3, atol=1e-3)


def test_values_come_back_in_each_sites_dtype_and_without_gradients():
    target = potential(mixed)
    values = target.constrain(torch.zeros(1, 4, dtype=torch.float64, requires_grad=True))
    assert (values["w"].dtype, values["b"].dtype) == (torch.float32, torch.float64)
    assert not any(value.requires_grad for value in values.values())


def test_values_may_be_given_in_any_order_and_dtype():
    target = potential(regression)
    values = {"b": torch.tensor([-99]), "scale": torch.tensor([2.0], dtype=torch.float64), "w": torch.ones(1, 3)}
    torch.testing.assert_close(target.unconstrain(values), torch.tensor([[1.0, 1.0, 1.0, math.log(2.0), -99.0]]))
    with pytest.raises(ValueError, match=r"site 'b' is missing"):
        target.unconstrain({"w": torch.ones(1, 3), "scale": torch.ones(1)})


# ------------------------------------------------------------------------------------------------- gradients stay where they belong


@pytest.mark.parametrize("backend", ["handlers", "graph"])
def test_numbers_come_without_a_graph_of_autograd_attached(backend):
    network = torch.nn.Linear(3, 3)
    target = potential(lambda x, y: likelihood(network(x), y), backend=backend)
    state = torch.zeros(1, 3, requires_grad=True)
    gradient, energy = target.evaluate("both", state)
    assert not gradient.requires_grad and not energy.requires_grad
    assert network.weight.grad is None and state.grad is None


def test_an_evaluation_leaves_no_trace_outside_and_asks_no_outer_handler():
    target, state = potential(batch_size=10), torch.zeros(1, 4)
    expected = target.energy(state, target.probe_batches[0])
    with pyro.poutine.trace() as outer, pyro.poutine.scale(scale=100.0):
        assert torch.equal(target.energy(state, target.probe_batches[0]), expected)
    assert list(outer.trace.nodes) == []


@pytest.mark.parametrize("validate", [True, False])
def test_a_models_own_validation_is_no_hindrance(validate):
    with pyro.validation_enabled(validate):
        prior = dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1)

        def model(x, y):
            w = pyro.sample("w", prior)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

        assert potential(model, backend="graph", num_chains=2, batch_size=10).gradient(torch.zeros(2, 3)).isfinite().all()

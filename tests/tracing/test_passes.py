"""Traced graphs give the numbers of the Python that they replace, to the last bit, on inputs that they were not traced on."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, grad_and_value, vmap

import pyro_advbayes as ab
from pyro_advbayes.nn import Classifier, bayesianize
from pyro_advbayes.tracing.replay import trace_graph

ROWS = 12


class Residual(nn.Module):
    """Blocks that write into their own activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        hidden += x
        hidden.mul_(2.0)
        hidden[:, 0] -= 1.0
        return self.second(F.relu(hidden, inplace=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        x = x.reshape(len(x), 2, 4)
        mask = torch.triu(torch.full((2, 2), float("-inf")), diagonal=1)
        return self.out(self.mix(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.cell(x.reshape(len(x), 2, 4))[0][:, -1])


def convolutions(*extra):
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), *extra, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def warmed_up(net, *shape):
    net.train()(torch.randn(64, *shape))
    return net.eval()


NETWORKS = {
    "tanh": (4, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    "in-place residual": (4, Residual),
    "convolution and pooling": (16, convolutions),
    "BatchNorm in eval mode": (16, lambda: warmed_up(convolutions(nn.BatchNorm2d(4)), 16)),
    "GroupNorm": (16, lambda: convolutions(nn.GroupNorm(2, 4))),
    "Dropout in eval mode": (4, lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).eval()),
    "attention": (8, Attention),
    "LSTM": (8, Recurrent),
    "embedding": (4, lambda: nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(8, 3))),
}


def constrained(x, y):
    """A site on each kind of support."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    shift = pyro.sample("shift", dist.Uniform(-1.0, 2.0))
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(4)))
    factor = pyro.sample("factor", dist.LKJCholesky(4, 1.5))
    mean = share * (x @ parts) + shift + (x @ factor).sum(-1) * rate
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.StudentT(3.0, mean, scale), obs=y.float())


def hierarchy(x, y):
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("groups", 4):
        w = pyro.sample("w", dist.Normal(top, spread))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.float())


def masked(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=y > 0):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.float())


def in_place(x, y):
    """Buffers that are filled in as the model runs, and copies of what must stay as it is."""
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    design = torch.zeros(len(x), 4)
    design[:, :2] = x[:, :2]
    design[:, 2:].copy_(2.0 * x[:, 2:])
    weight = torch.ones_like(design)
    weight.mul_(0.5)[0] = 0.0
    shifted = x - 0.0
    shifted.add_(1.0)
    mean = (design * weight) @ w
    mean += shifted.sum(-1) * 1.0
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, 1.0), obs=y.float())


def subsampling(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows].float())


def float64(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x.double() @ w, 1.0), obs=y.double())


MODELS = {name: (width, lambda make=make: Classifier(bayesianize(make()))) for name, (width, make) in NETWORKS.items()}
for plain in (constrained, hierarchy, masked, in_place, subsampling, float64):
    MODELS[plain.__name__] = (4, lambda plain=plain: plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_graph_is_its_energy_and_gradient_to_the_bit(name):
    width, make = MODELS[name]
    x, y = torch.randn(ROWS, width), torch.randint(0, 3, (ROWS,))
    if name == "embedding":
        x = torch.randint(0, 5, (ROWS, width))
    batch_size = None if name == "subsampling" else 4
    potential = ab.Potential(make(), (x, y), batch_size=batch_size, backend="handlers", batch_dependent=name == "in_place")
    energy_and_gradient = grad_and_value(potential.log_density)

    def inputs():
        row = potential.init()[0] + 0.1 * torch.randn(potential.size)
        return row, torch.rand(()).to(row), *potential.inputs(potential.batches.next())

    with pyro.validation_enabled(False):
        graph = trace_graph(energy_and_gradient, inputs())
        for _ in range(2):
            arguments = inputs()
            before = [value.clone() for value in arguments]
            ours, theirs = graph(*arguments), energy_and_gradient(*arguments)
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
            assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "the graph wrote into its inputs"


@pytest.mark.parametrize("name", ["tanh", "in-place residual", "constrained"])
def test_the_graph_of_many_chains_is_vmap_of_the_gradient_to_the_bit(name):
    width, make = MODELS[name]
    x, y = torch.randn(ROWS, width), torch.randint(0, 3, (ROWS,))
    potential = ab.Potential(make(), (x, y), num_chains=3, batch_size=4, backend="handlers")
    gradient = vmap(grad(potential.log_density), in_dims=(0, None, 0, 0))
    with pyro.validation_enabled(False):
        graph = trace_graph(gradient, (potential.init(), torch.tensor(1.0), *potential.batches.next()))
        for _ in range(2):
            arguments = potential.init(), torch.tensor(0.3), *potential.batches.next()
            assert torch.equal(graph(*arguments), gradient(*arguments))


# ------------------------------------------------------------------------------------------------ what the passes may not do

CONSTANT = torch.tensor([1.0, -2.0, 3.0])


def writes_into_a_new_buffer(w, x):
    buffer = torch.zeros(3)
    buffer[0] = w.sum()
    return (buffer * 2 + x).square().sum()


def writes_into_ones(w, x):
    ones = torch.ones_like(x)
    ones.mul_(2.0)
    ones[0] = 0.0
    return (ones * w * x).square().sum()


def accumulates(w, x):
    total = torch.zeros(3)
    for _ in range(2):
        total += w * x
    return total.square().sum()


def writes_into_a_difference_from_zero(w, x):
    shifted = x - 0.0
    shifted.add_(1.0)
    return (shifted * w).sum() + x.sum()


def writes_into_a_product_with_one(w, x):
    copy = w * 1.0
    copy.mul_(x)
    return copy.square().sum() + (w * 2.0).sum()


def writes_into_a_copy_of_a_constant(w, x):
    copy = CONSTANT * 1.0
    copy.add_(w)
    return (copy * x).sum() + CONSTANT.sum()


def writes_through_two_views(w, x):
    buffer = torch.zeros(2, 3)
    view = buffer[1:].view(3)
    view.copy_(w)
    buffer[0].add_(x)
    return (buffer.square() * (buffer + 1.0)).sum()


@pytest.mark.parametrize(
    "fn",
    [
        writes_into_a_new_buffer,
        writes_into_ones,
        accumulates,
        writes_into_a_difference_from_zero,
        writes_into_a_product_with_one,
        writes_into_a_copy_of_a_constant,
        writes_through_two_views,
    ],
)
@pytest.mark.parametrize("differentiate", [False, True])
def test_in_place_operations_act_anew_at_every_call_and_on_nothing_else(fn, differentiate):
    fn, constant = (grad(fn) if differentiate else fn), CONSTANT.clone()
    graph = trace_graph(fn, (torch.randn(3), torch.randn(3)))
    for _ in range(3):
        w, x = torch.randn(3), torch.randn(3)
        kept = w.clone(), x.clone()
        assert torch.equal(graph(w, x), fn(*kept))
        assert torch.equal(w, kept[0]) and torch.equal(x, kept[1]) and torch.equal(CONSTANT, constant)


def test_random_operations_stay_random():
    def fn(w):
        return w + torch.randn(3) + 0.0 * torch.ones(3)

    graph = trace_graph(fn, (torch.zeros(3),))
    assert not torch.equal(graph(torch.zeros(3)), graph(torch.zeros(3)))
    torch.manual_seed(3)
    ours = graph(torch.zeros(3))
    torch.manual_seed(3)
    assert torch.equal(ours, fn(torch.zeros(3)))


@pytest.mark.parametrize(
    "fn,count",
    [
        (lambda w: (w - 0.0) ** 1 * 1.0, 0),
        (lambda w: w.unsqueeze(0).t().t().squeeze(0), 2),
        (lambda w: w * 2.0 * torch.tensor(3.0), 1),
        (lambda w: w + (torch.tensor([2.0, 3.0, 4.0]).log() * 5).exp(), 1),
        (lambda w: grad(lambda v: (v - 0.0).square().sum() * 0.5)(w), 1),
        (lambda w: w.view(3).expand(3).mul(1).view(1, 3).transpose(0, -1).transpose(-2, 1), 1),
    ],
    ids=["nothing changes", "transposed twice", "two factors", "constants", "half a square", "the shape that it has"],
)
def test_what_changes_nothing_or_depends_on_no_input_is_not_computed(fn, count):
    graph = trace_graph(fn, (torch.ones(3),))
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(calls) <= count, graph.code
    w = torch.randn(3)
    assert torch.equal(graph(w), fn(w))


def test_a_forward_value_that_only_the_gradients_seed_reads_is_not_computed():
    def energy(w, x):
        return torch.distributions.Normal(0.0, 3.0, validate_args=False).log_prob(w).sum() + (x @ w).logsumexp(0)

    graph = trace_graph(grad(energy), (torch.ones(3), torch.randn(5, 3)))
    assert "log" not in graph.code.replace("logsumexp", ""), graph.code
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) <= 12


@pytest.mark.parametrize("fn", [lambda w: w * w.sum().item(), lambda w: w if w.sum() > 0 else -w], ids=["item", "branch"])
def test_a_python_number_taken_from_an_input_is_an_error(fn):
    with pytest.raises(RuntimeError):
        trace_graph(fn, (torch.ones(3),))


@pytest.mark.parametrize(
    "fn",
    [lambda w: w[w > 0].sum(), lambda w: w * len(torch.unique(w)), lambda w: w.nonzero().sum() * w, lambda w: w[torch.rand(3) > 0.5]],
    ids=["mask", "unique", "nonzero", "random mask"],
)
def test_a_shape_that_depends_on_an_inputs_values_is_an_error(fn):
    with pytest.raises(RuntimeError, match="a shape depends on values that change"):
        trace_graph(fn, (torch.ones(3),))


def test_what_takes_only_its_shape_from_an_input_may_shape_others():
    graph, w = trace_graph(lambda w: w * len(torch.ones_like(w).nonzero()), (torch.ones(3),)), torch.randn(3)
    assert torch.equal(graph(w), w * 3)


@pytest.mark.parametrize("index", [torch.tensor([True, False, True]), torch.tensor([2, 0])], ids=["mask", "numbers"])
def test_rows_picked_by_a_constant_or_by_number_are_no_error(index):
    graph, w = trace_graph(lambda w: w[index] * len(torch.unique(index)), (torch.ones(3),)), torch.randn(3)
    assert torch.equal(graph(w), w[index] * 2)

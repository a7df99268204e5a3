"""Traced graphs give the numbers of the Python that they replace, to the last bit, on inputs that they were not traced on."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import nn
from torch.func import grad, grad_and_value, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

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
        return row, torch.rand(()).to(row), *potential._inputs(potential.batches.next())

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
def test_a_shape_that_follows_an_inputs_values_is_an_error(fn):
    with pytest.raises(RuntimeError, match="a shape depends on values that change"):
        trace_graph(fn, (torch.ones(3),))


def test_what_takes_only_its_shape_from_an_input_may_shape_others():
    graph, w = trace_graph(lambda w: w * len(torch.ones_like(w).nonzero()), (torch.ones(3),)), torch.randn(3)
    assert torch.equal(graph(w), w * 3)


@pytest.mark.parametrize("index", [torch.tensor([True, False, True]), torch.tensor([2, 0])], ids=["mask", "numbers"])
def test_rows_picked_by_a_constant_or_by_number_are_no_error(index):
    graph, w = trace_graph(lambda w: w[index] * len(torch.unique(index)), (torch.ones(3),)), torch.randn(3)
    assert torch.equal(graph(w), w[index] * 2)


def test_a_model_whose_shapes_follow_its_batch_stays_with_the_handlers_whatever_the_first_batches_are():
    def averaged(x, y):
        scaled(x, y, 1.0 + len(torch.unique(y)))

    x, y = torch.randn(ROWS, 4, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.float64)
    with pytest.warns(UserWarning, match="falls back to 'handlers'.*a shape depends on values that change"):
        potential = ab.Potential(averaged, (x, y), batch_size=4)
        potential.init()
    exact, state = ab.Potential(averaged, (x, y), batch_size=4, backend="handlers"), potential.init()
    batch = x[:4], torch.arange(4.0).double()
    assert torch.equal(potential.gradient(state, batch), exact.gradient(state, batch))


# -------------------------------------------------------------------------------------- what lies outside of the traced inputs


class OnFeatures(PyroModule):
    """Weights on the features of a fixed network, with a fixed scale."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), self.scale).to_event(1))
        mean = self.features(x) @ w
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def nudge_weight(model):
    with torch.no_grad():
        model.features[0].weight.mul_(1 + 1e-5)


def nudge_weight_behind_autograds_back(model):
    model.features[0].weight.data.mul_(1 + 1e-5)


def replace_weight(model):
    model.features[0].weight = nn.Parameter(model.features[0].weight.detach() * (1 + 1e-5))


def load_statistics(model):
    model.load_state_dict({**model.state_dict(), "features.1.running_mean": torch.full((3,), 1e-4)})


def widen_prior(model):
    model.scale = torch.tensor(1.0001)


CHANGES = [nudge_weight, nudge_weight_behind_autograds_back, replace_weight, load_statistics, widen_prior]


@pytest.mark.parametrize("change,num_chains,batch_size", [(change, 1, None) for change in CHANGES] + [(nudge_weight, 2, 4)])
def test_what_changes_in_the_model_between_runs_is_seen_by_the_next_run(change, num_chains, batch_size):
    model, graphs = OnFeatures(), {}
    data, state = (torch.randn(ROWS, 4), torch.randn(ROWS)), torch.randn(num_chains, 3)
    options = {"num_chains": num_chains, "batch_size": batch_size}

    def gradients():
        traced, exact = (ab.Potential(model, data, backend=b, graphs=graphs, **options) for b in ("graph", "handlers"))
        batch = traced.batches.next()
        return traced.gradient(state, batch), exact.gradient(state, batch)

    for _ in range(2):
        ours, theirs = gradients()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        change(model)


def function_on_features(features):
    return lambda x, y: features(x, y)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: model.forward, function_on_features], ids=["module", "method", "function"]
)
@pytest.mark.parametrize("num_chains", [1, 3])
def test_what_a_potential_makes_of_buffers_and_frozen_weights_follows_them(wrap, num_chains):
    class Derived(OnFeatures):
        def forward(self, x, y):
            return super().forward(x * (2 * self.scale + self.features[0].weight.square().sum()), y)

    model, state = Derived(), torch.randn(num_chains, 3)
    data = torch.randn(ROWS, 4), torch.randn(ROWS)
    traced, exact = (ab.Potential(wrap(model), data, num_chains=num_chains, backend=backend) for backend in ("graph", "handlers"))
    for change in (lambda: None, lambda: model.scale.add_(1.0), lambda: model.features[0].weight.data.mul_(2.0)):
        change()
        torch.testing.assert_close(traced.gradient(state, ()), exact.gradient(state, ()), rtol=1e-5, atol=1e-5)
    assert traced.backend == "graph"


def test_a_graph_belongs_to_the_autocast_that_it_was_traced_under():
    model, data, state = OnFeatures(), (torch.randn(ROWS, 4), torch.randn(ROWS)), torch.randn(1, 3)
    traced, exact = (ab.Potential(model, data, backend=backend) for backend in ("graph", "handlers"))
    for casts in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            torch.testing.assert_close(traced.gradient(state, ()), exact.gradient(state, ()), rtol=1e-5, atol=1e-5)
    assert traced.backend == "graph"


def test_tracing_gives_back_what_the_function_gives_back():
    """A trace of five chains that kept all that it made took twice the memory of the run."""
    left = []

    def function(x):
        made = x * 2.0
        left.append(StorageWeakRef(made.untyped_storage()))
        total = (made + x).sum()
        del made
        left.append(left[0].expired())
        return total

    trace_graph(function, (torch.randn(5),))
    assert left[1] is True


def test_a_kernel_steps_under_the_autocast_of_each_step():
    data, ends = (torch.randn(ROWS, 4), torch.randn(ROWS)), []
    for backend in ("graph", "handlers"):
        pyro.set_rng_seed(0)
        kernel = ab.SGLD(OnFeatures(), step_size=0.01, temperature=0.0, backend=backend)
        kernel.setup(0, *data)
        params = kernel.initial_params
        for casts in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                params = kernel.sample(params)
        ends.append(params)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


class Weighed(PyroModule):
    """Class weights that only rows of their class see."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.ones(3))

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=(2 * self.weights)[y]):
            pyro.sample("obs", dist.Categorical(logits=x @ w), obs=y)


@pytest.mark.parametrize(
    "change",
    [lambda model: model.weights[2].fill_(500.0), lambda model: setattr(model, "weights", torch.tensor([1.0, 1.0, 500.0]))],
    ids=["in place", "another buffer"],
)
def test_a_change_between_runs_that_only_rows_of_a_rare_class_see_is_seen(change):
    model, graphs, state = Weighed(), {}, torch.randn(1, 12)
    x, y = torch.randn(ROWS, 4), torch.arange(ROWS) % 2
    rare = x[:4], torch.tensor([0, 1, 2, 2])
    for each in (lambda model: None, change):
        each(model)
        traced, exact = (ab.Potential(model, (x, y), batch_size=4, backend=b, graphs=graphs) for b in ("graph", "handlers"))
        for batch in ((x[:4], y[:4]), rare):  # graphs are compared with the handlers on the first
            torch.testing.assert_close(traced.gradient(state, batch), exact.gradient(state, batch))
    assert traced.backend == "graph"


@pytest.fixture
def traces(monkeypatch):
    """How often a model has been traced."""
    counted = []

    def counting(*args):
        counted.append(1)
        return trace_graph(*args)

    monkeypatch.setattr("pyro_advbayes.functions.trace_graph", counting)
    return counted


def doubles(rows):
    return torch.randn(rows, 4, dtype=torch.float64), torch.arange(rows) // 5 * (torch.arange(rows) % 5 > 2).double()


def scaled(x, y, scale=1.0):
    w = pyro.sample("w", dist.Normal(torch.zeros(4, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, scale), obs=y)


def test_a_graph_is_used_again_for_other_data_of_the_same_shapes(traces):
    kernel = ab.SGLD(scaled, 1e-3, batch_size=4)
    for _ in range(3):
        ab.SGMCMC(kernel, 2, 2, 2, disable_progbar=True).run(*doubles(ROWS))
        assert len(traces) == 1  # the steps and the estimate of their noise have one between them


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_graph_is_not_used_again_for_another_number_of_rows_or_another_plain_argument(traces, batch_size):
    graphs = {}
    state = torch.randn(2, 4, dtype=torch.float64)

    def check(rows, *more):
        data = (*doubles(rows), *more)
        traced, exact = (
            ab.Potential(scaled, data, num_chains=2, batch_size=batch_size, backend=b, graphs=graphs) for b in ("graph", "handlers")
        )
        batch = traced.batches.next()
        torch.testing.assert_close(traced.gradient(state, batch), exact.gradient(state, batch), rtol=1e-9, atol=1e-9)
        return len(traces)

    assert [check(2000), check(2001), check(2001), check(2001, 1.0001), check(2001, 1.0001)] == [1, 2, 2, 3, 3]


def test_a_fallback_is_told_at_every_run_and_never_used_for_another_model(traces):
    def counts(x, y):
        scaled(x, y, float(len(torch.unique(y))))

    kernel = ab.SGLD(counts, 1e-3, batch_size=4, batch_dependent=True)
    for _ in range(2):
        with pytest.warns(UserWarning, match="falls back"):
            ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(*doubles(ROWS))
    kernel.model = scaled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(*doubles(ROWS))


def test_what_depends_on_live_tensors_follows_them():
    held = torch.randn(3)

    def fn(x):
        return x * held.exp()

    x = torch.randn(3)
    live, kept = trace_graph(fn, (x,), live=(held,)), trace_graph(fn, (x,))
    before = fn(x)
    held += 1.0
    assert torch.equal(live(x), fn(x)) and torch.equal(kept(x), before)


@pytest.mark.parametrize("value, fn", [(1.0, lambda x, t: x * t), (0.0, lambda x, t: x - t), (3.0, lambda x, t: (2.0 * x) * t)])
def test_a_live_number_is_no_constant(value, fn):
    held, x = torch.tensor(value), torch.randn(3)
    graph = trace_graph(lambda x: fn(x, held), (x,), live=(held,))
    held += 0.5
    assert torch.equal(graph(x), fn(x, held))


def test_arguments_that_were_one_tensor_when_they_were_traced_are_two():
    x, y = torch.randn(3), torch.randn(3)
    graph = trace_graph(lambda a, b: a - 2 * b, (x, x))
    assert torch.equal(graph(x, y), x - 2 * y)


def test_an_argument_that_the_function_holds_too_is_not_what_it_holds():
    held, x = torch.randn(3), torch.randn(3)
    graph = trace_graph(lambda a: a - 2 * held, (held,), live=(held,))
    assert torch.equal(graph(x), x - 2 * held)


def test_random_numbers_of_a_cpu_generator_say_where_they_are():
    """Under ``torch.set_default_device("cuda")`` PyTorch would ask for them there."""

    class Strict(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if (kwargs or {}).get("generator") is not None and function in (torch.randn, torch.rand, torch.randint, torch.randperm):
                assert "device" in kwargs, function
            return function(*args, **(kwargs or {}))

    x, y = doubles(ROWS)
    with Strict():
        ab.SGMCMC(ab.SGLD(scaled, batch_size=4), 2, 2, disable_progbar=True).run(x, y)


def test_a_start_where_the_density_overflows_does_not_cost_the_graph():
    def counts(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)

    x, y = torch.rand(6, 2, dtype=torch.double), torch.arange(6.0, dtype=torch.double)
    starts = iter([1e4] * 3 + [0.1] * 100)
    kernel = ab.SGLD(counts, 1e-4, init_strategy=lambda site: torch.full((2,), next(starts), dtype=torch.double))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(x, y)
    assert kernel.potential.backend == "graph"


def test_the_curvature_of_a_network_with_attention_is_found():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    net = ab.nn.bayesianize(nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3)).eval())
    kernel = ab.SGLD(ab.nn.Classifier(net))
    ab.SGMCMC(kernel, 2, 2, disable_progbar=True).run(torch.randn(12, 8), torch.arange(12) % 3)
    assert kernel.step_size.curvature > 1.0

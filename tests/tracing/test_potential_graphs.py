"""A potential's graphs follow what their model holds, and are used again only where they are still the model's."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import pyro_advbayes as ab
from pyro_advbayes.tracing.replay import trace_graph

ROWS = 12


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
def test_a_potential_depends_on_live_buffers_and_frozen_weights(wrap, num_chains):
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

    monkeypatch.setattr("pyro_advbayes.model.functions.trace_graph", counting)
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


def test_a_fallback_warns_at_every_run_and_is_never_used_for_another_model(traces):
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


def test_results_change_with_live_tensors():
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


def test_a_model_whose_shapes_depend_on_its_batch_stays_with_the_handlers_whatever_the_first_batches_are():
    def averaged(x, y):
        scaled(x, y, 1.0 + len(torch.unique(y)))

    x, y = torch.randn(ROWS, 4, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.float64)
    with pytest.warns(UserWarning, match="falls back to 'handlers'.*a shape depends on values that change"):
        potential = ab.Potential(averaged, (x, y), batch_size=4)
        potential.init()
    exact, state = ab.Potential(averaged, (x, y), batch_size=4, backend="handlers"), potential.init()
    batch = x[:4], torch.arange(4.0).double()
    assert torch.equal(potential.gradient(state, batch), exact.gradient(state, batch))

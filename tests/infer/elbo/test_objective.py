"""The graphs of ``TraceAdversarial_ELBO``: the handlers' numbers, and the handlers where there can be no graph."""

from __future__ import annotations

import copy
import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import nn

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal
from pyro_advbayes.infer.elbo import objective
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from tests.small_models import data, logistic, mixed, regression, subsampling


def hierarchical(x, y=None):
    """A prior that depends on another site, priors whose divergence nobody knows, and one that differs from weight to weight."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=x.dtype), 0.5))
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), scale).to_event(1))
    v = pyro.sample("v", dist.StudentT(x.new_full((3,), 4.0), 0.0, 1.0).to_event(1))
    u = pyro.sample("u", dist.Normal(torch.arange(3.0).to(x), torch.arange(1.0, 4.0).to(x)).to_event(1))
    share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
    noise = pyro.sample("noise", dist.HalfCauchy(x.new_ones(())))
    with pyro.plate("groups", 2):
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ (w + v * share + u) + b.sum(), 1 + noise), obs=y)


def weighed(x, y=None):
    with pyro.poutine.scale(scale=0.1):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


NETWORK = mlp((3, 5, 4, 2), nn.Tanh).double()


def network(x, y=None):
    return NETWORK(x, None if y is None else y.long())


@pytest.fixture
def used(monkeypatch):
    """Counts the losses that graphs gave."""
    calls, original = [], objective.Objective.loss_and_gradients

    def counted(self, *args):
        result = original(self, *args)
        calls.append(self)
        return result

    monkeypatch.setattr(objective.Objective, "loss_and_gradients", counted)
    return calls


def run(elbo, model, steps=5, rows=(25, 25, 25, 25, 25), module=False):
    """Losses and gradients of some steps, each on other rows, at parameters that move."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, y = (value.double() for value in data(sum(rows)))
    guide, model = AutoAdversarialNormal(model, init_scale=0.3), ab.minibatch(model, size=200)
    guide(x, y)
    results, start = [], 0
    for step, size in enumerate(rows[:steps]):
        pyro.set_rng_seed(step)
        batch = x[start : start + size], y[start : start + size]
        start += size
        if module:
            loss = elbo(model, guide)(*batch)
            loss.backward()
        else:
            loss = elbo.loss_and_grads(model, guide, *batch)
        results.append([torch.as_tensor(loss).detach(), *(p.grad.clone() for p in guide.parameters())])
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter -= 0.01 * parameter.grad.sign()
                parameter.grad = None
    return results


def assert_alike(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", [logistic, regression, hierarchical, weighed, network])
@pytest.mark.parametrize("options", [{"mix": 0}, {"mix": 0.7, "kl_scale": 0.3}, {"mix": 0.7, "radius": 0.5}], ids=str)
def test_graphs_give_the_losses_and_gradients_of_the_handlers(model, options, used):
    torch.set_default_dtype(torch.double)
    ours = run(TraceAdversarial_ELBO(**options), model)
    assert len(used) == 5
    assert_alike(ours, run(TraceAdversarial_ELBO(**options, backend="handlers"), model))


def test_sites_of_different_dtypes_are_treated_like_the_handlers_do():
    x, y = data()
    results = []
    for backend in ("graph", "handlers"):
        pyro.clear_param_store()
        guide, elbo = AutoAdversarialNormal(mixed), TraceAdversarial_ELBO(backend=backend)
        guide(x, y)
        for step in range(4):
            pyro.set_rng_seed(step)
            loss = elbo.loss_and_grads(mixed, guide, x, y)
        results.append((torch.tensor(loss), *(p.grad.clone() for p in guide.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [regression, network])
def test_without_an_adversary_they_are_those_of_pyros_mean_field_elbo(model, used):
    torch.set_default_dtype(torch.double)
    assert_alike(run(TraceAdversarial_ELBO(mix=0, num_particles=2), model), run(TraceMeanField_ELBO(num_particles=2), model))
    assert len(used) == 10


def test_parameters_that_are_held_fixed_get_no_gradient(used):
    guide, elbo = AutoAdversarialNormal(logistic), TraceAdversarial_ELBO()
    guide(*data())
    for parameter in guide.locs.parameters():
        parameter.requires_grad_(False)
    for module in (False, True):
        for _ in range(3):
            if module:
                elbo(logistic, guide)(*data()).backward()
            else:
                elbo.loss_and_grads(logistic, guide, *data())
    assert all(p.grad is None for p in guide.locs.parameters()) and all(p.grad is not None for p in guide.scales.parameters())
    for parameter in guide.parameters():
        parameter.requires_grad_(False)
    assert elbo.loss_and_grads(logistic, guide, *data()) > 0
    assert len(used) == 7


@pytest.mark.parametrize("particles", [1, 3])
def test_as_a_module_they_attach_the_loss_to_the_parameters(particles, used):
    torch.set_default_dtype(torch.double)
    options = {"num_particles": particles, "mix": 0.5}
    assert_alike(
        run(TraceAdversarial_ELBO(**options), logistic, module=True), run(TraceAdversarial_ELBO(**options, backend="handlers"), logistic)
    )
    assert len(used) == 5 * particles


def test_graphs_take_the_random_numbers_that_the_handlers_take(used):
    model, (x, y) = mlp((3, 5, 2)), data()
    guide, scaled = AutoAdversarialNormal(model), ab.minibatch(model, size=600)
    guide(x, y.long())
    elbos = [TraceAdversarial_ELBO(backend=backend) for backend in ("graph", "handlers")]
    for step in range(5):
        losses, following = [], []
        for elbo in elbos:
            pyro.set_rng_seed(step)
            losses.append(elbo.loss_and_grads(scaled, guide, x, y.long()))
            following.append(torch.rand(()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and torch.equal(*following)
    assert len(used) == 5


def test_graphs_and_handlers_report_the_same_moves():
    torch.set_default_dtype(torch.double)
    for options in ({}, {"radius": 0.5}):
        moved = []
        for backend in ("graph", "handlers"):
            elbo = TraceAdversarial_ELBO(**options, num_particles=2, backend=backend)
            run(elbo, regression)
            moved.append(elbo.moved)
        torch.testing.assert_close(*moved)
        assert moved[0].noise.shape == (2,)


def test_svi_learns_the_same_with_and_without_graphs(used):
    torch.set_default_dtype(torch.double)
    x, y = (value.double() for value in data())
    learnt = []
    for backend in ("graph", "handlers"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAdversarialNormal(regression)
        svi = SVI(ab.minibatch(regression, size=60), guide, Adam({"lr": 0.01}), TraceAdversarial_ELBO(backend=backend))
        losses = [svi.step(x[rows], y[rows]) for _ in range(10) for rows in torch.arange(60).split(25)]
        learnt.append((torch.tensor(losses), *guide.median().values()))
    torch.testing.assert_close(*learnt)
    assert len(used) == 30 - 1  # the first step tells the guide its sites


def check_both_backends_learn_the_same(model, run):
    """The losses that ``run(step)`` gives, where ``step`` is one of SVI."""
    losses = []
    for backend in ("graph", "handlers"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(model, AutoAdversarialNormal(model), Adam({"lr": 0.01}), TraceAdversarial_ELBO(backend=backend))
        losses.append(run(svi.step))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_handlers_that_are_entered_around_a_step_hold(used):
    x, y = data()

    def run(step):
        with ab.minibatch(size=600):
            losses = [step(x, y) for _ in range(5)]
        with pyro.poutine.scale(scale=0.1):
            losses.append(step(x, y))
        return losses + [step(x, y) for _ in range(3)]

    check_both_backends_learn_the_same(regression, run)
    assert len(used) == 3  # the steps without any


def test_a_prior_that_depends_on_an_argument_is_no_constant(used):
    def model(x, y, tau):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), tau).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    check_both_backends_learn_the_same(model, lambda step: [step(x, y, torch.tensor(1.0 if i < 5 else 0.1)) for i in range(9)])
    assert len(used) == 8


def test_arguments_that_were_one_tensor_may_become_two(used):
    def denoise(noisy, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(noisy @ w, 1.0).to_event(1), obs=x)

    x, _ = data()
    check_both_backends_learn_the_same(denoise, lambda step: [step(x, x) for _ in range(5)] + [step(x + 1.0, x) for _ in range(3)])
    assert len(used) == 7


@pytest.mark.parametrize(
    ("prior", "given"),
    [
        (lambda x, n: dist.Normal(torch.zeros(3), 1 / n.float()), lambda step: torch.tensor(1 + step)),
        (lambda x, n: dist.Normal(torch.tensor([-5.0, 0.0, 5.0])[n].expand(3), 1.0), lambda step: torch.tensor([step % 3])),
        (lambda x, n: dist.Normal(torch.zeros(3), 1 / x.detach().std(0)), lambda step: None),
    ],
    ids=["of an integer", "picked by an integer", "of detached inputs"],
)
def test_a_prior_that_depends_on_an_argument_without_gradients_is_no_constant(prior, given, used):
    def model(x, y, n):
        w = pyro.sample("w", prior(x, n).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    x, y = data()
    check_both_backends_learn_the_same(model, lambda step: [step(x * (1 + i), y, given(i)) for i in range(9)])
    assert len(used) == 8


def test_a_prior_that_takes_only_its_dtype_from_an_argument_is_a_constant(used):
    x, y = data()

    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), torch.ones_like(x[0])).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    check_both_backends_learn_the_same(model, lambda step: [step(x, y) for _ in range(4)])
    assert used[0].priors == {"w": objective.NormalPrior(0.0, 1.0)}


def test_weights_may_be_changed_from_step_to_step_without_new_graphs(used):
    torch.set_default_dtype(torch.double)
    x, y = (value.double() for value in data())
    guide = AutoAdversarialNormal(logistic)
    guide(x, y)
    ours, theirs = (TraceAdversarial_ELBO(num_steps=2, backend=backend) for backend in ("graph", "handlers"))
    for step in range(6):
        losses = []
        for elbo in (ours, theirs):
            elbo.mix, elbo.kl_scale = 0.1 + 0.1 * step, step / 5
            pyro.set_rng_seed(step)
            losses.append(elbo.loss_and_grads(logistic, guide, x, y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert len(used) == 6 and len(used[0]._graphs) == 2 and used[0] is used[-1]


class Frozen(PyroModule):
    """Bayesian weights on features that are normalised by statistics from elsewhere, in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False).eval()
        self.last = PyroModule[nn.Linear](3, 1, bias=False)
        self.last.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))

    def forward(self, x, y=None):
        logits = self.last(self.norm(x)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


def test_statistics_that_are_loaded_later_count(used):
    model, (x, y) = Frozen(), data()
    guide, elbo = AutoAdversarialNormal(model, init_scale=1.0), TraceAdversarial_ELBO()
    guide(x, y)
    for _ in range(5):
        elbo.loss_and_grads(model, guide, x, y)
    model.norm.running_mean += 3.0
    for step in range(4):
        losses = []
        for each in (elbo, TraceAdversarial_ELBO(backend="handlers")):
            pyro.set_rng_seed(step)
            losses.append(each.loss_and_grads(model, guide, x, y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len({id(objective) for objective in used}) == 2


@pytest.mark.parametrize("learnt", [False, True])
def test_autocast_is_that_of_its_step_and_its_casts_are_of_the_weights_as_they_are(learnt, used):
    network, (x, y) = nn.Linear(3, 3).requires_grad_(learnt), data()
    start = copy.deepcopy(network.state_dict())

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((network(x) @ w).float(), 0.05), obs=y)

    losses = []
    for backend in ("graph", "handlers"):
        network.load_state_dict(start)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide, elbo = AutoAdversarialNormal(model), TraceAdversarial_ELBO(mix=0, backend=backend)
        guide(x, y)
        losses.append([])
        for casts in (True, False, True):
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                    losses[-1].append(elbo.loss_and_grads(model, guide, x, y))
            network.weight.data.mul_(1.5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(used) == 12 and used[0] is used[-1]


class Tempered(PyroModule):
    """A buffer in the prior, in the likelihood, and in Python's numbers."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x, y):
        scales = {place: self.scale * 1.0 if place == self.where else 1.0 for place in ("prior", "likelihood")}
        number = float(self.scale) if self.where == "number" else 1.0
        w = pyro.sample("w", dist.Normal(torch.zeros(3), scales["prior"]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, scales["likelihood"] * number), obs=y)


def fill_behind_autograds_back(model):
    model.scale.data.fill_(5.0)


def swap_behind_autograds_back(model):
    model.scale.data = torch.tensor(5.0)


@pytest.mark.parametrize("where", ["prior", "likelihood", "number"])
@pytest.mark.parametrize("change", [fill_behind_autograds_back, swap_behind_autograds_back])
def test_buffers_that_are_written_to_behind_autograds_back_are_seen(where, change, used):
    (x, y), model = data(), Tempered(where)

    def run(step):
        model.scale = torch.tensor(1.0)
        losses = [step(x, y) for _ in range(4)]
        change(model)
        return losses + [step(x, y) for _ in range(3)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_both_backends_learn_the_same(model, run)
    assert len(used) == (0 if where == "number" else 6)
    assert any("falls back" in str(w.message) for w in caught) == (where == "number")


class Holder(nn.Module):
    """A model that is a method, with a network beside a statistic of its own."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)).requires_grad_(False).eval()
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.features(x) - self.shift.exp()

    def model(self, x, y):
        return logistic(self(x), y)


@pytest.mark.parametrize("kind", ["method", "function"])
@pytest.mark.parametrize(
    "change",
    [
        lambda holder: holder.features[1].running_mean.add_(3.0),
        lambda holder: setattr(holder.features[1], "running_var", torch.full((3,), 9.0)),
        lambda holder: holder.features.__setitem__(1, nn.Tanh()),
        lambda holder: holder.shift.add_(1.0),
    ],
    ids=["statistics", "other statistics", "another layer", "own buffer"],
)
def test_networks_that_a_function_or_a_method_uses_may_change(kind, change, used):
    losses, start = [], Holder()
    for backend in ("graph", "handlers"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        holder = copy.deepcopy(start)
        model = holder.model if kind == "method" else lambda x, y, network=holder: logistic(network(x), y)
        svi = SVI(model, AutoAdversarialNormal(model), Adam({"lr": 0.01}), TraceAdversarial_ELBO(backend=backend))
        losses.append([svi.step(*data()) for _ in range(4)])
        change(holder)
        losses[-1] += [svi.step(*data()) for _ in range(4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(used) == 7


def test_a_network_that_a_function_uses_may_be_put_into_training_mode(used):
    network, (x, y) = Holder(), data()
    start = copy.deepcopy(network.state_dict())

    def model(x, y):
        return logistic(network(x), y)

    def run(step):
        network.load_state_dict(start)
        network.eval()
        losses = [step(x, y) for _ in range(4)]
        network.train()
        return losses + [step(x, y) for _ in range(4)]

    with pytest.warns(UserWarning, match=r"layer 'BatchNorm1d' \(BatchNorm1d\) is in training mode"):
        check_both_backends_learn_the_same(model, run)
    assert len(used) == 3


CLASSES = [2]


@pytest.mark.parametrize(
    "count, graphs",
    [
        (lambda y: len(torch.unique(y)), 0),
        (lambda y: len(set(y.detach().numpy())), 0),
        (lambda y: CLASSES[0], 1),  # which no recorder sees
    ],
    ids=["torch", "numpy", "a global"],
)
def test_a_graph_is_dropped_where_the_models_python_depends_on_the_data(count, graphs, used):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        factor = 1.0 + count(y)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(factor * (x @ w), 1.0), obs=y)

    (x, _), guide = data(), AutoAdversarialNormal(model)
    batches = [(x, (torch.arange(60) % classes).float()) for classes in (2, 5, 7, 2, 5)]
    guide(*batches[0])
    elbos = [TraceAdversarial_ELBO(backend=backend) for backend in ("graph", "handlers")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, batch in enumerate(batches):
            losses, CLASSES[0] = [], len(torch.unique(batch[1]))
            for elbo in elbos:
                pyro.set_rng_seed(step)
                losses.append(elbo.loss_and_grads(model, guide, *batch))
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [str(w.message) for w in caught if "falls back" in str(w.message)] and len(used) == graphs


class Learnt(PyroModule):
    """A weight of its own beside a Bayesian one."""

    def __init__(self):
        super().__init__()
        self.first = PyroModule[nn.Linear](3, 3)
        self.last = PyroModule[nn.Linear](3, 1, bias=False)
        self.last.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))

    def forward(self, x, y=None):
        logits = self.last(self.first(x)).squeeze(-1) * self.first.bias.square().sum().exp()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


def test_parameters_of_the_model_are_learnt_beside_the_guides(used):
    torch.set_default_dtype(torch.double)
    x, y = (value.double() for value in data())
    learnt, start = [], Learnt().state_dict()
    for backend in ("graph", "handlers"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Learnt()
        model.load_state_dict(start)
        guide, elbo = AutoAdversarialNormal(model), TraceAdversarial_ELBO(backend=backend)
        svi = SVI(ab.minibatch(model, size=600), guide, Adam({"lr": 0.01}), elbo)
        losses = [svi.step(x, y) for _ in range(6)]
        model.first.weight.grad = None
        elbo(ab.minibatch(model, size=600), guide)(x, y).backward()
        learnt.append((torch.tensor(losses), model.first.weight.detach(), guide.locs.last.weight.detach(), model.first.weight.grad))
        assert not torch.equal(model.first.weight, start["first.weight"])
    for ours, theirs in zip(*learnt, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert len(used) == 6


def test_a_network_that_a_function_uses_is_learnt_beside_the_guide(used):
    x, y = data()

    def model(x, y, network):
        return logistic(pyro.module("network", network)(x), y)

    learnt, start = [], nn.Linear(3, 3)
    for backend in ("graph", "handlers"):
        network = copy.deepcopy(start)
        check = functools.partial(model, network=network)
        guide, elbo = AutoAdversarialNormal(check), TraceAdversarial_ELBO(backend=backend)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = SVI(check, guide, Adam({"lr": 0.01}), elbo)
        losses = [svi.step(x, y) for _ in range(6)]
        learnt.append((torch.tensor(losses), network.weight.detach()))
        assert not torch.equal(network.weight, start.weight)
    torch.testing.assert_close(*learnt, rtol=1e-4, atol=1e-5)
    assert len(used) == 5


def with_param(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    offset = pyro.param("offset", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w + offset), obs=y)


class Dropped(Learnt):
    """Random masks in training mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        for parameter in self.first.parameters():
            parameter.requires_grad_(False)

    def forward(self, x, y=None):
        return super().forward(self.dropout(x), y)


def hand_written(x, y):
    for name, shape in (("w", (3,)), ("b", ())):
        pyro.sample(name, dist.Normal(pyro.param(f"{name}_loc", torch.zeros(shape)), 0.1).to_event(len(shape)))


@pytest.mark.parametrize("wrap", [lambda x: {"x": x}, lambda x: [x], lambda x: x.numpy()])
def test_data_in_an_argument_that_is_no_tensor_is_that_of_its_step(wrap, used):
    def wrapped(x, y):
        (x,) = x.values() if isinstance(x, dict) else x if isinstance(x, list) else (torch.as_tensor(x),)
        return logistic(x, y)

    (x, y), losses = data(400), []
    middle = torch.full((len(x) - 12, 1), 2.0)  # of a long tensor a repr shows the ends
    batches = [x] * 4 + [torch.cat([x[:6], x[6:-6] * middle, x[-6:]])] * 2
    for backend in ("graph", "handlers"):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        guide, elbo = AutoAdversarialNormal(wrapped), TraceAdversarial_ELBO(backend=backend)
        guide(wrap(x), y)
        with warnings.catch_warnings(action="ignore"):
            losses.append([elbo.loss_and_grads(wrapped, guide, wrap(batch), y) for batch in batches])
    assert losses[0] == losses[1] and not used


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: (with_param, AutoAdversarialNormal), "trains tensors that are not parameters"),
        (lambda: (Dropped(), AutoAdversarialNormal), r"layer 'dropout' \(Dropout\) is in training mode"),
        (lambda: (subsampling, AutoAdversarialNormal), "a plate subsamples itself"),
        (lambda: (logistic, lambda model: hand_written), "the guide is function"),
    ],
    ids=["own tensors", "dropout", "subsampling", "another guide"],
)
def test_where_there_is_no_graph_the_handlers_go_on_and_one_warning_says_why(make, why, used):
    model, guide = make()
    guide, elbo = guide(model), TraceAdversarial_ELBO()
    guide(*data())
    with pytest.warns(UserWarning, match=rf"falls back to 'handlers'.*{why}") as caught:
        losses = [elbo.loss_and_grads(model, guide, *data()) for _ in range(5)]
    assert len(losses) == 5 and not used
    assert sum("falls back" in str(w.message) for w in caught) == 1
    assert model is not with_param or pyro.param("offset").unconstrained().grad is not None


def test_an_argument_that_requires_a_gradient_gets_one():
    x, y = data()
    guide, elbo = AutoAdversarialNormal(logistic), TraceAdversarial_ELBO()
    guide(x, y)
    with pytest.warns(UserWarning, match="an argument of the model requires a gradient"):
        for _ in range(4):
            moved = x.clone().requires_grad_()
            elbo.loss_and_grads(logistic, guide, moved, y)
            assert moved.grad is not None


def test_the_divergence_of_normals_and_its_gradients_are_pytorchs():
    torch.set_default_dtype(torch.double)
    loc, scale, weight = torch.randn(4, 3), torch.rand(4, 3) + 0.1, torch.tensor(0.7)
    for prior in ((0.0, 1.0), (0.5, 0.15), (torch.randn(4, 3), torch.rand(4, 3) + 0.5)):
        m, s = (value.clone().requires_grad_() for value in (loc, scale))
        expected = torch.distributions.kl_divergence(dist.Normal(m, s), dist.Normal(*prior)).sum()
        slopes = torch.autograd.grad(weight * expected, (m, s))
        zero = torch.zeros(4, 3)
        found = objective.normal_divergence(loc, scale, objective.NormalPrior(*prior), weight, zero, zero)
        torch.testing.assert_close(found, (expected, *slopes))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='jit'"):
        TraceAdversarial_ELBO(backend="jit")


def test_few_graphs_are_kept():
    guide, elbo = AutoAdversarialNormal(logistic), TraceAdversarial_ELBO(mix=0)
    guide(*data())
    for rows in range(2, 20):
        elbo.loss_and_grads(logistic, guide, *(value[:rows] for value in data()))
    assert len(elbo._graphs._entries) == objective.KEPT

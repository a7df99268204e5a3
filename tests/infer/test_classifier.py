"""``PosteriorClassifier``: one network whose outputs, gradients and memory are those that the mean over draws should have."""

from __future__ import annotations

import copy
import io

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from models.mlp import mlp_network
from pyro_advbayes.infer.classifier import PosteriorClassifier
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier

SIZES = (4, 8, 3)


def draws_of(net, count, dtype=torch.double):
    return {f"net.{name}": torch.randn(count, *p.shape, dtype=dtype) for name, p in net.named_parameters()}


def posterior(count=12, dtype=torch.double, **options):
    """A small network, its draws, and the classifier made of them."""
    net = mlp_network(SIZES, nn.Tanh)
    samples = draws_of(net, count, dtype)
    return net, samples, PosteriorClassifier(Classifier(bayesianize(net)), samples, **options)


def mean_by_hand(net, samples, x):
    """The definition, by plain autograd over all draws at once."""
    names = list(samples)
    logits = [
        torch.func.functional_call(net, {n.removeprefix("net."): samples[n][i] for n in names}, x) for i in range(len(samples[names[0]]))
    ]
    return torch.stack(logits).softmax(-1).mean(0).log()


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12, 100])
def test_outputs_and_gradients_are_those_of_the_mean(chunk_size):
    net, samples, classifier = posterior(chunk_size=chunk_size)
    for rows in (6, 6, 1, 3):
        x = torch.randn(rows, 4, dtype=torch.double, requires_grad=True)
        weights = torch.randn(rows, 3, dtype=torch.double)
        results = []
        for output in (classifier(x), mean_by_hand(net, samples, x)):
            results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), x)))
        (ours, our_gradient), (theirs, their_gradient) = results
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.allclose(our_gradient, their_gradient, rtol=1e-11, atol=1e-13)


def test_outputs_are_normalised_logarithms():
    classifier = posterior()[2]
    total = classifier(torch.randn(20, 4, dtype=torch.double)).exp().sum(-1)
    assert torch.allclose(total, torch.ones_like(total))


def test_gradients_pass_a_numerical_check_and_second_derivatives_are_right():
    net, samples, classifier = posterior(count=7, chunk_size=3)
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(classifier, x)
    assert torch.autograd.gradgradcheck(classifier, x)
    penalties = []
    for output in (classifier(x), mean_by_hand(net, samples, x)):
        (gradient,) = torch.autograd.grad(output[:, 0].sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert torch.allclose(*penalties, rtol=1e-9)


class Backbone(PyroModule):
    """Deterministic features under a Bayesian last layer; logits at a site, too."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(4, 5)
        self.head = bayesianize(nn.Linear(5, 3))

    def forward(self, x, y=None):
        logits = pyro.deterministic("logits", self.head(self.features(x).tanh()), event_dim=1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_gradients_reach_parameters_of_the_model(chunk_size):
    model = Backbone().double()
    samples = {"head.weight": torch.randn(9, 3, 5, dtype=torch.double), "head.bias": torch.randn(9, 3, dtype=torch.double)}
    classifier = PosteriorClassifier(model, samples, return_site="logits", chunk_size=chunk_size)
    x = torch.randn(6, 4, dtype=torch.double)

    def by_hand():
        features = model.features(x).tanh()
        logits = torch.einsum("nf,skf->snk", features, samples["head.weight"]) + samples["head.bias"].unsqueeze(1)
        return logits.softmax(-1).mean(0).log()

    for _ in range(2):
        parameters = list(model.features.parameters())
        ours, theirs = (torch.autograd.grad(output[:, 1].sum(), parameters) for output in (classifier(x), by_hand()))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b)
        with torch.no_grad():  # a step of training is seen without a new recording
            for parameter, gradient in zip(parameters, ours, strict=True):
                parameter += gradient


def test_probabilities_that_vanish_in_a_draw_stay_finite_and_impossible_classes_have_no_gradient():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        return torch.stack([x * w, -x * w, torch.full_like(x, -float("inf"))], -1)

    x = torch.full((2,), 100.0, requires_grad=True)
    output = PosteriorClassifier(model, {"w": torch.tensor([40.0, -40.0, 3.0])})(x)
    assert torch.allclose(output[:, :2].exp(), torch.tensor([2 / 3, 1 / 3]))
    assert (output[:, 2] == -float("inf")).all()
    (gradient,) = torch.autograd.grad(output[:, :2].sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 100])
def test_the_draws_come_in_order_each_chunk_with_a_graph_of_its_own(chunk_size):
    net, samples, classifier = posterior(chunk_size=chunk_size)
    x = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    names = list(samples)
    expected = torch.stack(
        [torch.func.functional_call(net, {n.removeprefix("net."): samples[n][i] for n in names}, x) for i in range(classifier.num_samples)]
    )
    weights = torch.randn(12, 6, 3, dtype=torch.double)
    (gradient,) = torch.autograd.grad((expected.log_softmax(-1) * weights).sum(), x)
    for values, wanted in ((classifier.logits, expected), (classifier.log_probs, expected.log_softmax(-1))):
        with torch.no_grad():
            found = list(values(x))
            torch.testing.assert_close(torch.cat(found), wanted)
        assert all(len(chunk) == (chunk_size or 12) for chunk in found[:-1]) and not found[0].requires_grad
    total, start = torch.zeros_like(x), 0
    for chunk in classifier.log_probs(x):
        total += torch.autograd.grad((chunk * weights[start : start + len(chunk)]).sum(), x)[0]
        start += len(chunk)
    torch.testing.assert_close(total, gradient)


def likelihood(log_probs, y):
    return log_probs.gather(-1, y.expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1).logsumexp(0)


def reads_values(log_probs, y):
    """Its Python depends on what it is given, so that it cannot be recorded."""
    return likelihood(log_probs, y) * (2.0 if float(log_probs.detach().max()) > -0.05 else 1.0)


def leaves_torch(log_probs, y):
    """Its Python depends on what it is given, and a recorder does not see it."""
    return likelihood(log_probs, y) * float(log_probs.detach().numpy()[0, 0, 0])


def check_gradients(classifier, x, y, reduce):
    """That what comes chunk by chunk is what autograd makes of each chunk's log-probabilities."""
    found = list(classifier.gradients(x, y, reduce))
    attached = x.clone().requires_grad_()
    chunks = list(classifier.log_probs(attached))
    assert [len(log_probs) for log_probs, _, _ in found] == [len(chunk) for chunk in chunks]
    for (log_probs, values, gradient), chunk in zip(found, chunks, strict=True):
        expected = reduce(chunk, y)
        torch.testing.assert_close(log_probs, chunk.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), attached)[0], rtol=1e-4, atol=1e-6)
        assert not (log_probs.requires_grad or values.requires_grad or gradient.requires_grad)


@pytest.mark.parametrize("reduce", [likelihood, reads_values, leaves_torch])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_gradients_of_a_function_of_the_draws_are_those_of_autograd_call_after_call(chunk_size, reduce):
    model = Backbone().double()
    samples = {"head.weight": torch.randn(12, 3, 5, dtype=torch.double), "head.bias": torch.randn(12, 3, dtype=torch.double)}
    classifier = PosteriorClassifier(model, samples, return_site="logits", chunk_size=chunk_size)
    for rows in (6, 6, 6, 2, 6):
        x, y = 3 * torch.randn(rows, 4, dtype=torch.double), torch.randint(3, (rows,))
        with torch.no_grad():
            assert len(list(classifier.gradients(x, y, reduce))) == -(-12 // (chunk_size or 12))
        check_gradients(classifier, x, y, reduce)
        with torch.no_grad():  # a step of training is seen
            model.features.weight.mul_(1.1)
    assert all(p.grad is None for p in model.parameters())


def branching(x):
    pyro.sample("beside", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    return x * w if x.sum() > 0 else x


def test_a_prediction_takes_no_random_numbers_from_its_caller():
    for classifier in (posterior()[2], PosteriorClassifier(branching, {"w": torch.randn(6, 4, dtype=torch.double)})):
        before = torch.get_rng_state()
        x = torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            classifier(x)
            list(classifier.gradients(x, torch.zeros(6, dtype=torch.long), likelihood))
        assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------------ memory


def largest_saved(count, chunk_size=None):
    """Bytes that autograd holds at most at one time through a foreign library's step: forward, loss, backward."""
    net = mlp_network((16, 64, 10))
    classifier = PosteriorClassifier(Classifier(bayesianize(net)), draws_of(net, count, torch.float), chunk_size=chunk_size)
    x = torch.randn(50, 16, requires_grad=True)
    classifier(x).sum().backward()  # what is made once is made
    held, most = {}, [0]

    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            held[id(self)] = tensor.nbytes
            most[0] = max(most[0], sum(held.values()))

        def __del__(self):
            held.pop(id(self))

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor):
        nn.functional.cross_entropy(classifier(x), torch.zeros(50, dtype=torch.long)).backward()
    return most[0]


@pytest.mark.parametrize("chunk_size", [None, 1, 10])
def test_memory_of_a_backward_pass_does_not_grow_with_the_number_of_draws(chunk_size):
    few = largest_saved(3 * (chunk_size or 151), chunk_size)
    assert 0 < largest_saved(1000, chunk_size) <= 1.05 * few


# -------------------------------------------------------------------------------------------------------- being a network


def test_it_moves_copies_pickles_and_loads_like_a_network():
    _, samples, classifier = posterior(dtype=torch.float)
    x = torch.randn(5, 4)
    expected = classifier(x)
    for other in (copy.deepcopy(classifier), torch.load(_saved(classifier), weights_only=False)):
        assert torch.equal(other(x), expected)
    double = copy.deepcopy(classifier).double()
    assert double(x.double()).dtype == torch.double
    assert torch.allclose(double(x.double()).float(), expected, atol=1e-5)
    assert torch.equal(classifier(x), expected)
    fresh = PosteriorClassifier(classifier.model, {name: torch.zeros_like(value) for name, value in samples.items()})
    assert not torch.allclose(fresh(x), expected)
    fresh.load_state_dict(classifier.state_dict())
    assert torch.equal(fresh(x), expected)
    assert set(classifier.posterior_samples) == set(samples)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_predicted_with_and_the_draws_that_were_given_stay_as_they_are(assign):
    _, samples, classifier = posterior()
    given = {name: torch.zeros_like(value) for name, value in samples.items()}
    other = PosteriorClassifier(classifier.model, given)
    x = torch.randn(5, 4, dtype=torch.double)
    other(x)
    other.load_state_dict(classifier.state_dict(), assign=assign)
    assert torch.equal(other(x), classifier(x))
    assert not any(value.any() for value in given.values())
    around = nn.Sequential(PosteriorClassifier(classifier.model, given))
    around.load_state_dict(nn.Sequential(classifier).state_dict(), assign=assign)
    assert torch.equal(around(x), classifier(x)) and not any(value.any() for value in given.values())
    short = PosteriorClassifier(classifier.model, {name: value[:3] for name, value in samples.items()})
    with pytest.raises(RuntimeError, match="size mismatch for draws0"):
        other.load_state_dict(short.state_dict())
    assert torch.equal(other(x), classifier(x))


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_train_leaves_the_model_in_eval_mode():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.head = bayesianize(nn.Linear(4, 3))

        def forward(self, x, y=None):
            return self.head(self.norm(x))

    model = Model()
    classifier = PosteriorClassifier(model, {"head.weight": torch.randn(5, 3, 4), "head.bias": torch.randn(5, 3)})
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"'norm'.*training mode"):
        classifier(x)
    before = classifier.eval()(x)
    assert torch.equal(classifier.train()(x), before)
    assert classifier.training and not model.norm.training
    assert torch.equal(model.norm.running_mean, torch.zeros(4))


def test_layout_and_autocast_of_a_later_call_do_not_matter():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3))
    classifier = PosteriorClassifier(Classifier(bayesianize(net)), draws_of(net, 20, torch.float), chunk_size=6)
    x = torch.randn(5, 2, 4, 4)
    expected = classifier(x)
    assert torch.allclose(classifier(x.to(memory_format=torch.channels_last)), expected, atol=1e-6)
    assert torch.allclose(classifier(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(classifier(x), expected)
    assert torch.equal(classifier(x), expected)


def test_nothing_is_attached_without_gradients():
    classifier = posterior(dtype=torch.float)[2]
    x = torch.randn(5, 4)
    assert not classifier(x).requires_grad
    with torch.no_grad():
        assert not classifier(x.requires_grad_()).requires_grad
    assert classifier(x).requires_grad


def test_the_model_runs_only_where_a_shape_is_new():
    calls = []

    class Counted(Classifier):
        def forward(self, x, y=None):
            calls.append(len(x))
            return super().forward(x, y)

    net = mlp_network(SIZES)
    classifier = PosteriorClassifier(Counted(bayesianize(net)), draws_of(net, 50, torch.float))
    for rows in (5, 5, 2, 5, 2):
        classifier(torch.randn(rows, 4))
    assert calls == [5, 5, 2, 2]


# --------------------------------------------------------------------------------------------------------- kinds of models


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_a_guide_is_drawn_once_under_the_seed(guide_class):
    model = Classifier(bayesianize(mlp_network(SIZES)))
    guide = guide_class(model)
    x = torch.randn(5, 4)
    guide(x, torch.zeros(5, dtype=torch.long))
    outputs = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        classifier = PosteriorClassifier(model, guide=guide, num_samples=30)
        assert classifier.num_samples == 30 and set(classifier.sites) == {f"net.{i}.{n}" for i in (1, 3) for n in ("weight", "bias")}
        outputs.append(classifier(x))
        assert torch.equal(classifier(x), outputs[-1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_guide_that_needs_arguments_says_what_to_do_instead():
    model = Classifier(bayesianize(mlp_network(SIZES)))
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match=r"Predictive\(guide"):
        PosteriorClassifier(model, guide=guide, num_samples=3)
    x = torch.randn(5, 4)
    draws = Predictive(guide, num_samples=3)(x, torch.zeros(5, dtype=torch.long))
    assert PosteriorClassifier(model, draws)(x).shape == (5, 3)


def numpy_of_the_draw(x, w):
    return x * torch.as_tensor(np.tanh(w.detach().numpy()))


def branch_on_the_input(x, w):
    return x * w if x.sum() > 0 else x


def numpy_of_the_input(x, w):
    return x * w * float(np.abs(x.detach().numpy()[0]).sum())


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def straight_through(x, w):
    return Sign.apply(x * w) + x * w


@pytest.mark.parametrize("function", [numpy_of_the_draw, branch_on_the_input, numpy_of_the_input, straight_through])
def test_models_that_cannot_be_recorded_give_the_same(function):
    def model(x):
        return function(x, pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1)))

    w = torch.randn(6, 3)
    classifier = PosteriorClassifier(model, {"w": w})
    for _ in range(3):
        x = torch.randn(4, 3, requires_grad=True)
        output = classifier(x)
        expected = torch.stack([function(x, value) for value in w]).softmax(-1).mean(0).log()
        assert torch.allclose(output, expected, atol=1e-6)
        ours, theirs = (torch.autograd.grad(value[:, 0].sum(), x)[0] for value in (output, expected))
        assert torch.allclose(ours, theirs, atol=1e-6)
        check_gradients(classifier, x.detach(), torch.randint(3, (4,)), likelihood)


class Rounded(PyroModule):
    """A trainable layer whose inputs or weights are rounded, with gradients handed through, and a gain that no gradient reaches."""

    def __init__(self, rounded=""):
        super().__init__()
        self.first, self.rounded = nn.Linear(3, 3), rounded
        self.register_buffer("gain", torch.tensor(2.0))
        self.plain = torch.tensor(0.5)
        self.w = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self, x):
        weight = self.first.weight
        x, weight = (straight_through(v, 1.0) if name == self.rounded else v for name, v in (("inputs", x), ("weights", weight)))
        with torch.no_grad():
            gain = self.gain * self.plain
        return nn.functional.linear(x, weight, self.first.bias) * self.w * gain


@pytest.mark.parametrize(("rounded", "trained"), [("inputs", (True, False, True)), ("weights", (False, True))])
def test_a_prediction_before_it_changes_no_gradient(rounded, trained):
    model, w, x = Rounded(rounded).eval(), torch.randn(6, 3), torch.randn(4, 3)

    def gradients(classifier):
        inputs = x.clone().requires_grad_()
        wanted = [inputs, *(p for p in model.parameters() if p.requires_grad)]
        through_draws = next(classifier.gradients(x, torch.arange(4) % 3, likelihood))
        return [*torch.autograd.grad(classifier(inputs)[:, 0].sum(), wanted), *through_draws]

    used = PosteriorClassifier(model, {"w": w})
    for requires_grad in trained:
        model.first.requires_grad_(requires_grad)
        used(x)
        for ours, fresh in zip(gradients(used), gradients(PosteriorClassifier(model, {"w": w})), strict=True):
            assert torch.allclose(ours, fresh, atol=1e-6)


def test_tensors_that_are_replaced_count():
    def with_param(x):
        return x * pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1)) * pyro.param("s", torch.tensor(1.0))

    x, model = torch.randn(4, 3), Rounded()
    classifiers = [PosteriorClassifier(each, {"w": torch.randn(6, 3)}) for each in (model, with_param)]

    def check():
        for classifier in classifiers:
            fresh = PosteriorClassifier(classifier.model, classifier.posterior_samples)
            torch.testing.assert_close(classifier(x), fresh(x))

    check()
    model.plain = torch.tensor(5.0)
    pyro.get_param_store()["s"] = torch.tensor(4.0)
    check()
    for classifier in classifiers:
        classifier.draws0 = torch.randn(6, 3)
    check()


def test_autocast_keeps_no_copy_of_weights_that_change():
    model, x = Rounded(), torch.randn(40, 3)
    classifier = PosteriorClassifier(model, {"w": torch.randn(6, 3)})
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = classifier(x)
            fresh = PosteriorClassifier(model, classifier.posterior_samples)(x)
        torch.testing.assert_close(found, fresh)
        with torch.no_grad():
            model.first.weight.copy_(torch.randn(3, 3))


def test_handlers_around_a_prediction_see_and_change_nothing_of_it():
    _, samples, classifier = posterior()
    x = torch.randn(5, 4, dtype=torch.double)
    name = next(iter(samples))
    with pyro.poutine.trace() as outer, pyro.poutine.condition(data={name: torch.zeros_like(samples[name][0])}):
        found = classifier(x)
    assert not [site for site, node in outer.trace.nodes.items() if node["type"] == "sample"]
    assert torch.equal(found, classifier(x))
    assert torch.equal(found, PosteriorClassifier(classifier.model, samples)(x))


def test_what_the_backward_pass_would_read_must_not_be_written_to_before():
    model, x = Rounded(), torch.randn(4, 3, requires_grad=True)
    w = torch.randn(6, 3)
    classifier = PosteriorClassifier(model, {"w": w})
    for written in (model.gain, w):
        output = classifier(x)
        written.mul_(2.0)
        with pytest.raises(RuntimeError, match="have changed since the prediction"):
            output.sum().backward()
        classifier(x).sum().backward()


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_gradients_through_convolutions_and_pooling_are_those_of_autograd(chunk_size):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    classifier = PosteriorClassifier(Classifier(bayesianize(net)), draws_of(net, 6, torch.float), chunk_size=chunk_size)
    for _ in range(3):
        check_gradients(classifier, torch.randn(5, 1, 8, 8), torch.randint(3, (5,)), likelihood)
    assert len(list(classifier.gradients(torch.randn(5, 1, 8, 8), torch.zeros(5, dtype=torch.long), likelihood))) == 6 // chunk_size


def test_draws_that_cannot_be_batched_give_their_gradients_one_by_one():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        return torch._foreach_mul([x * w], 2.0)[0]

    classifier = PosteriorClassifier(model, {"w": torch.randn(7, 3)}, chunk_size=4)
    for _ in range(3):
        assert len(list(classifier.gradients(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), likelihood))) == 7
        check_gradients(classifier, torch.randn(4, 3), torch.randint(3, (4,)), likelihood)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_draws_are_enough(count):
    net, samples, classifier = posterior(count=count)
    x = torch.randn(5, 4, dtype=torch.double)
    assert torch.allclose(classifier(x), mean_by_hand(net, samples, x))


# --------------------------------------------------------------------------------------------------------------- bad input


def returning(value):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        return value(x, w)

    return model


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x, w: x[:, 0] * w, r"logits \[N, K\].*\(5,\)"),
        (lambda x, w: x[:, :1] * w, r"one number for each input.*\[0, logit\]"),
        (lambda x, w: (x * w).unsqueeze(0), r"logits \[N, K\].*\(1, 5, 4\)"),
        (lambda x, w: (x * w).t(), r"one row for each of the 5 inputs.*\(4, 5\)"),
        (lambda x, w: {"logits": x}, r"it is dict"),
        (lambda x, w: (x * w).long(), r"logits \[N, K\]"),
    ],
    ids=["vector", "binary", "batched", "transposed", "dict", "integers"],
)
def test_what_are_no_logits_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        PosteriorClassifier(returning(value), {"w": torch.randn(3)})(torch.randn(5, 4))


@pytest.mark.parametrize("branch", [False, True], ids=["recorded", "not recorded"])
def test_logits_that_need_a_site_without_draws_are_refused_by_name(branch):
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        return x * w + shift * (1.0 if branch and w > 0 else 2.0)

    with pytest.raises(ValueError, match=r"random although draws are given.*'shift'"):
        PosteriorClassifier(model, {"w": torch.randn(5)})(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs posterior_samples, or a guide"),
        ({"num_samples": 3}, "needs posterior_samples, or a guide"),
        ({"guide": lambda: None}, "num_samples must be specified"),
        ({"posterior_samples": {"a": torch.zeros(3), "b": torch.zeros(4)}}, "equally many draws"),
        ({"posterior_samples": {"a": torch.zeros(3)}, "chunk_size": 0}, "chunk_size=0"),
        ({"posterior_samples": {"a": torch.zeros(3)}, "guide": lambda: None}, "cannot be provided with the `guide`"),
    ],
)
def test_malformed_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        PosteriorClassifier(lambda x: x, **arguments)


def test_a_return_site_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"return_site='scores'"):
        PosteriorClassifier(returning(lambda x, w: x * w), {"w": torch.randn(3)}, return_site="scores")(torch.randn(5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_draw_that_is_no_number_is_refused_by_name(dtype):
    """The mean over draws would be NaN everywhere."""
    net = mlp_network(SIZES)
    draws = draws_of(net, 12, dtype)
    model = Classifier(bayesianize(net))
    site = next(iter(draws))
    draws[site][7, 0, 1] = torch.nan
    with pytest.raises(ValueError, match=rf"posterior_samples\['{site}'\] holds NaN in 1 of 12 draws, first in number 7: leave it out"):
        PosteriorClassifier(model, draws)
    draws[site][9, 1] = torch.nan
    with pytest.raises(ValueError, match="holds NaN in 2 of 12 draws, first in number 7: leave them out"):
        PosteriorClassifier(model, draws)
    with pytest.raises(ValueError, match="holds NaN in 2 of 2 draws, first in number 0"):
        PosteriorClassifier(model, guide=lambda: {"w": pyro.sample("w", pyro.distributions.Delta(torch.tensor(torch.nan)))}, num_samples=2)

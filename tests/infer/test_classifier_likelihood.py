"""``PosteriorClassifier`` on models of every likelihood: its classes are those of the observed site, whatever the model returns."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from models.logistic_regression import LogisticRegression
from pyro_advbayes.infer.classifier import PosteriorClassifier
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.nn import bayesianize

DRAWS, N, D, K = 8, 5, 4, 3
W = torch.randn(DRAWS, D, K, generator=torch.Generator().manual_seed(3), dtype=torch.double)
X = torch.randn(N, D, generator=torch.Generator().manual_seed(4), dtype=torch.double)
PRIOR = dist.Normal(torch.zeros(D, K, dtype=torch.double), 1.0).to_event(2)


def observing(likelihood, returned=lambda f, y: f):
    """``f = x @ w [N, K]``, an observed site "obs" and something that is returned."""

    def model(x, y=None):
        f = x @ pyro.sample("w", PRIOR)
        with pyro.plate("data", len(x)):
            y = pyro.sample("obs", likelihood(f), obs=y)
        return returned(f, y)

    return model


def mean_by_hand(x, log_probs=lambda f: f.log_softmax(-1)):
    return torch.stack([log_probs(x @ w) for w in W]).logsumexp(0) - torch.tensor(float(DRAWS)).log()


def check(model, x, log_probs, **options):
    """Outputs, draws and gradients, in their first and second call, against the definition by plain autograd."""
    classifier = PosteriorClassifier(model, {"w": W}, **options)
    weights = torch.randn(len(x), log_probs(x @ W[0]).shape[-1], dtype=torch.double)
    for _ in range(2):
        results = []
        for function in (classifier, lambda x: mean_by_hand(x, log_probs)):
            inputs = x.clone().requires_grad_()
            output = function(inputs)
            results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.cat(list(classifier.log_probs(x))), torch.stack([log_probs(x @ w) for w in W]))
    return classifier


RETURNED = {
    "logits": lambda f, y: f,
    "probabilities": lambda f, y: f.softmax(-1),
    "log-probabilities": lambda f, y: f.log_softmax(-1),
    "other logits": lambda f, y: 0.1 * f,
    "the outcome": lambda f, y: y,
    "the first two": lambda f, y: f[:, :2],
    "a dict": lambda f, y: {"logits": f},
    "nothing": lambda f, y: None,
}


@pytest.mark.parametrize("returned", RETURNED.values(), ids=RETURNED)
def test_the_classes_are_the_likelihoods_whatever_the_model_returns(returned):
    check(observing(lambda f: dist.Categorical(logits=f), returned), X, lambda f: f.log_softmax(-1))


LIKELIHOODS = {
    "probs": lambda f: dist.Categorical(probs=f.softmax(-1)),
    "log-probabilities": lambda f: dist.Categorical(logits=f.log_softmax(-1)),
    "by hand": lambda f: dist.Categorical(probs=f.exp() / f.exp().sum(-1, keepdim=True)),
    "one-hot": lambda f: dist.OneHotCategorical(logits=f),
    "masked": lambda f: dist.Categorical(logits=f).mask(torch.arange(len(f)) % 2 == 0),
}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_a_likelihood_of_classes_is_read_however_it_is_written(likelihood, chunk_size):
    check(observing(likelihood, lambda f, y: f.softmax(-1)), X, lambda f: f.log_softmax(-1), chunk_size=chunk_size)


def test_probabilities_are_not_softmaxed_again():
    """A certain prediction is certain: a softmax of (1, 0) is (.731, .269)."""
    model = observing(lambda f: dist.Categorical(probs=f[:, :2].softmax(-1)), lambda f, y: f[:, :2].softmax(-1))
    probs = PosteriorClassifier(model, {"w": W})(1e4 * X).exp()
    votes = torch.stack([(X @ w)[:, :2].argmax(-1) for w in W]).double().mean(0)
    torch.testing.assert_close(probs[:, 1], votes)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda f: dist.Categorical(probs=f.softmax(-1)),
        lambda f: dist.Categorical(torch.nn.functional.softmax(f, dim=1)),
        lambda f: dist.Categorical(logits=f.log_softmax(-1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_gradients_of_confident_probabilities_are_those_of_the_logits(likelihood, dtype):
    """Of a softmax that has rounded to 0, the logarithm has no gradient: an attack would stand still, and robustness would be false."""
    model = observing(likelihood, lambda f, y: f.softmax(-1))
    w = W[:1].to(dtype) * 1000
    x = X.to(dtype).requires_grad_()
    y = (X @ W[0]).argmin(-1)
    loss = nn.functional.nll_loss(PosteriorClassifier(model, {"w": w})(x), y)
    expected = nn.functional.cross_entropy(x @ w[0], y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))


def test_probabilities_that_were_rounded_to_zero_elsewhere_have_a_finite_gradient():
    model = observing(lambda f: dist.Categorical(probs=(f - f.amax(-1, keepdim=True)).exp()))
    x = X.clone().requires_grad_()
    output = PosteriorClassifier(model, {"w": 1000 * W})(x)
    assert output.isfinite().all()
    for k in range(K):
        assert torch.autograd.grad(output[:, k].sum(), x, retain_graph=True)[0].isfinite().all()


# ------------------------------------------------------------------------------------------------- one logit, two classes


def two(f):
    return torch.stack([nn.functional.logsigmoid(-f[:, 0]), nn.functional.logsigmoid(f[:, 0])], -1)


BINARY = {
    "Bernoulli": lambda f: dist.Bernoulli(logits=f[:, 0]),
    "of probabilities": lambda f: dist.Bernoulli(f[:, :1].sigmoid().squeeze(-1)),
    "event of one": lambda f: dist.Bernoulli(logits=f[:, :1]).to_event(1),
    "one trial": lambda f: dist.Binomial(1, logits=f[:, 0]),
    "trials of one": lambda f: dist.Binomial(torch.ones(len(f), dtype=f.dtype), logits=f[:, 0]),
    "masked": lambda f: dist.Bernoulli(logits=f[:, 0]).mask(torch.arange(len(f)) > 0),
}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("likelihood", BINARY.values(), ids=BINARY)
def test_one_logit_is_two_classes(likelihood, chunk_size):
    classifier = check(observing(likelihood, lambda f, y: f[:, 0]), X, two, chunk_size=chunk_size)
    logits = torch.cat(list(classifier.logits(X)))
    torch.testing.assert_close(logits, torch.stack([torch.stack([torch.zeros(N).double(), (X @ w)[:, 0]], -1) for w in W]))


def test_the_packages_logistic_regression_agrees_with_its_own_outcomes():
    model = LogisticRegression(D)
    samples = {"net.weight": torch.randn(2000, 1, D), "net.bias": torch.randn(2000, 1)}
    x = X.float()
    probs = PosteriorClassifier(model, samples)(x).exp()
    assert probs.shape == (N, 2) and torch.allclose(probs.sum(-1), torch.ones(N))
    outcomes = Predictive(model, samples)(x)["obs"].mean(0)
    assert ((probs[:, 1] - outcomes).abs() < 4 * (outcomes * (1 - outcomes) / 2000).sqrt()).all()


# --------------------------------------------------------------------------------------------------------- no classifiers


NO_CLASSES = {
    "mean and scale": (lambda f: dist.Normal(f[:, 0], f[:, 1].exp()), r"'obs', Normal, is a regression"),
    "vector": (lambda f: dist.Normal(f, 1.0).to_event(1), r"'obs', Normal, is a regression"),
    "robust": (lambda f: dist.StudentT(3.0, f[:, 0], 1.0), r"'obs', StudentT, is a regression"),
    "labels": (lambda f: dist.Bernoulli(logits=f).to_event(1), r"'obs', Bernoulli, has 15 outcomes of 5 inputs, several labels each"),
    "counts": (lambda f: dist.Poisson(f[:, 0].exp()), r"'obs', Poisson, is a distribution of counts"),
    "trials": (lambda f: dist.Binomial(7, logits=f[:, 0]), r"'obs', Binomial, is a distribution of counts"),
}


@pytest.mark.parametrize(("likelihood", "message"), NO_CLASSES.values(), ids=NO_CLASSES)
@pytest.mark.parametrize("returned", [lambda f, y: f, lambda f, y: f[:, :2], lambda f, y: y])
def test_what_is_no_classifier_is_refused_with_what_it_is(likelihood, message, returned):
    with pytest.raises(ValueError, match=rf"PosteriorClassifier: the likelihood at observed site {message}.*Predictive"):
        PosteriorClassifier(observing(likelihood, returned), {"w": W})(X)


def test_one_site_for_each_label_is_the_remedy_for_several_labels():
    def model(x, y=None):
        f = x @ pyro.sample("w", PRIOR)
        with pyro.plate("data", len(x)):
            for k in range(K):
                pyro.sample(f"label{k}", dist.Bernoulli(logits=f[:, k]), obs=None if y is None else y[:, k])

    with pytest.raises(ValueError, match=r"observes 'label0', 'label1', 'label2': name the one that is meant, return_site='label0'"):
        PosteriorClassifier(model, {"w": W})(X)
    for k in range(K):
        output = PosteriorClassifier(model, {"w": W}, return_site=f"label{k}")(X)
        torch.testing.assert_close(output, mean_by_hand(X, lambda f, k=k: two(f[:, k : k + 1])))


# ------------------------------------------------------------------------------------------------------------ return_site


def with_sites(x, y=None):
    f = x @ pyro.sample("w", PRIOR)
    pyro.deterministic("logits", f, event_dim=1)
    pyro.deterministic("probs", f.softmax(-1), event_dim=1)
    pyro.deterministic("tempered", f / 10, event_dim=1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=f), obs=y)


@pytest.mark.parametrize("site", ["_RETURN", "obs", "logits", "probs"])
def test_a_site_that_holds_the_classes_in_any_form_names_the_likelihood(site):
    torch.testing.assert_close(PosteriorClassifier(with_sites, {"w": W}, return_site=site)(X), mean_by_hand(X))


def test_a_site_of_other_logits_is_taken_once_the_likelihood_is_hidden():
    with pytest.raises(ValueError, match=r"return_site='tempered' holds neither.* 'obs'.*poutine.block\(model, hide=\['obs'\]\)"):
        PosteriorClassifier(with_sites, {"w": W}, return_site="tempered")(X)
    hidden = pyro.poutine.block(with_sites, hide=["obs"])
    output = PosteriorClassifier(hidden, {"w": W}, return_site="tempered")(X)
    torch.testing.assert_close(output, mean_by_hand(X, lambda f: (f / 10).log_softmax(-1)))


def test_the_one_logit_may_be_named():
    def model(x, y=None):
        f = pyro.deterministic("f", (x @ pyro.sample("w", PRIOR))[:, 0])
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=f), obs=y)

    torch.testing.assert_close(PosteriorClassifier(model, {"w": W}, return_site="f")(X), mean_by_hand(X, two))


def test_without_an_observed_site_the_return_value_holds_the_logits():
    net = bayesianize(nn.Linear(D, K, bias=False).double())
    output = PosteriorClassifier(net, {"weight": W.mT})(X)
    torch.testing.assert_close(output, mean_by_hand(X))


def test_a_model_with_its_observations_inside_is_read_too():
    y = torch.zeros(N, dtype=torch.long)
    model = observing(lambda f: dist.Categorical(logits=f), lambda f, y: f.softmax(-1))
    torch.testing.assert_close(PosteriorClassifier(lambda x: model(x, y), {"w": W})(X), mean_by_hand(X))


def test_a_local_latent_is_no_outcome():
    def model(x, y=None):
        f = x @ pyro.sample("w", PRIOR)
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Categorical(logits=f + shift.unsqueeze(-1) * torch.arange(K)), obs=y)

    with pytest.raises(ValueError, match=r"random although draws are given.*'shift'"):
        PosteriorClassifier(model, {"w": W})(X)
    shift = torch.randn(DRAWS, N).double()
    output = PosteriorClassifier(model, {"w": W, "shift": shift})(X)
    expected = torch.stack([(X @ w + s.unsqueeze(-1) * torch.arange(K)).log_softmax(-1) for w, s in zip(W, shift, strict=True)])
    torch.testing.assert_close(output, expected.logsumexp(0) - torch.tensor(float(DRAWS)).log())


def test_a_latent_function_that_draws_hold_may_be_the_logits():
    def model(x):
        return pyro.sample("f", dist.Normal(torch.zeros(len(x), K, dtype=torch.double), 1.0).to_event(2)).sum()

    f = torch.randn(DRAWS, N, K).double()
    output = PosteriorClassifier(model, {"f": f}, return_site="f")(X)
    torch.testing.assert_close(output, f.softmax(-1).mean(0).log())

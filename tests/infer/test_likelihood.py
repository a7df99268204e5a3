"""``read_likelihood``: what a model's outcomes are, and the logits of their classes."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from models.linear_regression import LinearRegression
from models.logistic_regression import LogisticRegression
from models.mlp import mlp
from pyro_advbayes.infer.likelihood import read_likelihood
from pyro_advbayes.model.outcomes import Likelihood, Origins

N, K = 7, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))


def observing(make, plated=True):
    """A model whose observed site "obs" has the distribution that ``make`` gives of ``x @ w [N, K]``."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(4, K), 1.0).to_event(2))
        f = x @ w
        if not plated:
            return pyro.sample("obs", make(f), obs=y)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", make(f), obs=y)

    return model


KINDS = [
    ("classes", lambda f: dist.Categorical(logits=f)),
    ("classes", lambda f: dist.Categorical(probs=f.softmax(-1))),
    ("classes", lambda f: dist.OneHotCategorical(logits=f)),
    ("classes", lambda f: dist.Multinomial(1, logits=f)),
    ("classes", lambda f: dist.Bernoulli(logits=f[:, 0])),
    ("classes", lambda f: dist.Bernoulli(logits=f[:, :1]).to_event(1)),
    ("classes", lambda f: dist.Binomial(1, logits=f[:, 0])),
    ("classes", lambda f: dist.Categorical(logits=f).mask(torch.arange(N) > 2)),
    ("classes", lambda f: dist.OrderedLogistic(f[:, 0], torch.tensor([-1.0, 1.0]))),
    ("labels", lambda f: dist.Bernoulli(logits=f).to_event(1)),
    ("labels", lambda f: dist.Categorical(logits=f.unsqueeze(1).expand(-1, 5, -1)).to_event(1)),
    ("counts", lambda f: dist.Binomial(4, logits=f[:, 0])),
    ("counts", lambda f: dist.Binomial(torch.arange(1.0, N + 1), logits=f[:, 0])),
    ("counts", lambda f: dist.Poisson(f[:, 0].exp())),
    ("numbers", lambda f: dist.Normal(f[:, 0], f[:, 1].exp())),
    ("numbers", lambda f: dist.Normal(f, 1.0).to_event(1)),
    ("numbers", lambda f: dist.StudentT(3.0, f[:, 0], 1.0)),
    ("numbers", lambda f: dist.RelaxedOneHotCategorical(torch.tensor(1.0), logits=f)),
]


@pytest.mark.parametrize(("kind", "make"), KINDS)
@pytest.mark.parametrize("observed", [False, True])
def test_the_kind_of_an_outcome_is_read_off_its_distribution_with_and_without_observations(kind, make, observed):
    model = observing(make)
    arguments = (X, model(X)) if observed else (X,)
    likelihood = read_likelihood(model, arguments)
    assert (likelihood.site, likelihood.kind, likelihood.rows) == ("obs", kind, N)
    if kind == "classes":
        likelihood.check_classes("who")
    else:
        with pytest.raises(ValueError, match=rf"who: the likelihood at observed site 'obs', {type(likelihood.fn).__name__}, .*Predictive"):
            likelihood.check_classes("who")


@pytest.mark.parametrize("make", [make for kind, make in KINDS if kind == "classes"])
def test_logits_of_the_classes_are_the_logarithms_of_what_the_distribution_gives_them(make):
    """In every case the distribution's own log-density of each value is compared."""
    model, w = observing(make), torch.randn(1, 4, K)
    with Origins() as origins:
        likelihood = read_likelihood(model, (X,), posterior_samples={"w": w})
        through = likelihood.logits(origins)
    fn = make(X @ w[0])
    fn = fn.base_dist if isinstance(fn, (dist.MaskedDistribution, torch.distributions.Independent)) else fn
    count = 2 if isinstance(fn, (torch.distributions.Bernoulli, torch.distributions.Binomial)) else K
    one_hot = torch.eye(count) if fn.event_shape else torch.arange(float(count))
    expected = torch.stack([fn.log_prob(value.expand(fn.shape())) for value in one_hot], -1).reshape(N, count)
    for logits in (likelihood.logits(), through):
        torch.testing.assert_close(logits.log_softmax(-1), expected)


def in_plate(fn):
    with pyro.plate("data", fn.batch_shape[0]):
        return pyro.sample("obs", fn)


def test_logits_survive_a_softmax_that_has_rounded_them_to_certainty():
    f = torch.tensor([[200.0, 0.0, -50.0]])
    for make in (
        lambda f: dist.Categorical(probs=f.softmax(-1)),
        lambda f: dist.Categorical(torch.nn.functional.softmax(f, dim=1)),
        lambda f: dist.OneHotCategorical(probs=torch.softmax(f, -1)),
        lambda f: dist.Categorical(logits=f.log_softmax(-1)),
        plain := lambda f: dist.Categorical(logits=f),
    ):
        with Origins() as origins:
            likelihood = read_likelihood(lambda x, make=make: in_plate(make(x)), (f,))
            torch.testing.assert_close(likelihood.logits(origins).log_softmax(-1), f.log_softmax(-1))
            if make is plain:
                assert torch.equal(likelihood.logits(origins), f)
    for make in (lambda f: torch.sigmoid(f).squeeze(-1), lambda f: f.sigmoid()[:, 0], lambda f: torch.nn.Sigmoid()(f).flatten()):
        with Origins() as origins:
            likelihood = read_likelihood(lambda x, make=make: in_plate(dist.Bernoulli(make(x))), (f[:, :1],))
            assert likelihood.logits(origins).tolist() == [[0.0, 200.0]]


def test_a_share_of_sigmoids_is_not_taken_for_a_softmax():
    f = torch.randn(N, K)
    with Origins() as origins:
        likelihood = read_likelihood(lambda x: pyro.sample("obs", dist.Categorical(probs=x.sigmoid())), (f,))
        probs = likelihood.logits(origins).softmax(-1)
        shares = f.sigmoid() / f.sigmoid().sum(-1, keepdim=True)
        binary = read_likelihood(lambda x: pyro.sample("obs", dist.Bernoulli(((s := x.sigmoid()) / s.sum(-1, keepdim=True))[:, 0])), (f,))
    torch.testing.assert_close(probs, shares)
    torch.testing.assert_close(binary.logits(origins).softmax(-1)[:, 1], shares[:, 0])


def test_a_softmax_over_rows_is_not_taken_for_one_over_classes():
    f = torch.randn(N, K)
    with Origins() as origins:
        logits = read_likelihood(lambda x: in_plate(dist.Categorical(probs=x.softmax(0))), (f,)).logits(origins)
    torch.testing.assert_close(logits.softmax(-1), f.softmax(0) / f.softmax(0).sum(-1, keepdim=True))


def test_logits_that_were_written_to_since_are_not_taken():
    f = torch.tensor([[2.0, 0.0, 1.0]])

    def tempered(x):
        logits = x.clone()
        pyro.sample("obs", dist.Categorical(logits=logits))
        return logits.div_(10.0)

    with Origins() as origins:
        logits = read_likelihood(tempered, (f,)).logits(origins)
    torch.testing.assert_close(logits.log_softmax(-1), f.log_softmax(-1))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: dist.Categorical(probs=p), [0.25, 0.75, 0.0]),
        (lambda p: dist.OneHotCategorical(probs=p), [0.25, 0.75, 0.0]),
        (lambda p: dist.Bernoulli(probs=p[:, 2]), [1.0, 0.0]),
    ],
)
def test_a_probability_of_zero_has_a_finite_gradient(make, expected):
    p = torch.tensor([[0.25, 0.75, 0.0]], requires_grad=True)
    logits = Likelihood("obs", make(p), torch.Size([1]), 1).logits()
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([expected]))
    assert -100.0 < float(logits.detach().min()) < -80.0
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), p)
    assert gradient.isfinite().all()


class NoisyLabels(dist.Categorical):
    """One label in ten is any of the classes, whatever the logits say."""

    def log_prob(self, value):
        return torch.logaddexp(super().log_prob(value) + torch.tensor(0.9).log(), torch.tensor(0.1 / K).log())


def test_a_log_density_of_the_users_own_is_that_of_the_classes():
    w = torch.randn(1, 4, K)
    likelihood = read_likelihood(observing(lambda f: NoisyLabels(logits=f)), (X,), posterior_samples={"w": w})
    torch.testing.assert_close(likelihood.logits().softmax(-1), 0.9 * (X @ w[0]).softmax(-1) + 0.1 / K)


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        (LogisticRegression(4), "Bernoulli", "classes"),
        (LinearRegression(4), "Normal", "numbers"),
        (mlp((4, 5, 3)), "Categorical", "classes"),
    ],
    ids=["logistic", "linear", "mlp"],
)
def test_the_packages_own_models_are_read(model, name, kind):
    state = torch.get_rng_state()
    likelihood = read_likelihood(model, (X,))
    assert (type(likelihood.fn).__name__, likelihood.kind) == (name, kind)
    assert torch.equal(torch.get_rng_state(), state) and not pyro.get_param_store().keys()


def test_an_outcome_needs_no_plate():
    likelihood = read_likelihood(observing(lambda f: dist.Categorical(logits=f).to_event(1), plated=False), (X,))
    assert likelihood.kind == "classes" and likelihood.logits().shape == (N, K)


def test_what_is_no_outcome_is_passed_by():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(N), 1.0).to_event(1))  # as long as the rows, and not one of them
        pyro.factor("small", -w.square().sum())
        scale = pyro.deterministic("scale", x[:, 0].exp())
        with pyro.plate("data", len(x)):
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.factor("in plate", -local)
            return pyro.sample("obs", dist.Normal(local, scale), obs=y)

    assert read_likelihood(model, (X,)).site == "obs"
    assert read_likelihood(model, (X, torch.zeros(N))).site == "obs"


def test_a_model_without_an_observed_site_has_no_likelihood():
    def factors(x, y=None):
        f = x @ pyro.sample("w", dist.Normal(torch.zeros(4, K), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.factor("likelihood", f[:, 0])
        return f

    assert read_likelihood(factors, (X,)) is None
    assert read_likelihood(lambda x: x * pyro.sample("w", dist.Normal(0.0, 1.0)), (X,)) is None


def test_of_several_outcomes_one_is_named():
    def heads(x, y=None, z=None):
        f = x @ pyro.sample("w", dist.Normal(torch.zeros(4, K), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(logits=f), obs=y)
            pyro.sample("size", dist.Normal(f[:, 0], 1.0), obs=z)

    with pytest.raises(ValueError, match="the model observes 'kind', 'size': name the one that is meant, site='kind'"):
        read_likelihood(heads, (X,))
    assert read_likelihood(heads, (X,), site="kind").kind == "classes"
    assert read_likelihood(heads, (X,), site="size").kind == "numbers"
    with pytest.raises(ValueError, match=r"site='color': the model has no such site; it observes 'kind', 'size'"):
        read_likelihood(heads, (X,), site="color")


def test_one_class_is_no_choice():
    likelihood = read_likelihood(observing(lambda f: dist.Categorical(logits=f[:, :1])), (X,))
    with pytest.raises(ValueError, match="'obs' has one class"):
        likelihood.check_classes("who")

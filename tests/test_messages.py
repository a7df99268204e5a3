"""Messages that name an argument, a layer or a prior, and remedies that work as they are written."""

from __future__ import annotations

import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import biject_to

import pyro_advbayes as ab
from pyro_advbayes.infer import distill
from pyro_advbayes.nn import Classifier, bayesianize
from tests.small_models import data, logistic

X, Y = data()
N = len(X)


def run(kernel, *args, samples=3, warmup=2, chains=2, **kwargs):
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


# ---------------------------------------------------------------------------------------------------------- unknown arguments


@pytest.mark.parametrize(
    "make,names",
    [
        (lambda **o: ab.SGLD(logistic, **o), "model, step_size, temperature, batch_size, num_steps_per_sample, batch_args, num_data"),
        (lambda **o: ab.SGHMC(logistic, **o), "friction, adaptive, averaging_window"),
        (lambda **o: ab.SGAdaLD(logistic, **o), "friction, averaging_window, noise_correction, clamp, batch_args"),
        (lambda **o: ab.BAL(logistic, "x", clip=(0.0, 1.0), **o), "model, perturb, batch_size, inputs, cost, weights"),
        (lambda **o: ab.SGAdaLD.rule(0.1, **o), "friction, averaging_window, noise_correction, clamp"),
    ],
    ids=["SGLD", "SGHMC", "SGAdaLD", "BAL", "SGAdaLD.rule"],
)
def test_an_argument_that_a_kernel_does_not_have_is_answered_with_those_that_it_has(make, names):
    with pytest.raises(TypeError, match="has no argument 'lr'; there are ") as caught:
        make(lr=0.1)
    assert isinstance(caught.value, ValueError)
    assert names in str(caught.value) and "options" not in str(caught.value) and "self" not in str(caught.value)


def test_a_kernel_survives_a_pickle():
    assert pickle.loads(pickle.dumps(ab.SGHMC(logistic, 1e-3, friction=0.3))).update_rule.friction == 0.3


# --------------------------------------------------------------------------------------------------------------- tied weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


class WithRemedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, x):
        h = self.embedding(x).mean(1)
        return F.linear(h, self.embedding.weight)


def test_tied_weights_are_answered_with_one_parameter_in_both_places_and_that_works():
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are one tensor.*F\.linear\(h, self\.embedding\.weight\)"):
        bayesianize(Tied())
    model, x, y = Classifier(bayesianize(WithRemedy())), torch.randint(0, 7, (N, 5)), torch.arange(N) % 7
    mcmc = run(ab.SGLD(model, 1e-3, batch_size=10, backend="handlers"), x, y)
    assert list(mcmc.get_samples()) == ["net.embedding.weight"]
    weight = torch.randn(7, 4)
    h = weight[x].mean(1)
    potential = ab.Potential(model, (x, y), backend="handlers")
    expected = F.cross_entropy(h @ weight.T, y, reduction="sum") - dist.Normal(0.0, 1.0).log_prob(weight).sum()
    torch.testing.assert_close(potential.energy(weight.reshape(1, -1)), expected.reshape(1))


# ------------------------------------------------------------------------------------------------------- scale-mixture priors


def mixture(scales=(1.0, 0.1)):
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.25, 0.75])), dist.Normal(torch.zeros(2), torch.tensor(scales)))


def under_a_mixture(x, y=None):
    w = pyro.sample("w", mixture().expand([3]).to_event(1))
    logits = x @ w
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)
    return logits


@pytest.mark.parametrize("backend", ["handlers", "graph"])
def test_a_two_gaussian_scale_mixture_is_a_prior_of_which_the_energy_is_right(backend):
    potential = ab.Potential(under_a_mixture, (X, Y), num_chains=3, backend=backend)
    state = torch.randn(3, 3)
    components = torch.stack([dist.Normal(0.0, s).log_prob(state) + p.log() for s, p in zip((1.0, 0.1), torch.tensor([0.25, 0.75]))])  # noqa: B905
    prior = components.logsumexp(0).sum(-1)
    likelihood = dist.Bernoulli(logits=state @ X.T).log_prob(Y).sum(-1)
    torch.testing.assert_close(potential.energy(state), -(prior + likelihood))
    assert potential.backend == backend and torch.equal(potential.constrain(state)["w"], state)


@pytest.mark.parametrize("kernel", [ab.SGLD, ab.SGHMC, ab.SGAdaLD])
def test_a_scale_mixture_is_sampled_from_minibatches_with_the_automatic_step_size(kernel):
    mcmc = run(kernel(under_a_mixture, batch_size=20, backend="handlers"), X, Y, samples=5, warmup=30)
    assert mcmc.get_samples()["w"].isfinite().all()


def test_a_scale_mixture_is_a_prior_of_networks_and_starts_them_at_their_fan_in():
    model = Classifier(bayesianize(nn.Sequential(nn.Linear(3, 400), nn.Tanh(), nn.Linear(400, 2)), prior=mixture((3.0, 2.0))))
    start = ab.Potential(model, (X, Y.long()), num_chains=2, backend="handlers")
    weight = start.split(start.init())["net.2.weight"]
    assert weight.std() == pytest.approx(400**-0.5, rel=0.1)
    run(ab.SGLD(model, 1e-4, batch_size=10, backend="handlers"), X, Y.long())


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("guide", [AutoNormal, ab.AutoAdversarialNormal])
def test_a_scale_mixture_is_a_prior_under_guides(guide, elbo):
    svi = SVI(under_a_mixture, guide(under_a_mixture), Adam({"lr": 0.01}), elbo())
    assert all(svi.step(X, Y) < 1e4 for _ in range(3))


def test_a_scale_mixture_is_a_prior_for_nuts_and_distillation():
    mcmc = MCMC(NUTS(under_a_mixture), 20, 20, disable_progbar=True)
    mcmc.run(X, Y)
    guide = ab.AutoImplicit(under_a_mixture, generator=distill.MLPGenerator(noise=5, hidden=(5,)))
    distill.APD(guide, num_steps=2, batch_size=5, check_every=None, disable_progbar=True).fit(mcmc.get_samples(), X, Y)
    assert guide()["w"].shape == (3,)


def test_the_support_of_a_mixture_is_that_of_its_components():
    pair = dist.Categorical(torch.ones(2))
    positive = dist.MixtureSameFamily(pair, dist.HalfNormal(torch.tensor([1.0, 2.0])))
    assert (biject_to(positive.support)(torch.tensor([-3.0, 3.0])) > 0).all()
    same = dist.MixtureSameFamily(pair, dist.Uniform(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])))
    values = biject_to(same.expand([4]).to_event(1).support)(torch.tensor([-9.0, -1.0, 1.0, 9.0]))
    assert values.shape == (4,) and ((values > 1) & (values < 3)).all()
    vectors = dist.MixtureSameFamily(pair, dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))
    assert biject_to(vectors.support)(torch.zeros(3)).shape == (3,)


def test_components_on_different_supports_are_refused_by_the_sites_name():
    def model(x, y):
        prior = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])))
        scale = pyro.sample("scale", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x[:, 0] * scale), obs=y)

    with pytest.raises(ValueError, match=r"'scale' \(MixtureSameFamily\).*different supports"):
        run(ab.SGLD(model, 1e-3), X, Y)


# ----------------------------------------------------------------------------------- second derivatives, and torch's warnings

TOKENS, TOPICS = torch.randint(0, 11, (N, 5), generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3


def bag():
    return Classifier(bayesianize(nn.Sequential(nn.EmbeddingBag(11, 4), nn.Linear(4, 3))))


@pytest.mark.parametrize("kernel", [ab.SGLD, ab.SGHMC, ab.SGAdaLD])
def test_an_embedding_bag_under_auto_says_that_a_step_size_is_needed_and_with_one_it_runs(kernel):
    options = {"batch_size": 10, "backend": "handlers"}
    with pytest.raises(ValueError, match=r'step_size="auto" needs second derivatives.*nn.EmbeddingBag.*Give a step size'):
        run(kernel(bag(), **options), TOKENS, TOPICS, warmup=20)
    assert run(kernel(bag(), 1e-4, **options), TOKENS, TOPICS).get_samples()["net.0.weight"].isfinite().all()


def test_no_warning_asks_a_user_to_file_an_issue_with_torch():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = bag()
        mcmc = run(ab.SGLD(model, 1e-4), TOKENS, TOPICS, samples=8)
        ab.Predictive(model, mcmc.get_samples(), return_sites=["obs"])(TOKENS)
        ab.PosteriorClassifier(model, mcmc.get_samples())(TOKENS)
        ab.to_arviz(mcmc, log_likelihood=True)
    assert not [str(w.message) for w in caught if "issue" in str(w.message)]

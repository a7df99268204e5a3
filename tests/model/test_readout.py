"""Whatever asks a model for classes reads them off its likelihood: guides under attack, regularisers, comparisons of guides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.attacks import FGSM, GuideClassifier
from pyro_advbayes.infer.autoguide.generators import NetworkGenerator
from pyro_advbayes.infer.autoguide.rows import sites_of
from pyro_advbayes.infer.distill import compare

N = 6
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


def observing(likelihood, returned):
    """``f = 3 x @ w [N]``, an observed site "obs", and something that is returned."""

    def model(x, y=None):
        f = 3.0 * x @ pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(f), obs=y)
        return returned(f)

    return model


def two(f):
    return torch.stack([torch.zeros_like(f), f], -1)


def under_attack(model, **options):
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    classifier = GuideClassifier(model, lambda x: pyro.sample("w", dist.Normal(torch.ones(2), 0.5).to_event(1)), **options)
    log_probs = torch.cat(list(classifier.log_probs(x)))
    return torch.cat([log_probs.flatten(), torch.autograd.grad(log_probs[..., 0].sum(), x)[0].flatten()])


def regularised(model, **options):
    torch.manual_seed(0)
    weights = iter(torch.tensor([[1.0, 0.5], [-0.5, 1.0]]))
    return ab.UncertaintyRegularizer(eps=0.5, **options).loss(model, lambda x: {"w": next(weights)}, X)


def compared(model, **options):
    torch.manual_seed(0)
    network = torch.nn.Linear(2, 2)
    network.noise = 2
    implicit, samples = ab.AutoImplicit(model, NetworkGenerator(network)), {"w": torch.randn(12, 2)}
    implicit.set_sites(sites_of({"w": samples["w"][None]}))
    implicit.num_draws = 12
    return torch.tensor(compare(samples, implicit, X, num_permutations=1, **options).functions).flatten()


READERS = {"GuideClassifier": under_attack, "uncertainty": regularised, "compare": compared}
CLASSES = {
    "probabilities": (lambda f: dist.Categorical(probs=two(f).softmax(-1)), lambda f: two(f).softmax(-1)),
    "log-probabilities": (lambda f: dist.Categorical(logits=two(f).log_softmax(-1)), lambda f: two(f).log_softmax(-1)),
    "other logits": (lambda f: dist.Categorical(logits=two(f)), lambda f: 0.1 * two(f)),
    "nothing": (lambda f: dist.OneHotCategorical(logits=two(f)), lambda f: None),
    "one logit": (lambda f: dist.Bernoulli(logits=f), lambda f: f),
    "one probability": (lambda f: dist.Bernoulli(f.sigmoid()), lambda f: f.sigmoid()),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("form", CLASSES)
def test_the_classes_are_the_likelihoods_in_every_form(form, read):
    torch.testing.assert_close(read(observing(*CLASSES[form])), read(observing(lambda f: dist.Categorical(logits=two(f)), two)))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_without_a_likelihood_the_return_value_holds_the_logits(read):
    model = observing(lambda f: dist.Categorical(logits=two(f)), two)
    torch.testing.assert_close(read(poutine.block(model, hide=["obs"])), read(model))
    with pytest.raises(ValueError, match=r"'_RETURN' must hold logits \[N, K\], one row for each of the 6 inputs; it is NoneType"):
        read(poutine.block(observing(*CLASSES["nothing"]), hide=["obs"]))


NO_CLASSES = {
    "mean and scale": (lambda f: dist.Normal(f, f.exp()), lambda f: torch.stack([f, f.exp()], -1), "Normal, is a regression"),
    "several labels": (lambda f: dist.Bernoulli(logits=two(f)).to_event(1), two, "Bernoulli, has 12 outcomes of 6 inputs"),
    "counts": (lambda f: dist.Poisson(f.exp()), two, "Poisson, is a distribution of counts"),
}
REMEDIES = {"GuideClassifier": "take Predictive", "uncertainty": "leave uncertainty= out", "compare": "leave its inputs out"}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", NO_CLASSES)
def test_what_is_no_classifier_is_refused_by_its_likelihood(kind, reader):
    likelihood, returned, says = NO_CLASSES[kind]
    remedy = "sigmoid" if kind == "several labels" else REMEDIES[reader]
    with pytest.raises(ValueError, match=f"^{reader}.*the likelihood at observed site 'obs', {says}.*{remedy}"):
        READERS[reader](observing(likelihood, returned))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_of_several_observed_sites_one_is_named(read):
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Bernoulli(logits=3.0 * x @ w))
            pyro.sample("size", dist.Normal(x @ w, 1.0))

    with pytest.raises(ValueError, match="observes 'kind', 'size': name the one that is meant, return_site='kind'"):
        read(model)
    torch.manual_seed(0)
    assert read(model, return_site="kind").isfinite().all()
    with pytest.raises(ValueError, match="'size', Normal, is a regression"):
        read(model, return_site="size")


def test_an_attack_on_a_guide_of_a_model_of_probabilities_is_that_on_its_logits():
    away = torch.where(Y == 1, -1.0, 1.0).unsqueeze(1) * torch.tensor([1.0, -1.0])
    for form in ("probabilities", "other logits", "one logit"):
        model = observing(*CLASSES[form])
        classifier = GuideClassifier(model, lambda x: pyro.sample("w", dist.Delta(torch.tensor([1.0, -0.5])).to_event(1)))
        torch.testing.assert_close(FGSM(0.1, clip=None)(classifier, X, Y), X + 0.1 * away)


def test_bayes_adapter_regularises_a_model_that_returns_nothing_and_refuses_a_regression_before_training():
    settings = {"num_epochs": 1, "uncertainty": ab.UncertaintyRegularizer(eps=0.1)}
    weights = {"w": torch.ones(2)}
    model = observing(lambda f: dist.Categorical(logits=two(f)), lambda f: None)
    assert ab.bayes_adapter(model, weights, DataLoader(TensorDataset(X, Y), 3), **settings).losses[0] > 0
    loader = DataLoader(TensorDataset(X, Y.float()), 3)
    with pytest.raises(ValueError, match=r"'obs', Normal, is a regression.*leave uncertainty= out"):
        ab.bayes_adapter(observing(*NO_CLASSES["mean and scale"][:2]), weights, loader, **settings)

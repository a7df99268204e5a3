"""Two classes by one logit, through everything that takes a classifier: the same as the two logits (0, f)."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_advbayes as ab
from models.logistic_regression import LogisticRegression
from pyro_advbayes import diagnostics
from pyro_advbayes.attacks import APGD, FGSM, IFGSM, MIM, PGD, WRM, AdversarialDistribution, CarliniWagner, Square, Uniform, evaluate

DRAWS, N, D = 10, 24, 5
ATTACKS = [
    FGSM(0.1),
    IFGSM(0.1),
    PGD(0.1, steps=5),
    PGD(0.1, steps=5, loss="margin"),
    PGD(0.1, steps=5, objective="mean_loss"),
    PGD(0.5, steps=5, norm="l2"),
    MIM(0.1, steps=5),
    APGD(0.1, steps=8),
    APGD(0.1, steps=8, loss="margin"),
    WRM(steps=3),
    AdversarialDistribution(0.1, steps=3),
    CarliniWagner(steps=8),
    Square(0.1, queries=20),
    Uniform(0.1),
]


def two_logits(x, y=None):
    """``LogisticRegression`` as a Categorical of two classes, of the same sites."""
    w = pyro.sample("net.weight", dist.Normal(torch.zeros(1, D), 1.0).to_event(2))
    b = pyro.sample("net.bias", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    f = (x @ w.T + b).squeeze(-1)
    logits = torch.stack([torch.zeros_like(f), f], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
    return logits


@pytest.fixture
def pair():
    samples = {"net.weight": 4 * torch.randn(DRAWS, 1, D), "net.bias": torch.randn(DRAWS, 1) - 2.0}
    one, two = (ab.PosteriorClassifier(model, samples) for model in (LogisticRegression(D), two_logits))
    x = torch.rand(N, D)
    return one, two, x, torch.bernoulli(two(x).exp()[:, 1]).long()


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_attack_on_one_logit_is_that_on_two(pair, attack):
    one, two, x, y = pair
    attacked = []
    for classifier in (one, two):
        pyro.set_rng_seed(5)
        attacked.append(attack(classifier, x, y))
    torch.testing.assert_close(*attacked, rtol=1e-4, atol=1e-5)
    assert not torch.equal(attacked[0], x)


def test_an_attack_on_one_logit_moves_against_the_weights(pair):
    one, _, x, y = pair
    single = ab.PosteriorClassifier(one.model, {name: value[:1] for name, value in one.posterior_samples.items()})
    away = torch.where(y == 1, -1.0, 1.0).unsqueeze(1) * single.posterior_samples["net.weight"][0].sign()
    torch.testing.assert_close(FGSM(0.1)(single, x, y), (x + 0.1 * away).clamp(0, 1))


def test_evaluation_counts_one_logit_as_two(pair):
    one, two, x, y = pair
    reports = []
    for classifier in (one, two):
        pyro.set_rng_seed(5)
        reports.append(evaluate(classifier, x, y, [FGSM(0.1), PGD(0.1, steps=5), Square(0.1, queries=20)]))
    assert torch.equal(reports[0].clean_right, reports[1].clean_right) and torch.equal(reports[0].right, reports[1].right)
    assert reports[0].accuracy == float((one(x).argmax(-1) == y).double().mean()) and not reports[0].warnings


def test_a_ratio_of_three_logits_is_refused_with_what_serves_two_classes(pair):
    one, _, x, y = pair
    for attack in (PGD(0.1, loss="dlr"), APGD(0.1, loss="dlr")):
        with pytest.raises(
            ValueError, match=r"loss='dlr' compares three logits, but the classifier has 2 classes: take 'cross_entropy' or"
        ):
            attack(one, x, y)


def test_a_zero_gradient_of_two_classes_is_not_answered_with_the_ratio_of_three():
    samples = {"net.weight": torch.full((2, 1, D), 1e4), "net.bias": torch.full((2, 1), 1e4)}
    classifier = ab.PosteriorClassifier(LogisticRegression(D), samples)
    with pytest.warns(UserWarning, match=r"exactly zero at 6 of 6 inputs.*Try loss='margin', and a gradient-free"):
        evaluate(classifier, torch.rand(6, D), torch.ones(6, dtype=torch.long), [FGSM(0.1)])


def test_labels_as_a_bernoulli_has_them_are_refused_with_the_remedy(pair):
    one, _, x, y = pair
    for labels, dtype in ((y.float(), "float32"), (y.bool(), "bool")):
        with pytest.raises(ValueError, match=rf"labels must be a tensor of integers, not torch.{dtype}: give y.long\(\)"):
            FGSM(0.1)(one, x, labels)
        with pytest.raises(ValueError, match=rf"labels must be a tensor of integers, not torch.{dtype}: give labels.long\(\)"):
            diagnostics.ece(one(x).exp(), labels)
    with pytest.raises(ValueError, match=r"not torch.float32$"):  # for which there is no such remedy
        FGSM(0.1)(one, x, torch.full((N,), 0.5))


def test_metrics_of_one_logit_are_those_of_two_classes(pair):
    one, two, x, y = pair
    p = torch.stack([(x @ w.T + b).sigmoid().squeeze(-1) for w, b in zip(*one.posterior_samples.values(), strict=True)])
    mean = p.mean(0)
    probs = torch.cat(list(one.log_probs(x))).exp()
    torch.testing.assert_close(probs[..., 1], p)
    assert diagnostics.nll(probs, y) == pytest.approx(-dist.Bernoulli(mean).log_prob(y.float()).mean().item(), rel=1e-5)
    assert diagnostics.accuracy(probs, y) == ((mean > 0.5) == y.bool()).double().mean().item()
    assert diagnostics.brier(probs, y) == pytest.approx(2 * (mean - y).square().mean().item(), rel=1e-5)
    torch.testing.assert_close(diagnostics.predictive_entropy(probs), dist.Bernoulli(mean).entropy())
    torch.testing.assert_close(diagnostics.mutual_information(probs), dist.Bernoulli(mean).entropy() - dist.Bernoulli(p).entropy().mean(0))
    confident = torch.where(mean > 0.5, mean, 1 - mean)
    one_bin = abs(confident.mean().item() - diagnostics.accuracy(probs, y))
    assert diagnostics.ece(probs, y, num_bins=1) == pytest.approx(one_bin, rel=1e-4)
    assert diagnostics.draw_quality(one.log_probs(x), y).mean == diagnostics.draw_quality(two.log_probs(x), y).mean


def test_active_learning_asks_for_the_labels_of_a_bernoulli():
    """The labels are floats, as the model's likelihood has them, from the pool to the fit."""
    x = torch.randn(200, D)
    y = torch.bernoulli((x @ torch.linspace(-3, 3, D)).sigmoid())
    seen = []

    def fit(x, y):
        seen.append((len(y), y.dtype))
        mcmc = ab.SGMCMC(ab.SGLD(LogisticRegression(D), step_size=1e-2), 30, 30, 1, disable_progbar=True)
        mcmc.run(x, y)
        return ab.PosteriorClassifier(LogisticRegression(D), mcmc.get_samples())

    curve = ab.active_learning(fit, (x[:100], y[:100]), (x[100:], y[100:]), num_rounds=4, per_round=10, disable_progbar=True)
    assert seen == [(4, torch.float32), (14, torch.float32), (24, torch.float32), (34, torch.float32), (44, torch.float32)]
    assert curve.accuracy[0, -1] > 0.75

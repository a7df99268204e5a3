"""What is wrong is refused before any work, in one sentence that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import (
    APGD,
    FGSM,
    IFGSM,
    MIM,
    PGD,
    WRM,
    AdversarialDistribution,
    CarliniWagner,
    FeatureAttack,
    GuideClassifier,
    OneStepCarliniWagner,
    Square,
    Uniform,
    evaluate,
)
from tests.attacks.posteriors import examples, posterior


@pytest.mark.parametrize("kind", [Uniform, FGSM, IFGSM, MIM, PGD, APGD, Square, AdversarialDistribution])
@pytest.mark.parametrize("eps", [0, -0.1, float("inf"), float("nan"), "0.1", True])
def test_a_radius_that_is_no_positive_number_is_refused(kind, eps):
    with pytest.raises(ValueError, match=r"eps=.*finite number > 0"):
        kind(eps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(0.1, norm="l1"), r"norm='l1': choose one of 'linf', 'l2'"),
        (lambda: PGD(0.1, loss="hinge"), r"loss='hinge': choose one of 'cross_entropy', 'margin', 'dlr'"),
        (lambda: PGD(0.1, objective="mean"), r"objective='mean': choose one of 'loss_of_mean', 'mean_loss'"),
        (lambda: PGD(0.1, clip=(1.0, 0.0)), r"clip=\(1.0, 0.0\).*low < high"),
        (lambda: PGD(0.1, eot=0), r"eot=0: an int >= 1"),
        (lambda: PGD(0.1, batch_size=0), r"batch_size=0: an int >= 1"),
        (lambda: PGD(0.1, steps=0), r"steps=0"),
        (lambda: PGD(0.1, steps=1.5), r"steps=1.5"),
        (lambda: PGD(0.1, step_size=0.0), r"step_size=0.0: a finite number > 0"),
        (lambda: PGD(0.1, restarts=2, random_start=False), r"restarts=2 would all be the same"),
        (lambda: IFGSM(0.1, step_size=-1.0), r"step_size=-1.0"),
        (lambda: MIM(0.1, decay=0.0), r"decay=0.0"),
        (lambda: WRM(0.0), r"strength=0.0"),
        (lambda: AdversarialDistribution(0.1, steps=0), r"steps=0: an int >= 1"),
        (lambda: AdversarialDistribution(0.1, num_samples=0), r"num_samples=0: an int >= 1"),
        (lambda: AdversarialDistribution(0.1, step_size=0.0), r"step_size=0.0: a finite number > 0"),
        (lambda: AdversarialDistribution(0.1, init_scale=0.0), r"init_scale=0.0: a finite number > 0"),
        (lambda: AdversarialDistribution(0.1, entropy_weight=-0.1), r"entropy_weight=-0.1: a finite number >= 0"),
        (lambda: AdversarialDistribution(0.1, norm="l2"), r"norm='l2': tanh fills the ball of the maximum norm only: leave norm='linf'"),
        (lambda: Square(0.1, share=0.0), r"share=0.0"),
        (lambda: Uniform(0.1, tries=0), r"tries=0"),
        (lambda: CarliniWagner(confidence=-1.0), r"confidence=-1.0"),
        (lambda: CarliniWagner(first_c=0.0), r"first_c=0.0"),
        (lambda: OneStepCarliniWagner(targeted=True), r"one published form"),
        (lambda: FeatureAttack(0.1, "0", targeted=True), r"FeatureAttack uses no labels"),
        (lambda: FeatureAttack(0.1, "0", towards=torch.zeros(2, 3), batch_size=1), r"batch_size cannot be combined with towards"),
        (lambda: GuideClassifier(lambda x: x, lambda x: None, num_samples=0), r"num_samples=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


X, Y = torch.rand(5, 6), torch.tensor([0, 1, 2, 3, 0])
PLAIN = nn.Linear(6, 4)


class NotANumber(nn.Module):
    def forward(self, x):
        logits = PLAIN(x)
        return torch.where(torch.arange(len(x)).unsqueeze(1) == 3, torch.nan, logits)


GOOD = posterior(4, dtype=torch.float)[0]


def badly_drawn():
    """A posterior of which one late draw is NaN."""
    classifier, _ = posterior(4, dtype=torch.float, chunk_size=1)
    next(classifier.buffers())[3] = torch.nan
    return classifier


CALLS = [
    lambda *a: FGSM(0.1)(*a),
    lambda *a: Uniform(0.1)(*a),
    lambda *a: evaluate(*a, [FGSM(0.1)]),
    lambda *a: AdversarialDistribution(0.1).fit(*a),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("classifier", "x", "y", "message"),
    [
        (PLAIN, X, Y + 1, r"labels run from 1 to 4, but the classifier has the classes 0 to 3"),
        (PLAIN, X, Y - 1, r"labels run from -1 to 2"),
        (GOOD, X, Y + 1, r"labels run from 1 to 4, but the classifier has the classes 0 to 3"),
        (PLAIN, X, Y.float(), r"labels must be a tensor of integers, not torch.float32"),
        (PLAIN, X, Y[:4], r"labels must be \[5\], one for each input, not \[4\]"),
        (PLAIN, X + 0.5, Y, r"inputs run from .* clip=\(0.0, 1.0\)"),
        (PLAIN, X * torch.nan, Y, r"inputs run from nan to nan"),
        (PLAIN, (255 * X).byte(), Y, r"inputs must be a tensor of floating type .* not torch.uint8 \(5, 6\)"),
        (PLAIN, X[0, 0], Y, r"inputs must be a tensor of floating type \[N, ...\]"),
        (PLAIN, X[:0], Y[:0], r"with one row or more"),
        (NotANumber(), X, Y, r"gives NaN or infinite logits for 1 of 5 inputs, the first in row 3"),
        (badly_drawn(), X, Y, r"gives NaN or infinite logits for 5 of 5 inputs"),
        (lambda x: x[:, 0], X, Y, r"must give logits \[N, K\].*it gave \(5,\)"),
        (lambda x: PLAIN(x).unsqueeze(0), X, Y, r"must give logits \[N, K\].*it gave \(1, 5, 4\)"),
        (lambda x: PLAIN(x)[:, :1], X, Y, r"K >= 2 classes; it gave \(5, 1\)"),
        (lambda x: PLAIN(x).argmax(-1), X, Y, r"tensor of logits \[N, K\], not torch.int64"),
        (nn.Sequential(nn.BatchNorm1d(6), PLAIN), X, Y, r"layer '0' \(BatchNorm1d\) is in training mode.*\.eval\(\)"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, classifier, x, y, message):
    with pytest.raises(ValueError, match=message):
        call(classifier, x, y)


def test_gradients_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"does not depend on the inputs in a way that can be differentiated"):
        PGD(0.1)(lambda x: PLAIN(x.detach()), X, Y)
    with pytest.raises(ValueError, match=r"does not depend on the inputs"):
        PGD(0.1)(lambda x: PLAIN(x).detach(), X, Y)


def test_gradients_that_are_nan_are_refused():
    def root(x):
        return torch.stack([(x - 0.6).square().sum(1).sqrt(), x[:, 0]], -1)

    x = torch.tensor([[0.2, 0.1], [0.6, 0.6]])
    with pytest.raises(ValueError, match=r"gradients of the loss are NaN or infinite for 1 of 2 inputs"):
        PGD(0.1, random_start=False)(root, x, torch.tensor([0, 1]))


def test_the_ratio_of_logits_needs_three_classes():
    with pytest.raises(ValueError, match=r"loss='dlr' compares three logits, but the classifier has 2 classes"):
        APGD(0.1, loss="dlr")(nn.Linear(6, 2), X, Y % 2)
    two_classes, _ = posterior(4, (6, 8, 2), dtype=torch.float)
    for objective in ("loss_of_mean", "mean_loss"):
        with pytest.raises(ValueError, match=r"loss='dlr' compares three logits, but the classifier has 2 classes"):
            PGD(0.1, loss="dlr", objective=objective)(two_classes, X, Y % 2)
        PGD(0.1, steps=1, objective=objective)(two_classes, X, Y % 2)
    assert [recorded.replays.chunk > 1 for recorded in two_classes._recorded.values()] == [True] * len(two_classes._recorded)


@pytest.mark.parametrize("attack", [Square(0.1, queries=20), Uniform(0.1, tries=20), PGD(0.1, restarts=2), CarliniWagner()], ids=repr)
def test_predictions_that_become_nan_are_no_success(attack):
    calls = []

    def fails_later(x):
        calls.append(1)
        return PLAIN(x) if len(calls) < 8 else PLAIN(x) * torch.nan

    with pytest.raises(ValueError, match=r"NaN or infinite"):
        attack(fails_later, X, PLAIN(X).argmax(1))


def test_attacks_on_a_loss_say_what_they_need():
    with pytest.raises(ValueError, match=r"the loss must be \[5\], one number for each input, not \(\)"):
        PGD(0.1).on_loss(lambda x: x.sum(), X)
    with pytest.raises(ValueError, match=r"CarliniWagner needs more than a loss"):
        CarliniWagner().on_loss(lambda x: x.sum(1), X)
    with pytest.raises(ValueError, match=r"targeted=True has no meaning without labels"):
        PGD(0.1, targeted=True).on_loss(lambda x: x.sum(1), X)
    for setting in ({"loss": "margin"}, {"objective": "mean_loss"}, {"eot": 2}, {"batch_size": 3}):
        with pytest.raises(ValueError, match=rf"{next(iter(setting))}=.* is for classifiers"):
            PGD(0.1, **setting).on_loss(lambda x: x.sum(1), X)
    with pytest.raises(ValueError, match=r"inputs run from"):
        PGD(0.1).on_loss(lambda x: x.sum(1), X + 1)


def test_layers_that_are_not_there_or_give_no_features_are_refused():
    classifier, _ = posterior(2, dtype=torch.float)
    x, y = examples(dtype=torch.float)
    with pytest.raises(ValueError, match=r"layer='conv': the network has 'net', 'net.0'"):
        FeatureAttack(0.1, "conv")(classifier, x, y)
    with pytest.raises(ValueError, match=r"needs the network as a torch.nn.Module"):
        FeatureAttack(0.1, "conv")(lambda inputs: PLAIN(inputs), X, Y)
    with pytest.raises(ValueError, match=r"towards must be \(10, 6\), like the inputs, not \(1, 6\)"):
        FeatureAttack(0.1, "net.1", towards=x[:1])(classifier, x, y)


WITH_GRADIENTS = (
    FGSM(0.1),
    PGD(0.1),
    APGD(0.1, loss="dlr"),
    CarliniWagner(),
    OneStepCarliniWagner(),
    FeatureAttack(0.1, "net.1"),
    AdversarialDistribution(0.1),
)


@pytest.mark.parametrize("attack", [*WITH_GRADIENTS, Square(0.1)], ids=str)
def test_in_inference_mode_only_an_attack_without_gradients_runs(attack):
    classifier, _ = posterior(2, dtype=torch.float)
    x, y = examples(dtype=torch.float)
    with torch.inference_mode():
        if isinstance(attack, Square):
            assert attack(classifier, x, y).shape == x.shape
        else:
            with pytest.raises(RuntimeError, match=r"needs gradients.*torch.no_grad\(\)"):
                attack(classifier, x, y)
    with torch.no_grad():
        assert attack(classifier, x, y).shape == x.shape


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        ([], r"one or more attacks"),
        (["pgd"], r"attacks\[0\]='pgd': an Attack is needed"),
        ([PGD(0.1, targeted=True)], r"evaluate counts what stays right"),
    ],
)
def test_evaluations_without_sense_are_refused(attacks, message):
    with pytest.raises(ValueError, match=message):
        evaluate(PLAIN, X, Y, attacks)

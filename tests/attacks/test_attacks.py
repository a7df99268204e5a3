"""What is true of every attack."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

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
    OneStepCarliniWagner,
    Square,
    Uniform,
)
from pyro_advbayes.attacks.base import BallAttack, Best
from pyro_advbayes.attacks.geometry import SIZES
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior

EPS = 0.1
QUICK = [
    Uniform(EPS, tries=2),
    Uniform(EPS, norm="l2"),
    FGSM(EPS),
    FGSM(EPS, norm="l2"),
    IFGSM(EPS, 3),
    MIM(EPS, 3),
    MIM(EPS, 3, norm="l2"),
    PGD(EPS, 3, restarts=2),
    PGD(EPS, 3, norm="l2", loss="dlr"),
    APGD(EPS, 6),
    APGD(EPS, 6, norm="l2", loss="margin", objective="mean_loss"),
    FeatureAttack(EPS, "net.1", 3),
    Square(EPS, 5),
    WRM(1.3, 3),
    CarliniWagner(4, 0.2),
    OneStepCarliniWagner(),
    AdversarialDistribution(EPS, 3, 2),
]


def named(attacks):
    return pytest.mark.parametrize("attack", attacks, ids=repr)


@named(QUICK)
def test_every_attack_keeps_to_its_ball_and_range_in_a_thousand_random_cases(attack):
    classifier, _ = posterior(3, dtype=torch.float)
    for eps, (low, high) in itertools.product((1e-3, 0.05, 0.3, 2.0), ((0.0, 1.0), (-1.0, 1.0), (-3.0, 0.5), (0.0, 255.0), (0.4, 0.6))):
        x, y = examples(50, dtype=torch.float)
        corner = torch.rand_like(x) < 0.2
        x = low + (high - low) * torch.where(corner, x.round(), x)
        low, high = x.new_tensor((low, high)).tolist()
        x = x.clamp(low, high)
        setting = replace(attack, clip=(low, high))
        if isinstance(attack, BallAttack):
            setting = replace(setting, eps=eps)
        attacked = setting(classifier, x, y)
        assert attacked.shape == x.shape and attacked.dtype == x.dtype and not attacked.requires_grad
        assert low <= float(attacked.min()) and float(attacked.max()) <= high
        if isinstance(attack, BallAttack):
            rounding = torch.finfo(torch.float).eps * max(abs(low), abs(high), eps) * x[0].numel() ** 0.5
            assert float(SIZES[attack.norm](attacked - x).max()) <= eps + rounding


class Mixed(nn.Module):
    """Layers with modes and buffers, some parameters frozen, some with gradients of an earlier step."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.net.eval()
        self.net[2].train()
        self.train = None
        self.net[0].weight.requires_grad_(False)
        self.net[4].weight.grad = torch.ones(4, 8)

    def forward(self, x):
        return self.net(x)


@named(QUICK)
def test_attacks_leave_the_network_its_mode_its_gradients_and_the_inputs_as_they_were(attack):
    net = Mixed()

    def state():
        tensors = {name: value.clone() for name, value in net.state_dict().items()}
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        return [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()], gradients, tensors

    before = copy.deepcopy(state())
    x, _ = examples(dtype=torch.float)
    y = net(x).argmax(-1)
    x.requires_grad_()
    clean = x.detach().clone()
    with torch.no_grad():
        attacked = attack(net, x, y)
    modes, required, gradients, tensors = state()
    assert (modes, required) == before[:2]
    assert all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(gradients.values(), before[2].values(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors.values(), before[3].values(), strict=True))
    assert torch.equal(x, clean) and x.grad is None and x.requires_grad
    assert not torch.equal(attacked, clean)


@named([FGSM(EPS), IFGSM(EPS, 3), MIM(EPS, 3), PGD(EPS, 3, random_start=False), WRM(1.3, 3), CarliniWagner(4)])
@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
def test_attacks_in_batches_are_those_of_all_inputs_together(attack, objective):
    classifier, _ = posterior(5)
    x, y = examples(10)
    whole = replace(attack, objective=objective)(classifier, x, y)
    torch.testing.assert_close(replace(attack, objective=objective, batch_size=4)(classifier, x, y), whole)


@named([Uniform(EPS), FGSM(EPS), IFGSM(EPS, 3), MIM(EPS, 3), PGD(EPS, 3), APGD(EPS, 3), WRM(1.3, 3), AdversarialDistribution(EPS, 3)])
def test_an_attack_on_a_loss_is_the_attack_on_the_classifier_with_that_loss(attack):
    _, (network,) = posterior(1)
    x, y = examples()
    torch.manual_seed(1)
    expected = attack(network, x, y)
    torch.manual_seed(1)
    found = attack.on_loss(lambda inputs: nn.functional.cross_entropy(network(inputs), y, reduction="none"), x)
    torch.testing.assert_close(found, expected)


@named([a for a in QUICK if a.loss != "dlr" and not isinstance(a, (FeatureAttack, CarliniWagner, OneStepCarliniWagner))])
def test_inputs_may_be_single_numbers(attack):
    x, y = torch.tensor([0.3, 0.45, 0.9]), torch.tensor([0, 0, 1])

    def network(inputs):
        return torch.stack([0.5 - inputs, inputs - 0.5], -1)

    attacked = attack(network, x, y)
    assert attacked.shape == (3,)
    if attack.uses_gradient:
        assert (attacked[:2] > x[:2]).all() and attacked[2] < x[2]


@named([PGD(EPS, 3), Uniform(EPS, tries=3), APGD(EPS, 5), Square(EPS, 5), AdversarialDistribution(EPS, 3)])
def test_random_attacks_follow_the_seed(attack):
    classifier, _ = posterior(3)
    x, y = examples()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attack(classifier, x, y))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@named(
    [
        IFGSM(0.5),
        MIM(0.5, 20),
        PGD(0.3),
        PGD(3.0, norm="l2"),
        APGD(0.5, 50),
        CarliniWagner(100, 0.1),
        Square(0.5, 500),
        AdversarialDistribution(0.5),
    ]
)
def test_targeted_attacks_reach_their_targets(attack):
    net = digits_network()
    x, y = digits_examples(60)
    targets = (y + 3) % 10
    attacked = replace(attack, targeted=True)(net, x, targets)
    assert (net(attacked).argmax(-1) == targets).double().mean() > 0.95
    assert (net(x).argmax(-1) == targets).double().mean() < 0.05


@named(
    [
        FGSM(EPS),
        IFGSM(EPS),
        MIM(EPS),
        PGD(EPS),
        APGD(EPS, 30),
        APGD(EPS, 30, loss="dlr"),
        Square(EPS, 300),
        WRM(1.0),
        AdversarialDistribution(EPS),
    ]
)
@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
def test_attacks_on_a_posterior_do_more_than_noise_of_their_size(attack, objective):
    """A posterior of the trained network's weights with some noise on them."""
    net = digits_network()
    classifier, _ = posterior(5, (64, 32, 10), torch.float)
    for values, trained in zip(classifier.buffers(), net.parameters(), strict=True):
        values.copy_(trained + 0.1 * values)
    x, y = digits_examples()
    attacked = replace(attack, objective=objective)(classifier, x, y)
    noisy = x + (attacked - x).flatten()[torch.randperm(x.numel())].view_as(x)
    accuracy = [float((classifier(inputs).argmax(-1) == y).double().mean()) for inputs in (attacked, noisy)]
    assert accuracy[0] < accuracy[1] - 0.3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_never_weaker_than_fgsm_at_the_same_budget_on_a_smooth_model(norm):
    net = digits_network(nn.Tanh)
    x, y = digits_examples(200)
    for eps in (0.02, 0.05, 0.1, 0.2) if norm == "linf" else (0.2, 0.5, 1.0, 2.0):
        losses, right = [], []
        for attack in (FGSM(eps, norm=norm), PGD(eps, norm=norm, random_start=False), PGD(eps, norm=norm)):
            logits = net(attack(net, x, y)).detach()
            losses.append(nn.functional.cross_entropy(logits, y, reduction="none"))
            right.append(logits.argmax(-1) == y)
        for i in (1, 2):
            assert losses[i].mean() > losses[0].mean()
            assert right[i].sum() <= right[0].sum()


class Beyond(nn.Module):
    """Its second class begins where no input of the range lies."""

    def forward(self, x):
        return torch.stack([x.new_full((len(x),), 1.05), x[:, 0]], -1)


@named([PGD(0.5, 5, restarts=3), APGD(0.5, 10), Square(0.5, 20), Uniform(0.5, tries=20), CarliniWagner(50)])
def test_success_is_judged_where_the_input_is_after_clipping(attack):
    x, y = torch.full((4, 1), 0.9), torch.zeros(4, dtype=torch.long)
    attacked = attack(Beyond(), x, y)
    assert (Beyond()(attacked).argmax(-1) == 0).all()
    if isinstance(attack, CarliniWagner):
        assert torch.equal(attacked, x)  # it knows that it has found nothing
    wider = replace(attack, clip=(0.0, 2.0))(Beyond(), x, y)
    assert (Beyond()(wider).argmax(-1) == 1).all()


@named([Uniform(EPS), PGD(EPS, 2, step_size=0.01)])
def test_of_several_tries_the_best_is_kept_for_every_input(attack):
    """A success before a failure, then the higher loss; that of the first try is among those of all."""
    net = digits_network()
    x, y = digits_examples(50)

    def judged(several):
        torch.manual_seed(3)
        logits = net(several(net, x, y)).detach()
        return logits.argmax(-1) != y, nn.functional.cross_entropy(logits, y, reduction="none")

    once, often = judged(attack), judged(replace(attack, **{"tries" if isinstance(attack, Uniform) else "restarts": 8}))
    assert (often[0] >= once[0]).all()
    same = once[0] == often[0]
    assert (often[1] >= once[1] - 1e-6)[same].all() and (often[1] > once[1] + 1e-6).any()


def test_a_success_is_better_than_a_higher_loss():
    best = Best()
    for value, (loss, success) in enumerate([(1.0, False), (5.0, False), (2.0, True), (3.0, True), (9.0, False), (2.5, True)]):
        best.offer(torch.full((1, 2), float(value)), torch.tensor([loss]), torch.tensor([success]))
        assert best.x.tolist() == [[[0.0, 1.0, 2.0, 3.0, 3.0, 3.0][value]] * 2]


def test_an_attack_is_written_as_it_is_made():
    assert repr(PGD(0.3)) == "PGD(eps=0.3)"
    assert repr(APGD(0.1, 20, loss="dlr", norm="l2")) == "APGD(eps=0.1, steps=20, loss='dlr', norm='l2')"
    assert repr(CarliniWagner()) == "CarliniWagner()"
    assert PGD(0.3) == PGD(0.3, 40) and hash(PGD(0.3)) == hash(PGD(0.3, 40)) and PGD(0.3) != PGD(0.3, 20)

"""Gradients that attacks follow are those of an explicit loop over draws, whatever the loss, the objective and the chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import PGD, OneStepCarliniWagner
from pyro_advbayes.attacks.losses import LOSSES
from pyro_advbayes.attacks.problem import OBJECTIVES, ClassifierProblem
from tests.attacks.posteriors import examples, posterior


def by_hand(networks, x, y, loss, objective, targeted):
    """The definition, by plain autograd over all draws at once."""
    x = x.clone().requires_grad_()
    log_probs = torch.stack([network(x).log_softmax(-1) for network in networks])
    if objective == "mean_loss":
        losses = LOSSES[loss](log_probs, y).mean(0)
    else:
        losses = LOSSES[loss](log_probs.exp().mean(0).log(), y)
    losses = -losses if targeted else losses
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient, (log_probs.exp().mean(0).argmax(-1) == y) == targeted


def check(problem, x, expected):
    for _ in range(3):  # the first time with autograd, then from what is recorded
        check_once(problem, x, expected)


def check_once(problem, x, expected):
    losses, gradient, success = expected
    found = problem.gradient(x, success=True)
    torch.testing.assert_close(found.loss, losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.success, success)
    assert problem.gradient(x).success is None
    loss, success = problem.examine(x)
    torch.testing.assert_close(loss, losses, rtol=1e-11, atol=1e-12)
    assert torch.equal(success, found.success) and not loss.requires_grad


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_a_posterior_are_those_of_a_loop_over_its_draws(loss, objective, chunk_size, targeted):
    classifier, networks = posterior(chunk_size=chunk_size)
    x, y = examples()
    problem = ClassifierProblem(classifier, y, loss, objective, targeted, eot=1)
    check(problem, x, by_hand(networks, x, y, loss, objective, targeted))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss", LOSSES)
def test_expectation_over_transformation_takes_the_calls_of_a_random_classifier_for_draws(loss, objective):
    _, networks = posterior(4)
    turns = itertools.cycle(networks)
    x, y = examples()
    problem = ClassifierProblem(lambda inputs: next(turns)(inputs), y, loss, objective, targeted=False, eot=4)
    check(problem, x, by_hand(networks, x, y, loss, objective, targeted=False))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_objectives_are_one_for_a_plain_network(loss):
    _, networks = posterior(1)
    x, y = examples()
    for objective in OBJECTIVES:
        problem = ClassifierProblem(networks[0], y, loss, objective, targeted=False, eot=1)
        check(problem, x, by_hand(networks, x, y, loss, objective, targeted=False))


class Counted(nn.Module):
    """Counts how often the draws are gone through, and how many chunks are held at a time."""

    def __init__(self, networks):
        super().__init__()
        self.networks, self.passes = networks, 0

    def forward(self, x):
        raise AssertionError("the mean prediction is not needed")

    def log_probs(self, x):
        self.passes += 1
        for network in self.networks:
            yield network(x).log_softmax(-1).unsqueeze(0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cross_entropy_takes_one_pass_over_the_draws(objective):
    classifier = Counted(posterior(5)[1])
    x, y = examples()
    problem = ClassifierProblem(classifier, y, "cross_entropy", objective, targeted=False, eot=1)
    for passes in (1, 2):
        problem.gradient(x, success=True)
        assert classifier.passes == passes
    problem.examine(x)
    assert classifier.passes == 3


class Named(nn.Module):
    """Its layers have the names of a posterior's methods."""

    def __init__(self):
        super().__init__()
        self.log_probs, self.logits, self.gradients = nn.Linear(6, 5), nn.Linear(5, 4), nn.Tanh()

    def forward(self, x):
        return self.logits(self.gradients(self.log_probs(x)))


def test_a_layer_is_not_taken_for_a_method_of_its_name():
    net = Named()
    x, y = examples(dtype=torch.float)
    same = nn.Sequential(net.log_probs, net.gradients, net.logits)
    for attack in (PGD(0.1, 3, random_start=False), OneStepCarliniWagner()):
        torch.testing.assert_close(attack(net, x, y), attack(same, x, y))


def test_draws_of_which_some_are_certain_weigh_as_they_should():
    """Probabilities from e^-800 to 1 within one posterior: the mean's gradient is that of the draws that allow the label."""

    class Extreme(nn.Module):
        def log_probs(self, x):
            for slope in (400.0, -400.0, 1.0):
                yield torch.stack([slope * x[:, 0], -slope * x[:, 0]], -1).log_softmax(-1).unsqueeze(0)

    x = torch.ones(3, 2)
    y = torch.zeros(3, dtype=torch.long)
    found = ClassifierProblem(Extreme(), y, "cross_entropy", "loss_of_mean", targeted=False, eot=1).gradient(x)
    p = torch.tensor(2.0).sigmoid()  # of the mild draw
    torch.testing.assert_close(found.loss, -((1 + p) / 3).log().expand(3))
    torch.testing.assert_close(found.gradient[:, 0], -(2 * p * (1 - p) / (1 + p)).expand(3))
    y = y + 1
    found = ClassifierProblem(Extreme(), y, "cross_entropy", "mean_loss", targeted=False, eot=1).gradient(x)
    torch.testing.assert_close(found.gradient[:, 0], ((800 + 2 * p) / 3).expand(3))

"""Activations moved away from where they were, or towards those of other inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from models.mlp import mlp_network
from pyro_advbayes.attacks import FeatureAttack
from pyro_advbayes.infer.classifier import PosteriorClassifier
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier
from tests.attacks.posteriors import SIZES, digits_examples, digits_network, examples, posterior

EPS = 0.1


def distance(networks, x, reference, layers=3):
    """Mean squared distance of the activations after some layers, over networks, ``[N]``."""
    return sum((net[:layers](x) - net[:layers](reference)).square().sum(1) for net in networks) / len(networks)


def test_a_layer_s_activations_are_those_before_a_layer_that_writes_into_them():
    x, y = digits_examples(10)
    nets = [nn.Sequential(nn.Linear(64, 20), nn.ReLU(inplace=inplace), nn.Linear(20, 10)) for inplace in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    torch.manual_seed(0)
    expected = FeatureAttack(EPS, layer="0")(nets[0], x, y)
    torch.manual_seed(0)
    assert torch.equal(FeatureAttack(EPS, layer="0")(nets[1], x, y), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_activations_of_a_posterior_move_away_further_than_by_chance(norm):
    classifier, networks = posterior(4)
    x, y = examples(20)
    attacked = FeatureAttack(EPS, "net.2", norm=norm)(classifier, x, y)
    start = FeatureAttack(EPS, "net.2", steps=1, step_size=1e-9, norm=norm)
    by_chance = torch.stack([distance(networks, start(classifier, x, y), x) for _ in range(20)])
    assert (distance(networks, attacked, x) > by_chance.mean(0)).all()
    assert distance(networks, attacked, x).mean() > 1.5 * by_chance.mean()


def test_one_step_follows_the_gradient_of_the_mean_distance_over_draws():
    classifier, networks = posterior(4)
    x, y = examples()
    x = 0.4 + 0.2 * x
    torch.manual_seed(2)
    start = x + torch.empty_like(x).uniform_(-EPS, EPS)
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(networks, start, x).sum(), start)
    expected = x + (start.detach() + 0.01 * gradient.sign() - x).clamp(-EPS, EPS)
    torch.manual_seed(2)
    torch.testing.assert_close(FeatureAttack(EPS, "net.2", 1, 0.01)(classifier, x, y), expected)


def test_activations_of_a_network_come_near_to_those_of_other_inputs():
    net = digits_network()
    x, y = digits_examples(40)
    other = x.roll(1, 0)
    attacked = FeatureAttack(0.3, "2", towards=other)(net, x, y)
    assert (distance([net], attacked, other) < 0.6 * distance([net], x, other)).double().mean() > 0.9
    reached = net(other).argmax(-1)
    assert (net(attacked).argmax(-1) == reached).double().mean() > 0.5 + (net(x).argmax(-1) == reached).double().mean()


def test_draws_of_a_guide_with_their_extra_dimensions_do_as_well():
    model = Classifier(bayesianize(mlp_network(SIZES, nn.Tanh)))
    guide = AutoNormal(model)
    x, y = examples(dtype=torch.float)
    guide(x, y)
    classifier = PosteriorClassifier(model, guide=guide, num_samples=3)
    draws = {name: values.unsqueeze(1) for name, values in classifier.posterior_samples.items()}
    results = []
    for samples in (classifier.posterior_samples, draws):
        torch.manual_seed(1)
        results.append(FeatureAttack(EPS, "net.1", 3)(PosteriorClassifier(model, samples), x, y))
    torch.testing.assert_close(*results)


def test_no_hook_is_left_behind():
    net = copy.deepcopy(digits_network())
    x, y = digits_examples(5)
    FeatureAttack(EPS, "2", 2)(net, x, y)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_layer_that_gives_no_features_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.unused = nn.LSTM(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.both(x)[0]

    x, y = examples(dtype=torch.float)
    for layer in ("both", "unused"):
        with pytest.raises(ValueError, match=rf"layer='{layer}' does not give one tensor"):
            FeatureAttack(EPS, layer)(Pair(), x, y)

"""The smallest perturbations that succeed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import PGD, CarliniWagner, OneStepCarliniWagner
from pyro_advbayes.attacks.carlini_wagner import SEARCHES
from pyro_advbayes.attacks.geometry import l2_size
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior


@pytest.mark.parametrize("clip", [None, (-0.5, 1.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_network_the_perturbation_is_the_distance_to_the_boundary(targeted, clip):
    net = nn.Linear(6, 2).double()
    x = torch.rand(20, 6, dtype=torch.double)
    y = net(x).argmax(-1)
    wanted = 1 - y if targeted else y
    attacked = CarliniWagner(150, 0.01, targeted=targeted, clip=clip)(net, x, wanted)
    slope = net.weight[1] - net.weight[0]
    distance = ((net(x)[:, 1] - net(x)[:, 0]) / slope.norm()).abs()
    assert (net(attacked).argmax(-1) != y).all()
    found = l2_size(attacked - x).detach()
    assert (found >= distance * (1 - 1e-6)).all()
    assert (found <= 1.03 * distance + 0.003).all()


def test_perturbations_are_smaller_than_those_that_pgd_needs():
    net = digits_network()
    x, y = digits_examples(60)
    x, y = (t[net(x).argmax(-1) == y] for t in (x, y))
    ours = CarliniWagner(80)(net, x, y)
    assert (net(ours).argmax(-1) != y).all() and 0 <= ours.min() and ours.max() <= 1
    needed = torch.full((len(x),), torch.inf)
    for eps in torch.linspace(0.1, 1.2, 30).tolist():
        theirs = PGD(eps, 15, norm="l2")(net, x, y)
        needed = torch.where(net(theirs).argmax(-1) != y, needed.minimum(l2_size(theirs - x)), needed)
    assert needed.isfinite().all()
    assert l2_size(ours - x).mean() < needed.mean()
    assert (l2_size(ours - x) < needed).double().mean() > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_last_step_counts_in_half_precision_too(dtype):
    net = nn.Linear(6, 2)
    x = torch.rand(20, 6)
    y = net(x).argmax(-1)
    attacked = CarliniWagner(1, 3.0, clip=None, first_c=10.0)(net.to(dtype), x.to(dtype), y)
    assert (net(attacked).argmax(-1) != y).all() and attacked.dtype == dtype


def test_confidence_is_reached():
    net = digits_network()
    x, y = digits_examples(20)
    sizes = []
    for confidence in (0.0, 2.0):
        logits = net(CarliniWagner(60, 0.1, confidence=confidence)(net, x, y))
        others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
        sizes.append((others - logits.gather(1, y.unsqueeze(1)).squeeze(1)).detach())
    assert (sizes[1] >= 2.0 - 1e-5).all() and float(sizes[0].median()) < 0.5


@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
def test_on_a_posterior_the_mean_prediction_is_what_is_changed(objective):
    classifier, _ = posterior(8)
    x, _ = examples(20)
    y = classifier(x).argmax(-1)
    attacked = CarliniWagner(100, 0.05, objective=objective)(classifier, x, y)
    changed = (attacked != x).any(1)
    assert torch.equal(classifier(attacked).argmax(-1) != y, changed)
    assert changed.double().mean() > 0.7


def margins(net, x, y):
    """The largest other logit less the label's."""
    logits = net(x)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return others - logits.gather(1, y.unsqueeze(1)).squeeze(1)


def searched(net, x, y, steps, step_size, first_c, confidence, order):
    """The published search with PyTorch's Adam and autograd; of all successes the nearest in a norm."""
    best, nearest = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype)
    low, high, c = torch.zeros_like(nearest), nearest.clone(), torch.full_like(nearest, first_c)
    for _ in range(SEARCHES):
        point = x.clone().requires_grad_()
        adam, found = torch.optim.Adam([point], step_size), torch.zeros(len(x), dtype=torch.bool)
        for step in range(steps + 1):
            margin = margins(net, point, y)
            with torch.no_grad():
                distance = torch.linalg.vector_norm(point - x, order, dim=1)
                success = (margin > 0) & (margin >= confidence)
                nearer = success & (distance < nearest)
                best[nearer], nearest[nearer] = point[nearer], distance[nearer]
                found |= success
            if step == steps:
                break
            adam.zero_grad()
            ((point - x).square().sum(1) + c * (confidence - margin).clamp_min(0)).sum().backward()
            adam.step()
            with torch.no_grad():
                point.clamp_(0, 1)
        low, high = torch.where(found, low, c), torch.where(found, c, high)
        c = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
    return best


@pytest.mark.parametrize("confidence", [0.0, 0.4])
def test_the_search_is_the_published_one_by_adam_and_autograd(confidence):
    _, (net,) = posterior(1)
    x, _ = examples(12)
    x = 0.3 + 0.4 * x
    y = net(x).argmax(-1)
    settings = {"steps": 25, "step_size": 0.04, "first_c": 0.003, "confidence": confidence}
    expected = searched(net, x, y, **settings, order=2)
    assert (expected != x).any(1).all() and not torch.equal(expected, searched(net, x, y, **settings, order=1))
    torch.testing.assert_close(CarliniWagner(**settings)(net, x, y), expected, rtol=1e-6, atol=1e-7)


def published(networks, x, y):
    """The step as it was published, network by network, by plain autograd."""
    gradients = []
    for network in networks:
        point = x.clone().requires_grad_()
        logits = network(point)
        true = logits.gather(1, y.unsqueeze(1)).sum()
        loss = (true - (logits.sum() - true)).clamp(min=0) + ((point - x).square().sum() + 1e-9).sqrt()
        gradients.append(torch.autograd.grad(loss, point)[0])
    return (x - sum(gradients) / len(gradients) / math.sqrt(2)).clamp(0, 1)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_the_one_step_form_is_the_published_one_also_where_some_networks_give_no_gradient(chunk_size):
    classifier, networks = posterior(8, chunk_size=chunk_size)
    x, y = examples()
    expected = published(networks, x, y)
    with torch.no_grad():
        signs = [float(network(x).gather(1, y.unsqueeze(1)).sum() * 2 - network(x).sum()) > 0 for network in networks]
    assert 0 < sum(signs) < 8
    torch.testing.assert_close(OneStepCarliniWagner()(classifier, x, y), expected)
    torch.testing.assert_close(OneStepCarliniWagner()(networks[0], x, y), published(networks[:1], x, y))

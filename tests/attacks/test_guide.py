"""A classifier that draws its weights at every call, and what attacks on it need."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_advbayes.attacks import PGD, GuideClassifier
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier
from tests.attacks.posteriors import digits_examples, digits_network


@pytest.fixture
def guided():
    """A guide around the trained network's weights."""
    net = digits_network()
    model = Classifier(bayesianize(net))
    locs = {f"net.{name}": p.detach() for name, p in net.named_parameters()}
    guide = AutoNormal(model, init_loc_fn=lambda site: locs.get(site["name"], torch.zeros(())), init_scale=0.3)
    x, y = digits_examples()
    guide(x, y)
    return model, guide, x, y


def test_every_call_draws_anew_and_many_draws_are_their_mean(guided):
    model, guide, x, _ = guided
    once = GuideClassifier(model, guide)
    assert not torch.allclose(once(x), once(x))
    torch.testing.assert_close(once(x).exp().sum(-1), torch.ones(len(x)))
    several = GuideClassifier(model, guide, num_samples=5)
    pyro.set_rng_seed(1)
    mean = several(x)
    pyro.set_rng_seed(1)
    draws = torch.cat(list(several.log_probs(x)))
    assert draws.shape == (5, len(x), 10)
    torch.testing.assert_close(mean, draws.exp().mean(0).log(), rtol=1e-4, atol=1e-5)


def test_no_site_reaches_handlers_outside(guided):
    model, guide, x, _ = guided
    trace = pyro.poutine.trace(GuideClassifier(model, guide)).get_trace(x)
    assert set(trace.nodes) == {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
def test_averaging_over_draws_makes_a_stronger_attack(guided, objective):
    model, guide, x, y = guided
    judge = GuideClassifier(model, guide, num_samples=30)
    right = []
    for eot in (1, 15):
        attacked = PGD(0.08, 5, eot=eot, objective=objective)(GuideClassifier(model, guide), x, y)
        right.append(int((judge(attacked).argmax(-1) == y).sum()))
    assert int((judge(x).argmax(-1) == y).sum()) > 90
    # a binomial count of 100 differs by 7 at most within two standard errors of both
    assert right[1] < right[0] - 7


def test_several_draws_a_call_are_averaged_as_well():
    calls = []

    def guide(x):
        calls.append(len(x))
        return {"w": pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))}

    def model(x):
        return nn.functional.pad((x[:, :1] - 0.5) * pyro.sample("w", pyro.distributions.Normal(0.0, 1.0)), (0, 1))

    x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.long)
    PGD(0.1, 3, eot=2)(GuideClassifier(model, guide, num_samples=5), x, y)
    assert len(calls) == 3 * 2 * 5

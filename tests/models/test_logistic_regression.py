from __future__ import annotations

import math

import pyro
import torch

from models.logistic_regression import LogisticRegression


def test_the_log_density_is_that_of_the_textbook():
    model = LogisticRegression(2, prior_scale=2.0)
    x, y = torch.randn(6, 2), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    weight, bias = torch.tensor([[0.7, -1.2]]), torch.tensor([0.4])
    conditioned = pyro.poutine.condition(model, {"net.weight": weight, "net.bias": bias})
    trace = pyro.poutine.trace(conditioned).get_trace(x, y)
    logits = x @ weight[0] + bias
    probability = 1 / (1 + torch.exp(-logits))
    likelihood = torch.where(y == 1, probability, 1 - probability).log().sum()
    theta = torch.cat([weight[0], bias])
    prior = (-0.5 * (theta / 2).square() - math.log(2 * math.sqrt(2 * math.pi))).sum()
    torch.testing.assert_close(trace.log_prob_sum(), likelihood + prior)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], logits)
    assert [(frame.name, frame.size) for frame in trace.nodes["obs"]["cond_indep_stack"]] == [("data", 6)]


def test_drawn_observations_are_zeros_and_ones_with_the_frequency_of_the_logit():
    model, num = LogisticRegression(1), 4000
    conditioned = pyro.poutine.condition(model, {"net.weight": torch.zeros(1, 1), "net.bias": torch.tensor([1.0])})
    drawn = pyro.poutine.trace(conditioned).get_trace(torch.zeros(num, 1)).nodes["obs"]["value"]
    expected = 1 / (1 + math.exp(-1))
    assert drawn.shape == (num,) and set(drawn.tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / num)

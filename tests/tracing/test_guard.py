"""Recordings are used where they hold, and where they do not one warning says why."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_advbayes as ab
from pyro_advbayes.tracing.guard import Guard, agree

KEEP = torch.tensor([True, False, True])


def counting(body):
    """A model of ``w [3]``, and how often its Python ran."""
    calls = []

    def model(x):
        calls.append(1)
        return body(x, pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)))

    return model, calls


def predict(model, x, draws):
    return ab.Predictive(model, {"w": draws}, return_sites=["_RETURN"])(x)["_RETURN"]


def test_weights_under_a_constant_mask_are_recorded_not_run_draw_by_draw():
    model, calls = counting(lambda x, w: x[:, KEEP] @ w[KEEP])
    x, draws = torch.randn(5, 3), torch.randn(50, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predict(model, x, draws)
    torch.testing.assert_close(found, torch.stack([x[:, KEEP] @ w[KEEP] for w in draws]))
    assert len(calls) <= 3


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda x, w: x[:, 0] * w[w > 0].sum(), "a Python number or a shape depends on values that change"),
        (lambda x, w: x[:, 0] * float(w.numpy().max()), "numpy makes an array"),
        (lambda x, w: x[:, 0] * w.sum().item(), "a Python number or a shape depends on values that change"),
    ],
    ids=["mask", "array", "number"],
)
def test_a_prediction_through_the_handlers_says_why_once(body, why):
    model, calls = counting(body)
    x, draws = torch.randn(5, 3), torch.randn(8, 3)
    with pytest.warns(UserWarning, match=rf"prediction falls back to 'handlers', which is slower.*{why}") as caught:
        found = predict(model, x, draws)
    torch.testing.assert_close(found, torch.stack([body(x, w) for w in draws]))
    assert len(calls) >= 8 and sum("falls back" in str(w.message) for w in caught) == 1


def test_results_agree_to_half_their_digits_and_nan_agrees_with_nan():
    one = torch.tensor([1.0, -2.0, float("nan")])
    assert agree([one], [one * (1 + 1e-4)]) and not agree([one], [one * (1 + 1e-3)])
    assert not agree([one.double()], [one.double() * (1 + 1e-7)]) and not agree([one], [one.nan_to_num()])
    leaf = torch.ones(2, requires_grad=True)
    assert agree([leaf * 2], [leaf + leaf], [leaf])
    assert agree([leaf * 2], [leaf**3 + 1]) and not agree([leaf * 2], [leaf**3 + 1], [leaf])  # alike at 1, with other slopes


@pytest.mark.parametrize(
    ("change", "versions"),
    [
        (lambda net: net.__setitem__(1, nn.Tanh()), False),
        (lambda net: net.train(), False),
        (lambda net: net[0].weight.requires_grad_(False), False),
        (lambda net: setattr(net[0], "bias", nn.Parameter(torch.zeros(2))), False),
        (lambda net: setattr(net[1], "running_mean", torch.ones(2)), False),
        (lambda net: net[1].running_mean.add_(1.0), True),
    ],
    ids=["layer", "mode", "frozen", "parameter", "buffer", "buffer in place"],
)
def test_a_guard_sees_what_changes_in_a_module(change, versions):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    before = Guard([net], versions)
    assert before.state == Guard([net], versions).state
    change(net)
    assert before.state != Guard([net], versions).state

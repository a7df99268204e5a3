"""Rivals of a step of variational inference do the same arithmetic."""

from __future__ import annotations

import contextlib

import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam

from pyro_advbayes import minibatch
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from pyro_advbayes.nn import ExemplarReparameterization
from tests.benchmarks import rows_variational
from tests.benchmarks.measure import Stopwatch
from tests.benchmarks.workloads import BATCH, CONVNET, ROWS, SMALL, data


@pytest.mark.parametrize("mix", [0.0, rows_variational.MIX])
def test_the_step_written_by_hand_learns_what_ours_learns(mix):
    hand = rows_variational.HandWritten(SMALL, torch.device("cpu"), mix)
    start = {f"net.{i}.{kind}": m.detach() for m, (i, kind) in zip(hand.means, (n.split(".") for n in hand.names), strict=True)}
    model, (x, y) = SMALL.model(), data(SMALL.inputs, SMALL.classes, BATCH, torch.device("cpu"))
    sites = list(AutoAdversarialNormal(model)(x, y))
    pyro.clear_param_store()
    guide = AutoAdversarialNormal(model, init_loc_fn=init_to_value(values=dict(zip(sites, start.values(), strict=True))))
    guide(x, y)
    svi = SVI(minibatch(model, size=ROWS), guide, Adam({"lr": 1e-3}), TraceAdversarial_ELBO(mix=mix))
    for seed in range(5):
        torch.manual_seed(seed)
        ours = svi.step(x, y)
        torch.manual_seed(seed)
        assert hand.step(x, y) == pytest.approx(ours, rel=1e-4)
    for mean, (ours, _) in zip(hand.means, guide.parameters_by_site().values(), strict=True):
        torch.testing.assert_close(mean, ours, rtol=1e-3, atol=1e-4)


def test_the_rows_name_what_they_compare():
    watch = Stopwatch(torch.device("cpu"), quick=True)
    compared = [
        c.what for row in (rows_variational.adversarial_step, rows_variational.guide_prediction) for r in row(watch) for c in r.comparisons
    ]
    assert compared == ["TraceAdversarial_ELBO / hand-written PyTorch", *["Pyro's Predictive / Predictive"] * 3]


def test_each_way_to_draw_a_network_for_every_image_estimates_one_gradient():
    x, y = (t[:2] for t in data(CONVNET.inputs, CONVNET.classes, ROWS, torch.device("cpu")))
    parts = [slice(i, i + 1) for i in range(2)]
    ways = (([slice(None)], ExemplarReparameterization), (parts, contextlib.nullcontext))
    found = []
    for way in ways:
        pyro.set_rng_seed(0)  # one start for all
        contender = rows_variational._pyro_gradient(x, y, *way)
        draws = torch.stack([contender.call()[7] for _ in range(40)])  # by the means of the last layer's biases
        found.append((draws.mean(0), draws.std(0) / 40**0.5))
    (expected, its_error), *others = found
    for mean, error in others:
        assert ((mean - expected).abs() < 4 * (error.square() + its_error.square()).sqrt()).all()
        assert (its_error / mean.abs().amax()).max() < 0.1  # the comparison can tell something

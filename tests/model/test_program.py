"""A run of a model at given values: what it draws, observes and hides."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_mean

from pyro_advbayes.kinds import latent_sites, observed_sites, subsampling_plates
from pyro_advbayes.model.program import draw, log_likelihood, run, values_of

Y = torch.tensor([0.5, -1.0, 2.0, 0.0])


def model(y):
    w = pyro.sample("w", dist.Normal(1.0, 1.0))
    v = pyro.sample("v", dist.Normal(w, 1.0))
    pyro.deterministic("sum", w + v)
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("obs", dist.Normal(v, 1.0), obs=y[rows])
    return w * v


def test_given_sites_keep_their_values_and_stay_latent_and_the_others_are_drawn():
    trace = run(model, ((Y,), {}), {"w": torch.tensor(3.0)})
    assert list(latent_sites(trace)) == ["w", "v"] and list(observed_sites(trace)) == ["obs"]
    w, v, product = values_of(trace, ["w", "v", "_RETURN"])
    assert w == 3.0 and product == w * v


def test_the_rows_of_a_plate_are_given_by_its_name():
    trace = run(model, ((Y,), {}), {"data": torch.tensor([3, 0])})
    (plate, rows) = subsampling_plates(trace)["data"]
    assert tuple(plate) == (4, 2) and rows.tolist() == [3, 0]
    assert trace.nodes["obs"]["value"].tolist() == [0.0, 0.5]


def test_the_log_likelihood_is_that_of_the_observed_sites_scaled():
    values = {"w": torch.tensor(0.0), "v": torch.tensor(0.5), "data": torch.tensor([0, 1])}
    expected = 2 * dist.Normal(0.5, 1.0).log_prob(Y[:2]).sum()
    torch.testing.assert_close(log_likelihood(run(model, ((Y,), {}), values)), expected)


def test_handlers_outside_see_a_run_only_if_it_is_not_hidden():
    with poutine.trace() as outer:
        run(model, ((Y,), {}))
    assert not outer.trace.nodes
    with poutine.trace() as outer:
        run(model, ((Y,), {}), hidden=False)
    assert "w" in outer.trace.nodes


def test_without_validation_a_prior_from_before_accepts_any_value():
    prior = dist.Normal(0.0, 1.0, validate_args=True)

    def wrong():
        pyro.sample("w", prior, obs=torch.tensor(float("nan")))

    with pytest.raises(ValueError):
        run(wrong, ((), {})).log_prob_sum()
    assert run(wrong, ((), {}), validated=False).log_prob_sum().isnan()


def test_a_draw_is_that_of_the_strategy():
    values = draw(model, ((Y,), {}), init_to_mean)
    assert {name: float(value) for name, value in values.items()} == {"w": 1.0, "v": 1.0}

"""A model whose plate takes some of its rows is asked about all of them: ``Predictive`` predicts for every input, in order."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_advbayes import SGLD, SGMCMC, Predictive
from tests.small_models import data, subsampling

DRAWS = 6
ROWS = torch.arange(10.0)


def numbered(x, y=None, size=4):
    """Every row's outcome is its number, times a slope, but for little noise."""
    slope = pyro.sample("slope", dist.Normal(1.0, 1e-3))
    shift = pyro.sample("shift", dist.Normal(0.0, 100.0))
    pyro.deterministic("twice", 2 * x)
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        mean = pyro.deterministic("mean", slope * x[rows] + shift)
        pyro.sample("obs", dist.Normal(mean, 1e-3), obs=None if y is None else y[rows])
    return mean


def samples():
    return {"slope": torch.linspace(0.9, 1.1, DRAWS), "shift": torch.zeros(DRAWS)}


@pytest.mark.parametrize("rows", [4, 5, 8, 10])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_every_input_is_predicted_in_order(rows, chunk_size):
    found = Predictive(numbered, samples(), chunk_size=chunk_size)(ROWS[:rows])
    expected = samples()["slope"][:, None] * ROWS[:rows]
    assert set(found) == {"mean", "obs", "twice"}
    assert torch.allclose(found["mean"], expected)
    assert torch.allclose(found["obs"], expected, atol=0.01)
    assert torch.equal(found["twice"].squeeze(), (2 * ROWS[:rows]).expand(DRAWS, rows))


def test_pyros_own_gives_as_many_inputs_as_the_plate_takes_whichever_they_are():
    assert pyro.infer.Predictive(numbered, samples())(ROWS)["obs"].shape == (DRAWS, 4)


@pytest.mark.parametrize("size,rows", [(4, 10), (1, 3), (3, 7)])
def test_the_return_value_has_all_rows_where_it_is_of_rows(size, rows):
    def model(x):
        return numbered(x, size=size)

    found = Predictive(model, samples(), return_sites=["_RETURN"])(ROWS[:rows])["_RETURN"]
    assert torch.allclose(found, samples()["slope"][:, None] * ROWS[:rows])


@pytest.mark.parametrize("inputs", [10, 8])
def test_a_return_value_without_the_rows_of_a_plate_stays_unchanged(inputs):
    def model(x):
        slope = pyro.sample("slope", dist.Normal(1.0, 1.0))
        logits = slope * torch.stack([x, -x], -1)
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("obs", dist.Categorical(logits=logits[rows]))
        return logits

    x = ROWS[:inputs]
    found = Predictive(model, {"slope": samples()["slope"]}, return_sites=["_RETURN", "obs"])(x)
    assert torch.allclose(found["_RETURN"], samples()["slope"][:, None, None] * torch.stack([x, -x], -1))
    assert found["obs"].shape == (DRAWS, len(x))


def test_what_is_drawn_outside_the_plate_is_one_draw_for_all_rows():
    found = Predictive(numbered, {"slope": torch.ones(DRAWS)})(ROWS)
    shift = found["obs"] - ROWS
    assert (shift.std(1) < 0.1).all() and shift.mean(1).std() > 1
    assert torch.allclose(shift.mean(1), found["shift"].reshape(-1), atol=0.01)
    prior = Predictive(numbered, num_samples=DRAWS)(ROWS)
    assert torch.allclose(prior["mean"], prior["slope"].reshape(-1, 1) * ROWS + prior["shift"].reshape(-1, 1))


def test_rows_have_noise_of_their_own_and_results_repeat_under_a_seed():
    results = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        results.append(Predictive(numbered, samples())(ROWS)["obs"])
    noise = results[0] - samples()["slope"][:, None] * ROWS
    assert len(noise.unique()) > 0.9 * noise.numel()
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_observations_and_nested_plates_have_all_rows():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(1.0, 1.0))
        with pyro.plate("outputs", 3, dim=-2), pyro.plate("data", len(x), subsample_size=4, dim=-1) as rows:
            mean = pyro.deterministic("mean", (slope * x[rows]).expand(3, 4))
            pyro.sample("obs", dist.Normal(mean.unsqueeze(-1), 1.0).expand([3, 4, 2]).to_event(1), obs=None if y is None else y[:, rows])

    y = torch.randn(3, 10, 2)
    found = Predictive(model, {"slope": samples()["slope"]})(ROWS, y)
    assert torch.equal(found["obs"], y.expand(DRAWS, 3, 10, 2))
    assert torch.allclose(found["mean"], (samples()["slope"][:, None, None] * ROWS).expand(DRAWS, 3, 10))


def test_gradients_reach_the_inputs():
    x = ROWS.clone().requires_grad_()
    Predictive(numbered, samples(), return_sites=["mean"])(x)["mean"].sum().backward()
    assert torch.allclose(x.grad, samples()["slope"].sum().expand(10))


def test_guides_predict_all_rows_too():
    guide = AutoNormal(pyro.poutine.block(numbered, expose=["slope", "shift"]))
    guide(ROWS)
    found = Predictive(numbered, guide=guide, num_samples=DRAWS)(ROWS)
    assert found["obs"].shape == (DRAWS, 10)


def test_a_posterior_of_a_model_that_subsamples_itself_predicts_all_rows():
    x, y = data()
    mcmc = SGMCMC(SGLD(subsampling, 1e-3), 4, 2, disable_progbar=True)
    mcmc.run(x, y)
    assert Predictive(subsampling, mcmc.get_samples())(x[:25])["obs"].shape == (4, 25)


def test_rows_that_are_named_are_the_rows_that_are_predicted():
    rows = torch.tensor([7, 1, 1, 9])
    found = Predictive(numbered, {**samples(), "data": rows.expand(DRAWS, 4)}, return_sites=["mean"])(ROWS)["mean"]
    assert torch.allclose(found, samples()["slope"][:, None] * ROWS[rows])


def test_fewer_inputs_than_the_plate_takes_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"plate 'data' takes subsample_size=4 of 3 rows.*min\(4, len\(x\)\)"):
        Predictive(numbered, samples())(ROWS[:3])


def test_draws_of_local_latents_that_belong_to_unknown_rows_are_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            local = pyro.sample("local", dist.Normal(x[rows], 1.0))
            pyro.sample("obs", dist.Normal(local, 1.0))

    with pytest.raises(ValueError, match=r"site 'local'.*plate 'data'.*rows"):
        Predictive(model, {"local": torch.randn(DRAWS, 4)})(ROWS)
    drawn = Predictive(model, num_samples=DRAWS)(ROWS)
    assert drawn["local"].shape == drawn["obs"].shape == (DRAWS, 10)


def test_two_plates_that_subsample_themselves_are_refused():
    def model(x):
        slope = pyro.sample("slope", dist.Normal(1.0, 1.0))
        for name in ("first", "second"):
            with pyro.plate(name, len(x), subsample_size=4) as rows:
                pyro.sample(f"obs_{name}", dist.Normal(slope * x[rows], 1.0))

    with pytest.raises(ValueError, match="plates 'first', 'second' all subsample themselves"):
        Predictive(model, {"slope": torch.ones(DRAWS)})(ROWS)

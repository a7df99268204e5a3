"""``minibatch`` scales a data plate to the whole set, in any of Pyro's ways to run a model, and refuses what it would scale wrongly."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam

import pyro_advbayes as ab
from pyro_advbayes.handlers import UnvalidatedMessenger
from tests.small_models import data, logistic, no_plate, sequential, subsampling, weights

X, Y = data()
N = len(X)
VALUES = {"w": torch.tensor([0.3, -0.2, 1.0]), "b": torch.tensor(0.5)}


def log_joint(model, *args):
    return poutine.trace(poutine.condition(model, VALUES)).get_trace(*args).log_prob_sum()


def terms(x, y):
    """log p(w, b), and log p(y | x, w, b) of all rows."""
    prior = dist.Normal(0.0, 1.0).log_prob(torch.cat([VALUES["w"], VALUES["b"].reshape(1)])).sum()
    return prior, dist.Bernoulli(logits=x @ VALUES["w"] + VALUES["b"]).log_prob(y).sum()


@pytest.mark.parametrize("rows", [1, 7, N])
def test_the_data_term_is_scaled_by_n_over_b_and_the_prior_is_not(rows):
    prior, likelihood = terms(X[:rows], Y[:rows])
    torch.testing.assert_close(log_joint(ab.minibatch(logistic, size=N), X[:rows], Y[:rows]), prior + N / rows * likelihood)


def test_the_rows_of_a_batch_are_counted_at_every_call():
    model = ab.minibatch(logistic, size=N)
    for rows in (7, 4, 7):
        prior, likelihood = terms(X[:rows], Y[:rows])
        torch.testing.assert_close(log_joint(model, X[:rows], Y[:rows]), prior + N / rows * likelihood)


def test_it_is_a_context_and_a_decorator_too():
    expected = log_joint(ab.minibatch(logistic, size=N), X[:7], Y[:7])
    torch.testing.assert_close(log_joint(ab.minibatch(size=N)(logistic), X[:7], Y[:7]), expected)
    with ab.minibatch(size=N):
        trace = poutine.trace(logistic).get_trace(X[:7], Y[:7])
    assert trace.nodes["obs"]["scale"] == N / 7 and trace.nodes["w"]["scale"] == 1


def test_a_short_batch_averages_right_over_an_epoch():
    """Batches of 25, 25 and 10 rows, each weighed by its own share of the rows."""
    model = ab.minibatch(logistic, size=N)
    parts = [len(x) / N * log_joint(model, x, y) for x, y in zip(X.split(25), Y.split(25), strict=True)]
    torch.testing.assert_close(sum(parts), log_joint(logistic, X, Y))


def test_an_elbo_of_minibatches_averages_to_that_of_the_full_data():
    guide = AutoNormal(logistic)
    guide(X, Y)
    model = poutine.condition(ab.minibatch(logistic, size=N), VALUES)
    elbo = Trace_ELBO()
    nothing = lambda *args: None  # noqa: E731
    parts = [elbo.loss(model, nothing, x, y) for x, y in zip(X.split(10), Y.split(10), strict=True)]
    assert sum(parts) / 6 == pytest.approx(elbo.loss(poutine.condition(logistic, VALUES), nothing, X, Y), rel=1e-5)
    svi = SVI(ab.minibatch(logistic, size=N), guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(x, y))) for x, y in zip(X.split(10), Y.split(10), strict=True))


def test_a_named_plate_is_the_one_that_is_scaled():
    def model(x, y):
        w = weights()
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("obs", dist.Normal((x @ w).unsqueeze(-1), 1.0), obs=y)

    both = torch.stack([Y, 1 - Y], dim=-1)
    with pytest.raises(ValueError, match=r"'obs' is in 2 plates .*'rows'.*plate=") as caught:
        log_joint(ab.minibatch(model, size=N), X[:7], both[:7])
    assert "'columns'" in str(caught.value)
    prior = dist.Normal(0.0, 1.0).log_prob(VALUES["w"]).sum()
    likelihood = dist.Normal(X[:7] @ VALUES["w"], 1.0).log_prob(both[:7].T).sum()
    torch.testing.assert_close(log_joint(ab.minibatch(model, size=N, plate="rows"), X[:7], both[:7]), prior + N / 7 * likelihood)


def test_a_users_own_scale_and_mask_stay():
    keep = Y[:7] > 0

    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5), poutine.mask(mask=keep):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w + VALUES["b"]), obs=y)

    prior = dist.Normal(0.0, 1.0).log_prob(VALUES["w"]).sum()
    _, likelihood = terms(X[:7][keep], Y[:7][keep])
    torch.testing.assert_close(log_joint(ab.minibatch(model, size=N), X[:7], Y[:7]), prior + 0.5 * N / 7 * likelihood)


def test_deterministic_sites_need_no_plate():
    def model(x, y):
        pyro.deterministic("logits", x @ weights())
        logistic_part = x @ VALUES["w"]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logistic_part), obs=y)

    assert log_joint(ab.minibatch(model, size=N), X[:7], Y[:7]).isfinite()


@pytest.mark.parametrize("size", [0, -1, 60.0, True, None, "60"])
def test_a_size_that_is_no_number_of_rows_is_refused(size):
    with pytest.raises(ValueError, match=r"size=.*: the number of rows in the whole data set, an int >= 1"):
        ab.minibatch(logistic, size=size)


def test_more_rows_than_the_data_set_has_are_refused():
    with pytest.raises(ValueError, match="plate 'data' has 60 rows, more than the data set's size=50"):
        log_joint(ab.minibatch(logistic, size=50), X, Y)


def test_a_model_that_scales_itself_is_not_scaled_again():
    with pytest.raises(ValueError, match=r"plate 'data' subsamples itself \(10 of 60 rows\), so it is scaled already"):
        log_joint(ab.minibatch(subsampling, size=N), X, Y)


def outside(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
    pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.0))


def local(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
        pyro.sample("late", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    "model,says",
    [
        (no_plate, "'obs' is in no plate"),
        (outside, "'total' is outside the data plate 'data'"),
        (local, "'late' is a local latent: it is drawn inside the data plate 'data'"),
        (sequential, "plate 'data' is sequential"),
    ],
)
def test_a_site_that_would_be_scaled_wrongly_is_refused_by_name(model, says):
    with pytest.raises(ValueError, match=says):
        log_joint(ab.minibatch(model, size=N), X, Y)


def test_the_plate_is_found_anew_at_every_call():
    handler = ab.minibatch(size=N)

    def named(name):
        def model(x, y):
            w = weights()
            with pyro.plate(name, len(x)):
                pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

        return model

    for name in ("first", "second"):
        assert log_joint(handler(named(name)), X[:7], Y[:7]).isfinite()


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Normal(torch.zeros(3), 1.0, validate_args=True).to_event(1),
        lambda: dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0, validate_args=True), [dist.transforms.ExpTransform()]),
        lambda: dist.Dirichlet(torch.ones(3), validate_args=True),
    ],
)
def test_a_distribution_that_was_made_with_validation_can_be_run_without(make):
    fn = make()

    def density(value):
        with UnvalidatedMessenger():
            trace = poutine.trace(poutine.condition(lambda: pyro.sample("w", fn), {"w": value})).get_trace()
        return trace.log_prob_sum()

    values = torch.full((4, 3), 1 / 3)
    with pyro.validation_enabled(False):
        batched = torch.func.vmap(density)(values)
    torch.testing.assert_close(batched, torch.stack([fn.log_prob(v).sum() for v in values]))
    with pytest.raises(ValueError, match="support"):  # the distribution itself goes on validating
        fn.log_prob(torch.full((3,), float("nan")))

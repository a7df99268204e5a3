"""Rows of data: shapes that do not fit, plates that hold none, factors of the prior, and observations that a mask covers."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes import attacks
from pyro_advbayes.handlers import covered
from pyro_advbayes.infer import distill
from pyro_advbayes.model.structure import look
from pyro_advbayes.nn import Classifier, bayesianize
from tests.small_models import data, energy, logistic, regression, weights
from tests.test_given import remedied

X, Y = data()
N = len(X)
CLASSES = torch.arange(N) % 3


def sgld(model, batch_size=None, **options):
    return ab.SGLD(model, 1e-3, batch_size=batch_size, backend="handlers", **options)


def run(kernel, *args, **kwargs):
    mcmc = ab.SGMCMC(kernel, 2, 1, 2, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


# ---------------------------------------------------------------------------------------------------------------------- shapes


def three_classes():
    return Classifier(bayesianize(nn.Linear(3, 3)))


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize(
    "model,y,says",
    [
        (logistic, lambda: Y.unsqueeze(-1), ["'obs'", "argument y has shape (60, 1), give y.squeeze(-1)"]),
        (logistic, lambda: Y.long().unsqueeze(-1), ["'obs'", "argument y has shape (60, 1), give y.squeeze(-1).float()"]),
        (three_classes(), lambda: CLASSES.unsqueeze(-1), ["'obs'", "argument y has shape (60, 1), give y.squeeze(-1)"]),
        (three_classes(), lambda: F.one_hot(CLASSES, 3), ["'obs'", "argument y has shape (60, 3), give y.argmax(-1)"]),
        (three_classes(), lambda: F.one_hot(CLASSES, 3).float(), ["'obs'", "argument y has shape (60, 3), give y.argmax(-1)"]),
    ],
    ids=["column", "column of ints", "column of classes", "one-hot", "one-hot in float"],
)
def test_observations_in_another_shape_are_refused_by_shape_and_not_by_number(model, y, says, batch_size):
    with pytest.raises(ValueError) as caught:
        run(sgld(model, batch_size), X, y())
    assert "equally long" not in str(caught.value) and "60 rows" not in str(caught.value)
    remedied(lambda y: run(sgld(model, batch_size), X, y), says, y=y())


def test_a_loaders_observations_in_another_shape_are_refused_by_shape():
    remedied(lambda y: run(sgld(three_classes()), DataLoader(TensorDataset(X, y), 10)), "give y.argmax(-1)", y=F.one_hot(CLASSES, 3))


def rows_in_an_event(x, y, event=True, plate=True):
    mean = x @ weights()
    law = dist.Normal(mean, 1.0).to_event(1) if event else dist.Normal(mean, 1.0)
    if not plate:
        pyro.sample("obs", law, obs=y)
        return
    with pyro.plate("data", len(x)):
        pyro.sample("obs", law, obs=y)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_to_event_over_rows_is_named_and_dropping_it_works(batch_size):
    says = r"'obs'.*\.to_event\(1\) makes all rows one event, which plate 'data' then repeats. Drop it"
    with pytest.raises(ValueError, match=says):
        run(sgld(rows_in_an_event, batch_size), X, Y)
    run(sgld(lambda x, y: rows_in_an_event(x, y, event=False), batch_size), X, Y)


def test_to_event_over_rows_without_a_plate_is_named_under_minibatches_and_right_on_the_full_data():
    model = lambda x, y: rows_in_an_event(x, y, plate=False)  # noqa: E731
    with pytest.raises(ValueError, match=r"no plate follows.*pyro\.plate\('data', len\(x\)\):` and drop \.to_event\(1\)"):
        run(sgld(model, 10), X, Y)
    run(sgld(model), X, Y)


@pytest.mark.parametrize("y", [Y, Y.unsqueeze(-1)], ids=["[N]", "[N, 1]"])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_outputs_of_shape_n_1_are_named_and_squeezing_them_works(y, batch_size):
    def model(x, y, squeeze=False):
        mean = (x @ weights()).unsqueeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean.squeeze(-1) if squeeze else mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"its parameters have shape \(\d+, 1\), which plate 'data' repeats.*\.squeeze\(-1\)"):
        run(sgld(model, batch_size), X, y)
    run(sgld(lambda x, y: model(x, y, squeeze=True), batch_size), X, y.reshape(-1))


@pytest.mark.parametrize("batch_size", [None, 10])
def test_several_outputs_of_a_row_are_refused_with_one_event_as_remedy(batch_size):
    def model(x, y, event=False):
        mean = x * weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1) if event else dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(
        ValueError, match=r"Shape mismatch inside plate\('data'\).*\.to_event\(1\) makes the outputs of a row one event"
    ) as caught:
        run(sgld(model, batch_size), X, X)
    assert "Trace Shapes" not in str(caught.value)
    run(sgld(lambda x, y: model(x, y, event=True), batch_size), X, X)


def test_arguments_of_different_length_are_refused_by_length():
    with pytest.raises(ValueError, match=r"x has 60 rows, y has 59 rows"):
        run(sgld(logistic, 10), X, Y[:-1])


# ----------------------------------------------------------------------------------------------------------- factors of a prior


def with_a_prior_term(x, y, first=True):
    w = weights()
    if first:
        pyro.factor("penalty", -w.abs().sum())
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
    if not first:
        pyro.factor("penalty", -w.abs().sum())


@pytest.mark.parametrize("first", [True, False])
def test_a_factor_of_the_prior_is_not_scaled_with_the_rows(first):
    full, batched = energy(lambda x, y: with_a_prior_term(x, y, first), X, Y)
    torch.testing.assert_close(batched, full)
    kernel = sgld(lambda x, y: with_a_prior_term(x, y, first))
    assert run(kernel, DataLoader(TensorDataset(X, Y), 10)).get_samples()["w"].isfinite().all()


@pytest.mark.parametrize(
    "term",
    [
        lambda x, w: -(x @ w).square().mean(),
        lambda x, w: -(x @ w).square().sum(),
        lambda x, w: -(x @ w).max(),
        lambda x, w: -w.abs().sum() / len(x),
        lambda x, w: -(x @ w).square(),
    ],
    ids=["mean", "sum", "max", "count", "rows"],
)
@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_refused_factor_that_depends_on_the_rows_names_both_remedies(term, batch_size):
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
        pyro.factor("term", term(x, w))

    with pytest.raises(ValueError, match=r"factor 'term' is outside the data plate.*move it into the plate.*belongs to the prior"):
        run(sgld(model, batch_size), X, Y)


def test_a_factor_inside_the_plate_is_scaled_with_its_rows():
    def model(x, y):
        w = weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
            pyro.factor("term", -w.abs().sum().expand(len(x)))

    full, batched = energy(model, X, Y)
    torch.testing.assert_close(batched, full)
    assert ab.Potential(model, (X, Y), batch_size=10, backend="handlers").structure.prior_factors == ()


def test_in_svi_a_factor_of_the_prior_is_named_to_the_handler():
    def step(**options):
        model = ab.minibatch(with_a_prior_term, size=N, **options)
        SVI(model, AutoNormal(with_a_prior_term), Adam({"lr": 0.1}), Trace_ELBO()).step(X[:10], Y[:10])

    with pytest.raises(ValueError, match=r"factor 'penalty'.*move it into the plate.*prior_factors=\['penalty'\]"):
        step()
    step(prior_factors=["penalty"])
    values = {"w": torch.tensor([0.3, -0.2, 1.0])}
    scaled = poutine.trace(poutine.condition(ab.minibatch(with_a_prior_term, size=N, prior_factors=["penalty"]), values)).get_trace(X, Y)
    assert scaled.nodes["penalty"]["scale"] == 1 and scaled.nodes["obs"]["scale"] == 1
    few = poutine.trace(poutine.condition(ab.minibatch(with_a_prior_term, size=N, prior_factors=["penalty"]), values)).get_trace(
        X[:6], Y[:6]
    )
    assert few.nodes["penalty"]["scale"] == 1 and few.nodes["obs"]["scale"] == 10


def test_ensembles_and_adapters_leave_a_factor_of_the_prior_as_it_is(monkeypatch):
    seen = []
    plain = ab.minibatch

    def noted(*args, **kwargs):
        seen.append(kwargs.get("prior_factors"))
        return plain(*args, **kwargs)

    monkeypatch.setattr("pyro_advbayes.infer.ensemble.minibatch", noted)
    monkeypatch.setattr("pyro_advbayes.infer.adapter.minibatch", noted)
    ab.deep_ensemble(with_a_prior_term, (X, Y), num_members=1, num_steps=1, optim=Adam({"lr": 0.1}), batch_size=10)
    ab.bayes_adapter(with_a_prior_term, {"w": torch.zeros(3)}, [(X, Y)], num_data=N, num_epochs=1)
    assert seen == [("penalty",), ("penalty",)]


# ------------------------------------------------------------------------------------------------------------ sequential plates

GROUPS = torch.arange(N) % 3


def by_group(x, group, y):
    w = weights()
    offsets = torch.stack([pyro.sample(f"offset_{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("groups", 3)])
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w + offsets[group], 1.0), obs=y)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
def test_a_sequential_plate_over_groups_is_not_the_data_plate(batch_size):
    few, fewer = ((X[:n], GROUPS[:n], Y[:n]) for n in (batch_size, max(1, batch_size - 1) if batch_size > 1 else 2))
    found = look(by_group, (few, {}), (fewer, {}), (batch_size, len(fewer[0])), N)
    assert (found.scaling, found.plate) == ("minibatch", "data")


def test_under_a_sequential_plate_over_groups_minibatches_average_to_the_full_data():
    full, batched = energy(by_group, X, GROUPS, Y)
    torch.testing.assert_close(batched, full)
    run(sgld(by_group, 3), X, GROUPS, Y)


def test_observations_in_a_sequential_plate_over_groups_are_refused_with_a_plate_of_rows_as_remedy():
    def model(x, group, y):
        w = weights()
        for i in pyro.plate("groups", 3):
            rows = group == i
            with pyro.plate(f"data_{i}", int(rows.sum())):
                pyro.sample(f"obs_{i}", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match=r"no plate follows the number of rows.*'groups' of 3.*pyro\.plate\('data', len\(x\)\)"):
        run(sgld(model, 10), X, GROUPS, Y)


# ------------------------------------------------------------------------------------------------- observations that are missing

MISSING = torch.zeros(N, dtype=torch.bool)
MISSING[[3, 17, 58]] = True


def masked(law, how):
    def model(x, y, seen=None):
        seen = y.isfinite() if seen is None else seen
        if y.dim() > 1 and seen.dim() > 1 and how != "inner mask":
            seen = seen.all(-1)
        mean = x @ weights()
        with pyro.plate("data", len(x)):
            if how == "poutine.mask":
                with poutine.mask(mask=seen):
                    pyro.sample("obs", law(mean), obs=y)
            elif how == "mask":
                pyro.sample("obs", law(mean).mask(seen), obs=y)
            elif how == "inner mask":
                pyro.sample("obs", dist.Normal(mean.unsqueeze(-1), 1.0).expand([len(x), 2]).mask(seen).to_event(1), obs=y)
            else:
                pyro.sample("obs", law(mean), obs=y, obs_mask=seen)

    return model


LAWS = {
    "Normal": (lambda f: dist.Normal(f, 1.0), Y),
    "Bernoulli": (lambda f: dist.Bernoulli(logits=f), Y),
    "Poisson": (lambda f: dist.Poisson(f.exp()), Y),
    "Gamma": (lambda f: dist.Gamma(2.0, f.exp()), Y + 0.5),
    "Categorical": (lambda f: dist.Categorical(logits=torch.stack([f, -f], -1)), Y),
    "Beta": (lambda f: dist.Beta(f.exp(), 1.0), 0.2 + 0.5 * Y),
    "two Normals": (lambda f: dist.Normal(f.unsqueeze(-1), 1.0).expand([len(f), 2]).to_event(1), torch.stack([Y, -Y], -1)),
}


@pytest.mark.parametrize("name,backend", [("Normal", "graph"), ("Categorical", "handlers")])
def test_a_masked_nan_gives_the_energy_and_gradient_of_the_rows_that_are_there(name, backend):
    law, y = LAWS[name]
    holes = torch.where(MISSING, torch.nan, y)
    potential = ab.Potential(masked(law, "mask"), (X, holes), num_chains=2, backend=backend)
    there = ab.Potential(masked(law, "mask"), (X[~MISSING], y[~MISSING]), num_chains=2, backend="handlers")
    state = torch.randn(2, 3)
    torch.testing.assert_close(potential.energy(state), there.energy(state))
    torch.testing.assert_close(potential.gradient(state), there.gradient(state))
    assert potential.backend == backend


@pytest.mark.parametrize("how", ["poutine.mask", "mask"])
@pytest.mark.parametrize("name", LAWS)
def test_nan_under_a_mask_is_accepted_under_minibatches(name, how):
    law, y = LAWS[name]
    holes = torch.where(MISSING.reshape(-1, *(1,) * (y.dim() - 1)), torch.nan, y)
    full, batched = energy(masked(law, how), X, holes)
    torch.testing.assert_close(batched, full)
    assert full.isfinite().all()


def test_nan_in_one_of_two_outputs_is_covered_by_a_mask_under_the_event():
    y = torch.stack([Y, -Y], -1)
    y[3, 1] = torch.nan
    full, batched = energy(masked(None, "inner mask"), X, y)
    torch.testing.assert_close(batched, full)
    with pytest.raises(ValueError, match="argument y holds 1 non-finite"):
        run(sgld(lambda x, y: masked(LAWS["two Normals"][0], "mask")(x, y, torch.ones(len(x)).bool()), 10), X, y)


def test_obs_mask_covers_nan_on_the_full_data_and_is_refused_as_a_local_latent_under_minibatches():
    holes = torch.where(MISSING, torch.nan, Y)
    model = masked(LAWS["Normal"][0], "obs_mask")
    assert run(sgld(model), X, holes).get_samples()["w"].isfinite().all()
    with pytest.raises(ValueError, match=r"'obs_unobserved' is a local latent.*obs_mask= adds such a site, too; poutine\.mask adds none"):
        run(sgld(model, 10), X, holes)


def test_a_mask_that_is_an_argument_covers_nan_and_a_chain_goes_on_bit_by_bit_as_with_any_number_there():
    law, y = LAWS["Normal"]
    samples = []
    for value in (torch.nan, 7.0):
        pyro.set_rng_seed(0)
        samples.append(run(sgld(masked(law, "mask"), 10), X, torch.where(MISSING, value, y), ~MISSING).get_samples()["w"])
    assert torch.equal(*samples)


@pytest.mark.parametrize("row", [3, 17])
def test_nan_that_no_mask_covers_is_refused_wherever_it_is(row):
    holes, seen = torch.where(MISSING, torch.nan, Y), ~MISSING
    seen[row] = True
    model = masked(LAWS["Normal"][0], "mask")
    for batch_size in (None, 10):
        with pytest.raises(
            ValueError, match=r"argument y holds 3 non-finite values .*clean the data.*poutine\.mask\(mask=y\.isfinite\(\)\)"
        ):
            run(sgld(model, batch_size), X, holes, seen)
    x = X.clone()
    x[row] = torch.nan
    with pytest.raises(ValueError, match="argument x holds 3 non-finite values"):
        run(sgld(model, 10), x, Y, ~MISSING)


def test_a_plate_that_subsamples_itself_finds_what_is_missing_in_any_of_its_rows():
    def model(x, y, seen):
        w = weights()
        with pyro.plate("data", len(x), subsample_size=7) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0).mask(seen[rows]), obs=y[rows])

    holes = torch.where(MISSING, torch.nan, Y)
    assert run(sgld(model), X, holes, ~MISSING).get_samples()["w"].isfinite().all()
    seen = ~MISSING
    seen[58] = True
    with pytest.raises(ValueError, match="argument y holds 3 non-finite values"):
        run(sgld(model), X, holes, seen)


@pytest.mark.parametrize("row,backend", [(3, "handlers"), (58, "graph")])
def test_a_loaders_batches_may_hold_nan_that_a_mask_covers_first_or_late(row, backend):
    holes = Y.clone()
    holes[row] = torch.nan
    kernel = ab.SGLD(masked(LAWS["Normal"][0], "mask"), 1e-3, backend=backend)
    mcmc = ab.SGMCMC(kernel, 8, 4, 2, disable_progbar=True)
    mcmc.run(DataLoader(TensorDataset(X, holes), 10))
    assert mcmc.get_samples()["w"].isfinite().all() and not any(mcmc.diagnostics()["divergences"].values())
    with pytest.raises(ValueError, match=rf"tensor 1 in batch {1 + row // 10} of the loader holds 1 non-finite"):
        ab.SGMCMC(sgld(regression), 8, 4, 2, disable_progbar=True).run(DataLoader(TensorDataset(X, holes), 10))


def test_an_ensemble_is_trained_around_what_is_missing():
    law, y = LAWS["Normal"]
    members = []
    for value in (torch.nan, 7.0):
        pyro.set_rng_seed(0)
        args = (X, torch.where(MISSING, value, y), ~MISSING)
        members.append(ab.deep_ensemble(masked(law, "mask"), args, num_members=2, num_steps=5, optim=Adam({"lr": 0.1}), batch_size=10)["w"])
    assert members[0].isfinite().all() and torch.equal(*members)
    with pytest.raises(ValueError, match="argument y holds 3 non-finite values"):
        ab.deep_ensemble(regression, (X, torch.where(MISSING, torch.nan, y)), num_members=1, num_steps=1, optim=Adam({"lr": 0.1}))


@pytest.mark.parametrize("row", [3, 58])
def test_bayes_adapter_is_fitted_around_what_is_missing_in_the_first_batch_or_a_later_one(row):
    law, y = LAWS["Normal"]
    fits = []
    for value in (torch.nan, 7.0):
        pyro.set_rng_seed(0)
        holes, seen = y.clone(), torch.ones(N, dtype=torch.bool)
        holes[row], seen[row] = value, False
        loader = DataLoader(TensorDataset(X, holes, seen), 10)
        fits.append(ab.bayes_adapter(masked(law, "mask"), {"w": torch.ones(3)}, loader, num_epochs=2))
    assert fits[0].losses == fits[1].losses
    assert torch.equal(*(fit.guide.median()["w"] for fit in fits)) and not torch.equal(fits[0].guide.median()["w"], torch.ones(3))
    loader = DataLoader(TensorDataset(X, torch.where(seen, y, torch.nan), torch.ones(N, dtype=torch.bool)), 10)
    with pytest.raises(ValueError, match=rf"tensor 1 in batch {1 + row // 10} of the loader holds 1 non-finite .*poutine\.mask"):
        ab.bayes_adapter(masked(law, "mask"), {"w": torch.ones(3)}, loader)


def test_what_is_not_masked_stays_as_it_is():
    value = torch.tensor([1.0, torch.nan, torch.inf])
    kept = covered(dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])), None, value)
    assert torch.equal(kept, torch.tensor([1.0, 0.0, torch.inf]))
    assert covered(dist.Normal(torch.zeros(3), 1.0), None, value) is value
    assert torch.equal(covered(dist.Normal(torch.zeros(3), 1.0), False, value), torch.zeros(3))


# ------------------------------------------------------------------------------------------------------ nothing below the message


def wrong_rows():
    SVI(ab.minibatch(logistic, size=5), AutoNormal(logistic), Adam({"lr": 0.1}), Trace_ELBO()).step(X, Y)


def unobserved_guide():
    SVI(logistic, ab.AutoAdversarialNormal(logistic), Adam({"lr": 0.1}), Trace_ELBO()).step(X)


def outside_the_range():
    elbo = ab.TraceRobust_ELBO(attacks.FGSM(0.1, clip=(0.0, 0.1)))
    SVI(logistic, AutoNormal(logistic), Adam({"lr": 0.1}), elbo).step(X, Y)


def wrong_draws():
    ab.Predictive(logistic, {"w": torch.zeros(4, 5), "b": torch.zeros(4)})(X)


def another_noise():
    guide = ab.AutoAdversarialNormal(logistic)
    guide(X, Y)
    with ab.BaseNoise({"w": torch.zeros(4), "b": torch.zeros(())}):
        poutine.trace(guide).get_trace(X, Y)


def another_model():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    guide = ab.AutoImplicit(model, generator=distill.MLPGenerator(noise=1, hidden=(2,)))
    distill.APD(guide, num_steps=1, batch_size=5, check_every=None, disable_progbar=True).fit({"w": torch.randn(99, 3)}, X, Y)
    poutine.trace(guide).get_trace(X[:, :2], Y)


@pytest.mark.parametrize("call", [wrong_rows, unobserved_guide, outside_the_range, wrong_draws, another_noise, another_model])
def test_no_table_of_shapes_hangs_under_a_refusal(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "Trace Shapes" not in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_a_refusal_survives_a_copy():
    with pytest.raises(ValueError) as caught:
        wrong_rows()
    assert str(copy.copy(caught.value)) == str(caught.value)


def test_labels_as_vectors_outside_the_classes_are_still_refused():
    def model(x, y):
        logits = x * weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.OneHotCategorical(logits=logits), obs=y)

    y = F.one_hot(CLASSES, 3).float()
    run(sgld(model, 10), X, y)
    y[57] = 1.0
    with pytest.raises(ValueError, match="'obs': 1 of the values in argument y are outside its support"):
        run(sgld(model, 10), X, y)

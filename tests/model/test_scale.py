"""Models whose minibatches no factor takes to the whole data set: what is refused, what says that it is meant, and what is let pass."""

from __future__ import annotations

import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import Adam
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.model.additivity import _rounding
from tests.small_models import data, logistic, mixed, regression, subsampling, weights

X, Y = data()
N = len(X)
CLASSES = 4 - torch.arange(N) % 5


def logits(x):
    return x @ pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 5]).to_event(2))


# ------------------------------------------------------------------------------------------------- what is silently wrong


def scaled_on_top(x, y):
    mean = x @ weights()
    with poutine.scale(scale=N / len(x)), pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=mean), obs=y)


def standardised(x, y):
    mean = ((x - x.mean(0)) / x.std(0)) @ weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=mean), obs=y)


def weighted_classes(x, y):
    f = logits(x)
    weight = len(y) / (5 * torch.bincount(y, minlength=5).float())
    with pyro.plate("data", len(x)), poutine.scale(scale=weight[y]):
        pyro.sample("obs", dist.Categorical(logits=f), obs=y)


def classes_of_the_batch(x, y):
    f = logits(x)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=f[:, : int(y.max()) + 1]), obs=y)


def mean_loss(x, y):
    f = logits(x)
    with pyro.plate("data", len(x)):
        pyro.factor("loss", -cross_entropy(f, y, reduction="none") / len(y))


def process(x, y):
    """A Gaussian process, whose rows depend on each other."""
    length = pyro.sample("length", dist.LogNormal(1.0, 0.1))
    covariance = torch.exp(-((torch.cdist(x, x) / length) ** 2)) + 0.1 * torch.eye(len(x))
    row = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), y[:, None], upper=False).squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.factor("row", dist.Normal(0.0, 1.0).log_prob(row) - torch.linalg.cholesky(covariance).diagonal().log())


def contrastive(x, y):
    similarity = x @ torch.diag(weights()) @ x.mT
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=similarity), obs=torch.arange(len(x)))


WRONG = {
    "scaled on top": (scaled_on_top, (X, Y), r"poutine\.scale"),
    "standardised by the batch": (standardised, (X, Y), "standardised"),
    "class weights of the batch": (weighted_classes, (X, CLASSES), "bincount"),
    "number of classes of the batch": (classes_of_the_batch, (X, CLASSES), r"y\.max\(\)"),
    "mean loss": (mean_loss, (X, CLASSES), "mean"),
    "Gaussian process": (process, (X, Y), "other rows"),
    "contrastive": (contrastive, (X, Y), "other rows"),
}
NUMBERS = r"log-likelihood of \d+ rows is (-?[\d.e+]*\d|nan|-inf), but .* add up to (?:twice )?(-?[\d.e+]*\d|nan|-inf)"


@pytest.mark.parametrize("batch_size", [3, 10, N])
@pytest.mark.parametrize("name", WRONG)
def test_a_likelihood_that_is_no_sum_over_rows_is_refused_with_both_numbers_and_the_cause(name, batch_size):
    model, args, says = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s)(?=.*{NUMBERS})(?=.*{says})(?=.*batch_dependent=True)"):
        ab.Potential(model, args, batch_size=batch_size, backend="handlers")


@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_scale_on_top_is_refused_for_batches_of_one_row_too(batch_size):
    with pytest.raises(ValueError, match=r"poutine\.scale"):
        ab.Potential(scaled_on_top, (X, Y), batch_size=batch_size, backend="handlers")


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_with_a_loader_too(name):
    model, args, says = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){NUMBERS}.*{says}"):
        ab.Potential(model, (DataLoader(TensorDataset(*args), 10, shuffle=True),), backend="handlers")


@pytest.mark.parametrize("options", [{"batch_size": 10}, {}], ids=["batch_size", "loader"])
def test_a_scale_that_is_a_number_is_refused_where_it_is_that_of_the_minibatches(options):
    def model(x, y, scale=N / 10):
        mean = x @ weights()
        with poutine.scale(scale=scale), pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=mean), obs=y)

    args = (X, Y) if options else (DataLoader(TensorDataset(X, Y), 10, shuffle=True),)
    with pytest.raises(ValueError, match=r"'obs' is scaled twice.*N / B = 6.*poutine\.scale"):
        ab.Potential(model, args, backend="handlers", **options)
    ab.Potential(lambda x, y: model(x, y, 2.0), args, backend="handlers", **options)


def test_a_model_that_fails_on_other_rows_says_so():
    def model(x, y):
        f = logits(x)
        with pyro.plate("data", len(x)):
            pyro.factor("loss", -cross_entropy(f, y, weight=torch.bincount(y).float(), reduction="none"))

    with pytest.raises(ValueError, match=r"runs on the first 10 rows and fails on \d others: weight tensor.*batch_dependent=True"):
        ab.Potential(model, (X, CLASSES), batch_size=10, backend="handlers")


def test_rows_sorted_by_class_hide_nothing():
    order = CLASSES.argsort(descending=True)
    for name in ("class weights of the batch", "number of classes of the batch"):
        with pytest.raises(ValueError, match=NUMBERS):
            ab.Potential(WRONG[name][0], (X[order], CLASSES[order]), batch_size=10, backend="handlers")


def test_halves_by_label_show_what_halves_at_random_hide():
    """The rows that are looked at have the labels 0101 and 0001: either half has the largest of the whole, unless they are sorted."""
    with pytest.raises(ValueError, match=NUMBERS):
        ab.Potential(classes_of_the_batch, (X, (torch.arange(N) % 16 == 8).long()), batch_size=10, backend="handlers")


def test_a_draw_without_a_finite_likelihood_is_followed_by_another():
    def model(x, y):
        mean = torch.where(weights().abs().max() < 100.0, -1.0, -torch.inf) / len(x)
        with pyro.plate("data", len(x)):
            pyro.factor("loss", mean.expand(len(x)))

    with pytest.raises(ValueError, match=NUMBERS):
        far = init_to_value(values={"w": torch.full((3,), 200.0)})
        ab.Potential(model, (X, Y), batch_size=10, backend="handlers", init_strategy=far)


def test_a_half_without_a_finite_likelihood_is_refused():
    def model(x, y):
        f = x @ weights()
        with pyro.plate("data", len(x)):
            pyro.factor("loss", f - (torch.inf if len(x) < 8 else 0.0))

    with pytest.raises(ValueError, match=r"but its halves add up to -inf"):
        ab.Potential(model, (X, Y), batch_size=10, backend="handlers")


def test_one_row_in_a_thousand_of_the_last_class_is_enough():
    x, y = torch.randn(2000, 3), torch.zeros(2000, dtype=torch.long)
    y[[0, 1200]] = 1  # in the first batch, so that the look at the labels finds two classes
    with pytest.raises(ValueError, match=NUMBERS):
        ab.Potential(classes_of_the_batch, (x, y), batch_size=10, backend="handlers")


def test_the_numbers_are_those_of_the_model():
    """Halved by its own scale, so that 8 rows have half of what 4 and 4 have."""
    with pytest.raises(ValueError, match=NUMBERS) as caught:
        ab.Potential(scaled_on_top, (X, Y), batch_size=10, backend="handlers")
    whole, parts = (float(number) for number in re.search(NUMBERS, str(caught.value)).groups())
    assert parts == pytest.approx(2 * whole, rel=1e-4)


@pytest.mark.parametrize(
    "run",
    [
        lambda: ab.SGMCMC(ab.SGLD(standardised, 1e-4, batch_size=10), 2, 1, disable_progbar=True),
        lambda: ab.SGMCMC(ab.SGHMC(standardised, 1e-4, batch_size=10), 2, 1, num_chains=2, disable_progbar=True),
        lambda: MCMC(ab.SGAdaLD(standardised, 1e-3, batch_size=10), 2, 1, disable_progbar=True),
        lambda: ab.SGMCMC(ab.BAL(standardised, "x", batch_size=10, clip=(-5.0, 5.0)), 2, 1, disable_progbar=True),
    ],
    ids=["SGLD", "SGHMC", "Pyro's driver", "BAL"],
)
def test_every_kernel_refuses_it(run):
    with pytest.raises(ValueError, match="standardised"):
        run().run(X, Y)


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: ab.SGLD(standardised, 1e-4, batch_size=10, batch_dependent=True),
        lambda: ab.SGHMC(standardised, 1e-4, batch_size=10, batch_dependent=True),
        lambda: ab.BAL(standardised, "x", batch_size=10, clip=(-5.0, 5.0), batch_dependent=True),
    ],
    ids=["SGLD", "SGHMC", "BAL"],
)
def test_who_means_it_says_so(kernel):
    assert kernel().settings()["batch_dependent"] is True and "batch_dependent" not in ab.SGLD(logistic).settings()
    mcmc = ab.SGMCMC(kernel(), 2, 1, disable_progbar=True)
    mcmc.run(X, Y)
    assert mcmc.get_samples()["w"].isfinite().all()


# ----------------------------------------------------------------------------------------------------------- the full data


def told(model, args, **options):
    """The energy is finite; what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        potential = ab.Potential(model, args, backend="handlers", **options)
    assert potential.energy(potential.init()).isfinite().all()
    return [str(warning.message) for warning in caught if warning.category is ab.TemperedLikelihoodWarning]


def mean_loss_outside(x, y):
    """As a network is trained, one number for all rows; and a term of the prior."""
    f = logits(x)
    pyro.factor("ridge", -f.new_ones(()))
    pyro.factor("loss", -cross_entropy(f, y))


def time_series(x, y):
    w = weights()
    state = 0.0
    for t, row in enumerate(x):
        state = 0.9 * state + row @ w
        pyro.sample(f"y_{t}", dist.Normal(state, 1.0), obs=y[t])


def as_many_rows_as_there_are(x, y):
    offset = pyro.sample("offset", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    with pyro.plate("data", N):
        pyro.sample("obs", dist.Normal(x[:, 0] + offset, 1.0), obs=y)


MEANS = {"mean loss": (mean_loss, (X, CLASSES)), "mean loss of all rows": (mean_loss_outside, (X, CLASSES))}
FULL = {name: (model, args) for name, (model, args, _) in WRONG.items() if name not in MEANS} | {
    "time series": (time_series, (X, Y)),
    "a size that is fixed": (as_many_rows_as_there_are, (X, Y)),
}


@pytest.mark.parametrize("rows", [2, 5, N])
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_over_rows_of_the_full_data_warns_with_both_numbers_and_can_be_meant(name, rows):
    model, args = MEANS[name]
    args = tuple(t[:rows] for t in args)
    (message,) = told(model, args)
    numbers = re.search(r"'loss': the log-likelihood of some rows is (\S+), the mean .* not their sum, (\S+): .* all (\d+) rows", message)
    whole, total, size = (float(number) for number in numbers.groups())
    assert total == pytest.approx(2 * whole, rel=1e-3) and size == rows
    assert "reduction='none'" in message and "pyro_advbayes.TemperedLikelihoodWarning" in message
    assert told(model, args, batch_dependent=True) == []


@pytest.mark.parametrize("name", FULL)
def test_on_the_full_data_nothing_has_to_add_up(name):
    assert told(*FULL[name]) == []


@pytest.mark.parametrize("options", [{}, {"batch_size": 10}], ids=["full data", "minibatches"])
def test_a_likelihood_that_is_multiplied_by_a_number_is_warned_of(options):
    (message,) = told(own_scale, (X, Y), **options)
    assert re.search(
        r"'obs': its log-likelihood is multiplied by 0\.5 \(poutine\.scale\).*count 0\.5 times.*TemperedLikelihoodWarning", message
    )
    assert told(class_weights_of_all, (X, CLASSES), **options) == []
    assert told(own_scale, (X, Y), batch_dependent=True, **options) == []


def test_a_mean_by_a_scale_is_warned_of_once():
    def model(x, y):
        with poutine.scale(scale=1 / len(x)):
            logistic(x, y)

    (message,) = told(model, (X, Y))
    assert "'obs': its log-likelihood is multiplied by 0.0166667" in message


def test_a_look_at_the_full_data_moves_no_random_numbers_and_no_statistics():
    starts = []
    for options in ({}, {"batch_dependent": True}):
        pyro.set_rng_seed(3)
        starts.append(ab.Potential(mean_loss_outside, (X, CLASSES), backend="handlers", **options).init())
    assert torch.equal(*starts)


# ---------------------------------------------------------------------------------------- plates that subsample themselves


def plate_of_its_own(body, args=(X, Y), size=10):
    def model(x, y):
        w = weights() if y.is_floating_point() else None
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            body(x[rows], y[rows], w)

    return model, args


def standardised_rows(x, y, w):
    pyro.sample("obs", dist.Bernoulli(logits=((x - x.mean(0)) / x.std(0)) @ w), obs=y)


def scaled_rows(x, y, w):
    with poutine.scale(scale=N / len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


@pytest.mark.parametrize("size", [9, 10])
@pytest.mark.parametrize("body,says", [(standardised_rows, f"{NUMBERS}.*standardised"), (scaled_rows, "scaled twice.*poutine.scale")])
def test_a_plate_that_subsamples_itself_is_looked_at_as_well(body, says, size):
    model, args = plate_of_its_own(body, size=size)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        ab.Potential(model, args, backend="handlers")
    ab.Potential(model, args, backend="handlers", batch_dependent=True)


def test_weights_of_rows_in_a_plate_that_subsamples_itself_are_accepted():
    weight = torch.linspace(0.5, 2.0, 5)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 5]).to_event(2))
        with pyro.plate("data", len(x), subsample_size=10) as rows, poutine.scale(scale=weight[y[rows]]):
            pyro.sample("obs", dist.Categorical(logits=x[rows] @ w), obs=y[rows])

    ab.Potential(model, (X, CLASSES), backend="handlers")


def test_a_plate_whose_rows_stay_is_accepted():
    def model(x, y):
        w = weights()
        with pyro.plate("data", N, subsample=torch.arange(10)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    ab.Potential(model, (X[:10], Y[:10]), backend="handlers")


def test_a_loaders_plate_that_knows_the_size_is_scaled_by_itself_and_not_twice():
    def model(x, y, scale=1.0):
        w = weights()
        with pyro.plate("data", N, subsample=torch.arange(len(x))), poutine.scale(scale=scale):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    loader = DataLoader(TensorDataset(X, Y), 10, shuffle=True)
    ab.Potential(model, (loader,), backend="handlers")
    with pytest.raises(ValueError, match=r"poutine\.scale"):
        ab.Potential(lambda x, y: model(x, y, N / len(x)), (loader,), backend="handlers")


# ------------------------------------------------------------------------------------------------------- what is let pass


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 5))
        net(X)
        self.model = ab.nn.Classifier(ab.nn.bayesianize(net))

    def forward(self, x, y):
        return self.model(x, y)


def own_scale(x, y):
    f = x @ weights()
    with poutine.scale(scale=0.5), pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=f), obs=y)


def masked(x, y):
    f = x @ weights()
    with pyro.plate("data", len(x)), poutine.mask(mask=y > 0):
        pyro.sample("obs", dist.Normal(f, 1.0), obs=y)


def nothing_observed(x, y):
    f = x @ weights()
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.zeros_like(y, dtype=torch.bool)):
        pyro.sample("obs", dist.Normal(f, 1.0), obs=y)


def huge(x, y):
    f = 1e4 * (x @ weights())
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(f, 1e-4), obs=y)


def wide_poisson(x, y):
    """Infinite at most draws of its prior."""
    rate = (x @ pyro.sample("w", dist.Normal(0.0, 1000.0).expand([3]).to_event(1))).exp()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson(rate), obs=y)


def two_sites(x, y):
    f = x @ weights()
    with pyro.plate("data", len(x)):
        pyro.sample("first", dist.Bernoulli(logits=f), obs=y)
        pyro.sample("second", dist.Normal(f, 1.0), obs=y)


def class_weights_of_all(x, y):
    f, weight = logits(x), torch.linspace(0.5, 2.0, 5)
    with pyro.plate("data", len(x)), poutine.scale(scale=weight[y]):
        pyro.sample("obs", dist.Categorical(logits=f), obs=y)


RIGHT = {
    "logistic": (logistic, (X, Y)),
    "regression": (regression, (X, Y)),
    "mixed dtypes": (mixed, (X, Y)),
    "a scale of its own": (own_scale, (X, Y)),
    "masked": (masked, (X, Y)),
    "nothing observed": (nothing_observed, (X, Y)),
    "huge": (huge, (X, Y)),
    "wide Poisson": (wide_poisson, (X, Y)),
    "two sites": (two_sites, (X, Y)),
    "class weights of all data": (class_weights_of_all, (X, CLASSES)),
    "normalisation in eval mode": (Normalised(), (X, CLASSES)),
}


@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("name", RIGHT)
def test_a_sum_over_rows_is_accepted(name, batch_size):
    model, args = RIGHT[name]
    ab.Potential(model, args, batch_size=batch_size, backend="handlers")


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_a_handful_of_rows_is_enough(rows):
    ab.Potential(logistic, (X[:rows], Y[:rows]), batch_size=rows, backend="handlers")
    ab.Potential(logistic, (DataLoader(TensorDataset(X[:rows], Y[:rows]), rows),), backend="handlers")
    with pytest.raises(ValueError, match=r"poutine\.scale"):
        ab.Potential(scaled_on_top, (X[:rows], Y[:rows]), batch_size=rows, backend="handlers")


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_plate_that_subsamples_itself_is_accepted(size):
    ab.Potential(*plate_of_its_own(lambda x, y, w: pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y), size=size))
    ab.Potential(subsampling, (X, Y))


def test_a_model_without_a_finite_likelihood_is_left_to_the_search_for_a_start():
    def model(x, y):
        f = x @ weights()
        with pyro.plate("data", len(x)):
            pyro.factor("loss", f - torch.inf)

    potential = ab.Potential(model, (X, Y), batch_size=10, backend="handlers")
    with pytest.raises(ValueError, match="no start with a finite energy"):
        potential.init()


def test_a_start_where_all_is_well_fitted_is_accepted():
    """Where log-probabilities are nearly 0 their rounding is large beside them, at the weights of a trained network."""
    x = X[X[:, 0].abs() > 0.1]
    y = (x[:, 0] > 0).float()
    strategy = init_to_value(values={"w": torch.tensor([300.0, 0.0, 0.0]), "b": torch.tensor(0.0)})
    ab.Potential(logistic, (x, y), batch_size=10, backend="handlers", init_strategy=strategy)


def test_a_difference_is_held_against_the_root_of_the_rounding():
    """Rows of -1 - c rows: 64 c and 32 c differ by 32 c, of terms whose sizes add up to 17.6."""
    bound = torch.finfo(torch.float32).eps ** 0.5 * 17.6 / 32

    def model(x, y, c=0.0):
        weights()
        with pyro.plate("data", len(x)):
            pyro.factor("loss", -1.0 - c * len(x) * torch.ones(len(x)))

    ab.Potential(lambda x, y: model(x, y, 0.9 * bound), (X, Y), batch_size=10, backend="handlers")
    with pytest.raises(ValueError, match=NUMBERS):
        ab.Potential(lambda x, y: model(x, y, 1.1 * bound), (X, Y), batch_size=10, backend="handlers")


def test_rounding_is_that_of_the_coarsest_numbers():
    """Of products on a GPU, too, where float32 has 10 bits by default."""
    cpu, cuda, single, double = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.float64
    assert _rounding({double}, [CLASSES], cpu) == _rounding({double}, [], cuda) == 2.0**-52
    assert _rounding({double}, [X], cpu) == _rounding({single}, [], cpu) == 2.0**-23
    assert _rounding({single}, [], cuda) == 2.0**-10
    with torch.autocast("cpu", torch.bfloat16):
        assert _rounding({single}, [], cpu) == 2.0**-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_taken_into_account(dtype):
    model = ab.nn.Classifier(ab.nn.bayesianize(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 5)))).to(dtype)
    ab.Potential(model, (X.to(dtype), CLASSES), batch_size=10, backend="handlers")


def test_autocast_is_taken_into_account():
    model = ab.nn.Classifier(ab.nn.bayesianize(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 5))))
    with torch.autocast("cpu", torch.bfloat16):
        ab.Potential(model, (X, CLASSES), batch_size=10, backend="handlers")


def test_the_look_leaves_the_random_numbers_of_a_run_as_they_are():
    starts = []
    for batch_dependent in (False, True):
        pyro.set_rng_seed(5)
        starts.append(ab.Potential(logistic, (X, Y), batch_size=10, batch_dependent=batch_dependent).init())
    assert torch.equal(*starts)


# ------------------------------------------------------------------------------------------------------ minibatches of SVI


def step(model, args, rows=20, **options):
    """One call of a model under ``minibatch``: its trace."""
    return poutine.trace(ab.minibatch(model, size=N, **options)).get_trace(*(t[:rows] for t in args))


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("name", WRONG)
def test_under_the_handler_the_first_minibatch_is_looked_at(name, rows):
    model, args, says = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s)(?=.*{NUMBERS})(?=.*{says})(?=.*batch_dependent=True)") as caught:
        step(model, args, rows)
    assert "Trace Shapes" not in str(caught.value)
    step(model, args, rows, batch_dependent=True)
    step(model, args, N)  # all rows are scaled by 1


def test_a_second_factor_is_refused_under_the_handler():
    def model(x, y):
        f = x @ weights()
        with poutine.scale(scale=N / 10), pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=f), obs=y)

    with pytest.raises(ValueError, match=r"'obs' is scaled twice.*N / B = 6"):
        step(model, (X, Y), 10)


@pytest.mark.parametrize("rows", [1, 2, 20])
@pytest.mark.parametrize("name", RIGHT)
def test_under_the_handler_a_sum_over_rows_is_accepted(name, rows):
    step(*RIGHT[name], rows)


def test_svi_refuses_at_its_first_step_and_ensembles_do():
    guide = AutoNormal(logistic)
    with pytest.raises(ValueError, match="standardised"):
        SVI(ab.minibatch(standardised, size=N), guide, Adam({"lr": 0.01}), Trace_ELBO()).step(X[:10], Y[:10])
    with pytest.raises(ValueError, match="standardised"):
        ab.deep_ensemble(standardised, (X, Y), num_members=1, num_steps=1, optim=Adam({"lr": 0.01}), batch_size=10)


def test_the_handlers_look_is_one_look_that_nobody_sees():
    calls = []

    def model(x, y):
        calls.append(len(x))
        return logistic(x, y)

    draws = []
    for options in ({}, {"batch_dependent": True}):
        handled = ab.minibatch(model, size=N, **options)
        assert poutine.unwrap(handled) is model
        pyro.set_rng_seed(1)
        draws += [poutine.trace(handled).get_trace(X[:20], Y[:20]).nodes for _ in range(2)][:1]
    assert calls == [20, 20, 8, 4, 4, 20, 20, 20]
    assert list(draws[0]) == list(draws[1]) and torch.equal(draws[0]["w"]["value"], draws[1]["w"]["value"])


def test_what_cannot_be_seen_under_the_handler_is_accepted():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    training = ab.nn.Classifier(ab.nn.bayesianize(net, eval_only=False))
    statistics = training.net[1].running_mean.clone()
    step(training.eval().train(), (X, CLASSES))
    assert not torch.equal(training.net[1].running_mean, statistics) and int(training.net[1].num_batches_tracked) == 1

    def always_twenty(x, y):
        f = x @ weights()
        with pyro.plate("data", 20):
            pyro.sample("obs", dist.Bernoulli(logits=f), obs=y)

    step(always_twenty, (X, Y))
    with ab.minibatch(size=N):
        standardised(X[:10], Y[:10])

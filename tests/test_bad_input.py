"""
What a user gets wrong is refused before any sampling, in one sentence that names the culprit and the remedy; what only looks wrong
is not.
"""

from __future__ import annotations

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import pyro_advbayes as ab
from models.logistic_regression import LogisticRegression
from models.mlp import mlp
from pyro_advbayes.infer.mcmc.update import ChunkUpdates
from pyro_advbayes.nn import bayesianize
from tests.small_models import data, energy, logistic, no_plate, sequential, subsampling, weights

X, Y = data()
N = len(X)


def sgld(model, step_size=1e-3, backend="handlers", **options):
    return ab.SGLD(model, step_size, backend=backend, **options)


def run(kernel, *args, samples=3, warmup=2, chains=2, **kwargs):
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


@pytest.fixture
def refused(monkeypatch):
    """A function that runs a kernel and wants a refusal before the first update."""

    def sampled(*_):
        pytest.fail("sampling began")

    monkeypatch.setattr(ChunkUpdates, "_call", sampled)  # of one update and of many

    def refused(*args, says, error=ValueError, **kwargs):
        with pytest.raises(error) as caught:
            run(*args, **kwargs)
        message = str(caught.value)
        assert type(caught.value) is error and "\n" not in message, message
        for part in [says] if isinstance(says, str) else says:
            assert part in message, message

    return refused


def likelihood(logits, y, plate="data", size=None):
    with pyro.plate(plate, len(y) if size is None else size):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


# ----------------------------------------------------------------------------------------------------------------- latents


def discrete(x, y):
    component = pyro.sample("component", dist.Categorical(torch.ones(2)))
    likelihood(x @ weights() + component, y)


def without_latents(x, y):
    likelihood(x.sum(-1), y)


def random_support(x, y):
    top = pyro.sample("top", dist.HalfNormal(1.0))
    likelihood(x @ weights() * pyro.sample("share", dist.Uniform(0.0, top)), y)


def random_shape(x, y):
    size = int(torch.randint(1, 10**6, ()))
    likelihood(x @ weights() + pyro.sample("ragged", dist.Normal(torch.zeros(size), 1.0).to_event(1)).mean(), y)


class SometimesThere:
    def __init__(self):
        self.calls = 0

    def __call__(self, x, y):
        self.calls += 1
        if self.calls % 2:
            pyro.sample("guest", dist.Normal(0.0, 1.0))
        likelihood(x @ weights(), y)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize(
    "model,says",
    [
        (discrete, ["'component'", "Categorical", "discrete", "obs="]),
        (without_latents, ["no latent site", "pyro.sample"]),
        (random_support, ["'share'", "support changes", "s * Uniform(0, 1)"]),
        (random_shape, ["'ragged'", "has shape", "fixed shape"]),
        (SometimesThere(), ["'guest'", "same sites in every run"]),
    ],
    ids=["discrete", "none", "random support", "random shape", "not in every run"],
)
def test_latents_that_no_gradient_can_move_are_refused_by_name(refused, model, says, batch_size):
    refused(sgld(model, batch_size=batch_size), X, Y, says=says)


# ------------------------------------------------------------------------------------------- plates and the scale that they get


def two_plates(x, y):
    logits = x @ weights()
    likelihood(logits, y, plate="first")
    with pyro.plate("second", len(x)):
        pyro.sample("again", dist.Bernoulli(logits=logits), obs=y)


def subsamples_a_fixed_number(x, y):
    w = weights()
    with pyro.plate("data", N, subsample_size=10) as rows:
        pyro.sample("obs", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


def local_latent(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Bernoulli(logits=x @ w + offset), obs=y)


def masked(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y, obs_mask=y > 0)


def weights_inside(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=(x * weights()).sum(-1)), obs=y)


class NetworkInside(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 1))

    def forward(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=self.net(x).squeeze(-1)), obs=y)


def hard_coded(x, y):
    likelihood(x @ weights(), y, size=N)


def observed_before(x, y):
    w = weights()
    pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.0))
    likelihood(x @ w, y)


def observed_after(x, y):
    w = weights()
    likelihood(x @ w, y)
    pyro.sample("total", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.0))


@pytest.mark.parametrize(
    "model,says",
    [
        (no_plate, ["no plate follows", "pyro.plate('data', len(x))", "batch_size=None"]),
        (two_plates, ["'first', 'second'", "Use one plate"]),
        (sequential, ["'data'", "sequential", "vectorised"]),
        (subsampling, ["'data'", "subsamples itself", "scaled twice", "Drop batch_size"]),
        (subsamples_a_fixed_number, ["'data'", "subsamples itself", "scaled twice", "Drop batch_size"]),
        (local_latent, ["'offset'", "local latent", "'data'", "outside the plate"]),
        (masked, ["'obs_unobserved'", "local latent", "obs_mask="]),
        (weights_inside, ["'w'", "drawn inside the data plate 'data'"]),
        (NetworkInside(), ["'net.weight'", "drawn inside the data plate 'data'"]),
        (observed_before, ["'total'", "outside the data plate 'data'", "Move it"]),
        (observed_after, ["'total'", "outside the data plate 'data'", "Move it"]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_plate_that_would_be_scaled_wrongly_is_refused_by_name(refused, model, says, batch_size):
    refused(sgld(model, batch_size=batch_size), X, Y, says=says)


@pytest.mark.parametrize("batch_size", [1, 10, N])
def test_a_plate_of_fixed_size_is_refused_under_minibatches(refused, batch_size):
    refused(sgld(hard_coded, batch_size=batch_size), X, Y, says=["'data'", f"has {N} rows in both", "len(x)"])
    refused(sgld(hard_coded), DataLoader(TensorDataset(X, Y), batch_size), says=["'data'", f"has {N} rows in both", "len(x)"])


@pytest.mark.parametrize("model", [no_plate, two_plates, local_latent, masked, observed_after, hard_coded])
def test_what_is_refused_under_minibatches_is_right_on_the_full_data(model):
    assert run(sgld(model), X, Y).get_samples()["w"].isfinite().all()


def nested(x, y):
    w, both = weights(), torch.stack([y, 1 - y], dim=-1)
    with pyro.plate("views", 2), pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=(x @ w).unsqueeze(-1).expand(-1, 2)), obs=both)


def users_own_scale(x, y):
    with poutine.scale(scale=0.3):
        likelihood(x @ weights(), y)


def two_sites(x, y):
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
        pyro.sample("again", dist.Normal(x @ w, 1.0), obs=y)


def deterministic(x, y):
    logits = pyro.deterministic("logits", x @ weights())
    with pyro.plate("data", len(x)):
        pyro.deterministic("probability", logits.sigmoid())
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


def latents_in_another_plate(x, y):
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    likelihood(x @ w, y)


@pytest.mark.parametrize("model", [logistic, nested, users_own_scale, two_sites, deterministic, latents_in_another_plate])
def test_minibatches_of_an_epoch_average_to_the_full_data(model):
    full, batched = energy(model, X, Y)
    torch.testing.assert_close(batched, full)


# ------------------------------------------------------------------------------------------------- layers that change or draw


class OnFeatures(PyroModule):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x, y):
        likelihood(self.features(x) @ weights(), y)


def on_features(features):
    """The same as a plain function, whose layers nobody can list."""
    return lambda x, y: likelihood(features(x) @ weights(), y)


LAYERS = {"BatchNorm1d": lambda: nn.BatchNorm1d(3), "Dropout": lambda: nn.Dropout(0.5)}


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_in_training_mode_is_refused_by_name(refused, layer, batch_size):
    network = nn.Sequential(nn.Linear(3, 3), LAYERS[layer]())
    refused(sgld(OnFeatures(network), batch_size=batch_size), X, Y, says=["'features.1'", layer, "training mode", ".eval()"])
    refused(sgld(on_features(network), batch_size=batch_size), X, Y, says=[layer, "training mode", ".eval()"])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_refusal_disturbs_no_statistics_and_eval_mode_is_fine(layer):
    network = nn.Sequential(nn.Linear(3, 3), LAYERS[layer]())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="training mode"):
        run(sgld(OnFeatures(network), batch_size=10), X, Y)
    run(sgld(OnFeatures(network.eval()), batch_size=10), X, Y)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("start", [None, 0.0, 1.0])
def test_a_model_that_draws_beside_its_sites_is_refused(refused, start):
    kernel = sgld(on_features(lambda x: F.dropout(x)), batch_size=10)
    mcmc = functools.partial(ab.SGMCMC, initial_params=None if start is None else {"w": torch.full((2, 3), start)})
    with pytest.raises(ValueError, match=r"no fixed log-density.*dropout in training mode"):
        mcmc(kernel, 3, 2, 2).run(X, Y)


def numbers_from_values(x, y):
    w, classes = weights(), len(torch.unique(y))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w / classes, 1.0), obs=y)


@pytest.mark.parametrize("num_chains", [1, 3])
def test_a_model_that_counts_classes_falls_back_to_handlers_with_the_right_numbers(num_chains):
    counts = torch.arange(N) // 7 * (torch.arange(N) % 7 > 3)  # 3 to 7 different values in ten rows
    model = numbers_from_values
    options = {"num_chains": num_chains, "batch_size": 10, "batch_dependent": True}
    traced = ab.Potential(model, (X, counts.float()), **options)
    exact = ab.Potential(model, (X, counts.float()), backend="handlers", **options)
    state = torch.randn(num_chains, 3)
    with pytest.warns(UserWarning, match="falls back to 'handlers'") as caught:
        for _ in range(4):
            batch = traced.batches.next()
            assert torch.equal(traced.gradient(state, batch), exact.gradient(state, batch))
            assert torch.equal(traced.energy(state, batch), exact.energy(state, batch))
    assert len([w for w in caught if "falls back" in str(w.message)]) == 1


# ---------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("rows", [1, 10, N - 1, N + 1])
def test_inputs_and_labels_of_different_length_are_refused(refused, rows, batch_size):
    y = torch.zeros(rows)
    refused(sgld(logistic, batch_size=batch_size), X, y, says=["'obs'", f"x has {N} rows", f"y has {rows} rows"])
    if batch_size is None:
        refused(sgld(logistic), X[:rows], Y if rows <= N else Y[:-1], says=["'obs'", "x has", "y has"])


@pytest.mark.parametrize("batch_size", [None, 10])
def test_labels_outside_the_classes_are_refused_wherever_they_are(refused, batch_size):
    x, y = torch.randn(60, 3), torch.zeros(60, dtype=torch.long)
    y[57] = 2
    says = ["site 'obs': 1 of the values in argument y are outside its support", "the first is 2"]
    refused(sgld(mlp((3, 4, 2)), batch_size=batch_size), x, y, says=says)


@pytest.mark.parametrize("make", [lambda data: DataLoader(data, 7), lambda data: [data[:7], data[7:]]])
def test_a_loader_whose_rows_would_weigh_unequally_is_refused_before_the_run(refused, make):
    refused(sgld(logistic, num_data=N), make(TensorDataset(X, Y)), says=["rows and the first one 7, in a fixed order"])


@pytest.mark.parametrize("row", [3, 57])
def test_labels_outside_the_classes_are_found_in_the_batches_of_a_loader(row):
    x, y = torch.randn(60, 3), torch.zeros(60, dtype=torch.long)
    y[row] = 2
    where = r"argument y, batch 6 of the loader, are" if row == 57 else "argument y are"
    batches = DataLoader(TensorDataset(x, y), batch_size=10)
    with pytest.raises(ValueError, match=f"'obs': 1 of the values in {where} outside its support"):
        ab.SGMCMC(ab.SGLD(mlp((3, 4, 2)), step_size=1e-4), num_samples=5, warmup_steps=5, disable_progbar=True).run(batches)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("most", [lambda n: n, lambda n: 9])
def test_counts_have_bounds_of_their_own_row(most, batch_size, refused):
    def counts(x, n, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Binomial(most(n), logits=x @ w), obs=y)

    x, n = torch.randn(60, 3), torch.randint(5, 10, (60,)).float()
    ab.Potential(counts, (x, n, n), batch_size=batch_size)
    y = n.clone()
    y[2] = 12.0
    refused(sgld(counts, batch_size=batch_size), x, n, y, says=["'obs'", "argument y", "outside its support", "12"])


def test_shares_between_0_and_1_may_stand_for_coins_and_2_may_not():
    x, y = torch.randn(20, 3), torch.rand(20)
    model = LogisticRegression(3)
    ab.Potential(model, (x, y), batch_size=10)
    y[19] = 2.0
    with pytest.raises(ValueError, match="argument y are outside its support"):
        ab.Potential(model, (x, y), batch_size=10)


@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_column_of_labels_is_no_row_of_labels(refused, batch_size):
    refused(sgld(logistic, batch_size=batch_size), X, Y[:, None], says=["'obs'", "rows"])


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_that_is_not_finite_is_refused_by_the_arguments_name(refused, value, batch_size):
    x = X.clone()
    x[17, 1] = value
    kernel = sgld(logistic, batch_size=batch_size)
    refused(kernel, x, Y, says=["argument x", "1 non-finite"])
    refused(kernel, y=Y, x=x, says=["argument x", "1 non-finite"])
    refused(kernel, X, torch.where(torch.arange(N) < 2, value, Y), says=["argument y", "2 non-finite"])


@pytest.mark.parametrize("batch_size", [0, -1, N + 1])
def test_a_batch_size_out_of_range_is_refused(refused, batch_size):
    refused(sgld(logistic, batch_size=batch_size), X, Y, says=[f"batch_size={batch_size!r}", f"1 to the number of rows, {N}"])


@pytest.mark.parametrize(
    "options,says",
    [
        ({"batch_size": 10.0}, "batch_size=10.0: an int"),
        ({"batch_size": "10"}, "batch_size='10': an int"),
        ({"batch_size": True}, "batch_size=True: an int"),
        ({"num_data": True}, "num_data=True: an int"),
        ({"batch_args": "xy"}, "batch_args='xy': a sequence"),
        ({"num_data": 2.0 * N}, "num_data=120.0: an int"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_refused_before_any_data_are_seen(options, says):
    with pytest.raises(ValueError, match=says):
        sgld(logistic, **options)


def test_minibatches_need_an_argument_with_rows(refused):
    refused(sgld(lambda x: weights(), batch_size=2), 3.0, says=["batch_size", "tensor with rows"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("batch_size", [None, 10])
def test_labels_of_any_dtype_give_the_same_posterior(dtype, batch_size):
    def model(x, y):
        logits = x @ weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y.float())

    samples = []
    for y in (Y, Y.to(dtype)):
        pyro.set_rng_seed(0)
        samples.append(run(sgld(model, batch_size=batch_size), X, y).get_samples()["w"])
    assert torch.equal(*samples)


def test_inputs_in_float64_need_weights_in_float64():
    def model(x, y):
        logits = x @ pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        likelihood(logits, y)

    assert run(sgld(model, batch_size=10), X.double(), Y).get_samples()["w"].dtype == torch.float64
    with pytest.raises(ValueError, match=r"argument x is of torch.float64.*same dtype.*give x\.float\(\)"):
        run(sgld(logistic, batch_size=10), X.double(), Y)


def weighted(x, y, scale, shift=0.0):
    likelihood(x @ (weights() * scale) + shift, y)


def test_keywords_are_data_too():
    samples = []
    for args, kwargs in [((X, Y), {}), ((), {"x": X, "y": Y}), ((X,), {"y": Y})]:
        pyro.set_rng_seed(0)
        samples.append(run(sgld(logistic, batch_size=10), *args, **kwargs).get_samples()["w"])
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("options", [{}, {"batch_args": ["x", "y"]}, {"batch_args": [0, 1]}, {"batch_args": ("y", 0)}])
def test_arguments_of_another_length_are_constants(options):
    scale = torch.tensor([1.0, 0.5, 2.0])
    full, batched = energy(functools.partial(weighted, shift=0.5), X, Y, scale, **options)
    torch.testing.assert_close(batched, full)


@pytest.mark.parametrize("batch_args", [["x", "y"], [1, 2]])
def test_batch_args_override_the_guess_that_the_first_argument_is_data(refused, batch_args):
    def model(scale, x, y):
        weighted(x, y, scale)

    refused(sgld(model, batch_size=10), torch.ones(3), X, Y, says=["batch_size=10", "rows, 3 in argument scale", "batch_args="])
    full, batched = energy(model, torch.ones(3), X, Y, batch_args=batch_args)
    torch.testing.assert_close(batched, full)


def test_batch_args_keep_a_constant_as_long_as_the_data_whole():
    def model(x, y, table):
        likelihood(x @ weights() + table.sum(), y)

    table = torch.linspace(0.0, 0.1, N)
    full, batched = energy(model, X, Y, table, batch_args=["x", "y"])
    torch.testing.assert_close(batched, full)


@pytest.mark.parametrize(
    "batch_args,says",
    [
        (["z"], ["['z']", "['x', 'y']"]),
        ([2], ["[2]", "['x', 'y']"]),
        ([], ["[]", "['x', 'y']"]),
        (["x"], ["'obs'", f"x has {N} rows", f"y has {N} rows"]),
    ],
)
def test_batch_args_that_do_not_fit_are_refused(refused, batch_args, says):
    refused(sgld(logistic, batch_size=10, batch_args=batch_args), X, Y, says=says)


# ----------------------------------------------------------------------------------------------------------------- loaders


class Batches:
    """A loader of one's own: what it gives, again and again."""

    def __init__(self, *items, dataset=None):
        self.items = items
        if dataset is not None:
            self.dataset = dataset

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


class Endless:
    def __iter__(self):
        return iter([(X, Y)])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


LOADER = DataLoader(TensorDataset(X, Y), 10)


@pytest.mark.parametrize(
    "loader,options,says",
    [
        (Batches(dataset=X), {}, ["loader is empty"]),
        (Batches({"x": X, "y": Y}), {"num_data": N}, ["gave dict", "tuple of tensors", "collate_fn"]),
        (Batches((X, 3.0)), {"num_data": N}, ["['Tensor', 'float']", "tuple of tensors"]),
        (Batches((X, torch.tensor(1.0))), {"num_data": N}, ["tuple of tensors with a row per data point"]),
        (Batches((X, Y[:-1])), {"num_data": N}, ["'obs'", f"x has {N} rows, y has {N - 1} rows"]),
        (Batches((X, Y)), {}, ["num_data", "no .dataset"]),
        (DataLoader(Stream(), 10), {}, ["num_data", "no .dataset with a length"]),
        (DataLoader([(X[:10], Y[:10])] * 6, batch_size=None), {}, ["num_data", "batch_size=None"]),
        (Endless(), {"num_data": N}, ["Endless has no length", "__len__"]),
        (((x, y) for x, y in [(X, Y)]), {"num_data": N}, ["generator can be run through only once", "DataLoader"]),
        (LOADER, {"batch_size": 5}, ["batch_size=5", "a loader cuts its own batches"]),
        (LOADER, {"num_data": N + 1}, [f"num_data={N + 1}", f"{N} rows"]),
        (Batches((X, Y)), {"num_data": N - 1}, [f"num_data={N - 1}", f"one batch has {N}"]),
        (Batches((X, Y)), {"num_data": 0}, ["num_data=0"]),
    ],
)
def test_a_loader_that_cannot_be_sampled_from_is_refused(refused, loader, options, says):
    refused(sgld(logistic, **options), loader, says=says)


def test_a_loader_is_the_only_argument(refused):
    refused(sgld(logistic), LOADER, Y, says="a loader must be the only argument")
    refused(sgld(logistic), LOADER, y=Y, says="a loader must be the only argument")


def test_num_data_is_for_loaders(refused):
    refused(sgld(logistic, num_data=N), X, Y, says=[f"num_data={N}", "only a loader needs it"])


def test_a_batch_of_a_loader_that_is_not_finite_is_named():
    x = X.clone()
    x[33, 2] = float("nan")
    with pytest.raises(ValueError, match="tensor 0 in batch 4 of the loader holds 1 non-finite"):
        run(sgld(logistic), DataLoader(TensorDataset(x, Y), 10))


@pytest.mark.parametrize(
    "loader,options,rows",
    [
        (LOADER, {}, N),
        (LOADER, {"num_data": N}, N),
        (DataLoader(TensorDataset(X, Y), 7), {}, N),
        (DataLoader(Subset(TensorDataset(X, Y), range(30)), 10), {}, 30),
        (DataLoader(TensorDataset(X, Y), 10, sampler=SubsetRandomSampler(range(30))), {}, 30),
        (DataLoader(Stream(), 10), {"num_data": N}, N),
        (DataLoader([(X[:10], Y[:10])] * 6, batch_size=None), {"num_data": N}, N),
        (Batches((X, Y)), {"num_data": 10 * N}, 10 * N),
        ([(X[:30], Y[:30]), (X[30:], Y[30:])], {"num_data": N}, N),
        ([[X, Y]], {"num_data": N}, N),
    ],
)
def test_a_loaders_batches_are_scaled_to_all_rows_behind_it(loader, options, rows):
    potential = ab.Potential(logistic, (loader,), backend="handlers", **options)
    state = torch.ones(1, 4)
    x, y = potential.batches.example
    logits = x @ torch.ones(3) + 1.0
    data_term = rows / len(x) * F.binary_cross_entropy_with_logits(logits, y, reduction="sum")
    prior = -dist.Normal(0.0, 1.0).log_prob(state).sum()
    torch.testing.assert_close(potential.energy(state, (x, y)), (prior + data_term).reshape(1))


# ------------------------------------------------------------------------------------------------------------ the numbers asked


@pytest.mark.parametrize("step_size", [0, -1.0, float("nan"), float("inf"), True, None, "fast", lambda step: None, lambda step: "soon"])
def test_a_step_size_that_is_none_is_refused(step_size):
    with pytest.raises(ValueError, match="step_size"):
        sgld(logistic, step_size)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf"), True, None, "warm", lambda step: -1.0])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        sgld(logistic, temperature=temperature)


@pytest.mark.parametrize("name", ["step_size", "temperature"])
@pytest.mark.parametrize("later,says", [(None, "None"), ("soon", "'soon'"), (float("nan"), "nan"), (-0.1, "-0.1")])
def test_a_schedule_that_goes_wrong_later_is_refused_before_it_starts(refused, name, later, says):
    refused(
        sgld(logistic, **{name: lambda step: 1e-3 if step < 400 else later}), X, Y, samples=300, warmup=200, says=[name, says, "step 400"]
    )


def test_a_step_size_that_falls_to_zero_is_refused_before_it_starts(refused):
    refused(sgld(logistic, lambda step: 1e-3 * (1 - step / 4)), X, Y, says=["step_size is 0.0 at step 4", "> 0"])


def test_a_schedule_that_goes_wrong_in_pyros_driver_says_where():
    kernel = sgld(logistic, lambda step: 1e-3 if step < 4 else None)
    with pytest.raises(ValueError, match="step_size is None at step 4: a schedule must return a number"):
        pyro.infer.MCMC(kernel, 3, 2, disable_progbar=True).run(X, Y)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "3"])
@pytest.mark.parametrize("name", ["num_samples", "num_chains", "checkpoint_every"])
def test_a_count_that_is_no_positive_int_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        ab.SGMCMC(sgld(logistic), **{"num_samples": 3, name: value})


def test_warmup_may_be_none_at_all_but_not_negative():
    assert ab.SGMCMC(sgld(logistic), 3).warmup_steps == 3
    assert ab.SGMCMC(sgld(logistic), 3, 0).warmup_steps == 0
    with pytest.raises(ValueError, match="warmup_steps=-1"):
        ab.SGMCMC(sgld(logistic), 3, -1)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"num_steps_per_sample": 0}, "num_steps_per_sample=0"),
        ({"num_steps_per_sample": 1.5}, "num_steps_per_sample=1.5"),
        ({"backend": "jit"}, "backend='jit'"),
        ({"auto_share": 1.0}, "auto_share=1.0"),
    ],
)
def test_an_option_of_a_kernel_out_of_range_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ab.SGLD(logistic, **options)


def test_an_option_of_a_rule_out_of_range_is_refused():
    for options, says in [
        ({"friction": 0.0}, "friction=0.0"),
        ({"friction": 1.5}, "friction=1.5"),
        ({"averaging_window": 0}, "averaging_window=0"),
    ]:
        with pytest.raises(ValueError, match=says):
            ab.SGHMC(logistic, **options)
    for options, says in [({"friction": -1.0}, "friction=-1.0"), ({"averaging_window": 0.5}, "averaging_window=0.5")]:
        with pytest.raises(ValueError, match=says):
            ab.SGAdaLD(logistic, **options)


def test_what_is_no_model_or_no_kernel_is_refused():
    with pytest.raises(ValueError, match="model=3 is no Pyro model"):
        ab.SGLD(3)
    with pytest.raises(ValueError, match=r"kernel=NUTS.*pyro.infer.MCMC"):
        ab.SGMCMC(pyro.infer.NUTS(logistic), 3)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_of_no_chains_is_refused(refused, chunk_size):
    refused(sgld(logistic, chunk_size=chunk_size), X, Y, says=f"chunk_size={chunk_size}")


GOOD = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    "params,says",
    [
        ({"w": torch.zeros(2, 3)}, ["'b'", "missing"]),
        ({**GOOD, "c": torch.zeros(2)}, ["'c'", "unknown to the model"]),
        ({**GOOD, "w": torch.zeros(2, 4)}, ["'w'", "(2, 4)", "[chains, *(3,)]"]),
        ({**GOOD, "w": torch.zeros(3)}, ["'w'", "(3,)", "[chains, *(3,)]"]),
        ({**GOOD, "b": torch.tensor(0.0)}, ["'b'", "()", "[chains, *()]"]),
        ({**GOOD, "b": torch.zeros(1)}, ["'b' has values for 1 chains", "'w' for 2"]),
        ({name: value[:1] for name, value in GOOD.items()}, ["1 chains", "2 are needed"]),
        ({**GOOD, "b": torch.tensor([0.0, float("nan")])}, ["initial_params", "not finite", "chain 1"]),
    ],
)
def test_initial_params_that_do_not_fit_are_refused(refused, monkeypatch, params, says):
    plain = ab.SGMCMC.__init__
    monkeypatch.setattr(ab.SGMCMC, "__init__", functools.partialmethod(plain, initial_params=params))
    refused(sgld(logistic), X, Y, says=says)


def test_a_model_without_a_finite_start_is_refused(refused):
    def nowhere(x, y):
        likelihood(x @ weights() + float("inf"), y)

    refused(sgld(nowhere), X, Y, says=["no start with a finite energy", "initial_params", "init_strategy"])


def test_an_error_in_the_models_own_code_is_the_models_own():
    with pytest.raises(ZeroDivisionError):
        run(sgld(lambda x, y: weights() / (1 // 0)), X, Y)
    with pytest.raises(ZeroDivisionError):
        run(sgld(lambda x, y: weights() / (1 // 0), batch_size=10), X, Y)


# ------------------------------------------------------------------------------------------------------------- energies on the run


def cliff(kind):
    """Chains that drift from 0 to 5 and find an edge at 1.5, behind which the energy alone, or the gradient too, is not finite."""

    def model():
        w = pyro.sample("w", dist.Normal(torch.full((2,), 5.0), 1.0).to_event(1))
        if kind == "energy":
            pyro.factor("edge", torch.where(w[0] > 1.5, -float("inf"), 0.0))
        else:
            pyro.factor("edge", 1e-3 * (1.5 - w[0]).sqrt())

    return model


LOSING = {
    "SGLD": lambda model, **options: ab.SGLD(model, 0.05, **options),
    "SGHMC": lambda model, **options: ab.SGHMC(model, 4e-4, **options),
    "SGAdaLD": lambda model, **options: ab.SGAdaLD(model, 0.22, noise_correction=False, **options),
}
CASES = [(name, "handlers", None) for name in LOSING] + [("SGLD", "graph", None), ("SGLD", "graph", 1)]


@pytest.mark.parametrize("kind", ["energy", "gradient"])
@pytest.mark.parametrize("name,backend,chunk_size", CASES)
def test_a_lost_chain_stops_where_it_is_and_the_others_go_on(name, backend, chunk_size, kind):
    kernel = LOSING[name](cliff(kind), backend=backend, chunk_size=chunk_size)
    start = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1e4, 0.0]])
    mcmc = ab.SGMCMC(kernel, 90, 5, 3, initial_params={"w": start}, disable_progbar=True)
    with pytest.warns(ab.SamplingWarning, match="2 of 3 chains were lost"):
        mcmc.run()
    assert torch.equal(mcmc.get_samples(group_by_chain=True)["w"], mcmc.get_samples(group_by_chain=True, lost_chains=True)["w"][2:])
    draws, diverging = mcmc.get_samples(group_by_chain=True, lost_chains=True)["w"], mcmc._draws.get()["sample_stats/diverging"]
    assert diverging.any(1).tolist() == [True, True, False] and draws.isfinite().all()
    for chain in range(3):
        first = int(diverging[chain].int().argmax()) if chain < 2 else 90
        assert bool((draws[chain, first:] == draws[chain, -1]).all()), "a lost chain moves on"
        assert len(torch.unique(draws[chain, :first], dim=0)) == first, "a living chain stands still"
        assert {**mcmc.diagnostics()["lost"], **mcmc.diagnostics()["divergences"]}[f"chain {chain}"] == list(range(first, 90))
    assert mcmc.kernel.logging()["divergences"] == "2"
    assert arviz_counts(mcmc) == 0 and mcmc.num_chains == 1


def arviz_counts(mcmc):
    import arviz

    with warnings.catch_warnings(), pyro.validation_enabled(False):  # the model runs once more, from its prior
        warnings.simplefilter("ignore")
        return int(arviz.from_pyro(mcmc, log_likelihood=False).sample_stats["diverging"].sum())


def test_lost_chains_are_in_the_progress_bar(monkeypatch):
    shown = []

    class Bar:
        disable = False

        def __init__(self, **options):
            self.format_dict = {"rate": 7.0}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def set_description(self, stage, refresh):
            self.stage = stage

        def set_postfix(self, values, refresh):
            shown.append((self.stage, values))

        def update(self):
            pass

    monkeypatch.setattr("pyro_advbayes.infer.mcmc.runner.tqdm", Bar)
    start = {"w": torch.tensor([[-1e4, 0.0], [1.4, 0.0]])}
    ab.SGMCMC(sgld(cliff("energy"), 0.05, num_steps_per_sample=2), 40, 2, 2, initial_params=start).run()
    assert [stage for stage, _ in shown[:3]] == ["Warmup", "Warmup", "Sample"] and len(shown) == 42
    assert set(shown[0][1]) == {"step size", "energy", "steps/s"} and shown[0][1]["steps/s"] == "14"
    assert shown[-1][1]["divergences"] == "1"


@pytest.mark.parametrize("driver", ["SGMCMC", "MCMC"])
def test_a_run_whose_chains_are_all_lost_says_so(driver):
    kernel = sgld(logistic, 1e3, num_steps_per_sample=3)
    message = "every chain is lost: .* at update .*step_size=1e.03.*smaller step_size"
    if driver == "MCMC":
        with pytest.raises(RuntimeError, match=message):
            pyro.infer.MCMC(kernel, 50, 50, disable_progbar=True).run(1e3 * X, Y)
        return
    mcmc = ab.SGMCMC(sgld(cliff("gradient"), 0.05), 10**6, 0, 2, initial_params={"w": torch.full((2, 2), 1.4)}, disable_progbar=True)
    with pytest.raises(RuntimeError, match="every chain is lost"):
        mcmc.run()
    assert 0 < len(mcmc.get_samples()["w"]) < 2000, "what was drawn before is there to be looked at"


@pytest.mark.parametrize(("form", "what"), [("meta", "of the meta device, without data"), ("sparse", "of layout torch.sparse_coo")])
def test_a_tensor_that_is_not_dense_is_refused(form, what):
    x = X.to("meta") if form == "meta" else X.to_sparse()
    with pytest.raises(ValueError, match=f"argument x is a tensor {what}: give a dense tensor"):
        run(sgld(logistic), x, Y)

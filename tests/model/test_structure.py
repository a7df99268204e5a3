"""What a look at a model finds: its sites in flat order, and its data plate. What it refuses is in ``test_bad_input.py``."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from pyro_advbayes.model.layers import kept_statistics, refuse_random_layers
from pyro_advbayes.model.structure import look
from tests.small_models import data, logistic, mixed, regression, subsampling, weights

X, Y = data()


def look_at(model, batch_size=None, loader=False):
    if batch_size is None:
        return look(model, ((X, Y), {}), None, None, None)
    few, fewer = ((X[:n], Y[:n]) for n in (batch_size, batch_size - 1))
    return look(model, (few, {}), (fewer, {}), (batch_size, batch_size - 1), len(X), loader=loader)


def simplex(x, y):
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x @ factor) @ parts, 1.0), obs=y)


def test_sites_are_in_model_order_and_fill_a_row_without_gaps():
    sites = look_at(regression).sites
    assert [(site.name, site.shape, site.start, site.numel) for site in sites] == [("w", (3,), 0, 3), ("scale", (), 3, 1), ("b", (), 4, 1)]


def test_a_site_may_have_fewer_unconstrained_numbers_than_values():
    sites = look_at(simplex).sites
    assert [(site.shape, site.unconstrained_shape, site.start) for site in sites] == [((3,), (2,), 0), ((3, 3), (3,), 2)]


def test_each_site_keeps_its_dtype():
    assert [site.dtype for site in look_at(mixed).sites] == [torch.float32, torch.float64]


def test_transforms_lead_from_unconstrained_numbers_into_the_support():
    for site in look_at(simplex).sites:
        value = site.transform(torch.randn(site.unconstrained_shape))
        assert value.shape == site.shape
    assert look_at(regression).sites[1].transform(torch.tensor(-3.0)) > 0


def test_on_the_full_data_nothing_is_scaled():
    structure = look_at(logistic)
    assert (structure.scaling, structure.plate) == ("none", None)


def test_the_plate_with_the_rows_is_the_one_that_is_scaled():
    def model(x, y):
        with pyro.plate("features", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    for batch_size in (3, 10):  # of three rows, too, though another plate has three
        structure = look_at(model, batch_size)
        assert structure[1:5] == ("minibatch", "rows", 60, batch_size)


def test_a_model_that_subsamples_itself_is_to_be_given_indices():
    assert look_at(subsampling)[1:5] == ("indices", "data", 60, 10)


def given_rows(x, y):
    """Rows with their indices, as a loader may supply them."""
    w = weights()
    with pyro.plate("data", 60, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


def test_a_loaders_model_may_know_the_size_and_take_its_rows_from_the_batch():
    assert look_at(given_rows, 10, loader=True)[1:5] == ("none", "data", 60, 10)
    with pytest.raises(ValueError, match="'data' subsamples itself"):
        look_at(given_rows, 10)


def test_two_plates_that_subsample_themselves_are_refused():
    def model(x, y):
        w = weights()
        for name in ("first", "second"):
            with pyro.plate(name, 60, subsample_size=10) as rows:
                pyro.sample(f"obs_{name}", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])

    with pytest.raises(ValueError, match="plates 'first', 'second' all subsample themselves"):
        look_at(model)


def test_a_local_latent_in_a_subsampling_plate_is_refused():
    def model(x, y):
        w = weights()
        with pyro.plate("data", 60, subsample_size=10) as rows:
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Bernoulli(logits=x[rows] @ w + offset), obs=y[rows])

    with pytest.raises(ValueError, match=r"'offset' is a local latent.*'data'"):
        look_at(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda f: (dist.Normal(f, 1.0), Y),
        lambda f: (dist.Normal(f.unsqueeze(-1), 1.0).to_event(1), Y.unsqueeze(-1)),
        lambda f: (dist.Normal(f, 1.0), torch.tensor(0.0)),
        lambda f: (dist.Categorical(logits=torch.stack([f, -f], -1)), Y.long()),
        lambda f: (dist.OneHotCategorical(logits=torch.stack([f, -f], -1)), nn.functional.one_hot(Y.long(), 2).float()),
        lambda f: (dist.MultivariateNormal(f.unsqueeze(-1).expand(-1, 2), torch.eye(2)), torch.stack([Y, Y], -1)),
        lambda f: (dist.Normal(f, 1.0).mask(Y > 0), Y),
        lambda f: (dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([f, -f], -1), 1.0)), Y),
    ],
    ids=["rows", "columns in an event", "one number for all", "Categorical", "one-hot", "vectors", "masked", "mixture"],
)
def test_observations_of_every_kind_are_taken(make):
    def model(x, y):
        fn, value = make(x @ weights())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", fn, obs=value)

    assert look_at(model).sites[0].name == "w"


def test_observations_larger_than_their_distribution_are_taken_and_smaller_ones_are_not():
    def shared(x, y):
        pyro.sample("obs", dist.Normal(weights().sum(), 1.0).expand([1]).to_event(1), obs=y)

    def repeated(x, y):
        pyro.sample("obs", dist.Normal(x @ weights(), 1.0).to_event(1), obs=y[:1])

    assert look_at(shared).sites
    with pytest.raises(ValueError, match=r"'obs' has values of shape \(1,\) where its distribution has \(60,\)"):
        look_at(repeated)


def test_factors_and_deterministic_sites_are_no_observations():
    def model(x, y):
        w = weights()
        pyro.factor("penalty", -w.square().sum())
        pyro.deterministic("norm", w.norm())
        with pyro.plate("data", len(x)):
            pyro.deterministic("mean", x @ w)
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    assert [site.name for site in look_at(model).sites] == ["w"]


def test_a_look_leaves_no_trace_outside():
    with poutine.trace() as outer:
        look_at(logistic, 10)
    assert list(outer.trace.nodes) == []


class Layers(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.5)))

    def forward(self, x):
        return self.inner(x)


def test_a_random_layer_is_named_and_the_guard_ends_with_its_block():
    model = Layers()
    with pytest.raises(ValueError, match=r"layer 'inner.1.0' \(Dropout\) is in training mode") as caught, refuse_random_layers(model):
        poutine.trace(model).get_trace(X)
    assert type(caught.value) is ValueError and "Trace Shapes" not in str(caught.value)
    model(X)
    with refuse_random_layers(model.eval()):
        model(X)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()],
    ids=lambda layer: type(layer).__name__,
)
def test_every_layer_that_draws_or_changes_is_known(layer):
    with pytest.raises(ValueError, match=type(layer).__name__), refuse_random_layers(layer):
        layer(torch.randn(2, 3, *[2] * {"BatchNorm2d": 2, "BatchNorm3d": 3}.get(type(layer).__name__, 0)))


def test_statistics_are_kept_where_layers_normalise_by_the_batch():
    net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)), torch.randn(8, 3)
    twin = copy.deepcopy(net)
    loss = net(x).square().sum()
    held = {name: (value, value.clone()) for name, value in net.named_buffers()}
    with kept_statistics():
        again = [net(x + shift) for shift in (0.0, 5.0)]
    assert torch.allclose(again[0], twin(x))
    for name, value in net.named_buffers():
        assert value is held[name][0] and torch.equal(value, held[name][1])
    (loss + again[1].sum()).backward()  # nothing that autograd holds was written to
    with kept_statistics():
        net.eval()(x)
    assert net[1].num_batches_tracked == 1

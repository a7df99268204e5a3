"""``Predictive`` beside Pyro's: the same constructor, the same sites, shapes, warnings and laws."""

from __future__ import annotations

import inspect
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from models.mlp import mlp
from pyro_advbayes.infer.predictive import Predictive
from pyro_advbayes.nn import bayesianize

DRAWS = 30


def hierarchy(x, y=None):
    """Plates inside plates, local latents, deterministic sites in and out of plates, a vector site."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("norm", weights.norm())
    with pyro.plate("groups", 2, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x), dim=-1):
            mean = pyro.deterministic("mean", (x * weights).sum(-1) + shift, event_dim=0)
            local = pyro.sample("local", dist.Normal(mean, 0.1))
            pyro.sample("obs", dist.Normal(local, scale), obs=y)
    return mean


def guide_of_hierarchy(x, y=None):
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    pyro.sample("weights", dist.Normal(loc, 0.1).to_event(1))
    with pyro.plate("groups", 2, dim=-2):
        pyro.sample("shift", dist.Normal(0.0, 1.0))


def coins(trials):
    with pyro.plate("data", len(trials)):
        p = pyro.sample("p", dist.Uniform(trials.new_tensor(0.0), trials.new_tensor(1.0)))
        return pyro.sample("obs", dist.Binomial(trials, p))


def sequential(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    for i in pyro.plate("steps", 3):
        pyro.sample(f"obs{i}", dist.Normal(slope * x.sum() + i, 1.0), obs=None if y is None else y[i])
    return slope


def subsampled(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        return pyro.sample("obs", dist.Normal(slope * x[rows].sum(-1), 1.0))


def branching(x, y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return pyro.sample("obs", dist.Normal(1.0 if z > 0 else -1.0, 0.1))


def scalar(x=None, y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return pyro.sample("obs", dist.Normal(z, 1.0))


def hierarchy_samples():
    return {
        "scale": torch.rand(DRAWS) + 0.5,
        "weights": torch.randn(DRAWS, 3),
        "shift": torch.randn(DRAWS, 2, 1),
    }


def network_samples():
    trace = poutine.trace(mlp((3, 5, 2))).get_trace(torch.zeros(1, 3))
    return {
        name: torch.randn(DRAWS, *node["value"].shape)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and name.startswith("net")
    }


X = torch.linspace(-1.0, 1.0, 12).view(4, 3)

# name -> model, posterior samples or None, guide or None, arguments, keyword arguments
CASES = {
    "posterior": (lambda: hierarchy, hierarchy_samples, None, (X,), {}),
    "some sites from the prior": (lambda: hierarchy, lambda: {"weights": torch.randn(DRAWS, 3)}, None, (X,), {}),
    "prior": (lambda: hierarchy, None, None, (X,), {}),
    "guide": (lambda: hierarchy, None, lambda model: guide_of_hierarchy, (X,), {}),
    "observed": (lambda: hierarchy, hierarchy_samples, None, (X,), {"y": torch.randn(2, 4)}),
    "network": (lambda: mlp((3, 5, 2)), network_samples, None, (X,), {}),
    "network, observed": (lambda: mlp((3, 5, 2)), network_samples, None, (X, torch.tensor([0, 1, 1, 0])), {}),
    "network, prior": (lambda: mlp((3, 5, 2)), None, None, (X,), {}),
    "network, autoguide": (lambda: mlp((3, 5, 2)), None, AutoNormal, (X, torch.tensor([0, 1, 1, 0])), {}),
    "network, joint autoguide": (lambda: mlp((3, 5, 2)), None, AutoDiagonalNormal, (X, torch.tensor([0, 1, 1, 0])), {}),
    "local latents": (lambda: coins, lambda: {"p": torch.rand(DRAWS, 5)}, None, (torch.full((5,), 7.0),), {}),
    "local latents, autoguide": (lambda: coins, None, lambda model: AutoDelta(poutine.block(model, hide=["obs"])), (torch.ones(5),), {}),
    "sequential plate": (lambda: sequential, lambda: {"slope": torch.randn(DRAWS)}, None, (X,), {}),
    "sequential plate, observed": (lambda: sequential, lambda: {"slope": torch.randn(DRAWS)}, None, (X,), {"y": torch.ones(3)}),
    "subsampled plate": (lambda: subsampled, lambda: {"slope": torch.randn(DRAWS)}, None, (X,), {}),
    "a branch on a drawn value": (lambda: branching, lambda: {"z": torch.randn(DRAWS)}, None, (X,), {}),
    "scalars": (lambda: scalar, lambda: {"z": torch.randn(DRAWS)}, None, (), {}),
}
RETURN_SITES = {
    "default": (),
    "return value": ["_RETURN"],
    "observations": {"obs"},
    "latents and more": ("weights", "scale", "net.1.weight", "slope", "_RETURN", "obs", "absent"),
}


def both(case, return_sites, **options):
    """Results of Pyro's Predictive and of ours, on the same model and the same draws."""
    make_model, make_samples, make_guide, args, kwargs = CASES[case]
    model = make_model()
    guide = None if make_guide is None else make_guide(model)
    samples = None if make_samples is None else make_samples()
    num_samples = None if samples else DRAWS
    results = []
    for kind, extra in ((pyro.infer.Predictive, {}), (Predictive, options)):
        pyro.set_rng_seed(1)
        results.append(kind(model, samples, guide, num_samples, return_sites, **extra)(*args, **kwargs))
    return results


@pytest.mark.parametrize("return_sites", RETURN_SITES.values(), ids=RETURN_SITES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "subsampled plate"])  # of which ours predicts all rows
def test_sites_shapes_and_dtypes_are_those_of_pyro(case, return_sites):
    theirs, ours = both(case, return_sites)
    assert {name: (value.shape, value.dtype) for name, value in ours.items()} == {
        name: (value.shape, value.dtype) for name, value in theirs.items()
    }


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("case", ["posterior", "observed", "network", "network, observed", "local latents", "sequential plate", "scalars"])
def test_values_that_are_not_random_are_those_of_pyro(case, chunk_size):
    fixed = ["_RETURN"] if case in ("network", "network, observed", "posterior", "observed", "sequential plate") else []
    fixed += ["obs"] if "observed" in case else []
    theirs, ours = both(case, [*fixed, "norm", "mean", "weights", "net.1.weight", "p", "z"], chunk_size=chunk_size)
    assert set(ours) == set(theirs) and ours
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-5, atol=1e-6), name
    assert not any(value.requires_grad for value in ours.values())


def test_constructor_takes_the_arguments_of_pyro_in_their_order():
    theirs = list(inspect.signature(pyro.infer.Predictive.__init__).parameters)
    ours = list(inspect.signature(Predictive.__init__).parameters)
    assert ours == [*theirs, "chunk_size"]
    assert isinstance(Predictive(scalar, num_samples=3), pyro.infer.Predictive)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"posterior_samples": {}}, {"posterior_samples": {"z": torch.ones(3)}, "guide": scalar}],
    ids=["nothing", "no samples", "samples and guide"],
)
def test_constructor_refuses_what_pyro_refuses(arguments):
    with pytest.raises(ValueError) as theirs:
        pyro.infer.Predictive(scalar, **arguments)
    with pytest.raises(ValueError) as ours:
        Predictive(scalar, **arguments)
    assert str(ours.value) == str(theirs.value)


def test_num_samples_that_contradicts_the_samples_warns_as_in_pyro():
    with pytest.warns(UserWarning, match="Defaulting to 3"):
        predictive = Predictive(scalar, {"z": torch.ones(3)}, num_samples=5)
    assert predictive()["obs"].shape == (3,)


def test_nothing_warns_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "prediction falls back")  # which of the cases one asks for: its Python branches on a draw
        for case in CASES:
            both(case, ())


def test_call_returns_the_values_sorted_by_site():
    pyro.set_rng_seed(2)
    values = Predictive(hierarchy, hierarchy_samples(), return_sites=["obs", "mean"]).call(X)
    assert [value.shape for value in values] == [(DRAWS, 2, 4), (DRAWS, 2, 4)]
    with pytest.warns(DeprecationWarning):
        assert set(Predictive(scalar, num_samples=5).get_samples()) == {"z", "obs"}


def test_vectorized_trace_is_that_of_pyro():
    trace = Predictive(coins, {"p": torch.rand(DRAWS, 5)}).get_vectorized_trace(torch.full((5,), 7.0))
    assert trace.nodes["obs"]["value"].shape == (DRAWS, 5)


def test_parallel_gives_the_results_of_sequential():
    samples = hierarchy_samples()
    plain, parallel = (Predictive(hierarchy, samples, return_sites=["mean"], parallel=flag)(X)["mean"] for flag in (False, True))
    assert torch.equal(plain, parallel)


def test_a_non_tensor_return_value_matters_only_where_it_is_asked_for():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return {"z": z}

    assert Predictive(model, num_samples=6)()["z"].shape == (6,)
    with pytest.raises(TypeError, match=r"_RETURN.*dict"):
        Predictive(model, num_samples=6, return_sites=["_RETURN"])()


@pytest.mark.parametrize("case", ["posterior", "prior", "guide", "a branch on a drawn value", "network", "scalars", "subsampled plate"])
def test_results_repeat_under_a_seed_and_differ_without(case):
    make_model, make_samples, make_guide, args, kwargs = CASES[case]
    samples = None if make_samples is None else make_samples()
    predictive = Predictive(make_model(), samples, make_guide and make_guide(None), None if samples else DRAWS)
    predictive(*args, **kwargs)  # makes the guide's parameters
    first, again, other = [], [], []
    for results, seed in ((first, 3), (again, 3), (other, 4)):
        pyro.set_rng_seed(seed)
        results.append(predictive(*args, **kwargs)["obs"])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_every_draw_has_random_numbers_of_its_own(chunk_size):
    drawn = Predictive(hierarchy, {"scale": torch.ones(40)}, chunk_size=chunk_size)(X)
    for name in ("weights", "shift", "local", "obs"):
        assert len(drawn[name].unique()) == drawn[name].numel(), name


@pytest.mark.filterwarnings("error:chunk_size")
def test_laws_of_random_sites_are_those_of_pyro():
    """Moments of 40 000 draws within 5 standard errors of the truth, for each way in which draws are computed."""

    def model():
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        logits = torch.stack([torch.zeros(()), p, -p])
        pyro.sample("class", dist.Categorical(logits=logits))
        pyro.sample("classes", dist.Categorical(probs=torch.tensor([[0.1, 0.0, 0.9], [0.3, 0.7, 0.0]])).to_event(1))
        pyro.sample("count", dist.Poisson(3.0 * p))
        pyro.sample("heads", dist.Binomial(7.0, p))
        pyro.sample("normal", dist.Normal(p, 2.0))
        pyro.sample("gamma", dist.Gamma(2.0 + p, 1.0))
        pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("exponential", dist.Exponential(2.0))

    n = 40_000
    p = torch.full((n,), 0.4)
    for chunk_size in (None, 500):
        drawn = Predictive(model, {"p": p}, chunk_size=chunk_size)()
        probs = torch.softmax(torch.tensor([0.0, 0.4, -0.4]), 0)
        truths = {
            "class": (torch.nn.functional.one_hot(drawn["class"], 3), probs),
            "classes": (torch.nn.functional.one_hot(drawn["classes"], 3), torch.tensor([[0.1, 0.0, 0.9], [0.3, 0.7, 0.0]])),
            "count": (drawn["count"], torch.tensor(1.2)),
            "heads": (drawn["heads"], torch.tensor(2.8)),
            "normal": (drawn["normal"], torch.tensor(0.4)),
            "spread": (drawn["normal"].sub(0.4).square(), torch.tensor(4.0)),
            "gamma": (drawn["gamma"], torch.tensor(2.4)),
            "simplex": (drawn["simplex"], torch.tensor([1.0, 2.0, 3.0]) / 6),
            "exponential": (drawn["exponential"], torch.tensor(0.5)),
        }
        for name, (values, mean) in truths.items():
            values = values.double()
            error = values.std(0) / n**0.5
            assert ((values.mean(0) - mean).abs() <= 5 * error + 1e-12).all(), name


def test_a_guides_own_predictions_may_be_passed_on():
    model = bayesianize(torch.nn.Linear(3, 2))
    for guide in (AutoNormal(model), AutoDiagonalNormal(model)):
        draws = Predictive(guide, num_samples=DRAWS)(X)
        weights = draws["weight"].reshape(DRAWS, 2, 3)
        expected = X @ weights.mT + draws["bias"].reshape(DRAWS, 1, 2)
        assert torch.allclose(Predictive(model, draws, return_sites=["_RETURN"])(X)["_RETURN"], expected, atol=1e-5)

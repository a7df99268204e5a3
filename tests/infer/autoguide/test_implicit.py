from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import OrderedTransform
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.nn import PyroModule, PyroSample
from safetensors.torch import load_file
from torch import nn

from pyro_advbayes import PosteriorClassifier, Potential, Predictive
from pyro_advbayes.attacks import PGD
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.autoguide.model_sites import same_sites
from pyro_advbayes.infer.autoguide.rows import sites_of
from pyro_advbayes.infer.autoguide.stored import pack_sites, unpack_sites
from pyro_advbayes.infer.distill import APD, FactoredGenerator, HyperGenerator, MLPGenerator
from pyro_advbayes.infer.elbo.robust import TraceRobust_ELBO
from pyro_advbayes.nn import Classifier, bayesianize
from pyro_advbayes.storage import files
from tests.small_models import data, logistic, regression


def classifier(width: int = 4) -> Classifier:
    torch.manual_seed(3)
    return Classifier(bayesianize(nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))))


def draws(model, x, count: int = 300):
    """From the prior, ``[count, *site]``."""
    return {k: v.squeeze(1) for k, v in pyro.infer.Predictive(model, num_samples=count)(x).items() if k != "obs"}


def quick(guide, samples, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        APD(guide, num_steps=20, batch_size=50, disable_progbar=True).fit(samples, *args)
    return guide


def fitted(generator=None, model=None):
    model = classifier() if model is None else model
    x, _ = data(5)
    return quick(AutoImplicit(model, generator or MLPGenerator(noise=4, hidden=(8,))), draws(model, x))


@pytest.mark.parametrize("predictive", [Predictive, pyro.infer.Predictive])
def test_a_prediction_without_labels_may_be_its_first_call(predictive):
    guide, (x, _) = fitted(), data(5)
    predicted = predictive(guide.model, guide=guide, num_samples=7)(x)
    assert predicted["obs"].shape[0] == 7 and predicted["obs"].shape[-1] == 5
    assert "obs" not in guide()


@pytest.mark.parametrize("predictive", [Predictive, pyro.infer.Predictive])
def test_predictions_are_those_of_the_drawn_weights(predictive):
    guide, (x, _) = fitted(), data(5)
    predicted = predictive(guide.model, guide=guide, num_samples=3, return_sites=["_RETURN", "net.0.weight"])(x)
    assert predicted["net.0.weight"].flatten(1).unique(dim=0).shape[0] == 3  # every draw its own weights
    everything = predictive(guide.model, guide=guide, num_samples=3)(x)
    logits = Predictive(guide.model, {k: v for k, v in everything.items() if k != "obs"}, return_sites=["_RETURN"])(x)["_RETURN"]
    assert logits.shape == (3, 5, 2)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2),
        TraceMeanField_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=2),
        JitTrace_ELBO(),
        TraceRobust_ELBO(PGD(eps=0.1, steps=1, clip=None)),
    ],
    ids=lambda e: type(e).__name__,
)
def test_no_elbo_reads_a_number_from_it(elbo):
    guide, (x, y) = fitted(), data(5)
    with pytest.raises(NotImplementedError, match=r"distill\.APD\(guide\)\.fit"):
        SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.1}), elbo).step(x, y.long())


def test_no_kl_divergence_reads_a_number_from_it():
    site = poutine.trace(fitted()).get_trace().nodes["net.0.bias"]
    with pytest.raises(NotImplementedError, match="distill"):
        torch.distributions.kl_divergence(site["fn"], dist.Normal(torch.zeros(4), 1.0).to_event(1))


def test_it_is_part_of_a_guide_list():
    x, y = data(20)
    part = AutoImplicit(poutine.block(logistic, expose=["w"]), MLPGenerator(noise=3, hidden=(8,)))
    quick(part, {"w": torch.randn(100, 3)})
    guide = AutoGuideList(logistic)
    guide.append(part)
    guide.append(AutoDelta(poutine.block(logistic, expose=["b"])))
    assert set(guide(x, y)) == {"w", "b"}
    for predictive in (Predictive, pyro.infer.Predictive):
        assert predictive(logistic, guide=guide, num_samples=4)(x)["obs"].shape[0] == 4


def test_a_classifier_takes_it_for_a_guide():
    guide, (x, _) = fitted(), data(5)
    network = PosteriorClassifier(guide.model, guide=guide, num_samples=10)
    torch.testing.assert_close(network(x).exp().sum(-1), torch.ones(5))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(network.posterior_samples["net.0.bias"][0], network.posterior_samples["net.0.bias"][1])


def test_a_plate_around_it_does_not_repeat_one_draw_in_silence():
    guide, (x, _) = fitted(), data(5)
    with pytest.raises(ValueError, match=r"draws once in a call.* take guide\.sample"):
        pyro.infer.Predictive(guide.model, guide=guide, num_samples=3, parallel=True)(x)
    assert Predictive(guide.model, guide=guide, num_samples=3, parallel=True)(x)["obs"].shape[0] == 3  # ours draws one by one


def test_samples_serve_as_posterior_samples():
    guide, (x, _) = fitted(), data(5)
    samples = guide.sample(9)
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "net.0.weight": (9, 4, 3),
        "net.0.bias": (9, 4),
        "net.2.weight": (9, 2, 4),
        "net.2.bias": (9, 2),
    }
    assert Predictive(guide.model, samples)(x)["obs"].shape == (9, 5)
    assert not any(value.requires_grad for value in samples.values())
    with pytest.raises(ValueError, match="num_samples=0"):
        guide.sample(0)


def test_it_leaves_nothing_in_the_parameter_store_and_takes_no_random_numbers_to_look_at_the_model():
    guide, (x, _) = fitted(), data(5)
    pyro.clear_param_store()
    torch.manual_seed(1)
    first = guide(x)  # which looks at the model
    torch.manual_seed(1)
    second = guide(x)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(pyro.get_param_store().keys())


every_generator = pytest.mark.parametrize(
    "generator",
    [
        MLPGenerator(noise=4, hidden=(8,)),
        FactoredGenerator(rank=3, noise=4, hidden=(8,)),
        FactoredGenerator(rank=3, hidden=None),
        FactoredGenerator(rank=3, noise=4, hidden=(8,), packed=True),
        FactoredGenerator(rank=3, hidden=None, packed=True),
        HyperGenerator(noise=4, hidden=(8,), width=5),
    ],
)


@every_generator
def test_saved_and_loaded_it_gives_the_same_draws_under_one_seed(tmp_path, generator):
    guide = fitted(generator)
    guide.save(tmp_path / "posterior.safetensors")
    loaded = AutoImplicit.load(tmp_path / "posterior.safetensors", classifier())
    for draw in (lambda g: g.sample(20), lambda g: g()):
        torch.manual_seed(5)
        here = draw(guide)
        torch.manual_seed(5)
        there = draw(loaded)
        assert all(torch.equal(here[name], there[name]) for name in here)
    assert loaded.num_draws == 300


@every_generator
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator")
def test_loaded_it_takes_no_more_storage_than_before(tmp_path, generator, dtype):
    guide = fitted(generator)
    guide.save(tmp_path / "first.safetensors", dtype=dtype)
    loaded = AutoImplicit.load(tmp_path / "first.safetensors", classifier())
    loaded.save(tmp_path / "again.safetensors", dtype=dtype)
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [(tmp_path / "first.safetensors").stat().st_size] * 2
    assert loaded.storage() == guide.storage() and loaded.storage(dtype) == guide.storage(dtype)
    here, there = guide.network.state_dict(), loaded.network.state_dict()
    assert {name: value.dtype for name, value in there.items()} == {name: value.dtype for name, value in here.items()}


def test_a_custom_generator_is_saved_and_loaded(tmp_path):
    def network():
        module = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 26))
        module.noise = 5
        return module

    guide = fitted(network())
    guide.save(tmp_path / "own.safetensors")
    loaded = AutoImplicit.load(tmp_path / "own.safetensors", classifier(), generator=network())
    torch.manual_seed(0)
    here = guide.sample(2)
    torch.manual_seed(0)
    assert torch.equal(loaded.sample(2)["net.2.bias"], here["net.2.bias"])
    with pytest.raises(ValueError, match="pass generator="):
        AutoImplicit.load(tmp_path / "own.safetensors", classifier())
    other = nn.Sequential(nn.Linear(5, 26))
    other.noise = 5
    with pytest.raises(ValueError, match="does not fit the generator"):
        AutoImplicit.load(tmp_path / "own.safetensors", classifier(), generator=other)


@pytest.mark.parametrize("mode", [True, False])
def test_a_custom_generator_makes_a_row_of_its_noise_alone(mode):
    model = classifier()

    def own(*layers):
        module = nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 26)).train(mode)
        module.noise = 5
        return AutoImplicit(model, module)

    for layer in (nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.BatchNorm1d(8, track_running_stats=False)):
        with pytest.raises(ValueError, match=rf"layer '1' \({type(layer).__name__}\) of Sequential makes a row depend .*LayerNorm"):
            own(layer)
    for layer in (nn.Dropout(0.1), nn.AlphaDropout()):
        with pytest.raises(
            ValueError, match=rf"layer '2.0' \({type(layer).__name__}\) of Sequential .*in training mode only: leave it out"
        ):
            own(nn.Tanh(), nn.Sequential(layer))
    guide = quick(own(nn.LayerNorm(8), nn.Dropout(0.0)), draws(model, data(5)[0]))
    z = torch.randn(3, 5)
    torch.testing.assert_close(guide.network(z)[:1], guide.network(z[:1]))


def test_a_file_is_never_overwritten_or_half_written(tmp_path, monkeypatch):
    guide, path = fitted(), tmp_path / "posterior.safetensors"
    guide.save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        guide.save(path)
    monkeypatch.setattr(files, "save_file", lambda tensors, name, **_: (open(name, "wb").write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        guide.save(path, overwrite=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["posterior.safetensors"]


class Other(Classifier):
    pass


def test_a_file_of_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "posterior.safetensors"
    fitted().save(path)
    with pytest.raises(ValueError, match=r"another model: it was saved for 'Classifier', here is 'Other'"):
        AutoImplicit.load(path, Other(classifier().net))
    deeper = Classifier(bayesianize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    with pytest.raises(ValueError, match=r"another model: site 'net.4.weight' of the model is missing"):
        AutoImplicit.load(path, deeper)
    with pytest.raises(ValueError, match=r"another model: site 'net.0.weight' has shape .*4, 3\) in the guide and \(6, 3\) in the model"):
        AutoImplicit.load(path, classifier(width=6))


class Declared(PyroModule):
    """A prior that a plate repeats, and one that is a function of the module."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        self.scale = PyroSample(lambda self: dist.LogNormal(self.w.sum(-1), 1.0))

    def forward(self, x):
        with pyro.plate("groups", 5):
            return self.w * self.scale.unsqueeze(-1)


def test_declared_priors_may_be_repeated_by_a_plate_or_be_functions(tmp_path):
    guide = quick(AutoImplicit(Declared(), MLPGenerator(noise=4, hidden=(8,))), {"w": torch.randn(200, 5, 3), "scale": torch.randn(200, 5)})
    guide.save(tmp_path / "declared.safetensors")
    assert AutoImplicit.load(tmp_path / "declared.safetensors", Declared()).sample(2)["w"].shape == (2, 5, 3)
    with pytest.raises(ValueError, match=r"site 'w' has shape \(5, 4\) in the guide and \(3,\) in the model"):
        quick(AutoImplicit(Declared(), MLPGenerator()), {"w": torch.randn(200, 5, 4), "scale": torch.randn(200, 5)})


@pytest.mark.parametrize("predictive", [Predictive, pyro.infer.Predictive])
def test_a_site_without_draws_is_not_drawn_from_its_prior_in_silence(predictive):
    x, y = data(5)
    guide = quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 3)})
    missing = (
        r"site 'b' of the model, on which its site 'obs' depends, is not among the guide's, \['w'\], .*poutine.block\(model, hide=\['b'\]\)"
    )
    with pytest.raises(ValueError, match=missing):
        predictive(logistic, guide=guide, num_samples=3)(x)
    with pytest.raises(ValueError, match=missing):
        guide(x, y)
    with pytest.raises(ValueError, match="depend on a site without draws"):
        PosteriorClassifier(lambda x: logistic(x)[:, None].expand(-1, 2), guide=guide, num_samples=3)(x)
    meant = quick(AutoImplicit(poutine.block(logistic, hide=["b"]), MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 3)})
    assert predictive(logistic, guide=meant, num_samples=3)(x)["obs"].shape[0] == 3


def outcomes_without_a_plate(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    first = pyro.sample("first", dist.Normal(x @ w, 1.0).to_event(1))
    second = pyro.sample("second", dist.Normal(-x @ w, 1.0).to_event(1))
    return pyro.deterministic("both", first + second)


def drawn_for_every_row(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        local = pyro.sample("local", dist.Normal(x[rows] @ w, 1.0))
        pyro.sample("obs", dist.Normal(local, 1.0))


def effects_of_groups(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("groups", 2):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Uniform(0.0, (x @ w + effect[0]).exp()))


def prior_with_a_scale_of_its_own(x):
    scale = pyro.sample("scale", dist.Exponential(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(3), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0))


def test_sites_on_which_no_prediction_depends_and_those_of_every_row_may_be_missing():
    x, _ = data(5)
    for model in (outcomes_without_a_plate, drawn_for_every_row, prior_with_a_scale_of_its_own):
        guide = quick(AutoImplicit(model, MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 3)})
        assert guide(x)["w"].shape == (3,)
    guide = quick(AutoImplicit(effects_of_groups, MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 3)})
    with pytest.raises(ValueError, match="site 'effect' of the model, on which its site 'obs' depends"):
        guide(x)


def test_draws_of_another_model_are_noticed_at_the_first_call():
    x, _ = data(5)
    guide = quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), {"weights": torch.randn(200, 3)})
    with pytest.raises(ValueError, match=r"site 'weights' is the guide's, but not the model's, which has .*'w', 'b'"):
        guide(x)
    guide = quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 4), "b": torch.randn(200)})
    with pytest.raises(ValueError, match=r"site 'w' has shape \(4,\) in the guide and \(3,\) in the model"):
        guide(x)


@pytest.mark.parametrize(
    "place,value",
    [
        (("settings", "hidden"), [10**5, 10**5]),
        (("settings", "noise"), -1),
        (("settings", "nonsense"), 1),
        (("settings",), [1]),
        (("sites",), []),
        (("sites",), [{}]),
        (("sites",), [3]),
        (("state",), {}),
        (("state", "loc"), 3),
        (("num_draws",), -1),
        (("num_draws",), None),
        (("model",), None),
    ],
)
def test_a_senseless_field_of_a_saved_guide_is_refused_by_name_and_allocates_nothing(tmp_path, place, value):
    path = tmp_path / "guide.safetensors"
    quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), {"w": torch.randn(200, 3), "b": torch.randn(200)}).save(path)
    content = holder = files.load(path, "file of AutoImplicit")
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    files.save(path, content, "file of AutoImplicit")
    with pytest.raises(ValueError, match=r"guide\.safetensors"):
        AutoImplicit.load(path, logistic)


def test_what_is_no_file_of_a_guide_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(FileNotFoundError):
        AutoImplicit.load(path, classifier())
    files.save(path, {"runner": 1})
    with pytest.raises(ValueError, match="is no file of AutoImplicit"):
        AutoImplicit.load(path, classifier())
    path.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ValueError, match="truncated, or no file"):
        AutoImplicit.load(path, classifier())


def test_constrained_sites_are_drawn_on_their_supports_and_keep_them_in_a_file(tmp_path):
    x, y = data(30)
    samples = {"w": torch.randn(200, 3), "b": torch.randn(200), "scale": torch.randn(200).mul(0.5).exp()}
    guide = quick(AutoImplicit(regression, MLPGenerator(noise=3, hidden=(8,))), samples, x, y)
    scale = guide.sample(500)["scale"]
    assert scale.shape == (500,) and bool((scale > 0).all())
    guide.save(tmp_path / "regression.safetensors")
    loaded = AutoImplicit.load(tmp_path / "regression.safetensors", regression)
    assert bool((loaded.sample(500)["scale"] > 0).all())
    assert Predictive(regression, guide=loaded, num_samples=5)(x)["obs"].shape == (5, 30)
    by_potential = quick(AutoImplicit(regression, MLPGenerator(noise=3, hidden=(8,)), Potential(regression, (x, y))), samples)
    assert bool((by_potential.sample(500)["scale"] > 0).all())


def test_a_support_that_draws_alone_do_not_show_is_noticed_at_the_first_call():
    x, _ = data(30)
    guide = quick(
        AutoImplicit(regression, MLPGenerator(noise=3, hidden=(8,))),
        {"w": torch.randn(200, 3), "b": torch.randn(200), "scale": torch.rand(200) + 1},
    )
    with pytest.raises(ValueError, match=r"site 'scale' has the support .*fit\(samples, x, y\)"):
        guide(x)


class Constrained(PyroModule):
    """A classifier with declared priors, two of them on less than all reals."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        self.scale = PyroSample(dist.HalfNormal(1.0))
        self.offset = PyroSample(dist.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])).to_event(1))

    def forward(self, x, y=None):
        logits = self.scale * (x @ self.w) + self.offset
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits


def test_supports_that_the_model_declares_need_no_arguments(tmp_path):
    model, (x, _) = Constrained(), data(30)
    guide = quick(AutoImplicit(model, MLPGenerator(noise=3, hidden=(8,))), draws(model, x))
    guide.save(tmp_path / "constrained.safetensors")
    loaded = AutoImplicit.load(tmp_path / "constrained.safetensors", Constrained())
    for samples in (guide.sample(500), loaded.sample(500), PosteriorClassifier(model, guide=guide, num_samples=500).posterior_samples):
        assert bool((samples["scale"] > 0).all())
        assert bool(((samples["offset"] > torch.tensor([-1.0, 2.0])) & (samples["offset"] < torch.tensor([1.0, 5.0]))).all())
    assert Predictive(model, guide=guide, num_samples=5)(x)["obs"].shape == (5, 30)
    with pytest.raises(ValueError, match=r"draw \d+ of site 'scale' is not finite in unconstrained space"):
        quick(AutoImplicit(model, MLPGenerator(noise=3, hidden=(8,))), {**draws(model, x), "scale": torch.randn(300)})


def test_sites_on_another_support_than_the_model_declares_are_refused():
    model, (x, _) = Constrained(), data(5)
    real = sites_of({name: value[None] for name, value in draws(model, x).items()})
    with pytest.raises(ValueError, match=r"site 'scale' has the support .*GreaterThanEq\(lower_bound=0.0\) in the model"):
        AutoImplicit(model, MLPGenerator(noise=3, hidden=(8,))).set_sites(real)
    counts = PyroModule()
    counts.rate = PyroSample(dist.Poisson(3.0))
    with pytest.raises(ValueError, match=r"site 'rate' \(Poisson\) has a support without a map from unconstrained space.*sum it out"):
        quick(AutoImplicit(counts, MLPGenerator(noise=3, hidden=(8,))), {"rate": torch.rand(200)})


def scaled(x):
    """Two logits of a function's constrained site, which nobody can know of without calling it."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    return torch.stack([torch.zeros(len(x)), scale * x[:, 0]], -1)


def test_a_classifier_compares_the_guide_of_its_model_at_its_first_inputs():
    x, _ = data(5)
    samples = {"scale": torch.rand(200)}
    guide = quick(AutoImplicit(scaled, MLPGenerator(noise=3, hidden=(8,))), samples)
    network = PosteriorClassifier(scaled, guide=guide, num_samples=3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"site 'scale' has the support .*fit\(samples, x, y\)"):
            network(x)
    told = quick(AutoImplicit(scaled, MLPGenerator(noise=3, hidden=(8,))), samples, x)
    assert PosteriorClassifier(scaled, guide=told, num_samples=3)(x).shape == (5, 2)


def test_bounds_move_with_the_guide_and_keep_their_precision(tmp_path):
    model, (x, _) = Constrained(), data(5)
    guide = quick(AutoImplicit(model, MLPGenerator(noise=3, hidden=(8,))), draws(model, x))
    guide.save(tmp_path / "constrained.safetensors")
    loaded = AutoImplicit.load(tmp_path / "constrained.safetensors", model)
    assert same_sites(loaded.double().half().sites, guide.sites)
    for moved in (guide.to("meta"), loaded.to("meta")):
        made = moved.constrain(torch.zeros(4, moved.network.size, device="meta"))
        assert all(value.device.type == "meta" for value in made.values())
    for site in AutoImplicit(model, MLPGenerator()).sites_of({name: value[None].to("meta") for name, value in draws(model, x).items()}):
        assert site.transform(torch.zeros(site.unconstrained_shape, device="meta")).device.type == "meta"


def correlated_outcomes(x, y=None):
    """Sites on a Cholesky factor, a correlation matrix and ordered numbers."""
    factor = pyro.sample("factor", dist.LKJCholesky(3))
    matrix = pyro.sample("matrix", dist.LKJ(3, 1.0))
    cuts = pyro.sample("cuts", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), OrderedTransform()))
    logits = x @ (factor @ matrix @ cuts)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)
    return torch.stack([torch.zeros_like(logits), logits], -1)


@pytest.mark.parametrize("predictive", [Predictive, pyro.infer.Predictive])
def test_factors_correlations_and_ordered_numbers_are_fitted_called_saved_and_fitted_again(tmp_path, predictive):
    x, y = data(30)
    samples = draws(correlated_outcomes, x)
    guide = quick(AutoImplicit(correlated_outcomes, MLPGenerator(noise=3, hidden=(8,))), samples, x, y)
    made = guide.sample(100)
    assert bool((made["cuts"].diff() > 0).all())
    torch.testing.assert_close((made["factor"] @ made["factor"].mT).diagonal(dim1=-2, dim2=-1), torch.ones(100, 3))
    torch.testing.assert_close(made["matrix"].diagonal(dim1=-2, dim2=-1), torch.ones(100, 3))
    guide.save(tmp_path / "correlated.safetensors")
    for each in (guide, AutoImplicit.load(tmp_path / "correlated.safetensors", correlated_outcomes)):
        assert predictive(correlated_outcomes, guide=each, num_samples=5)(x)["obs"].shape[-1] == 30
        network = PosteriorClassifier(correlated_outcomes, guide=each, num_samples=5)
        torch.testing.assert_close(network(x).exp().sum(-1), torch.ones(30))
        before = next(each.network.parameters())
        quick(each, samples, x, y)
        assert next(each.network.parameters()) is before  # it went on with the generator that there was


def test_a_support_in_other_coordinates_than_the_draws_is_noticed_at_the_first_call():
    x, _ = data(30)
    samples = draws(correlated_outcomes, x)
    for name, support in (("factor", "CorrCholesky"), ("matrix", "CorrMatrix"), ("cuts", "OrderedVector")):
        guide = AutoImplicit(poutine.block(correlated_outcomes, expose=[name]), MLPGenerator(noise=3, hidden=(8,)))
        guide.set_sites(sites_of({name: samples[name][None]}))
        guide.num_draws = 300
        with pytest.raises(ValueError, match=rf"site '{name}' has the support {support}.*fit\(samples, x, y\)"):
            guide(x)


def test_transforms_of_all_supports_survive_a_file(tmp_path):
    def model():
        pyro.sample("real", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("positive", dist.Gamma(2.0, 1.0))
        pyro.sample("unit", dist.Beta(2.0, 2.0))
        pyro.sample("interval", dist.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])).to_event(1))
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
        pyro.sample("above", dist.Pareto(2.0, 3.0))
        pyro.sample("correlation", dist.LKJCholesky(3))
        pyro.sample("matrix", dist.LKJ(3, 1.0))

    sites = Potential(model).sites
    files.save(tmp_path / "sites.safetensors", {"sites": pack_sites(sites)})
    again = unpack_sites(files.load(tmp_path / "sites.safetensors")["sites"])
    for one, two in zip(sites, again, strict=True):
        assert one[:4] == two[:4] and one.start == two.start
        u = torch.randn(one.unconstrained_shape)
        assert torch.equal(one.transform(u), two.transform(u))


def test_storage_says_from_how_many_draws_on_it_pays():
    guide = fitted(MLPGenerator(noise=4, hidden=(8,)))
    with pytest.warns(UserWarning, match="keep the draws, or take a smaller generator"):
        guide.num_draws = 5
        found = guide.storage()
    assert found.draw_bytes == 4 * 26
    assert found.bytes == 4 * (5 * 8 + 9 * 26 + 2)
    assert found.pays_from == found.bytes // found.draw_bytes + 1
    guide.num_draws = found.pays_from
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guide.storage()


def test_the_published_generator_pays_beyond_a_hundred_and_one_draws():
    weights = 784 * 100 + 100 + 100 * 10 + 10
    assert weights == 79_510
    assert MLPGenerator().numbers([(weights,)]) // weights == 101  # 8.05 million numbers
    assert round(MLPGenerator().numbers([(478_410,)]) / 1e6, 1) == 48.3
    assert FactoredGenerator(rank=8).numbers([(weights,)]) / weights < 10.2


@pytest.mark.parametrize(
    "kind",
    [
        MLPGenerator(noise=4, hidden=(8, 6)),
        FactoredGenerator(rank=3, noise=4, hidden=(8,)),
        FactoredGenerator(rank=3, noise=4, hidden=(8,), packed=True),
        HyperGenerator(noise=4, hidden=(8,), width=5),
    ],
)
def test_storage_formulas_count_what_a_finished_generator_holds(kind):
    network = fitted(kind).network
    assert sum(value.numel() for value in network.state_dict().values()) == network.numbers([(4, 3), (4,), (2, 4), (2,)])


@pytest.mark.parametrize(
    "generator",
    [
        MLPGenerator(noise=4, hidden=(8,)),
        FactoredGenerator(rank=3, noise=4, hidden=(8,)),
        FactoredGenerator(rank=3, hidden=None),
        HyperGenerator(noise=4, hidden=(8,), width=5),
    ],
)
@pytest.mark.parametrize("dtype,digits", [(torch.float16, 11), (torch.bfloat16, 8)])
@pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator")
def test_half_precision_takes_half_the_bytes_and_moves_draws_by_its_rounding(tmp_path, generator, dtype, digits):
    guide = fitted(generator)
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    guide.save(full)
    guide.save(half, dtype=dtype)
    assert guide.storage(dtype).bytes == guide.storage().bytes / 2
    assert guide.storage(dtype).pays_from < guide.storage().pays_from
    held = {path: sum(tensor.nbytes for tensor in load_file(path).values() if tensor.is_floating_point()) for path in (full, half)}
    assert held[half] == guide.storage(dtype).bytes and held[full] == guide.storage().bytes
    loaded = AutoImplicit.load(half, classifier())
    torch.manual_seed(5)
    here = guide.sample(200)
    torch.manual_seed(5)
    there = loaded.sample(200)
    for name, value in here.items():
        assert there[name].dtype == torch.float32
        moved = ((there[name] - value) / value.std(0)).square().mean().sqrt()
        assert 0 < float(moved) < 4 * 2.0**-digits  # a few roundings, each by less than 2^-digits


def test_half_precision_that_loses_the_posterior_says_so(tmp_path):
    far = {"w": 100.0 + 0.01 * torch.randn(300, 3), "b": torch.randn(300)}
    guide = quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), far)
    with pytest.warns(UserWarning, match=r"float16 moves the draws of site 'w' by .* of their standard deviation") as caught:
        guide.save(tmp_path / "rounded.safetensors", dtype=torch.float16)
    assert len(caught) == 1  # site 'b' is as good as before
    huge = quick(AutoImplicit(logistic, MLPGenerator(noise=3, hidden=(8,))), {"w": 1e6 * torch.randn(300, 3), "b": torch.randn(300)})
    with pytest.raises(ValueError, match=r"layers.2.\w+ of the generator holds .* beyond its range; take torch.bfloat16"):
        huge.save(tmp_path / "huge.safetensors", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        guide.save(tmp_path / "small.safetensors", dtype=torch.int8)
    assert [path.name for path in tmp_path.iterdir()] == ["rounded.safetensors"]


def test_draws_with_the_ones_that_predictive_puts_in_front_are_understood():
    model, (x, _) = classifier(), data(5)
    guide = quick(AutoImplicit(model, MLPGenerator(noise=4, hidden=(8,))), {k: v.unsqueeze(1) for k, v in draws(model, x).items()})
    assert guide(x)["net.0.weight"].shape == (4, 3)


def test_bad_arguments_are_refused_by_name():
    model = classifier()
    with pytest.raises(RuntimeError, match=r"has not been fitted yet: distill\.APD"):
        AutoImplicit(model, MLPGenerator())()
    with pytest.raises(ValueError, match="generator='mlp'"):
        AutoImplicit(model, "mlp")
    with pytest.raises(ValueError, match="Linear has no attribute noise"):
        AutoImplicit(model, nn.Linear(3, 26))
    own = nn.Linear(3, 25)
    own.noise = 3
    with pytest.raises(ValueError, match=r"Linear makes \(2, 25\) of noise \(2, 3\): \(2, 26\) is needed"):
        quick(AutoImplicit(model, own), draws(model, data(5)[0]))
    own = nn.Linear(4, 26)
    own.noise = 3
    with pytest.raises(ValueError, match=r"Linear does not take noise \(2, 3\), which its attribute says"):
        quick(AutoImplicit(model, own), draws(model, data(5)[0]))
    own = nn.LSTM(3, 26)
    own.noise = 3
    with pytest.raises(ValueError, match=r"LSTM makes tuple of noise \(2, 3\)"):
        quick(AutoImplicit(model, own), draws(model, data(5)[0]))
    partial = draws(model, data(5)[0])
    del partial["net.2.bias"]
    with pytest.raises(ValueError, match=r"site 'net.2.bias' of the model is missing; draws are needed of it"):
        quick(AutoImplicit(model, MLPGenerator()), partial)
    for wrong in ({"noise": 0}, {"noise": 2.5}, {"hidden": (0,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MLPGenerator(**wrong)
    with pytest.raises(ValueError, match="rank=0"):
        FactoredGenerator(rank=0)
    with pytest.raises(ValueError, match="packed=8"):
        FactoredGenerator(packed=8)

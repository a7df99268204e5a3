"""``AutoAdversarialNormal``: Pyro's AutoNormal with its base noise in the open and no auxiliary sites."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, init_to_value
from pyro.optim import Adam
from torch.distributions import kl_divergence

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal, BaseNoise, NoiseAscent
from tests.small_models import data, logistic, regression


def supports(x=None, y=None):
    """A site on each kind of support."""
    pyro.sample("real", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("positive", dist.Gamma(2.0, torch.ones(4)).to_event(1))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0).expand([2]).to_event(1))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("correlation", dist.LKJCholesky(3, 1.0))
    with pyro.plate("groups", 5):
        pyro.sample("local", dist.LogNormal(0.0, 1.0))


def test_it_draws_what_auto_normal_draws_with_the_same_density():
    theirs, ours = AutoNormal(supports, init_scale=0.7), AutoAdversarialNormal(supports, init_scale=0.7)
    theirs(), ours()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_()
            ours.get_parameter(name).copy_(parameter)
    pyro.set_rng_seed(1)
    expected = poutine.trace(theirs).get_trace()
    pyro.set_rng_seed(1)
    trace = poutine.trace(ours).get_trace()
    for name in ("real", "positive", "interval", "simplex", "correlation", "local"):
        torch.testing.assert_close(trace.nodes[name]["value"], expected.nodes[name]["value"])
    assert not any(name.endswith("_unconstrained") for name in trace.nodes)
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())
    for name, value in theirs.median().items():
        assert torch.equal(ours.median()[name], value)
    for name, value in theirs.quantiles([0.1, 0.9]).items():
        assert torch.equal(ours.quantiles([0.1, 0.9])[name], value)


def test_base_noise_given_to_the_guide_makes_its_draw_to_the_last_bit():
    guide = AutoAdversarialNormal(supports, init_scale=0.7)
    guide()
    pyro.set_rng_seed(1)
    drawn = guide()
    pyro.set_rng_seed(1)
    noise = guide.noise()
    with BaseNoise(noise):
        made = guide()
    assert list(made) == list(drawn) and all(torch.equal(made[name], drawn[name]) for name in drawn)


def test_zero_noise_makes_the_median():
    guide = AutoAdversarialNormal(regression)
    guide(*data())
    with BaseNoise({name: torch.zeros_like(e) for name, e in guide.noise().items()}):
        made = guide()
    assert all(torch.equal(made[name], value) for name, value in guide.median().items())


@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_divergence_of_a_log_normal_is_exact_under_pyros_mean_field_elbo_and_right_under_its_other(shape):
    def model():
        pyro.sample("z", dist.LogNormal(torch.zeros(shape), 1.0).to_event(len(shape)))

    guide = AutoAdversarialNormal(model, init_loc_fn=init_to_value(values={"z": torch.ones(shape).exp()}), init_scale=0.3)
    guide()
    exact = float(kl_divergence(dist.Normal(1.0, 0.3), dist.Normal(0.0, 1.0))) * torch.Size(shape).numel()
    assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(exact, rel=1e-5)
    draws = torch.tensor([Trace_ELBO().loss(model, guide) for _ in range(300)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 300**0.5


def test_where_no_divergence_is_known_its_estimate_is_right():
    def model():
        pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0))

    guide = AutoAdversarialNormal(model, init_loc_fn=init_to_value(values={"z": torch.tensor(0.5)}), init_scale=0.8)
    guide()
    z = torch.linspace(-8, 9, 20001, dtype=torch.double)
    q, p = dist.Normal(torch.tensor(0.5).double(), 0.8), dist.StudentT(torch.tensor(3.0).double(), 0.0, 1.0)
    exact = float(torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        draws = torch.tensor([elbo.loss(model, guide) for _ in range(300)])
        assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 300**0.5


def test_the_density_of_a_draw_at_the_edge_of_its_support_is_finite():
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    guide = AutoAdversarialNormal(model, init_scale=0.1)
    guide()
    with torch.no_grad():
        guide.locs.z.fill_(20.0)  # where the sigmoid is 1 in float32, which its inverse makes 16 of
    trace = poutine.trace(guide).get_trace()
    noise = trace.log_prob_sum() + 0.5 * torch.log(torch.tensor(2 * torch.pi)) + torch.log(torch.tensor(0.1))
    assert noise < 0.1 + 20.1 and noise > 20 - 0.1 - 10  # -eps^2/2 and the Jacobian, exp(20)


def trained(model=logistic, steps=30, **options):
    x, y = data()
    guide = AutoAdversarialNormal(model, **options)
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    return guide


def test_it_works_in_pyros_predictive_and_in_ours_alike():
    guide, (x, _) = trained(), data()
    results = []
    for predictive in (pyro.infer.Predictive, ab.Predictive):
        pyro.set_rng_seed(2)
        results.append(predictive(logistic, guide=guide, num_samples=200, return_sites=["w", "_RETURN"])(x))
    for name in ("w", "_RETURN"):
        one, two = (r[name].reshape(200, -1) for r in results)
        error = (one.var(0) / 200 + two.var(0) / 200).sqrt()
        assert bool(((one.mean(0) - two.mean(0)).abs() < 4.5 * error).all())


def test_it_works_in_a_posterior_classifier():
    model = mlp((3, 5, 2))
    x, y = data()
    guide = AutoAdversarialNormal(model, init_scale=1e-4)
    guide(x, y.long())
    classifier = ab.PosteriorClassifier(model, guide=guide, num_samples=5)
    expected = poutine.condition(model, guide.median())(x).log_softmax(-1)
    torch.testing.assert_close(classifier(x), expected, rtol=1e-2, atol=1e-2)


def test_it_works_as_part_of_a_guide_list():
    x, y = data()
    guide = AutoGuideList(logistic)
    guide.append(AutoAdversarialNormal(poutine.block(logistic, hide=["b"])))
    guide.append(AutoDelta(poutine.block(logistic, expose=["b"])))
    svi = SVI(ab.minibatch(logistic, size=600), guide, Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(60)]
    assert losses[-1] < losses[0]
    assert set(guide.median()) == {"w", "b"}


def test_plates_that_subsample_are_taken_from_create_plates():
    def model(x, y, rows):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("obs", dist.Normal(x[rows] + z, 1.0), obs=y[rows])

    x, y = torch.randn(20), torch.randn(20)
    guide = AutoAdversarialNormal(model, create_plates=lambda x, y, rows: pyro.plate("data", len(x), subsample=rows))
    guide(x, y, torch.arange(5))
    assert guide.locs.z.shape == (20,)
    trace = poutine.trace(guide).get_trace(x, y, torch.arange(10, 15))
    assert trace.nodes["z"]["value"].shape == (5,) and torch.equal(trace.nodes["data"]["value"], torch.arange(10, 15))


@pytest.mark.parametrize("call", [lambda g, x: g(x), lambda g, x: g(x, None), lambda g, x: g(x, y=None)])
@pytest.mark.parametrize("model", [regression, logistic, mlp((3, 5, 2))])
def test_a_first_call_without_observations_is_refused_by_name(call, model):
    guide = AutoAdversarialNormal(model)
    with pytest.raises(ValueError, match=r"site 'obs' would become a latent site.*argument 'y'"):
        call(guide, data()[0])
    guide(data()[0], data()[1].long() if isinstance(model, torch.nn.Module) else data()[1])
    assert "obs" not in guide(data()[0])


@pytest.mark.parametrize("predictive", [pyro.infer.Predictive, ab.Predictive])
def test_a_first_call_from_a_prediction_is_refused(predictive):
    with pytest.raises(ValueError, match="has not been called yet"):
        predictive(regression, guide=AutoAdversarialNormal(regression), num_samples=3)(data()[0])


def test_none_where_the_model_wants_observations_is_refused_too():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    guide = AutoAdversarialNormal(ab.minibatch(model, size=600))
    for each in (guide, AutoAdversarialNormal(model)):
        with pytest.raises(ValueError, match=r"site 'obs' would become a latent site.*argument 'y'"):
            each(data()[0], None)
    assert list(guide(*data())) == ["w"]


def test_local_latents_beside_an_optional_argument_are_no_observations():
    def model(y, mask=None):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0 if mask is None else 2.0), obs=y)

    assert list(AutoAdversarialNormal(model)(torch.randn(5))) == ["z"]


def test_beside_an_observation_what_is_left_out_is_meant_to_be_latent():
    def partly_observed(y, z=None, rows=None):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0), obs=z)
            pyro.sample("obs", dist.Normal(z if rows is None else z[rows.long()], 1.0), obs=y)

    def regularised(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("small", -w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    assert list(AutoAdversarialNormal(partly_observed)(torch.randn(5))) == ["z"]
    with pytest.raises(ValueError, match=r"site 'obs' would become a latent site.*argument 'y'"):
        AutoAdversarialNormal(regularised)(data()[0])


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_a_guide_survives_copying_and_pickling(remake):
    guide = trained()
    pyro.set_rng_seed(1)
    expected = guide()
    pyro.set_rng_seed(1)
    again = remake(guide)()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_learning_leaves_the_tensors_that_it_started_from_as_they_were():
    start = {"w": torch.ones(3), "b": torch.zeros(())}
    guide = trained(init_loc_fn=init_to_value(values=start))
    assert not torch.equal(guide.locs.w, torch.ones(3))
    assert torch.equal(start["w"], torch.ones(3)) and start["b"] == 0


def test_noise_of_another_shape_is_refused():
    guide = AutoAdversarialNormal(logistic)
    guide(*data())
    with pytest.raises(ValueError, match=r"site 'w': the noise has shape \(2,\), the site \(3,\)"), BaseNoise({"w": torch.zeros(2)}):
        guide()


def test_a_scale_that_is_none_is_refused_as_pyro_does():
    with pytest.raises(ValueError, match="init_scale"):
        AutoAdversarialNormal(logistic, init_scale=0.0)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"num_steps": -1}, "num_steps=-1"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"radius": -0.1}, "radius=-0.1"),
    ],
)
def test_settings_of_the_ascent_out_of_range_are_refused_by_name(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        NoiseAscent(**settings)


def quadratic(centre: float):
    return lambda values: [2 * (value - centre) for value in values]


def test_sign_steps_follow_their_equation():
    locs, scales, noises = [torch.tensor([1.0, -1.0])], [torch.tensor([0.5, 2.0])], [torch.tensor([0.2, 0.1])]
    ended = NoiseAscent(num_steps=3, step_size=0.1).run(locs, scales, noises, quadratic(0.0))
    torch.testing.assert_close(ended.noises[0], torch.tensor([0.2 + 0.3, 0.1 - 0.3]))
    torch.testing.assert_close(ended.values(locs, scales)[0], torch.tensor([1 + 0.5 * 0.5, -1 - 0.2 * 2.0]))
    assert torch.equal(noises[0], torch.tensor([0.2, 0.1])) and ended.shifts is None


def test_steps_that_are_not_given():
    """Of noise a fiftieth of a standard deviation; in a ball so long that all of them could cross it and a quarter of it again."""
    one = [torch.ones(1)]
    ended = NoiseAscent(num_steps=3).run(one, one, one, lambda values: one)
    torch.testing.assert_close(ended.noises, [torch.tensor([1.0 + 3 * 0.02])])
    ended = NoiseAscent(num_steps=10, radius=0.4).run(one, one, one, lambda values: [torch.sign(1.95 + 0.4 - values[0])])
    torch.testing.assert_close(ended.shifts, [torch.tensor([0.4])])
    ended = NoiseAscent(num_steps=3, radius=0.4).run(one, one, one, lambda values: [torch.sign(2.1 - values[0])])
    torch.testing.assert_close(ended.shifts, [torch.tensor([0.4 * 2.5 / 3])])


def test_steps_in_a_ball_take_all_sites_together_and_end_where_the_loss_is_largest():
    locs, scales, noises = ([torch.tensor([v, 0.0]), torch.tensor(v)] for v in (3.0, 0.5, 0.0))
    scales[0][1] = 1.0
    ended = NoiseAscent(num_steps=4, radius=0.5).run(locs, scales, noises, lambda values: [torch.tensor([3.0, 0.0]), torch.tensor(4.0)])
    torch.testing.assert_close(ended.shifts, [torch.tensor([0.3, 0.0]), torch.tensor(0.4)])
    assert ended.noises[0] is not noises[0] and torch.equal(ended.noises[0], noises[0])


def test_a_flat_loss_leaves_a_draw_where_it_is():
    for ascent in (NoiseAscent(), NoiseAscent(radius=1.0)):
        ended = ascent.run([torch.zeros(3)], [torch.ones(3)], [torch.ones(3)], lambda values: [torch.zeros(3)])
        assert torch.equal(ended.values([torch.zeros(3)], [torch.ones(3)])[0], torch.ones(3))


def test_noise_for_a_site_that_there_is_not_is_refused_by_name():
    guide, (x, y) = AutoAdversarialNormal(logistic), data()
    guide(x, y)
    with pytest.raises(ValueError, match=r"noise: 'typo' is no site that was drawn, of 'w', 'b'"), BaseNoise({"typo": torch.zeros(3)}):
        guide(x, y)
    with pytest.raises(ValueError, match=r"noise: 'typo' is no site"), BaseNoise({"w": torch.zeros(3), "typo": torch.zeros(3)}):
        guide(x, y)
        guide(x, y)
    with pytest.raises(KeyError, match="its own"), BaseNoise({"typo": torch.zeros(3)}):
        guide(x, y)
        raise KeyError("its own")
    handler = BaseNoise({"b": torch.zeros(())})
    for _ in range(2):  # used again it starts anew
        with handler:
            assert torch.equal(guide(x, y)["b"], guide.median(x, y)["b"])
    with pytest.raises(ValueError, match=r"noise\['w'\] is a list: give a tensor"):
        BaseNoise({"w": [0.0, 0.0, 0.0]})
    with pytest.raises(ValueError, match="noise is a Tensor: a dict of noise by site"):
        BaseNoise(torch.zeros(3))

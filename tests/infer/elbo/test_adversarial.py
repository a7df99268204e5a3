"""``TraceAdversarial_ELBO``: what it minimises, where its adversary may go, and what it leaves as it was."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import nn

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal, BaseNoise, MovedNoise
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO, distances
from tests.small_models import data, logistic, regression, subsampling


def loss_and_gradients(elbo, model, seed=3, guide=AutoAdversarialNormal, size=600):
    """Loss and gradients of the guide's parameters from one seed, on a tenth of the data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = guide(model)
    guide(*data())
    loss = elbo.loss_and_grads(ab.minibatch(model, size=size), guide, *data())
    return loss, {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", [logistic, regression])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("still", [{"mix": 0}, {"radius": 0.0}, {"num_steps": 0}, {"mix": 0, "kl_in_mix": True}], ids=str)
def test_where_nothing_moves_loss_and_gradients_are_pyros_to_the_last_bit(model, particles, still):
    loss, gradients = loss_and_gradients(TraceMeanField_ELBO(particles), model)
    elbo = TraceAdversarial_ELBO(num_particles=particles, backend="handlers", **still)
    ours, our_gradients = loss_and_gradients(elbo, model)
    assert ours == loss and elbo.moved is None
    assert gradients.keys() == our_gradients.keys() and all(torch.equal(our_gradients[name], g) for name, g in gradients.items())


def by_hand(guide, noise, moved, mix, kl_weight, scale=10):
    """The objective of ``logistic`` at these base noises, from the formulas."""
    x, y = data()
    parameters = guide.parameters_by_site()

    def nll(noise):
        w, b = (parameters[name][0] + parameters[name][1] * noise[name] for name in ("w", "b"))
        return scale * nn.functional.binary_cross_entropy_with_logits(x @ w + b, y, reduction="sum")

    kl = sum((0.5 * (s**2 + m**2 - 1) - s.log()).sum() for m, s in parameters.values())
    loss = (1 - mix) * nll(noise) + mix * nll(moved) + kl_weight * kl
    return loss, torch.autograd.grad(loss, list(guide.parameters()))


def drawn(seed=3):
    """A guide, and the plain and the adversary's noise, as :func:`loss_and_gradients` draws them from this seed."""
    pyro.set_rng_seed(seed)
    guide = AutoAdversarialNormal(logistic)
    guide(*data())
    return guide, guide.noise(), guide.noise()


def slopes(guide, noise, shift=None):
    """Gradient of the negative log-likelihood of ``logistic`` with respect to its weights at a noise."""
    x, y = data()
    w, b = (guide.median()[name] + 0.1 * noise[name] + (0 if shift is None else shift[name]) for name in ("w", "b"))
    error = torch.sigmoid(x @ w + b) - y
    return {"w": x.T @ error, "b": error.sum()}


@pytest.mark.parametrize(
    ("options", "kl_weight"),
    [({}, 1.0), ({"kl_scale": 0.3}, 0.3), ({"kl_in_mix": True}, 0.6), ({"kl_scale": 0.01, "kl_in_mix": True}, 0.006)],
)
def test_the_objective_is_its_equation_with_noise_moved_by_sign_steps(options, kl_weight):
    elbo = TraceAdversarial_ELBO(num_steps=3, step_size=0.1, mix=0.4, **options)
    loss, gradients = loss_and_gradients(elbo, logistic)
    guide, noise, moved = drawn()
    for _ in range(3):
        g = slopes(guide, moved)
        moved = {name: moved[name] + 0.1 * g[name].sign() for name in moved}
    expected, expected_gradients = by_hand(guide, noise, moved, 0.4, kl_weight)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients.values(), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_authors_weights_are_an_option():
    """Theirs is (1 - mix) (CE + beta KL) + mix CE_adv with CE a mean over N rows and beta = 1 / (100 N)."""
    ours, _ = loss_and_gradients(TraceAdversarial_ELBO(mix=0.8, kl_scale=0.01, kl_in_mix=True), logistic, size=60)
    cross_entropy, _ = loss_and_gradients(TraceAdversarial_ELBO(mix=0.8, kl_scale=0.0), logistic, size=60)
    kl, _ = by_hand(*drawn(), 0.0, 1.0, scale=0)
    assert ours / 60 == pytest.approx(cross_entropy / 60 + 0.2 * kl.item() / (100 * 60), rel=1e-6)


class Recorded:
    """An ascent whose ends are kept, and given again when ``frozen``."""

    def __init__(self, ascent):
        self.ascent, self.ends, self.frozen, self.moves = ascent, [], False, True

    def run(self, *args):
        end = self.ends.pop(0) if self.frozen else self.ascent.run(*args)
        self.ends.append(end)
        return end


@pytest.mark.parametrize("options", [{"num_steps": 3}, {"num_steps": 2, "radius": 0.3}], ids=str)
def test_gradients_agree_with_finite_differences(options):
    torch.set_default_dtype(torch.double)
    x, y = (value.double() for value in data())
    start = {"w": torch.zeros(3), "scale": torch.tensor(20.0), "b": torch.tensor(-100.0)}
    guide = AutoAdversarialNormal(regression, init_loc_fn=init_to_value(values=start))
    guide(x, y)
    elbo = TraceAdversarial_ELBO(num_particles=2, mix=0.7, **options)
    elbo.ascent = Recorded(elbo.ascent)

    def loss():
        pyro.set_rng_seed(0)
        return elbo.loss_and_grads(regression, guide, x, y)

    loss()
    gradients, elbo.ascent.frozen = [p.grad.clone() for p in guide.parameters()], True
    for parameter, gradient in zip(guide.parameters(), gradients, strict=True):
        for place in range(parameter.numel()):
            values = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                values.append(loss())
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-5
            assert float(gradient.view(-1)[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("num_steps", "step_size"), [(1, 0.02), (5, 0.02), (20, 0.5)])
def test_no_noise_moves_further_than_the_steps_add_up_to(num_steps, step_size):
    elbo = TraceAdversarial_ELBO(num_steps, step_size, num_particles=3)
    loss_and_gradients(elbo, regression)
    assert elbo.moved.noise.shape == elbo.moved.distance.shape == (3,)
    assert bool((elbo.moved.noise <= num_steps * step_size * (1 + 1e-5)).all())
    # five weights with standard deviations of 0.1
    assert bool((elbo.moved.distance <= num_steps * step_size * 0.1 * 5**0.5 * (1 + 1e-5)).all())
    assert bool((elbo.moved.distance > 0).all())


def test_the_moves_of_draws_are_reported_in_noise_and_in_distance():
    """Noise in standard deviations, the largest; distance in the weights' units, of all sites together."""
    scales, start = [torch.tensor([0.5, 2.0]), torch.tensor([4.0])], [torch.zeros(2), torch.ones(1)]
    noise, distance = distances(MovedNoise([torch.tensor([0.2, -0.4]), torch.tensor([1.1])], None), start, scales)
    assert float(noise) == pytest.approx(0.4) and float(distance) == pytest.approx((0.1**2 + 0.8**2 + 0.4**2) ** 0.5)
    noise, distance = distances(MovedNoise(start, [torch.tensor([0.3, 0.8]), torch.tensor([-1.2])]), start, scales)
    assert float(noise) == pytest.approx(0.6) and float(distance) == pytest.approx((0.3**2 + 0.8**2 + 1.2**2) ** 0.5)


@pytest.mark.parametrize("radius", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("step_size", [None, 100.0])
def test_no_draw_moves_further_than_the_radius(radius, step_size):
    elbo = TraceAdversarial_ELBO(radius=radius, step_size=step_size, num_particles=3)
    loss_and_gradients(elbo, regression)
    assert bool((elbo.moved.distance <= radius * (1 + 1e-5)).all())
    assert bool((elbo.moved.distance > 0.2 * radius).all())


@pytest.mark.parametrize(
    "options", [{}, {"step_size": 3.0}, {"num_steps": 1, "step_size": 0.001}, {"radius": 0.1}, {"radius": 9.0}], ids=str
)
def test_the_likelihood_of_a_linear_model_is_never_higher_at_the_moved_draw(options):
    x, y = data()
    elbo = TraceAdversarial_ELBO(**options)
    guide, _, _ = drawn()

    def nll(values):
        return float(nn.functional.binary_cross_entropy_with_logits(x.double() @ values["w"].double() + values["b"].double(), y.double()))

    for seed in range(30):
        pyro.set_rng_seed(seed)
        moved = elbo.adversarial_draw(logistic, guide, x, y)
        pyro.set_rng_seed(seed)
        guide.noise()  # the plain draw
        with BaseNoise(guide.noise()), torch.no_grad():
            start = guide()
        assert nll(moved) > nll(start)


def test_in_a_small_ball_the_moved_draw_is_the_worst():
    x, y = data()
    elbo, (guide, _, _) = TraceAdversarial_ELBO(radius=0.01, num_steps=5), drawn()
    pyro.set_rng_seed(1)
    moved = elbo.adversarial_draw(logistic, guide, x, y)
    pyro.set_rng_seed(1)
    guide.noise()
    noise = guide.noise()
    g = slopes(guide, noise)
    norm = torch.cat([g["w"], g["b"][None]]).norm()
    for name in ("w", "b"):
        expected = guide.median()[name] + 0.1 * noise[name] + 0.01 * g[name] / norm
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=3e-5)


def test_point_masses_beside_the_normals_stay_where_they_are():
    guide = AutoGuideList(logistic)
    guide.append(AutoAdversarialNormal(poutine.block(logistic, hide=["b"])))
    guide.append(AutoDelta(poutine.block(logistic, expose=["b"])))
    elbo = TraceAdversarial_ELBO()
    svi = SVI(ab.minibatch(logistic, size=600), guide, Adam({"lr": 0.05}), elbo)
    losses = [svi.step(*data()) for _ in range(40)]
    assert losses[-1] < losses[0]
    moved = elbo.adversarial_draw(logistic, guide, *data())
    assert torch.equal(moved["b"], guide.median()["b"]) and not torch.equal(moved["w"], guide.median()["w"])


def test_a_guide_written_by_hand_is_moved_like_an_autoguide():
    def guide(x, y):
        for name, shape in (("w", (3,)), ("b", ())):
            loc = pyro.param(f"{name}_loc", torch.zeros(shape))
            scale = pyro.param(f"{name}_scale", torch.full(shape, 0.1), constraint=dist.constraints.softplus_positive)
            pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))

    auto = AutoAdversarialNormal(logistic)
    auto(*data())
    losses = []
    for each in (guide, auto):
        pyro.set_rng_seed(0)
        losses.append(TraceAdversarial_ELBO(mix=0.5).loss(logistic, each, *data()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_adversary_sees_the_rows_that_the_plain_draw_saw():
    def guide(x, y):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.1).to_event(1))

    model_trace, _ = TraceAdversarial_ELBO()._get_trace(subsampling, guide, data(), {})
    assert torch.equal(model_trace.nodes["obs (adversarial)"]["value"], model_trace.nodes["obs"]["value"])


class Normalised(PyroModule):
    """Batch normalisation between Bayesian layers, in training mode."""

    def __init__(self):
        super().__init__()
        self.first = PyroModule[nn.Linear](3, 4)
        self.first.weight = PyroSample(dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        self.norm = PyroModule[nn.BatchNorm1d](4)
        self.last = PyroModule[nn.Linear](4, 1)

    def forward(self, x, y=None):
        logits = self.last(self.norm(self.first(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)
        return logits


@pytest.mark.parametrize("options", [{"mix": 0}, {}, {"radius": 0.5}], ids=str)
def test_running_statistics_are_those_of_the_plain_draw(options):
    statistics = []
    for elbo in (TraceMeanField_ELBO(), TraceAdversarial_ELBO(**options)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Normalised()
        guide = AutoAdversarialNormal(model)
        guide(*data())
        elbo.loss_and_grads(model, guide, *data())
        statistics.append({name: value.clone() for name, value in model.norm.named_buffers()})
        gradients = [p.grad for p in model.parameters()]
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())
    assert len(gradients) == 5 and all(g is not None and bool(g.isfinite().all()) for g in gradients)


def test_svi_learns_under_minibatches_and_the_parameters_are_pyros():
    x, y = data()
    guide, elbo = AutoAdversarialNormal(logistic), TraceAdversarial_ELBO()
    svi = SVI(ab.minibatch(logistic, size=60), guide, Adam({"lr": 0.05}), elbo)
    losses = []
    for _ in range(20):
        losses.append(sum(svi.step(x[rows], y[rows]) for rows in torch.arange(60).split(25)))  # the last batch is shorter
    assert sum(losses[-5:]) < sum(losses[:5])
    assert set(pyro.get_param_store()) == {f"AutoAdversarialNormal.{n}.{s}" for n in ("locs", "scales") for s in ("w", "b")}
    assert isinstance(svi.evaluate_loss(x, y), float)


def test_it_is_a_module_for_plain_torch_optimisers():
    with pyro.settings.context(module_local_params=True):
        x, y = data()
        model = mlp((3, 8, 2))
        guide = AutoAdversarialNormal(model, init_scale=0.01)
        elbo = TraceAdversarial_ELBO(num_steps=2)(ab.minibatch(model, size=60), guide)
        elbo(x, y.long())
        optimiser = torch.optim.Adam(elbo.parameters(), lr=0.05)
        losses = []
        for _ in range(40):
            optimiser.zero_grad()
            losses.append(elbo(x, y.long()))
            losses[-1].backward()
            optimiser.step()
    assert float(losses[-1]) < float(losses[0]) and len(pyro.get_param_store()) == 0


def test_a_fit_to_conjugate_regression_is_the_exact_mean_field_optimum():
    """The optimum has the posterior's mean, and the inverse of its precision's diagonal as variances."""
    x, noise, prior = data()[0] + torch.tensor([0.5, 0.0, -0.3]), 0.5, 2.0
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + noise * torch.randn(60)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), prior).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, noise), obs=y)

    guide = AutoAdversarialNormal(model, init_scale=0.1)
    guide(x, y)
    svi = SVI(
        model,
        guide,
        pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.996}),
        elbo := TraceAdversarial_ELBO(mix=0, num_particles=2),
    )
    for _ in range(1200):
        svi.step(x, y)
        svi.optim.step()
    precision = x.T @ x / noise**2 + torch.eye(3) / prior**2
    mean = torch.linalg.solve(precision, x.T @ y / noise**2)
    deviations = precision.diagonal().rsqrt()
    assert elbo.moved is None
    assert bool(((guide.locs.w - mean).abs() < 0.1 * deviations).all())
    torch.testing.assert_close(guide.scales.w.detach(), deviations, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"mix": -0.1}, "mix=-0.1"),
        ({"mix": 1.1}, "mix=1.1"),
        ({"mix": float("nan")}, "mix=nan"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"step_size": -1.0}, "step_size=-1.0"),
        ({"radius": -1.0}, "radius=-1.0"),
        ({"kl_scale": -1.0}, "kl_scale=-1.0"),
        ({"num_particles": 0}, "num_particles=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        TraceAdversarial_ELBO(**settings)


def laplace_guide(x, y):
    pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.zeros(())), 1.0))
    pyro.sample("w", dist.Laplace(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))


def half_guide(x, y):
    pyro.sample("b", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (AutoNormal(logistic), r"site '\w_unconstrained' is drawn by the guide and unknown to the model.*AutoAdversarialNormal"),
        (AutoMultivariateNormal(logistic), "'_AutoMultivariateNormal_latent'.*unknown to the model"),
        (AutoDelta(logistic), "no site with Normal base noise"),
        (laplace_guide, "site 'w': the guide draws it from Laplace"),
        (half_guide, "site 'w' is neither observed nor in the guide"),
    ],
    ids=["auxiliary", "joint", "points", "Laplace", "a site short"],
)
@pytest.mark.parametrize("mix", [0, 0.8])
def test_guides_without_normal_base_noise_are_refused_before_anything_is_learnt(guide, message, mix):
    svi = SVI(logistic, guide, Adam({"lr": 0.1}), TraceAdversarial_ELBO(mix=mix))
    with pytest.raises(ValueError, match=message):
        svi.step(*data())


def test_a_model_that_observes_nothing_is_refused():
    def model(x, y=None):
        return x @ pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="the model observes nothing"):
        TraceAdversarial_ELBO().loss(model, AutoAdversarialNormal(model), *data())


def test_a_loss_without_observations_is_refused_by_name():
    guide = AutoAdversarialNormal(logistic)
    guide(*data())
    with pytest.raises(ValueError, match="site 'obs' is neither observed nor in the guide"):
        TraceAdversarial_ELBO().loss(logistic, guide, data()[0])


def test_a_guide_that_took_observations_for_latents_is_refused():
    def guide(x, y):
        pyro.sample("w", dist.Normal(pyro.param("w_loc", torch.zeros(3)), 1.0).to_event(1))
        pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.zeros(())), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'obs' is observed, but the guide draws it"):
        TraceAdversarial_ELBO().loss(logistic, guide, *data())

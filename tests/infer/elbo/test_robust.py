from __future__ import annotations

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.attacks.base import Attack
from pyro_advbayes.attacks.carlini_wagner import CarliniWagner
from pyro_advbayes.attacks.distribution import AdversarialDistribution
from pyro_advbayes.attacks.fgsm import FGSM
from pyro_advbayes.attacks.pgd import PGD
from pyro_advbayes.attacks.uniform import Uniform
from pyro_advbayes.attacks.wrm import WRM
from pyro_advbayes.infer.elbo.robust import TraceRobust_ELBO
from tests.small_models import data, logistic

FREE = {"clip": None}


@dataclass(frozen=True, repr=False)
class Still(Attack):
    """Looks at the loss and its gradient, and leaves the inputs where they are."""

    seen: list = field(default_factory=list, kw_only=True)
    clip: tuple[float, float] | None = field(default=None, kw_only=True)

    def run(self, problem, region):
        self.seen.append(problem.gradient(region.center))
        return region.center


def moved_by_hand(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, b: torch.Tensor, eps: float) -> torch.Tensor:
    """FGSM on a logistic regression: the loss falls along w for y = 1."""
    return x + eps * torch.outer(torch.sigmoid(x @ w + b) - y, w).sign()


def trained(guide: type, elbo, steps: int = 3, model=logistic) -> tuple[list[float], dict[str, torch.Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide(logistic), Adam({"lr": 0.1}), loss=elbo)
    losses = [svi.step(*data()) for _ in range(steps)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(), Trace_ELBO(num_particles=3), TraceMeanField_ELBO(), TraceGraph_ELBO()],
    ids=["trace", "particles", "mean field", "graph"],
)
def test_an_attack_that_does_not_move_gives_pyros_own_elbo_and_gradients_to_the_last_bit(guide, elbo):
    attack = Still()
    losses, params = trained(guide, elbo)
    ours, our_params = trained(guide, TraceRobust_ELBO(attack, elbo=elbo))
    assert ours == losses and list(our_params) == list(params)
    assert all(torch.equal(our_params[name], params[name]) for name in params)
    assert len(attack.seen) == 3 * elbo.num_particles


def test_the_loss_is_pyros_on_inputs_moved_by_hand():
    (x, y), eps = data(), 0.3
    guide = AutoDelta(logistic)
    guide(x, y)
    with torch.no_grad():
        guide.w += 0.5
    x_adv = moved_by_hand(x, y, guide.w.detach(), guide.b.detach(), eps)
    expected = Trace_ELBO().loss(logistic, guide, x_adv, y)
    robust = TraceRobust_ELBO(FGSM(eps=eps, **FREE))
    assert robust.loss(logistic, guide, x, y) == pytest.approx(expected, rel=1e-6)
    assert expected > Trace_ELBO().loss(logistic, guide, x, y) + 1


def test_each_particle_is_scored_on_inputs_moved_against_its_own_draw():
    (x, y), eps, particles = data(), 0.3, 4
    guide = AutoNormal(logistic, init_scale=1.0)
    guide(x, y)
    pyro.set_rng_seed(5)
    expected = 0.0
    for _ in range(particles):
        trace = poutine.trace(guide).get_trace(x, y)
        w, b = (trace.nodes[name]["value"].detach() for name in ("w", "b"))
        x_adv = moved_by_hand(x, y, w, b, eps)
        joint = poutine.trace(poutine.replay(logistic, trace)).get_trace(x_adv, y).log_prob_sum()
        expected += (trace.log_prob_sum() - joint).item() / particles
    pyro.set_rng_seed(5)
    robust = TraceRobust_ELBO(FGSM(eps=eps, **FREE), elbo=Trace_ELBO(num_particles=particles))
    assert robust.loss(logistic, guide, x, y) == pytest.approx(expected, rel=1e-5)


def test_gradients_are_pyros_on_inputs_moved_by_hand():
    (x, y), eps = data(), 0.3
    guide = AutoDelta(logistic)
    guide(x, y)
    with torch.no_grad():
        guide.w += 0.5
    x_adv = moved_by_hand(x, y, guide.w.detach(), guide.b.detach(), eps)
    parameters = list(guide.parameters())
    wanted = torch.autograd.grad(Trace_ELBO().differentiable_loss(logistic, guide, x_adv, y), parameters)
    TraceRobust_ELBO(FGSM(eps=eps, **FREE)).loss_and_grads(logistic, guide, x, y)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_as_a_module_it_trains_under_torchs_optimisers():
    x, y = data()
    model = mlp((3, 2))
    guide = AutoNormal(model)
    module = TraceRobust_ELBO(PGD(eps=0.2, steps=2, **FREE))(model, guide)
    module(x, y.long())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(module(x, y.long()))
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def normal(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


def several(x, y=None):
    """Two observed sites, one of them a vector in every row; half of the rows masked at the other; a scale of the user's."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    logits = x * w
    with pyro.plate("data", len(x)), poutine.scale(scale=7.0):
        pyro.sample("pixels", dist.Bernoulli(logits=logits).to_event(1), obs=(x > 0).float())
        with poutine.mask(mask=torch.arange(len(x)) % 2 == 0):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=None if y is None else y.long())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("model", [logistic, normal, several])
def test_what_the_attack_raises_is_the_unscaled_loss_of_every_row(model, scaled):
    x, y = data()
    guide = AutoDelta(model)
    guide(x, y)
    with torch.no_grad():
        guide.w += torch.tensor([0.5, -1.0, 2.0])
    w, attack = guide.w.detach(), Still()
    TraceRobust_ELBO(attack).loss(ab.minibatch(model, size=1000) if scaled else model, guide, x, y)
    if model is logistic:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + guide.b.detach(), y, reduction="none")
    elif model is normal:
        expected = -dist.Normal(x @ w, 0.5).log_prob(y)
    else:
        expected = -dist.Bernoulli(logits=x * w).log_prob((x > 0).float()).sum(-1)
        expected[::2] += torch.nn.functional.cross_entropy(x * w, y.long(), reduction="none")[::2]
    (ascent,) = attack.seen
    torch.testing.assert_close(ascent.loss, expected)


def test_under_minibatch_the_loss_is_scaled_to_the_whole_set():
    x, y = data()
    guide = AutoDelta(logistic)
    model = ab.minibatch(logistic, size=600)
    loss = TraceRobust_ELBO(FGSM(eps=0.3, **FREE)).loss(model, guide, x, y)
    x_adv = moved_by_hand(x, y, guide.w.detach(), guide.b.detach(), 0.3)
    assert loss == pytest.approx(Trace_ELBO().loss(model, guide, x_adv, y), rel=1e-6)


def test_rows_of_a_plate_with_the_size_of_the_whole_set_are_attacked_unscaled():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 600, subsample_size=len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    (x, y), guide, attack = data(), AutoDelta(model), Still()
    loss = TraceRobust_ELBO(attack).loss(model, guide, x, y)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x @ guide.w.detach(), y, reduction="none")
    torch.testing.assert_close(attack.seen[0].loss, expected)
    prior = dist.Normal(0.0, 1.0).log_prob(guide.w.detach()).sum().item()
    assert loss == pytest.approx(10 * expected.sum().item() - prior, rel=1e-5)


def test_stronger_attacks_make_larger_losses():
    x, y = data()
    guide = AutoDelta(logistic)
    guide(x, y)
    with torch.no_grad():
        guide.w += 1.0
    attacks = [Still(), Uniform(eps=0.3, **FREE), PGD(eps=0.1, steps=5, **FREE), FGSM(eps=0.3, **FREE), WRM(strength=2.0, **FREE)]
    losses = [TraceRobust_ELBO(attack).loss(logistic, guide, x, y) for attack in attacks]
    still, uniform, small, large, wrm = losses
    assert still < small < large and abs(uniform - still) < large - still and wrm > still + 1


def one_strong_feature(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes 0.5 apart in one feature, and 0.08 in each of fifty: without an adversary of 0.1 the fifty tell more."""
    y = torch.arange(rows) % 2
    apart = torch.cat([torch.tensor([0.25]), torch.full((50,), 0.04)])
    width = torch.cat([torch.tensor([0.05]), torch.full((50,), 0.04)])
    return (0.5 + (2 * y.unsqueeze(1) - 1) * apart + width * torch.randn(rows, 51)).clamp(0, 1), y


def two_classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(51), 10.0).to_event(1))
    f = (x - 0.5) @ w
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=torch.stack([-f, f], -1)), obs=y)


@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
def test_training_against_a_distribution_makes_a_network_and_a_posterior_more_robust(guide):
    """By four fifths of the test points at least; without it, none stays right."""
    (x, y), (x_test, y_test) = one_strong_feature(200), one_strong_feature(200)
    right = {}
    for name, loss in (
        ("plain", Trace_ELBO()),
        ("adversarial", TraceRobust_ELBO(AdversarialDistribution(eps=0.1, steps=7, num_samples=1))),
    ):
        pyro.clear_param_store()
        fitted = guide(two_classes)
        svi = SVI(ab.minibatch(two_classes, size=len(x)), fitted, Adam({"lr": 0.1}), loss)
        for _ in range(150):
            rows = torch.randperm(len(x))[:50]
            svi.step(x[rows], y[rows])
        classifier = ab.PosteriorClassifier(two_classes, guide=fitted, num_samples=10)
        attacked = classifier(PGD(0.1, 20)(classifier, x_test, y_test))
        right[name] = float((attacked.argmax(-1) == y_test).float().mean())
    assert right["adversarial"] > right["plain"] + 0.8


@pytest.mark.parametrize("call", [lambda f, x, y: f(x, y), lambda f, x, y: f(x, y=y), lambda f, x, y: f(y=y, x=x)])
def test_inputs_are_found_by_position_and_by_name(call):
    x, y = data()
    guide = AutoDelta(logistic)
    guide(x, y)
    robust, attack = TraceRobust_ELBO(PGD(eps=0.3, steps=2, random_start=False, **FREE)), FGSM(eps=0.3, **FREE)
    loss = call(lambda *args, **kwargs: robust.loss(logistic, guide, *args, **kwargs), x, y)
    assert loss == pytest.approx(TraceRobust_ELBO(attack).loss(logistic, guide, x, y), rel=1e-6)


def test_another_argument_can_be_perturbed():
    x, y = data()

    def model(context, images, labels):
        return logistic(images + context, labels)

    guide, attack = AutoDelta(model), Still()
    TraceRobust_ELBO(attack, perturb="images").loss(model, guide, torch.ones(3), x, y)
    assert attack.seen[0].gradient.shape == x.shape


def test_one_seed_gives_one_loss_however_random_the_start():
    robust = TraceRobust_ELBO(PGD(eps=0.5, steps=1, step_size=0.1, **FREE))
    losses, _ = trained(AutoNormal, robust)
    assert trained(AutoNormal, robust)[0] == losses != trained(AutoNormal, TraceRobust_ELBO(Still()))[0]


def test_the_attack_leaves_no_gradients_parameters_or_modes_behind():
    class Network(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.linear = torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5), PyroModule[torch.nn.Linear](3, 1)
            self.linear.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

        def forward(self, x, y=None):
            logits = self.linear(self.drop(self.norm(x))).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

    def guide(x, y=None):
        pyro.sample("linear.bias", dist.Delta(pyro.param("bias", torch.zeros(1)), event_dim=1))

    model, names = Network(), []
    model.drop.register_forward_pre_hook(lambda module, _: names.append(module.training))
    x, y = data()
    assert not x.requires_grad
    TraceRobust_ELBO(PGD(eps=0.1, steps=4, **FREE)).loss(model, guide, x, y)
    assert names == [False] * 4 + [True]
    assert model.norm.num_batches_tracked == 1 and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters()) and not x.requires_grad
    found = set(pyro.get_param_store())
    pyro.clear_param_store()
    Trace_ELBO().loss(model, guide, x, y)
    assert found == set(pyro.get_param_store())
    assert pyro.param("bias").grad is None


def test_where_gradients_are_disabled_the_attack_has_them_all_the_same():
    guide, robust = AutoDelta(logistic), TraceRobust_ELBO(FGSM(eps=0.3, **FREE))
    guide(*data())
    svi = SVI(logistic, guide, Adam({"lr": 0.1}), loss=robust)
    assert svi.evaluate_loss(*data()) == robust.loss(logistic, guide, *data()) > Trace_ELBO().loss(logistic, guide, *data()) + 1


def test_adversarial_training_drops_a_feature_that_is_right_but_small():
    """One feature is always right, and smaller than the perturbation; another is right nine times in ten, and larger."""
    y = torch.arange(200) % 2
    sign = 2.0 * y - 1
    often = torch.where(torch.arange(200) % 20 < 2, -sign, sign)
    x = torch.stack([0.05 * sign, 0.5 * often], -1) + 0.001 * torch.randn(200, 2)
    attack, accuracy = FGSM(eps=0.1, **FREE), {}
    for name, loss in (("plain", Trace_ELBO()), ("robust", TraceRobust_ELBO(attack))):
        pyro.clear_param_store()
        model = mlp((2, 2), prior=dist.Normal(0.0, 100.0))
        guide = AutoDelta(model, init_loc_fn=ab.init_to_fan_in)
        svi = SVI(model, guide, Adam({"lr": 0.3}), loss=loss)
        for _ in range(150):
            svi.step(x, y)
        network = ab.PosteriorClassifier(model, {site: value[None] for site, value in guide.median().items()})
        accuracy[name] = (network(attack(network, x, y)).argmax(-1) == y).double().mean()
    assert accuracy["plain"] < 0.1 and accuracy["robust"] == pytest.approx(0.9, abs=0.01)


def poisson(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("count", dist.Poisson((x @ w).exp()), obs=y)


def outside(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("mean", dist.Normal((x @ w).mean(), 1.0), obs=y.mean())


def subsampled(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        pyro.sample("obs", dist.Bernoulli(logits=x[rows] @ w), obs=y[rows])


def unobserved(x, y=None):
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


X, Y = data()


@pytest.mark.parametrize(
    ("model", "settings", "arguments", "words"),
    [
        (logistic, {"perturb": "image"}, (X, Y), "perturb='image' is not a tensor argument .* those of logistic are 'x', 'y'"),
        (logistic, {"perturb": "x"}, (X.long(), Y), "perturb='x': .* floating type .* not torch.int64"),
        (logistic, {"attack": FGSM(eps=0.1)}, (X, Y), r"inputs run from .* but clip=\(0.0, 1.0\)"),
        (poisson, {}, (X, Y), "observed site 'count' is Poisson: adversarial training is for Categorical, Bernoulli and Normal"),
        (outside, {}, (X, Y), "observed site 'mean' must be in one plate of 60 rows.*plates: none"),
        (subsampled, {}, (X, Y), "observed site 'obs' must be in one plate of 60 rows.*'data' of 7.*minibatch"),
        (unobserved, {}, (X, Y), "no observed site"),
        (logistic, {}, (X,), "site 'obs' is neither observed nor in the guide"),
    ],
)
def test_what_cannot_be_attacked_is_named(model, settings, arguments, words):
    guide = AutoDelta(poutine.block(model, expose=["w", "b"]))
    with pytest.raises(ValueError, match=words):
        TraceRobust_ELBO(**{"attack": FGSM(eps=0.1, **FREE), **settings}).loss(model, guide, *arguments)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attack": None}, "attack must be an attack"),
        ({"attack": FGSM(eps=0.1, targeted=True)}, "targeted=True has no meaning"),
        ({"attack": CarliniWagner()}, "CarliniWagner needs more than a loss"),
        ({"attack": FGSM(eps=0.1, objective="mean_loss")}, "objective='mean_loss' is for classifiers"),
        ({"elbo": Trace_ELBO}, "elbo must be an instance"),
        ({"elbo": JitTrace_ELBO()}, "not compiled"),
        ({"elbo": Trace_ELBO(num_particles=2, vectorize_particles=True)}, "vectorize_particles=False"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TraceRobust_ELBO(**{"attack": FGSM(eps=0.1), **settings})


def test_a_guide_that_draws_while_the_model_runs_is_refused():
    with pytest.raises(ValueError, match="guide is an effect handler"):
        TraceRobust_ELBO(FGSM(eps=0.1, **FREE)).loss(logistic, AutoNormalMessenger(logistic), *data())

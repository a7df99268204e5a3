"""``bayes_adapter``: from a trained network to a posterior around it."""

from __future__ import annotations

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torchvision
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from models.heteroscedastic_regression import HeteroscedasticRegression
from models.linear_regression import LinearRegression
from models.mlp import mlp_network
from pyro_advbayes.diagnostics import mutual_information
from pyro_advbayes.infer.adapter import UncertaintyRegularizer, bayes_adapter, weight_decay_prior
from pyro_advbayes.infer.autoguide.adversarial import AutoAdversarialNormal
from pyro_advbayes.infer.elbo.adversarial import TraceAdversarial_ELBO
from pyro_advbayes.nn import bayesianize
from pyro_advbayes.nn.classifier import Classifier
from tests.small_models import data, logistic


def images(rows=64):
    """Stripes, across or along, in noise."""
    y = torch.arange(rows) % 2
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8)
    x = torch.where(y[:, None, None] == 0, stripes, stripes.T) + 0.5 * torch.randn(rows, 8, 8)
    return x[:, None], y


def convnet():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net, (x, y) = convnet(), images()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval()


def loader(batch_size=16):
    return DataLoader(TensorDataset(*images()), batch_size=batch_size, shuffle=True)


def test_at_zero_scale_it_predicts_exactly_as_the_trained_network(trained):
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    for pretrained in (trained, state):
        model, guide, losses = bayes_adapter(convnet(), pretrained, loader(), weight_decay=1e-3, num_epochs=0, init_scale=1e-30)
        x, _ = images()
        results = ab.Predictive(model, guide=guide, num_samples=3, return_sites=["_RETURN"])(x)["_RETURN"]
        assert all(torch.equal(logits, trained(x)) for logits in results) and losses == []


def test_the_divergences_gradients_are_weight_decay_and_a_pull_towards_uncertainty():
    torch.set_default_dtype(torch.double)
    weight_decay, num_data = 2e-4, 50_000
    mean, log_scale = torch.randn(20).requires_grad_(), (torch.randn(20) - 5).requires_grad_()
    prior = weight_decay_prior(weight_decay, num_data)
    assert float(prior.scale) ** 2 == pytest.approx(0.1)
    kl = kl_divergence(dist.Normal(mean, log_scale.exp()), prior).sum() / num_data
    slopes = torch.autograd.grad(kl, (mean, log_scale))
    torch.testing.assert_close(slopes[0], weight_decay * mean)
    torch.testing.assert_close(slopes[1], weight_decay * log_scale.exp() ** 2 - 1 / num_data)


def test_those_are_the_gradients_that_the_guide_gets(trained):
    weight_decay, (x, y) = 1e-3, images()
    model, guide, _ = bayes_adapter(convnet(), trained, loader(), weight_decay=weight_decay, num_epochs=0)
    gradients = []
    for kl_scale in (0.0, 1.0):
        guide.zero_grad()
        pyro.set_rng_seed(0)
        elbo = TraceAdversarial_ELBO(mix=0, kl_scale=kl_scale)
        (elbo.differentiable_loss(ab.minibatch(model, size=64), guide, x, y) / 64).backward()
        gradients.append({name: p.grad.clone() for name, p in guide.named_parameters()})
    for name, (mean, scale) in guide.parameters_by_site().items():
        mean, scale = mean.detach(), scale.detach()
        of_mean, of_scale = (
            gradients[1][key] - gradients[0][key] for key in (f"{part}.{name}_unconstrained" for part in ("locs", "scales"))
        )
        torch.testing.assert_close(of_mean, weight_decay * mean, rtol=1e-3, atol=1e-6)
        slope = -torch.expm1(-scale) / scale  # of the softplus' logarithm: nearly 1 for small scales
        torch.testing.assert_close(of_scale, (weight_decay * scale**2 - 1 / 64) * slope, rtol=1e-3, atol=1e-6)


def test_one_call_makes_a_fitted_posterior_of_a_trained_network(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    model, guide, losses = bayes_adapter(
        trained,
        trained,
        loader(),
        weight_decay=1e-3,
        num_epochs=12,
        lr=1e-3,
        scale_lr=0.05,
        init_scale=0.3,
        loss=TraceAdversarial_ELBO(mix=0),
    )
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    x, y = images()
    network = ab.PosteriorClassifier(model, guide=guide, num_samples=20)
    quality = ab.diagnostics.draw_quality(network.log_probs(x), y)
    assert quality.ensembled.value > 0.9
    scales = torch.cat([scale.detach().flatten() for _, scale in guide.parameters_by_site().values()])
    assert scales.std().item() > 1e-3


def test_one_call_makes_a_fitted_posterior_of_a_torchvision_network():
    """Draws from its prior, with a standard deviation of 12, overflow in the network, and must not matter."""
    x, y = images()
    x = nn.functional.interpolate(x, (16, 16)).expand(-1, 3, -1, -1)
    rows = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    net = torchvision.models.resnet18(num_classes=2)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(6):
        for batch, labels in rows:
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(batch), labels).backward()
            optimiser.step()
    net.eval()
    model, guide, losses = bayes_adapter(net, net, rows, weight_decay=1e-4, num_epochs=1, lr=1e-3, scale_lr=0.01)
    assert all(math.isfinite(loss) for loss in losses) and len(losses) == 1
    network = ab.PosteriorClassifier(model, guide=guide, num_samples=3)
    with torch.no_grad():
        quality = ab.diagnostics.draw_quality(torch.cat(list(network.log_probs(x))), y)
        share = (net(x).argmax(-1) == y).float().mean().item()
    assert quality.ensembled.value >= share - 0.05 and share > 0.9
    assert {f"net.{name}" for name, _ in net.named_parameters()} == set(guide.parameters_by_site())


def test_statistics_are_looked_at_once_they_come_from_the_trained_network(trained):
    for pretrained, unseen in ((trained, False), (convnet(), True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bayes_adapter(convnet(), pretrained, loader(), weight_decay=1e-3, num_epochs=0)
        assert ["layer '1': running statistics that have never" in str(w.message) for w in caught] == [True] * unseen


def test_layers_that_only_training_needs_have_no_part_in_it(trained):
    class Aided(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.aid = copy.deepcopy(trained), nn.Linear(64, 2)

        def forward(self, x):
            return self.body(x) + self.aid(x.flatten(1)) if self.training else self.body(x)

    net = Aided().eval()
    guide = bayes_adapter(net, net, loader(), weight_decay=1e-3, num_epochs=1).guide
    assert set(guide.parameters_by_site()) == {f"net.body.{name}" for name, _ in trained.named_parameters()}
    with pytest.raises(ValueError, match=r"'another' is unknown to the model$"):
        bayes_adapter(net, {**net.state_dict(), "another": torch.zeros(1)}, loader(), weight_decay=1e-3)


def test_means_and_scales_have_learning_rates_of_their_own(trained):
    moved = []
    for lr, scale_lr in ((1e-3, 1e-12), (1e-12, 0.1)):
        _, guide, _ = bayes_adapter(convnet(), trained, loader(), weight_decay=1e-3, lr=lr, scale_lr=scale_lr)
        parameters = guide.parameters_by_site()
        means = max(
            float((mean.detach() - trained.state_dict()[name.removeprefix("net.")]).abs().max()) for name, (mean, _) in parameters.items()
        )
        scales = max(float((scale.detach() - math.exp(-5.5)).abs().max()) for _, scale in parameters.values())
        moved.append((means > 1e-6, scales > 1e-6))
    assert moved == [(True, False), (False, True)]


def test_another_optimiser_and_another_loss_may_be_given(trained):
    model = Classifier(bayesianize(convnet(), prior=weight_decay_prior(1e-3, 64)))
    seen = []

    def optim(groups):
        seen.extend(group["lr"] for group in groups)
        return torch.optim.Adam(groups)

    _, _, losses = bayes_adapter(model, trained, loader(), loss=TraceMeanField_ELBO(), optim=optim, lr=1e-3, scale_lr=2e-3, num_epochs=2)
    assert seen == [1e-3, 2e-3] and len(losses) == 2


class Excluded(PyroModule):
    """A Bayesian last layer on a feature extractor that is none, with a site beside the network's."""

    def __init__(self):
        super().__init__()
        self.inner = bayesianize(convnet(), exclude=["0.*", "1.*"])

    def forward(self, x, y=None):
        sharpness = pyro.sample("sharpness", dist.LogNormal(0.0, 0.1))
        logits = sharpness * self.inner(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)


def test_weights_go_to_sites_and_to_what_is_no_site_and_other_sites_start_by_themselves(trained):
    model, guide, _ = bayes_adapter(Excluded(), trained, loader(), num_epochs=0)
    state = trained.state_dict()
    assert torch.equal(guide.locs.get_submodule("inner.5").weight_unconstrained, state["5.weight"])
    assert torch.equal(model.inner[0].weight, state["0.weight"]) and torch.equal(model.inner[1].running_mean, state["1.running_mean"])
    assert guide.median()["sharpness"] > 0


def test_parameters_that_are_no_sites_are_learnt_like_the_means(trained):
    state = trained.state_dict()
    for lr, moves in ((1e-3, True), (1e-12, False)):
        model, _, _ = bayes_adapter(Excluded(), trained, loader(), lr=lr)
        moved = (model.inner[0].weight - state["0.weight"]).abs().max().item()
        assert (moved > 1e-6) is moves


def test_the_uncertainty_regulariser_is_its_equation(trained):
    model, guide, _ = bayes_adapter(convnet(), trained, loader(), weight_decay=1e-3, num_epochs=0, init_scale=0.5)
    x, y = images()
    for threshold in (0.75, 0.05):
        pyro.set_rng_seed(0)
        found = UncertaintyRegularizer(eps=0.5, threshold=threshold, weight=3.0).loss(model, guide, x, y)
        pyro.set_rng_seed(0)
        moved = x + torch.empty_like(x).uniform_(-0.5, 0.5)
        probs = []
        for _ in range(2):
            weights = {name.removeprefix("net."): value for name, value in guide().items()}
            probs.append(torch.func.functional_call(trained, weights, moved).softmax(-1))
        probs = torch.stack(probs)
        disagreement = mutual_information(probs)
        assert bool((disagreement > 0.05).any()) and bool((disagreement < 0.05).any())
        torch.testing.assert_close(found, 3 * (threshold - disagreement).clamp(min=0).mean())
    with torch.no_grad():
        guide.locs.get_submodule("net.5").weight_unconstrained *= 1e4  # where softmax is 0 and 1
    found = found + UncertaintyRegularizer(eps=0.5).loss(model, guide, x, y)
    found.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in guide.parameters())


def test_the_uncertainty_regulariser_makes_draws_disagree_beside_the_data(trained):
    x, disagreement = images()[0], []
    noisy = x + 2 * torch.rand_like(x) - 1
    for uncertainty in (None, UncertaintyRegularizer(eps=1.0, weight=10.0)):
        pyro.set_rng_seed(0)
        settings = {"weight_decay": 1e-3, "num_epochs": 6, "lr": 1e-3, "scale_lr": 0.3, "init_scale": 0.1}
        model, guide, _ = bayes_adapter(convnet(), trained, loader(), **settings, uncertainty=uncertainty)
        logits = ab.Predictive(model, guide=guide, num_samples=30, return_sites=["_RETURN"])(noisy)["_RETURN"]
        disagreement.append(mutual_information(logits.softmax(-1)).mean())
    assert disagreement[1] > 1.5 * disagreement[0]


def test_the_uncertainty_regulariser_wants_numbers():
    for wrong in ({"eps": 0.0}, {"eps": 1.0, "threshold": -1.0}, {"eps": 1.0, "weight": 0.0}):
        with pytest.raises(ValueError, match="a number > 0"):
            UncertaintyRegularizer(**wrong)


def test_weights_that_do_not_fit_are_listed_before_training(trained):
    state = dict(trained.state_dict())
    state["7.weight"] = state.pop("5.weight")
    state["0.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="pretrained does not fit the model") as caught:
        bayes_adapter(convnet(), state, loader(), weight_decay=1e-3)
    for part in ("'net.5.weight' is missing", "'7.weight' is unknown to the model", r"'0.bias' has shape [5], the model [4]"):
        assert part in str(caught.value)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.second = self.first

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)[:, :8]).relu()))


@pytest.mark.parametrize("copied", [lambda state: state, lambda state: {name: value.clone() for name, value in state.items()}])
def test_a_layer_in_two_places_has_its_weights_under_either_name(copied):
    net = Twice()
    state = copied(net.state_dict())
    for given in (state, {name: value for name, value in state.items() if not name.startswith("first")}):
        _, guide, _ = bayes_adapter(Twice(), given, loader(), weight_decay=1e-3, num_epochs=0)
        assert torch.equal(guide.median()["net.second.weight"], net.first.weight) and "net.first.weight" not in guide.median()
    with pytest.raises(ValueError, match=r"'first.weight' differs from 'second.weight', which is the same weight"):
        bayes_adapter(Twice(), {**state, "first.weight": torch.zeros(8, 8)}, loader(), weight_decay=1e-3)


def test_batches_go_where_a_network_is_of_which_all_is_bayesian(trained):
    for each in (trained, nn.Sequential(nn.Flatten(), nn.Linear(64, 2))):
        model = Classifier(bayesianize(copy.deepcopy(each).to("meta")))
        with pyro.validation_enabled(False):  # there are no values to look at
            _, guide, _ = bayes_adapter(model, each, loader(), num_epochs=0)
        assert {p.device.type for p in guide.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"weight_decay": 0.0}, "weight_decay=0.0"),
        ({"weight_decay": None}, "weight_decay: a plain network has no priors"),
        ({"num_epochs": -1}, "num_epochs=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"scale_lr": -1.0}, "scale_lr=-1.0"),
        ({"init_scale": 0.0}, "init_scale"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(trained, settings, culprit):
    with pytest.raises(ValueError, match=culprit):
        bayes_adapter(convnet(), trained, loader(), **{"weight_decay": 1e-3, **settings})


def test_weight_decay_for_a_model_with_priors_is_refused(trained):
    with pytest.raises(ValueError, match="the model has priors already"):
        bayes_adapter(Classifier(bayesianize(convnet())), trained, loader(), weight_decay=1e-3)


def test_posteriors_in_one_process_are_apart(trained):
    SVI(logistic, AutoAdversarialNormal(logistic), Adam({}), TraceMeanField_ELBO()).step(*data())
    x, _ = images()
    posteriors, means = [], []
    for scale_lr in (0.1, 1.0):
        model, guide, _ = bayes_adapter(convnet(), trained, loader(), weight_decay=1e-3, scale_lr=scale_lr)
        posteriors.append((model, guide))
        means.append(guide.scales.get_submodule("net.5").weight_unconstrained.clone())
    assert not torch.equal(*means)
    for _ in range(2):
        for (model, guide), mean in zip(posteriors, means, strict=True):
            ab.Predictive(model, guide=guide, num_samples=2)(x)
            assert torch.equal(guide.scales.get_submodule("net.5").weight_unconstrained, mean)
    pyro.clear_param_store()
    posteriors[0][1]()
    posteriors[1][1]()
    assert torch.equal(posteriors[0][1].scales.get_submodule("net.5").weight_unconstrained, means[0])


def line(rows=10, batch_size=4):
    """A line in noise, whose last two rows are far off."""
    x = torch.linspace(-1, 1, rows)[:, None]
    y = 2 * x[:, 0] + 0.3 * torch.randn(rows)
    y[-2:] += 5.0
    return x, y, DataLoader(TensorDataset(x, y), batch_size=batch_size)


def test_the_loss_of_an_epoch_is_that_of_all_rows_whatever_the_batches():
    """Its likelihood is scaled to N, so that the divergence counts once, and a short last batch counts as the rows that it has."""
    torch.set_default_dtype(torch.double)
    model, net = LinearRegression(1, prior_scale=2.0, noise_scale=0.7), nn.Linear(1, 1)
    x, y, _ = line()
    scale = 1e-9
    nll = -dist.Normal(net(x).squeeze(-1), 0.7).log_prob(y).detach()
    kl = sum(kl_divergence(dist.Normal(p.detach(), scale), dist.Normal(0.0, 2.0)).sum() for p in net.parameters())
    assert kl > 30 and (nll[:8].mean() - nll[8:].mean()).abs() > 5  # either mistake shows
    for batch_size in (10, 4, 3):
        loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
        _, _, losses = bayes_adapter(model, net, loader, lr=1e-30, scale_lr=1e-30, init_scale=scale, num_epochs=2)
        # draws are 1e-9 from the means
        assert losses == pytest.approx([(nll.mean() + kl / 10).item()] * 2, rel=1e-6)


def test_a_normal_likelihood_is_fitted_to_its_exact_mean_field_posterior():
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    y = x @ torch.tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(60)
    model, net = LinearRegression(2, noise_scale=0.5), nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.8, -0.8]]))
        net.bias.zero_()
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)
    settings = {"num_epochs": 80, "lr": 0.005, "scale_lr": 0.02, "init_scale": 0.05}
    _, guide, losses = bayes_adapter(model, net, loader, **settings, optim=torch.optim.Adam)
    exact = model.exact_posterior(x, y)
    mean, scale = (torch.cat([values[0].flatten(), values[1]]) for values in zip(*guide.parameters_by_site().values(), strict=True))
    ideal = exact.precision_matrix.diagonal().rsqrt()  # of the mean-field posterior
    assert ((mean - exact.mean).abs() < 0.4 * ideal).all()
    assert (scale / ideal - 1).abs().max() < 0.25  # without the factor N / B they are 1.7 times as large
    assert losses[-1] < losses[0]
    law = ab.PosteriorRegressor(model, guide=guide, num_samples=50)
    mean, scale = law(x)
    assert ab.diagnostics.r2(mean, y) > 0.6 and torch.equal(scale, torch.full_like(scale, 0.5))


def test_a_heteroscedastic_network_is_made_bayesian():
    x, _, loader = line(40, 16)
    net = mlp_network((1, 8, 2))
    model = HeteroscedasticRegression(1, hidden=(8,), prior=weight_decay_prior(1e-3, 40))
    _, guide, losses = bayes_adapter(model, net, loader, num_epochs=0, init_scale=1e-30)
    mean, scale = ab.PosteriorRegressor(model, guide=guide, num_samples=2)(x)
    torch.testing.assert_close(mean, net(x)[:, 0].expand(2, 40).detach())
    torch.testing.assert_close(scale, net(x)[:, 1].exp().expand(2, 40).detach())
    assert losses == []


def test_a_regression_is_refused_with_what_it_needs():
    _, _, loader = line()
    net = nn.Linear(1, 2)
    with pytest.raises(ValueError, match=r"a plain network is made a classifier, and the loader's second tensor is torch.float32.*Normal"):
        bayes_adapter(net, net, loader, weight_decay=1e-3)
    model = HeteroscedasticRegression(1, hidden=())
    state = {f"1.{name}": value for name, value in net.state_dict().items()}
    assert len(bayes_adapter(model, state, loader).losses) == 1
    with pytest.raises(ValueError, match=r"uncertainty: .* 'obs', Normal, is a regression.*: leave uncertainty= out"):
        bayes_adapter(model, state, loader, uncertainty=UncertaintyRegularizer(eps=0.1))

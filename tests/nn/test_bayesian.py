from __future__ import annotations

import copy
import math
import pickle
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_advbayes.nn import FanIn, bayesianize
from pyro_advbayes.nn.bayesian import declared_sites
from pyro_advbayes.nn.classifier import Classifier


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch_norm_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net(torch.randn(20, 3) + 1)  # statistics that differ from those of a new network
    return net


def data(num: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num, 3), torch.arange(num) % 2


def sites(model, *args) -> dict[str, dict]:
    trace = pyro.poutine.trace(model).get_trace(*args)
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def test_every_parameter_is_a_site_of_its_own_name_and_shape():
    net = small_net()
    found = sites(bayesianize(net), torch.randn(5, 3))
    assert {name: site["value"].shape for name, site in found.items()} == {name: value.shape for name, value in net.named_parameters()}


def test_sites_carry_the_name_of_the_attribute_that_holds_the_network():
    model = Classifier(bayesianize(small_net()))
    assert set(sites(model, data()[0])) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias", "data", "obs"}


def test_the_log_density_is_the_prior_of_each_weight_plus_the_likelihood():
    net, (x, y) = small_net(), data()
    model = Classifier(bayesianize(net, dist.Normal(0.5, 2.0)))
    values = {f"net.{name}": value.detach() for name, value in net.named_parameters()}
    trace = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace(x, y)
    weights = torch.cat([value.flatten() for value in values.values()])
    prior = -0.5 * ((weights - 0.5) / 2).square() - math.log(2 * math.sqrt(2 * math.pi))
    likelihood = -nn.functional.cross_entropy(net(x), y, reduction="sum")
    torch.testing.assert_close(trace.log_prob_sum(), prior.sum() + likelihood)


def test_the_original_is_left_as_it_was():
    net = batch_norm_net()
    before, mode = copy.deepcopy(net.state_dict()), net.training
    model = Classifier(bayesianize(net, exclude="0.*"))
    with torch.no_grad():
        model.net[0].weight.add_(1)
    sites(model, data()[0])
    assert not any(isinstance(module, PyroModule) for module in net.modules())
    assert net.training == mode
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_prior_may_be_a_function_of_name_and_value():
    net = small_net()

    def prior(name, value):
        return None if name.endswith("bias") else dist.Normal(value, 0.1)

    bayesian = bayesianize(net, prior)
    found = sites(bayesian, data()[0])
    assert set(found) == {"0.weight", "2.weight"}
    assert torch.equal(found["2.weight"]["fn"].base_dist.loc, net[2].weight)
    assert torch.equal(bayesian[0].bias, net[0].bias) and isinstance(bayesian[0].bias, nn.Parameter)


def test_prior_may_have_the_shape_of_the_parameter_in_its_batch_or_event():
    scales = torch.linspace(1, 2, 5)
    for prior in [
        dist.Normal(torch.zeros(5), scales),
        dist.Normal(torch.zeros(5), scales).to_event(1),
        dist.MultivariateNormal(torch.zeros(5), torch.diag(scales**2)),
    ]:
        fn = sites(bayesianize(nn.Linear(5, 2, bias=False), prior), torch.randn(1, 5))["weight"]["fn"]
        assert fn.event_shape == (2, 5) and fn.batch_shape == ()
        expected = dist.Normal(0, scales).log_prob(torch.ones(2, 5)).sum()
        torch.testing.assert_close(fn.log_prob(torch.ones(2, 5)), expected)


def test_fan_in_scales_weights_by_the_inputs_of_their_layer_and_biases_not_at_all():
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    found = sites(bayesianize(net, FanIn(scale=2.0, bias_scale=0.5)), torch.randn(1, 4, 3, 3))
    scales = {name: site["fn"].base_dist.scale.unique().item() for name, site in found.items()}
    expected = {"0.weight": 2 / math.sqrt(2 * 9), "0.bias": 0.5, "2.weight": 2 / math.sqrt(6), "2.bias": 0.5}
    assert scales == pytest.approx(expected)


def test_fan_in_keeps_the_size_of_outputs_as_layers_grow_wider():
    num = 400
    for width in (10, 1000):
        layer = bayesianize(nn.Linear(width, num, bias=False), FanIn())
        # num independent outputs of variance 1: the standard error of their mean square is √(2/num)
        assert layer(torch.ones(1, width)).square().mean() == pytest.approx(1, abs=4 * math.sqrt(2 / num))


def test_excluded_parameters_stay_parameters_with_their_values():
    net = small_net()
    bayesian = bayesianize(net, exclude=["0.*", "*.bias"])
    assert set(sites(bayesian, data()[0])) == {"2.weight"}
    assert dict(bayesian.named_parameters()).keys() == {"0.weight", "0.bias", "2.bias"}
    for name, value in bayesian.named_parameters():
        assert torch.equal(value, net.get_parameter(name)) and value is not net.get_parameter(name)


def test_samplers_hold_excluded_parameters_fixed_and_two_models_do_not_share_them():
    x, y = data()
    nets = [small_net(), small_net()]
    models = [Classifier(bayesianize(net, exclude="0.*")) for net in nets]
    for model in models:
        mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True)
        mcmc.run(x, y)
        assert set(mcmc.get_samples()) == {"net.2.weight", "net.2.bias"}
    for net, model in zip(nets, models, strict=True):
        values = {"net.2.weight": net[2].weight, "net.2.bias": net[2].bias}
        torch.testing.assert_close(pyro.poutine.condition(model, values)(x), net(x))


def test_priors_take_the_dtype_of_their_parameter():
    net = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 2))
    bayesian = bayesianize(net)
    assert bayesian[0](torch.randn(1, 3).double()).dtype == torch.float64
    assert bayesian[1](torch.randn(1, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    "prior",
    [
        dist.Normal(0.0, 1.0),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(torch.zeros(1), 2.0)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))),
        dist.TransformedDistribution(dist.LogNormal(torch.zeros(1), 1.0), dist.transforms.ExpTransform().inv),
        dist.Uniform(-1.0, 1.0),
    ],
    ids=repr,
)
def test_priors_follow_the_model_to_another_dtype_and_device(prior):
    model = Classifier(bayesianize(small_net(), prior))
    for site in sites(model, *data()).values():
        site["fn"].log_prob(site["value"])  # fills the caches that distributions and transforms keep
    model.double()
    for site in sites(model, data()[0].double()).values():
        if site["name"].startswith("net"):
            assert site["value"].dtype == torch.float64
            assert torch.isfinite(site["fn"].log_prob(site["value"]))
    model.to("meta")
    assert model.net[0].weight.is_meta


def test_a_prior_stays_two_numbers_however_many_weights_it_covers():
    bayesian = bayesianize(nn.Linear(1000, 1000)).double()
    fn = sites(bayesian, torch.randn(1, 1000).double())["weight"]["fn"].base_dist
    assert fn.loc.shape == (1000, 1000)
    assert fn.loc.untyped_storage().nbytes() == fn.scale.untyped_storage().nbytes() == 8


def test_running_the_model_does_not_change_batch_statistics():
    net, (x, y) = batch_norm_net(), data()
    model = Classifier(bayesianize(net)).train()
    MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run(x, y)
    guide = AutoNormal(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x, y)
    Predictive(model, guide=guide, num_samples=3)(x)
    for name, value in net.named_buffers():
        assert torch.equal(model.net.get_buffer(name), value), name


def test_the_network_stays_in_eval_mode_inside_a_model_in_train_mode():
    net, (x, _) = batch_norm_net(), data()
    bayesian = bayesianize(net, exclude="[01].*")
    assert net.training and not any(module.training for module in bayesian.modules())
    model = Classifier(bayesian).train()
    values = {f"net.{name}": value for name, value in net.named_parameters()}
    assert model.training
    torch.testing.assert_close(pyro.poutine.condition(model, values)(x), net.eval()(x))


def test_a_module_in_two_places_is_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Sequential(nn.Tanh(), self.first)

        def forward(self, x):
            return self.second(self.first(x))

    net, x = Twice(), torch.randn(2, 3)
    bayesian = bayesianize(net)
    assert set(sites(bayesian, x)) == {"second.1.weight", "second.1.bias"}
    values = {"second.1.weight": net.first.weight, "second.1.bias": net.first.bias}
    torch.testing.assert_close(pyro.poutine.condition(bayesian, values)(x), net(x))


def tied_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize("exclude", [(), "0.*", "1.*"])
def test_one_tensor_under_two_names_is_refused(exclude):
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' are one tensor"):
        bayesianize(tied_net(), exclude=exclude)


def test_tied_parameters_stay_tied_where_both_are_excluded():
    bayesian = bayesianize(tied_net(), exclude="*.weight")
    assert bayesian[0].weight is bayesian[1].weight


def lstm() -> nn.Module:
    return nn.LSTM(3, 4, batch_first=True)


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


@pytest.mark.parametrize("make,width", [(lstm, 3), (transformer, 4)])
def test_recurrent_and_attention_layers_use_the_weights_of_their_sites(make, width):
    net, x = make().eval(), torch.randn(2, 5, width)
    bayesian = bayesianize(net)
    output = pyro.poutine.condition(bayesian, dict(net.named_parameters()))(x)
    expected = net(x)
    if isinstance(net, nn.LSTM):
        output, expected = output[0], expected[0]
    torch.testing.assert_close(output, expected)
    assert set(sites(bayesian, x)) == dict(net.named_parameters()).keys()


def test_nuts_svi_and_predictive_run_on_the_model():
    x, y = data()
    model = Classifier(bayesianize(small_net()))
    mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(x, y)
    drawn = Predictive(model, mcmc.get_samples(), return_sites=["obs", "_RETURN"])(x[:4])
    assert drawn["obs"].shape == (5, 4) and drawn["_RETURN"].shape == (5, 4, 2)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_or_pickle_of_the_model_is_the_same_model_and_independent(clone):
    x, y = data()
    model = Classifier(bayesianize(small_net(), FanIn(), exclude="0.bias")).double()
    other = clone(model)
    assert type(other.net) is type(model.net)
    densities = []
    for each in (model, other):
        pyro.set_rng_seed(1)
        densities.append(pyro.poutine.trace(each).get_trace(x.double(), y).log_prob_sum())
    assert densities[0] == densities[1]
    other.float()
    assert sites(other, x)["net.0.weight"]["value"].dtype == torch.float32
    assert sites(model, x.double())["net.0.weight"]["value"].dtype == torch.float64
    assert not other.train().net.training


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))


def compiled() -> nn.Module:
    net = small_net()
    net.compile()
    return net


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: nn.Sequential(nn.ReLU()), "Sequential has no parameters"),
        (lambda: torch.zeros(3), "net is a torch Tensor: a torch.nn.Module is needed"),
        (lambda: nn.Sequential(nn.ReLU(), nn.LazyLinear(2)), "Module '1' is lazy"),
        (parametrised, r"Module '0' has parametrised tensors \(weight\)"),
        (lambda: bayesianize(small_net()), "BayesianSequential is a PyroModule already"),
        (lambda: nn.Sequential(nn.Linear(3, 2), PyroModule[nn.Linear](2, 2)), "Module '1' is a PyroModule already"),
        (lambda: torch.compile(small_net()), "is compiled"),
        (compiled, "is compiled"),
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            "Module '1' normalises by its batch",
        ),
    ],
)
def test_networks_whose_parameters_cannot_become_sites_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        bayesianize(make())


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"exclude": "3.*"}, r"exclude='3\.\*' matches no parameter; there are 0\.weight, 0\.bias, 2\.weight, 2\.bias"),
        ({"exclude": ["0.*", "bias"]}, "exclude='bias' matches no parameter"),
        ({"exclude": "*"}, "No parameter is left"),
        ({"prior": lambda name, value: None}, "No parameter is left"),
        ({"prior": 1.0}, r"prior=1\.0: a distribution of pyro\.distributions or a function or a LearnedScale is needed"),
        ({"prior": lambda name, value: 1.0}, r"prior of '0\.weight' must be a distribution of pyro\.distributions"),
        ({"prior": torch.distributions.Normal(0.0, 1.0)}, r"prior is a torch Normal: a distribution of pyro\.distributions or"),
        ({"prior": dist.Normal(torch.zeros(5), 1.0)}, r"prior of '0\.weight' has shape \(5,\).*\(4, 3\)"),
        ({"prior": dist.Normal(torch.zeros(5), 1.0).to_event(1)}, r"prior of '0\.weight' has shape \(5,\).*\(4, 3\)"),
        ({"prior": dist.Normal(torch.zeros(2, 4, 3), 1.0)}, r"'0\.weight' has shape \(2, 4, 3\)"),
    ],
)
def test_priors_and_exclusions_that_do_not_fit_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        bayesianize(small_net(), **kwargs)


def test_a_parameter_of_whole_numbers_is_refused_by_name():
    net = small_net()
    net.steps = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)
    with pytest.raises(ValueError, match=r"'steps' is torch\.int64"):
        bayesianize(net)
    assert "2.weight" in sites(bayesianize(net, exclude="steps"), data()[0])


@pytest.mark.parametrize("kwargs", [{"scale": 0.0}, {"bias_scale": -1.0}, {"scale": math.nan}])
def test_fan_in_needs_positive_scales(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} > 0"):
        FanIn(**kwargs)


def test_the_copy_has_the_modes_of_the_original_layer_by_layer():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2))
    net.train()
    net[1].eval()
    copied = bayesianize(net, eval_only=False)
    assert [module.training for module in copied] == [True, False, True, True]
    assert not any(module.training for module in bayesianize(net))


# ------------------------------------------------------------------------------------------------ what a copy does not do


def told(net, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bayesianize(net, **options)
    return [str(warning.message) for warning in caught]


def test_statistics_that_have_never_seen_data_are_warned_of_by_layer():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)))
    (message,) = told(net)
    assert re.search(r"'1', '2\.1'.*never seen data.*not normalised.*train mode.*eval_only=False.*GroupNorm", message)
    assert told(net, eval_only=False) == []  # gathered in training
    seen = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    seen(torch.randn(20, 3))
    assert told(seen) == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.LSTM(4, 4, num_layers=2, dropout=0.2),
        nn.MultiheadAttention(4, 2, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_dropout_that_is_turned_off_is_warned_of_by_layer(layer):
    net = nn.Sequential(nn.Linear(3, 4), layer)
    (message,) = told(net)
    assert re.search(r"Dropout is off.*'1'.*mc_dropout.*\.eval\(\)", message)
    assert told(net, eval_only=False) == []
    assert told(net.eval()) == []  # off already


def test_layers_that_drop_nothing_do_not_warn():
    assert told(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))) == []


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "LayerNorm of images": lambda: nn.LayerNorm((4, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:BatchNorm")
def test_fan_in_centres_gains_of_normalisation_at_1_and_their_biases_at_0(name):
    net = bayesianize(nn.Sequential(nn.Conv2d(4, 4, 1), NORMS[name]()), FanIn(scale=2.0, bias_scale=0.3))
    priors = {name: (prior.mean.unique().tolist(), prior.variance.sqrt().unique().tolist()) for name, prior in declared_sites(net).items()}
    assert priors["0.weight"] == ([0.0], [1.0]) and priors["0.bias"][0] == [0.0]
    assert priors["1.weight"] == ([1.0], [pytest.approx(0.3)]) and priors["1.bias"] == ([0.0], [pytest.approx(0.3)])


def test_a_distribution_that_is_given_is_the_prior_of_gains_too():
    net = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), dist.Normal(0.0, 0.5))
    assert {name: prior.mean.unique().tolist() for name, prior in declared_sites(net).items()}["1.weight"] == [0.0]

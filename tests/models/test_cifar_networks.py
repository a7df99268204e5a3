"""ResNet, VGG and WideResNet: sizes, normalisation, and what of them is Bayesian."""

from __future__ import annotations

import pickle

import pyro
import pytest
import torch
from torch import nn

from models.normalization import FilterResponseNorm, ThresholdedLinearUnit, affine_parameters
from models.resnet import ResidualBlock, resnet, resnet_network
from models.vgg import vgg, vgg_network
from models.wide_resnet import wide_resnet, wide_resnet_network

NORMS = ["batch", "group", "filter_response"]


def latents(model, x):
    trace = pyro.poutine.trace(model).get_trace(x)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name not in ("data", "obs")}


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: resnet_network(20), 269_722),
        (lambda: resnet_network(56), 853_018),
        (vgg_network, 14_728_266),
        (lambda: resnet_network(20, 100), 275_572),
    ],
)
def test_networks_have_the_published_number_of_weights(make, count):
    assert sum(p.numel() for p in make().parameters()) == count


def test_the_wide_network_has_the_published_number_of_weights():
    with torch.device("meta"):
        assert sum(p.numel() for p in wide_resnet_network().parameters()) == 36_479_194


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("network", "model"),
    [
        (lambda norm: resnet_network(8, 4, norm), lambda norm, **kw: resnet(8, 4, norm, **kw)),
        (lambda norm: wide_resnet_network(10, 1, 4, norm), lambda norm, **kw: wide_resnet(10, 1, 4, norm, **kw)),
    ],
    ids=["resnet", "wide_resnet"],
)
def test_with_the_weights_of_the_plain_network_the_model_is_that_network(network, model, norm):
    net, x = network(norm).eval(), torch.randn(2, 3, 32, 32)
    values = {f"net.{name}": value for name, value in net.named_parameters()}
    bayesian = model(norm)
    torch.testing.assert_close(pyro.poutine.condition(bayesian, values)(x), net(x))
    assert latents(bayesian, x).keys() == values.keys()


@pytest.mark.parametrize("norm", NORMS)
def test_gains_and_shifts_are_parameters_on_request(norm):
    model, x = resnet(8, 4, norm, bayesian_norm=False), torch.randn(2, 3, 32, 32)
    named = affine_parameters(resnet_network(8, 4, norm))
    assert {name.removeprefix("net.") for name, _ in model.named_parameters()} == set(named)
    assert not {name.removeprefix("net.") for name in latents(model, x)} & set(named)
    assert len(named) == (7 * 3 if norm == "filter_response" else 7 * 2)


def test_statistics_are_learnt_where_the_model_follows_train_mode_and_only_there():
    x = torch.randn(4, 3, 32, 32)
    for eval_only in (True, False):
        model = resnet(8, 4, eval_only=eval_only)
        before = model.net.get_submodule("1").running_mean.clone()
        model.train()(x)
        assert torch.equal(before, model.net.get_submodule("1").running_mean) == eval_only
        before = model.net.get_submodule("1").running_mean.clone()
        model.eval()(x)
        assert torch.equal(before, model.net.get_submodule("1").running_mean)
        again = pickle.loads(pickle.dumps(model))
        assert again.train().net.training != eval_only


def test_a_vgg_gives_a_row_of_logits_per_image():
    assert vgg_network(7, "group")(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert len(vgg(7).net.get_submodule("1").running_mean) == 64


def test_shortcuts_thin_out_images_and_fill_channels_with_zeros():
    block = ResidualBlock(2, 4, 2, nn.BatchNorm2d, lambda channels: nn.Identity())
    nn.init.zeros_(block.branch[-1].weight)
    images = torch.randn(3, 2, 8, 8)
    out = block(images)
    assert torch.equal(out[:, 1:3], images[..., ::2, ::2]) and not out[:, [0, 3]].any()


def test_filter_responses_have_mean_square_one_in_every_image():
    layer, images = FilterResponseNorm(5), 10 * torch.randn(3, 5, 6, 6) + 4
    torch.testing.assert_close(layer(images).square().mean((-2, -1)), torch.ones(3, 5))
    torch.testing.assert_close(layer(images[:1]), layer(images)[:1])
    unit = ThresholdedLinearUnit(5)
    nn.init.constant_(unit.threshold, -0.5)
    assert float(unit(images - 4).detach().min()) == -0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet(19), "depth=19: these networks have 6 n"),
        (lambda: wide_resnet(27), "depth=27: these networks have 6 n"),
        (lambda: wide_resnet(width=0), "width=0"),
        (lambda: vgg(norm="layer"), "norm='layer': choose one of 'batch', 'group', 'filter_response'"),
    ],
)
def test_networks_that_are_not_there_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

from __future__ import annotations

import pyro
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_advbayes import PosteriorClassifier, Potential, Predictive, minibatch
from pyro_advbayes.nn import dropout_guide, mc_dropout
from pyro_advbayes.nn.classifier import Classifier


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Dropout(0.25), nn.Linear(20, 2))


def test_a_mask_leaves_units_out_and_scales_the_others():
    net = network()
    model, x = Classifier(mc_dropout(net)), torch.randn(7, 2)
    mask = (torch.rand(20) < 0.5).float()
    logits = poutine.condition(model, {"net.2.mask": mask})(x)
    torch.testing.assert_close(logits, net[3](net[1](net[0](x)) * mask / 0.75))


def test_over_draws_units_are_left_out_as_often_as_the_layer_says_and_the_same_for_all_rows():
    model, x = Classifier(mc_dropout(network())), torch.randn(7, 2)
    masks = Predictive(model, num_samples=2000)(x)["net.2.mask"].reshape(2000, 20)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert abs(float(masks.mean()) - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5


def test_a_layer_in_two_places_has_a_mask_in_each():
    drop, x = nn.Dropout(0.5), torch.randn(7, 2)
    inner = nn.Sequential(nn.Linear(20, 5), drop)
    net = nn.Sequential(nn.Linear(2, 20), drop, nn.ReLU(), drop, inner, nn.Linear(5, 2))
    model = Classifier(mc_dropout(net))
    masks = {name: (torch.rand(size) < 0.5).float() for name, size in (("net.1", 20), ("net.3", 20), ("net.4.1", 5))}
    sites = poutine.trace(model).get_trace(x)
    assert {name for name in sites.stochastic_nodes if name.endswith(".mask")} == {f"{name}.mask" for name in masks}
    logits = poutine.condition(model, {f"{name}.mask": mask for name, mask in masks.items()})(x)
    hidden = net[2](net[0](x) * masks["net.1"] * 2) * masks["net.3"] * 2
    torch.testing.assert_close(logits, net[5](inner[0](hidden) * masks["net.4.1"] * 2))


def test_a_layer_that_is_called_twice_is_refused_by_its_name():
    block = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model = Classifier(mc_dropout(nn.Sequential(block, block)))
    with pytest.raises(RuntimeError, match=r"Multiple sample sites named 'net.1.1.mask'"):
        poutine.trace(model).get_trace(torch.randn(7, 2))


def test_masks_of_channels_hold_for_whole_maps():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(6 * 36, 2))
    model, x = Classifier(mc_dropout(net)), torch.randn(3, 1, 8, 8)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1])
    logits = poutine.condition(model, {"net.1.mask": mask})(x)
    torch.testing.assert_close(logits, net[3](net[2](net[0](x) * 2 * mask[:, None, None])))


def test_svi_trains_it_and_its_loss_is_the_negative_log_likelihood_of_a_masked_network():
    x = torch.randn(200, 2)
    y = (x.sum(-1) > 0).long()
    net = network()
    model = Classifier(mc_dropout(net))
    svi = SVI(minibatch(model, 200), dropout_guide(model), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    torch.manual_seed(0)
    mask = torch.bernoulli(torch.full((20,), 0.75))
    torch.manual_seed(0)
    first = svi.evaluate_loss(x, y)
    expected = nn.functional.cross_entropy(net[3](net[1](net[0](x)) * mask / 0.75), y, reduction="sum")
    assert first == pytest.approx(expected.item(), rel=1e-4)
    for _ in range(150):
        svi.step(x, y)
    assert svi.evaluate_loss(x, y) < 0.5 * first


@pytest.mark.parametrize("predictive", [Predictive, pyro.infer.Predictive])
def test_a_prediction_draws_a_network_for_each_draw(predictive):
    model, x = Classifier(mc_dropout(network())), torch.randn(5, 2)
    drawn = predictive(model, guide=dropout_guide(model), num_samples=10, return_sites=["net.2.mask", "_RETURN"])(x)
    assert len(drawn["_RETURN"].flatten(1).unique(dim=0)) > 5
    assert PosteriorClassifier(model, {"net.2.mask": drawn["net.2.mask"]})(x).shape == (5, 2)


def test_what_cannot_be_a_mask_is_refused_by_name():
    with pytest.raises(ValueError, match="the Sequential has no Dropout layer"):
        mc_dropout(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"layer '1' leaves every unit out \(p=1.0\)"):
        mc_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(1.0)))
    with pytest.raises(ValueError, match=r"layer '1' \(AlphaDropout\) is no mask"):
        mc_dropout(nn.Sequential(nn.Linear(2, 2), nn.AlphaDropout(0.1)))
    x, y = torch.randn(10, 2), torch.zeros(10).long()
    with pytest.raises(ValueError, match=r"'net.2.mask' .* is discrete"):
        Potential(Classifier(mc_dropout(network())), (x, y))


class Sequences(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.drop, self.head = layer, nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layer(x)
        return self.head(self.drop(found[0] if isinstance(found, tuple) else found)[:, -1])


def encoder(activation, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **{"dropout": 0.5, "batch_first": True, "activation": activation, **options})


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(8, 8, 2, dropout=0.5), r"layer 'layer' \(LSTM\) has dropout=0.5 between its layers, .*: use num_layers=1"),
        (nn.GRU(8, 8, 3, dropout=0.5), r"layer 'layer' \(GRU\) has dropout=0.5"),
        (nn.MultiheadAttention(8, 2, dropout=0.5), r"layer 'layer' \(MultiheadAttention\) has dropout=0.5 .*: set its dropout to 0"),
        (encoder(nn.functional.relu), r"layer 'layer' \(TransformerEncoderLayer\) skips its Dropout layers .* activation=lambda"),
        (encoder(nn.GELU()), r"layer 'layer' \(TransformerEncoderLayer\) skips"),
        (nn.TransformerEncoder(encoder("gelu"), 2), r"layer 'layer.layers.0' \(TransformerEncoderLayer\) skips"),
        (encoder(lambda x: x.relu()), r"layer 'layer.self_attn' \(MultiheadAttention\) has dropout=0.5"),
    ],
)
def test_layers_that_would_leave_units_out_without_a_site_or_skip_a_site_are_refused_by_name(layer, message):
    with pytest.raises(ValueError, match=message):
        mc_dropout(Sequences(layer))


def test_an_encoder_layer_itself_is_refused_too():
    with pytest.raises(ValueError, match="the TransformerEncoderLayer skips its Dropout layers"):
        mc_dropout(encoder("relu"))


def test_what_the_refusals_ask_for_draws_every_mask_in_eval_mode_and_without_gradients():
    layer = encoder(lambda x: x.relu())
    layer.self_attn.dropout = 0.0
    model, x = Classifier(mc_dropout(Sequences(layer))).eval(), torch.randn(5, 4, 8)
    with torch.no_grad():
        masks = {name for name in poutine.trace(model).get_trace(x).stochastic_nodes if name.endswith(".mask")}
        drawn = Predictive(model, guide=dropout_guide(model), num_samples=10, return_sites=["_RETURN"])(x)["_RETURN"]
    assert masks == {"net.drop.mask", *(f"net.layer.{name}.mask" for name in ("dropout", "dropout1", "dropout2"))}
    assert len(drawn.flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("layer", [nn.LSTM(8, 8, 1), nn.GRU(8, 8, 2), encoder("relu", dropout=0.0)])
def test_layers_that_leave_nothing_out_are_taken_as_they_are(layer):
    model = Classifier(mc_dropout(Sequences(layer))).eval()
    with torch.no_grad():
        sites = poutine.trace(model).get_trace(torch.randn(5, 4, 8)).stochastic_nodes
    assert [name for name in sites if name.endswith(".mask")] == ["net.drop.mask"]

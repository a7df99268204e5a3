from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import Predictive

from models.bal_convnet import bal_convnet, bal_convnet_network
from models.mlp import mlp, mlp_network


def latent_values(model, x) -> dict[str, torch.Tensor]:
    trace = pyro.poutine.trace(model).get_trace(x)
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name not in ("data", "obs")}


@pytest.mark.parametrize(
    "make,shape,classes,count",
    [
        (mlp, (784,), 10, 478_410),
        (mlp, (1, 28, 28), 10, 478_410),
        (lambda: mlp((784, 100, 10)), (784,), 10, 79_510),
        (lambda: mlp((2, 20, 20, 2)), (2,), 2, 522),
        (lambda: mlp((5, 3)), (5,), 3, 18),
        (bal_convnet, (1, 28, 28), 10, 110_634),
    ],
)
def test_a_classifier_has_the_published_number_of_weights_and_gives_one_row_of_logits_per_input(make, shape, classes, count):
    model, x = make(), torch.rand(3, *shape)
    assert sum(value.numel() for value in latent_values(model, x).values()) == count
    assert list(model.parameters()) == []
    assert model(x).shape == (3, classes)


@pytest.mark.parametrize(
    "make,make_network,shape",
    [(lambda: mlp((4, 6, 3)), lambda: mlp_network((4, 6, 3)), (4,)), (bal_convnet, bal_convnet_network, (1, 28, 28))],
    ids=["mlp", "bal_convnet"],
)
def test_with_the_weights_of_the_plain_network_the_model_is_that_network(make, make_network, shape):
    model, network = make(), make_network()
    x, y = torch.rand(5, *shape), torch.tensor([0, 1, 2, 1, 0])
    values = {f"net.{name}": value for name, value in network.named_parameters()}
    conditioned = pyro.poutine.condition(model, values)
    torch.testing.assert_close(conditioned(x), network(x))

    site = pyro.poutine.trace(conditioned).get_trace(x, y).nodes["obs"]
    expected = -torch.nn.functional.cross_entropy(network(x), y, reduction="none")
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)
    assert site["is_observed"] and site["scale"] == 1
    assert [(frame.name, frame.size) for frame in site["cond_indep_stack"]] == [("data", 5)]


def test_an_mlp_has_an_activation_after_every_layer_but_the_last():
    net, x = mlp_network((4, 6, 5, 3), torch.nn.Tanh), torch.randn(5, 4)
    first, second, last = (module for module in net if isinstance(module, torch.nn.Linear))
    torch.testing.assert_close(net(x), last(second(first(x).tanh()).tanh()))


def test_without_observations_a_model_draws_them():
    model, x = mlp((4, 3)), torch.randn(7, 4)
    values = {name: value.expand(20, *value.shape) for name, value in latent_values(model, x).items()}
    drawn = Predictive(model, values)(x)["obs"]
    assert drawn.shape == (20, 7) and drawn.min() >= 0 and drawn.max() <= 2


def test_an_mlp_needs_inputs_and_outputs():
    with pytest.raises(ValueError, match=r"sizes must name at least the inputs and the outputs, got \(784,\)"):
        mlp((784,))

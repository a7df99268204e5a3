from __future__ import annotations

import math
import warnings

import pyro
import pytest
import torch

import pyro_advbayes as ab
from models.spatial_transformer import SpatialTransformer, spatial_transformer, spatial_transformer_network


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32)


def latent_values(model, x) -> dict[str, torch.Tensor]:
    trace = pyro.poutine.trace(model).get_trace(x)
    return {name: trace.nodes[name] for name in trace.stochastic_nodes if name not in ("data", "obs")}


def test_it_has_the_stated_number_of_weights_and_gives_a_row_of_logits_per_image():
    model, x = spatial_transformer(), images()
    assert sum(site["value"].numel() for site in latent_values(model, x).values()) == 554_779
    assert list(model.parameters()) == [] and model(x).shape == (3, 43)
    assert spatial_transformer(num_classes=5)(x).shape == (3, 5)


def test_before_training_the_transformer_leaves_images_as_they_are():
    x = images()
    torch.testing.assert_close(SpatialTransformer()(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pixels", [1, 5])
def test_a_shift_by_whole_pixels_moves_the_image_and_fills_with_zeros(pixels):
    transformer, x = SpatialTransformer(), images()
    with torch.no_grad():
        transformer.locate[-1].bias[2] = 2 * pixels / 32  # widths run from -1 to 1
    moved = transformer(x)
    torch.testing.assert_close(moved[..., :-pixels], x[..., pixels:], atol=1e-5, rtol=0)
    assert moved[..., -pixels:].abs().max() < 1e-5


def test_turning_by_a_half_circle_mirrors_both_axes():
    transformer, x = SpatialTransformer(), images()
    with torch.no_grad():
        transformer.locate[-1].bias += torch.tensor([-2.0, 0, 0, 0, -2.0, 0])
    torch.testing.assert_close(transformer(x), x.flip(-1, -2), atol=1e-5, rtol=0)


def test_with_the_weights_of_the_plain_network_the_model_is_that_network():
    model, network, x = spatial_transformer(), spatial_transformer_network(), images()
    values = {f"net.{name}": value for name, value in network.named_parameters()}
    torch.testing.assert_close(pyro.poutine.condition(model, values)(x), network(x))


def test_a_row_of_logits_depends_on_its_own_image_alone_in_either_mode():
    network, x = spatial_transformer_network(), images(4)
    alone = torch.cat([network(row[None]) for row in x])
    for mode in (True, False):
        torch.testing.assert_close(network.train(mode)(x), alone, atol=1e-5, rtol=1e-4)


def test_the_prior_is_narrow_where_images_are_moved_and_follows_fan_in_elsewhere():
    sites = latent_values(spatial_transformer(), images())
    scales = {name: site["fn"].base_dist.scale.flatten()[0].item() for name, site in sites.items()}
    assert scales["net.0.locate.9.weight"] == pytest.approx(0.01) == scales["net.0.locate.9.bias"]
    assert scales["net.14.weight"] == pytest.approx(math.sqrt(2 / 1350))
    assert sites["net.4.weight"]["fn"].mean.unique().item() == 1  # the gains of GroupNorm


def test_where_chains_start_images_are_still_in_sight():
    model, x = spatial_transformer(), images()
    potential = ab.Potential(model, (x, torch.tensor([0, 1, 2])), backend="handlers")
    values = {name: value[0] for name, value in potential.constrain(potential.init()).items()}
    transformer = SpatialTransformer()
    transformer.load_state_dict({name.removeprefix("net.0."): v for name, v in values.items() if "locate" in name})
    assert (transformer.locate(x)).abs().max() < 0.2


def test_a_graph_of_its_gradient_agrees_with_pyros_handlers():
    model = spatial_transformer(num_classes=3)
    arguments = (images(4), torch.tensor([0, 1, 2, 1]))
    by_handlers, by_graph = (ab.Potential(model, arguments, batch_size=2, backend=backend) for backend in ("handlers", "graph"))
    state, batch = by_handlers.init(), by_handlers.batches.next()
    expected = by_handlers.gradient(state, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would say that it fell back
        gradient = by_graph.gradient(state, batch)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

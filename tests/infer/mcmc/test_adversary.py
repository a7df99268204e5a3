"""BAL's perturbed inputs to the last digit: without noise each of them is a formula."""

from __future__ import annotations

import pytest
import torch

import pyro_advbayes as ab
from tests.small_models import no_inputs

SLOPE = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def linear(model, clean, args, kwargs):
    return args[0] @ SLOPE


def kernel_of(x, **options):
    """A kernel that has been set up on inputs ``x``, whose adversary has no noise."""
    options = {"batch_size": len(x), "cost": ab.L2(0.0), "input_temperature": 0.0, **options}
    kernel = ab.BAL(no_inputs, "x", **options)
    kernel.setup_chains(1, 0, (x, torch.arange(float(len(x)))), {})
    return kernel


def perturbed(x, **options):
    return kernel_of(x, keep=range(len(x)), loss=linear, **options).extras()["x"][0]


def inputs(rows=6):
    return torch.linspace(0.05, 0.95, 3 * rows, dtype=torch.float64).view(rows, 3)


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-0.1, 1.2), None])
def test_inputs_that_would_leave_the_range_stop_at_its_edge(clip):
    x = inputs()
    moved = perturbed(x, inputs=ab.SGLD.rule(step_size=0.1, num_steps=4), clip=clip)
    expected = x + 0.4 * SLOPE
    assert float(expected.min()) < -0.1 and float(expected.max()) > 1.2
    torch.testing.assert_close(moved, expected if clip is None else expected.clamp(*clip))


def test_what_a_generator_makes_is_clipped_to_the_range_too():
    x = inputs()
    network = torch.nn.Linear(3, 3).double()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.tensor([3.0, -3.0, 0.5]))
    generator = ab.Generator(network, radius=0.4)
    moved = perturbed(x, adversary=generator, inputs=ab.SGLD.rule(step_size=1e-12, num_steps=1), clip=(0.0, 1.0))
    torch.testing.assert_close(moved, (x + 0.4 * network.bias.detach().tanh()).clamp(0.0, 1.0))


def test_the_steps_of_the_inputs_follow_their_schedule_from_0_on_every_minibatch():
    """A linear loss raises x by its slope times the sum of the steps."""
    x = inputs()
    schedule = ab.schedules.Polynomial(initial=0.1, scale=2.0, power=1.0)
    kernel = kernel_of(x, inputs=ab.SGLD.rule(step_size=schedule, num_steps=3), loss=linear, keep=range(6))
    for _ in range(2):
        torch.testing.assert_close(kernel.extras()["x"][0], x + (0.1 + 0.1 / 1.5 + 0.1 / 2.0) * SLOPE)


def test_the_temperature_of_the_inputs_is_that_of_their_noise():
    """One step of η without a gradient adds normal numbers times the root of 2 η T."""
    x = torch.zeros(4000, 1, dtype=torch.float64)
    kernel = kernel_of(x, inputs=ab.SGLD.rule(step_size=0.02, num_steps=1), input_temperature=0.5, keep=range(4000))
    random = torch.Generator()
    random.set_state(kernel.chains.inputs.random.get_state())
    noise = torch.empty_like(x).normal_(generator=random)
    torch.testing.assert_close(kernel.extras()["x"][0], (2.0 * 0.02 * 0.5) ** 0.5 * noise)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_clean_share_is_the_share_of_rows_that_stay(share):
    x = torch.linspace(0.1, 0.9, 3 * 2000, dtype=torch.float64).view(2000, 3)
    kernel = kernel_of(x, inputs=ab.SGLD.rule(step_size=0.1, num_steps=1), loss=linear, clean_share=share)
    moved, row = kernel._next_batch()
    stays = float((moved == x[row.long()]).all(1).double().mean())
    assert abs(stays - share) <= 4.0 * (share * (1.0 - share) / 2000) ** 0.5


@pytest.mark.parametrize("clip", [(0.0, 1.0), (-1.0, 3.0)])
def test_what_is_not_given_is_in_the_units_of_the_range(clip):
    """Steps are those of a squared length, a box is a tenth of the range; a flow and a generator have energies of their own."""
    kernel, extent = ab.BAL(no_inputs, "x", 4, clip=clip), clip[1] - clip[0]
    assert [kernel.inputs.step_size(i) for i in range(15)] == [extent**2] * 15 and kernel.inputs.num_steps == 15
    assert kernel.cost == ab.Box(0.1 * extent)
    assert ab.BAL(no_inputs, "x", 4, clip=clip, adversary=ab.Flow()).cost == ab.L2(0.0)


def test_the_moves_of_inputs_are_reported_in_both_norms_as_the_mean_over_rows():
    x = inputs()
    kernel = kernel_of(x, inputs=ab.SGLD.rule(step_size=0.1, num_steps=3), loss=lambda m, c, a, k: (a[0] @ SLOPE) * a[1])
    moved, row = kernel._next_batch()
    torch.testing.assert_close(moved - x[row.long()], 0.3 * row[:, None] * SLOPE)
    found = kernel.diagnostics()["perturbation"]
    assert found["linf"] == pytest.approx(0.3 * 2.5 * 2.0) and found["l2"] == pytest.approx(0.3 * 2.5 * 5.25**0.5)


def test_a_generator_s_parameters_have_a_standard_normal_prior():
    """Its energy is half their squared length; a step of η without a loss shrinks them by 1 - η."""
    torch.manual_seed(0)
    generator = ab.Generator(torch.nn.Linear(3, 3).double(), radius=0.2)
    z = generator.start(inputs())
    torch.testing.assert_close(generator.energy(z), 0.5 * (z * z).sum())
    kernel = kernel_of(inputs(), adversary=generator, inputs=ab.SGLD.rule(step_size=0.1, num_steps=5))
    kernel._next_batch()
    torch.testing.assert_close(kernel.chains.inputs.lasting, 0.9**5 * z)
    kernel._next_batch()
    torch.testing.assert_close(kernel.chains.inputs.lasting, 0.9**10 * z)


def test_a_flow_s_energy_counts_every_pair_of_neighbours_once():
    z = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    down = sum(((z[:, :, i + 1, j] - z[:, :, i, j]) ** 2).sum() for i in range(2) for j in range(5))
    right = sum(((z[:, :, i, j + 1] - z[:, :, i, j]) ** 2).sum() for i in range(3) for j in range(4))
    found = ab.Flow(weight=0.3, smoothness=0.7).energy(z)
    torch.testing.assert_close(found, 0.3 * (z * z).sum() + 0.7 * (down + right))
    assert abs(float(down - right)) > 1.0


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_a_flow_is_in_pixels_on_images_of_any_sides(shape):
    """The first component goes right, the second down; half a pixel is the mean of two."""
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    flow = ab.Flow()
    right, down, between = (flow.start(x) for _ in range(3))
    right[:, 0], down[:, 1], between[:, 0] = 2.0, 1.0, 0.5
    torch.testing.assert_close(flow.inputs(right, x)[..., :-2], x[..., 2:])
    torch.testing.assert_close(flow.inputs(down, x)[..., :-1, :], x[..., 1:, :])
    torch.testing.assert_close(flow.inputs(between, x)[..., :-1], 0.5 * (x[..., 1:] + x[..., :-1]))


@pytest.mark.parametrize("cost", [ab.L2(0.7), lambda perturbed, clean: 0.7 * (perturbed - clean).square().sum(-1)])
def test_a_cost_pulls_back_with_twice_its_weight_times_the_distance(cost):
    x = inputs()
    moved = perturbed(x, inputs=ab.SGLD.rule(step_size=0.1, num_steps=2), cost=cost)
    first = 0.1 * SLOPE
    torch.testing.assert_close(moved, x + first + 0.1 * (SLOPE - 2.0 * 0.7 * first))


def test_a_box_ends_at_its_radius():
    x = inputs()
    moved = perturbed(x, inputs=ab.SGLD.rule(step_size=0.1, num_steps=2), cost=ab.Box(0.15))
    torch.testing.assert_close(moved, x + torch.tensor([0.15, -0.15, 0.1], dtype=torch.float64))

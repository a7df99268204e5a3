"""Every rule's step, number by number, against the equation in its kernel's docstring."""

from __future__ import annotations

import pytest
import torch

from pyro_advbayes.infer.mcmc.sgadald import SGAdaLDRule, adapt_second_moment, second_moment_variables
from pyro_advbayes.infer.mcmc.sghmc import SGHMCRule
from pyro_advbayes.infer.mcmc.sgld import SGLDRule

CHAINS, SIZE = 3, 5
T, STEP = 0.7, 0.2
RULES = {
    "SGLD": SGLDRule(),
    "SGAdaLD": SGAdaLDRule(),
    "SGAdaLD window": SGAdaLDRule(averaging_window=10.0),
    "SGAdaLD uncorrected": SGAdaLDRule(noise_correction=False),
    "SGAdaLD friction": SGAdaLDRule(friction=40.0),
    "SGHMC": SGHMCRule(friction=0.1),
    "SGHMC adaptive": SGHMCRule(friction=0.1, adaptive=True),
    "SGHMC corrected": SGHMCRule(friction=0.1, noise_correction=True),
}


@pytest.fixture
def inputs():
    theta, gradient, noise = (torch.randn(CHAINS, SIZE, dtype=torch.float64) for _ in range(3))
    return theta, gradient, noise


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def take(rule, theta, gradient, noise, variables, step_size=STEP, temperature=T, adapting=False):
    return rule.step(theta, gradient.clone(), noise.clone(), scalar(step_size), scalar(temperature), variables, adapting)


def varied(rule, theta):
    """The rule's variables with numbers in them that are not those of the start."""
    variables = rule.variables(theta)
    for i, value in enumerate(variables.values()):
        value.copy_(torch.linspace(1.0, 2.0 + i, value.numel(), dtype=value.dtype).reshape(value.shape))
    return variables


def by_hand(name, theta, g, n, variables):
    if name == "SGLD":
        return theta - STEP * g + (2 * STEP * T) ** 0.5 * n
    if name.startswith("SGAdaLD"):
        V = variables["V"]
        h = STEP**2 / V.sqrt()
        variance = {"SGAdaLD uncorrected": 2 * T * h, "SGAdaLD friction": 2 * T * STEP**3 * 40.0 / V - STEP**4}.get(
            name, 2 * T * h - STEP**4
        )
        assert (variance > 0).all()
        return theta - h * g + variance.sqrt() * n
    a, v = 0.1, variables["momentum"]
    h = STEP**2 / variables["V"].sqrt() if name == "SGHMC adaptive" else torch.full_like(theta, STEP)
    variance = 2 * a * T * h - (h**2 * variables["noise"] if name == "SGHMC corrected" else 0.0)
    return theta + (1 - a) * v - h * g + variance.clamp_min(0.0).sqrt() * n


@pytest.mark.parametrize("name", RULES)
def test_a_step_is_the_documented_equation(name, inputs):
    rule = RULES[name]
    variables = varied(rule, inputs[0])
    if name == "SGHMC corrected":
        variables["noise"].mul_(0.1)
    expected = by_hand(name, *inputs, {key: value.clone() for key, value in variables.items()})
    assert torch.allclose(take(rule, *inputs, variables), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_nothing_moves_without_gradient_and_temperature(name, inputs):
    rule, theta = RULES[name], inputs[0]
    variables = rule.variables(theta)
    new = rule.step(theta, torch.zeros_like(theta), inputs[2], scalar(STEP), scalar(0.0), variables, False)
    assert torch.equal(new, theta)


@pytest.mark.parametrize("name", RULES)
def test_a_positive_gradient_moves_down(name, inputs):
    rule, theta = RULES[name], inputs[0]
    new = rule.step(theta, torch.ones_like(theta), inputs[2], scalar(STEP), scalar(0.0), rule.variables(theta), False)
    assert (new < theta).all()


@pytest.mark.parametrize("name", RULES)
def test_theta_is_left_as_it_was_and_the_new_one_is_in_the_memory_of_the_noise(name, inputs):
    theta, gradient, noise = inputs
    before = theta.clone()
    new = RULES[name].step(theta, gradient, noise, scalar(STEP), scalar(T), RULES[name].variables(theta), True)
    assert torch.equal(theta, before) and new.data_ptr() == noise.data_ptr()


@pytest.mark.parametrize("name", ["SGAdaLD", "SGHMC adaptive"])
def test_the_second_moment_moves_in_warm_up_only(name, inputs):
    rule = RULES[name]
    variables = varied(rule, inputs[0])
    before = variables["V"].clone()
    take(rule, *inputs, variables, adapting=False)
    assert torch.equal(variables["V"], before)
    take(rule, *inputs, variables, adapting=True)
    assert not torch.equal(variables["V"], before)


def test_the_adaptive_window_follows_springenberg_on_old_values():
    gradients = torch.randn(50, CHAINS, SIZE, dtype=torch.float64)
    variables = second_moment_variables(gradients[0], None)
    tau, mean, V = (torch.ones_like(gradients[0]) for _ in range(3))
    for g in gradients:
        adapt_second_moment(variables, g, None)
        r = 1 / (tau + 1)
        tau, mean, V = tau + 1 - tau * mean**2 / V, mean + r * (g - mean), V + r * (g**2 - V)
    for name, expected in (("tau", tau), ("mean", mean), ("V", V)):
        assert torch.allclose(variables[name], expected, rtol=1e-12)


def test_a_fixed_window_averages_the_start_and_all_gradients_until_it_is_full():
    gradients = torch.randn(9, CHAINS, SIZE, dtype=torch.float64)
    variables = second_moment_variables(gradients[0], 8)
    for g in gradients[:8]:
        adapt_second_moment(variables, g, 8)
    mean = (1.0 + gradients[:8].square().sum(0)) / 9.0
    assert torch.allclose(variables["V"], mean, rtol=1e-12)
    adapt_second_moment(variables, gradients[8], 8)
    assert torch.allclose(variables["V"], mean + (gradients[8].square() - mean) / 9.0, rtol=1e-12)


def test_temperatures_add_what_minibatch_noise_brings():
    noise, theta = torch.tensor([0.0, 2.0, 8.0], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    assert torch.allclose(SGLDRule().temperatures(noise, 0.1, 1.0, {}), 1.0 + 0.05 * noise)
    hmc = SGHMCRule(friction=0.25)
    assert torch.allclose(hmc.temperatures(noise, 0.1, 1.0, hmc.variables(theta)), 1.0 + 0.2 * noise)
    corrected = SGHMCRule(friction=0.25, noise_correction=True)
    variables = corrected.variables(theta)
    variables["noise"].copy_(noise)
    # up to 2 a T / h = 5 of noise variance can be taken off; what is beyond stays
    assert torch.allclose(corrected.temperatures(noise, 0.1, 1.0, variables), torch.tensor([1.0, 1.0, 1.6], dtype=torch.float64))
    ada = SGAdaLDRule(clamp=True)
    V = torch.tensor([[1.0, 4e4, 16e4]], dtype=torch.float64)
    # e^2 sqrt(V) / 2 = .005, 1, 2: the correction is exact until it would have to take off more than there is
    assert torch.allclose(ada.temperatures(noise, 0.1, 1.0, {"V": V}), torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))


@pytest.mark.parametrize("updates_per_batch", [1, 8])
@pytest.mark.parametrize(
    "rule, step",
    [
        (SGLDRule(), 0.004),
        (SGAdaLDRule(), 0.2),
        (SGAdaLDRule(noise_correction=False), 0.2),
        (SGHMCRule(friction=0.25), 0.0005),
        (SGHMCRule(friction=0.25, noise_correction=True), 0.0005),
        (SGHMCRule(friction=0.25, adaptive=True), 0.0005**0.5 * 100**0.25),
    ],
)
def test_temperatures_are_those_of_chains_whose_minibatches_last_for_several_updates(rule, step, updates_per_batch):
    """A Gaussian of precision 1, gradients with noise of variance 100 that stays the same for so many updates."""
    chains, noise = 4000, torch.full((1,), 100.0, dtype=torch.float64)
    variables = rule.variables(torch.zeros(chains, 1, dtype=torch.float64))
    for known in {"V", "noise"} & set(variables):
        variables[known].fill_(100.0)
    expected = float(rule.temperatures(noise, step, 1.0, variables, updates_per_batch).mean())
    assert updates_per_batch == 1 or expected > 1.5
    x = expected**0.5 * torch.randn(chains, 1, dtype=torch.float64)
    size, one = (torch.tensor(value, dtype=torch.float64) for value in (step, 1.0))
    for i in range(3000):
        if i % updates_per_batch == 0:
            off = 10.0 * torch.randn_like(x)
        x = rule.step(x, x + off, torch.randn_like(x), size, one, variables, False)
    assert abs(float(x.var()) / expected - 1.0) < 4.0 * (2.0 / chains) ** 0.5 + 0.02


@pytest.mark.parametrize("name", ["SGLD", "SGAdaLD", "SGAdaLD uncorrected", "SGHMC", "SGHMC adaptive"])
@pytest.mark.parametrize("noise", [0.0, 3.0, 300.0])
def test_the_largest_step_keeps_the_temperature_within_its_share(name, noise):
    rule, share = RULES[name], 0.1
    theta = torch.zeros(1, 2, dtype=torch.float64)
    variables = rule.variables(theta)
    if "V" in variables:
        variables["V"].fill_(noise + 1.0)  # what the gradient would be at stationarity: its noise and its signal
    variance = torch.tensor([noise, 0.5 * noise], dtype=torch.float64)
    step = rule.largest_step(4.0, variance, T, share, variables)
    assert step > 0
    heat = rule.temperatures(variance, step, T, variables)
    assert (heat <= (1 + share) * T + 1e-9).all()
    rate = step**2 if "V" in variables else step
    friction = getattr(rule, "friction", None) if name.startswith("SGHMC") else 1.0
    assert 1 / (1 - rate * 4.0 / (2 * (2 - friction))) <= 1 + share + 1e-9


def test_sgadald_refuses_where_the_noise_is_hotter_than_the_temperature():
    rule, names = SGAdaLDRule(), [("a", slice(0, 2)), ("b", slice(2, 4))]
    variables = {"V": torch.tensor([[1.0, 1.0, 1.0, 1e8]])}
    with pytest.raises(ValueError, match=r"25.0% of the coordinates \(most of them in site 'b'\).*smaller step_size"):
        rule.check(0.1, 0.1, variables, names)
    assert SGAdaLDRule(clamp=True).check(0.1, 0.1, variables, names) == 0.25
    assert rule.check(0.01, 10.0, variables, names) == 0.0

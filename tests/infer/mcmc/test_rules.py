"""Every rule's step, number by number, against the equation in its kernel's docstring."""

from __future__ import annotations

import pyro
import pytest
import torch

from pyro_advbayes.infer.mcmc.kernel import SGMCMCKernel
from pyro_advbayes.infer.mcmc.rule import Rule, has_own_steps, per_chain
from pyro_advbayes.infer.mcmc.runner import SGMCMC
from pyro_advbayes.infer.mcmc.sgadald import SGAdaLDRule, adapt_second_moment, second_moment_variables
from pyro_advbayes.infer.mcmc.sghmc import SGHMCRule
from pyro_advbayes.infer.mcmc.sgld import SGLD, SGLDRule
from tests.small_models import data, logistic

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


def take(rule, theta, gradient, noise, variables, step_size=STEP, temperature=T, learning=None):
    return rule.step(theta, gradient.clone(), noise.clone(), scalar(step_size), scalar(temperature), variables, learning)


def varied(rule, theta):
    """The rule's variables with numbers in them that are not those of the start."""
    variables = rule.variables(theta)
    if has_own_steps(rule):
        variables |= per_chain(theta)
    for i, value in enumerate(variables.values()):
        value.copy_(torch.linspace(1.0, 2.0 + i, value.numel(), dtype=value.dtype).reshape(value.shape))
    return variables


def by_hand(name, theta, g, n, variables):
    if name == "SGLD":
        return theta - STEP * g + (2 * STEP * T) ** 0.5 * n
    if name.startswith("SGAdaLD"):
        V = variables["V"]
        h = STEP**2 / V.sqrt()
        variance = 2 * T * STEP**3 * 40.0 / V if name == "SGAdaLD friction" else 2 * T * h
        if name != "SGAdaLD uncorrected":
            variance = variance - h**2 * variables["moment"]
        assert (variance > 0).all()
        return theta - h * g + variance.sqrt() * n
    a, v = 0.1, variables["momentum"]
    step = STEP * variables["relative_step"].expand_as(theta)
    h = step**2 / variables["V"].sqrt() if name == "SGHMC adaptive" else step
    variance = 2 * a * T - (h * variables["noise"] if name == "SGHMC corrected" else torch.zeros_like(h))
    return theta + h.sqrt() * ((1 - a) * v - h.sqrt() * g + variance.clamp_min(0.0).sqrt() * n)


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
    new = rule.step(theta, torch.zeros_like(theta), inputs[2], scalar(STEP), scalar(0.0), variables, None)
    assert torch.equal(new, theta)


@pytest.mark.parametrize("name", RULES)
def test_a_positive_gradient_moves_down(name, inputs):
    rule, theta = RULES[name], inputs[0]
    new = rule.step(theta, torch.ones_like(theta), inputs[2], scalar(STEP), scalar(0.0), rule.variables(theta), None)
    assert (new < theta).all()


@pytest.mark.parametrize("name", RULES)
def test_theta_is_left_as_it_was_and_the_new_one_is_in_the_memory_of_the_noise(name, inputs):
    theta, gradient, noise = inputs
    before = theta.clone()
    new = RULES[name].step(theta, gradient, noise, scalar(STEP), scalar(T), RULES[name].variables(theta), "metric")
    assert torch.equal(theta, before) and new.data_ptr() == noise.data_ptr()


@pytest.mark.parametrize("name", ["SGAdaLD", "SGHMC adaptive"])
def test_the_second_moment_moves_in_warm_up_only(name, inputs):
    rule = RULES[name]
    variables = varied(rule, inputs[0])
    before = variables["V"].clone()
    take(rule, *inputs, variables, learning=None)
    assert torch.equal(variables["V"], before)
    take(rule, *inputs, variables, learning="metric")
    assert not torch.equal(variables["V"], before)


def test_the_second_moment_weighs_gradients_by_the_cube_of_their_number():
    gradients = torch.randn(50, CHAINS, SIZE, dtype=torch.float64)
    variables = second_moment_variables(gradients[0])
    for g in gradients:
        adapt_second_moment(variables, g, None)
    n = torch.arange(51.0, dtype=torch.float64)
    weights = (n + 1) * (n + 2) * (n + 3)  # that of number 0 is the start's, V = 1
    squares = torch.cat([torch.ones_like(gradients[:1]), gradients.square()])
    assert torch.allclose(variables["V"], torch.tensordot(weights / weights.sum(), squares, 1), rtol=1e-12)


def test_a_window_bounds_the_weight_of_the_past():
    gradients = torch.randn(30, CHAINS, SIZE, dtype=torch.float64)
    variables, V = second_moment_variables(gradients[0]), torch.ones_like(gradients[0])
    for n, g in enumerate(gradients, 1):
        adapt_second_moment(variables, g, 8)
        V = V + max(4 / (n + 4), 1 / 8) * (g**2 - V)
    assert torch.allclose(variables["V"], V, rtol=1e-12)


def test_sgadald_takes_off_the_mean_square_of_the_gradients_at_rest(inputs):
    rule, (theta, gradient, noise) = RULES["SGAdaLD"], inputs
    variables = rule.variables(theta)
    rule.settle(variables, torch.full((SIZE,), 0.3, dtype=torch.float64), 8)
    V = variables["V"].clone()
    take(rule, theta, gradient, noise, variables, learning="moment")
    take(rule, theta, 2.0 * gradient, noise, variables, learning="moment")
    assert torch.allclose(variables["moment"], (8 * 0.3 + 5.0 * gradient**2) / 10.0) and torch.equal(variables["V"], V)
    before = variables["moment"].clone()
    take(rule, theta, gradient, noise, variables)
    assert torch.equal(variables["moment"], before)


def test_momentum_is_not_in_units_of_the_step():
    """A chain at rest keeps its kinetic energy when the step falls by 10^4: it moves a hundredth as far, and does not coast."""
    rule, chains, a = SGHMCRule(friction=0.05), 20_000, 0.05
    theta = torch.zeros(chains, 1, dtype=torch.float64)
    variables = rule.variables(theta)
    variables["momentum"].normal_()
    for step in (1e-2, 1e-6):
        new = take(rule, theta, torch.zeros_like(theta), torch.randn_like(theta), variables, step_size=step, temperature=1.0)
        moved = (new - theta).square().mean() / step
        assert abs(float(moved) - ((1 - a) ** 2 + 2 * a)) < 5 * (2 / chains) ** 0.5, step


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
    variables = {"V": torch.full((1, 3), 16.0, dtype=torch.float64), "moment": torch.tensor([[5.0, 800.0, 1600.0]], dtype=torch.float64)}
    # h = .0025: h M / 2 = .006, 1, 2. What is taken off is exact until it would have to be more than there is
    seen = ada.temperatures(torch.tensor([0.0, 800.0, 1600.0], dtype=torch.float64), 0.1, 1.0, variables)
    assert torch.allclose(seen, torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64))
    # eight updates see each minibatch: 7 h σ² / 2 more than was taken off
    seen = ada.temperatures(torch.tensor([0.0, 400.0, 1600.0], dtype=torch.float64), 0.1, 1.0, variables, 8)
    assert torch.allclose(seen, torch.tensor([[1.0, 4.5, 16.0]], dtype=torch.float64))


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
    for known in {"V", "noise", "moment"} & set(variables):
        variables[known].fill_(100.0)
    expected = float(rule.temperatures(noise, step, 1.0, variables, updates_per_batch).mean())
    assert updates_per_batch == 1 or expected > 1.5
    x = expected**0.5 * torch.randn(chains, 1, dtype=torch.float64)
    size, one = (torch.tensor(value, dtype=torch.float64) for value in (step, 1.0))
    for i in range(3000):
        if i % updates_per_batch == 0:
            off = 10.0 * torch.randn_like(x)
        x = rule.step(x, x + off, torch.randn_like(x), size, one, variables, None)
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
    if "moment" in variables:
        rule.settle(variables, variance + 1.0, 8)
    metric = rule.metric(variables)
    step = rule.largest_step(4.0, variance if metric is None else metric[0] ** 2 * variance, T, share, variables)
    assert step > 0
    heat = rule.temperatures(variance, step, T, variables)
    assert (heat <= (1 + share) * T + 1e-9).all()
    rate = step**2 if "V" in variables else step
    friction = getattr(rule, "friction", None) if name.startswith("SGHMC") else 1.0
    assert 1 / (1 - rate * 4.0 / (2 * (2 - friction))) <= 1 + share + 1e-9


def test_sgadald_refuses_where_the_noise_is_hotter_than_the_temperature():
    rule, names = SGAdaLDRule(), [("a", slice(0, 2)), ("b", slice(2, 4))]
    variables = {"V": torch.tensor([[1.0, 1.0, 1.0, 1e8]]), "moment": torch.tensor([[1.0, 1.0, 1.0, 1e8]])}
    with pytest.raises(ValueError, match=r"25.0% of the coordinates \(most of them in site 'b'\).*smaller step_size"):
        rule.check(0.1, 0.1, variables, names)
    assert SGAdaLDRule(clamp=True).check(0.1, 0.1, variables, names) == 0.25
    assert rule.check(0.01, 10.0, variables, names) == 0.0


# ---------------------------------------------------------------------------------------------------- a rule with a step alone


class WalkRule(Rule):
    """The update of SGLD, and nothing else."""

    def step(self, theta, gradient, noise, step_size, temperature, variables, learning):
        return noise.mul_((2.0 * step_size * temperature).sqrt()).sub_(gradient.mul_(step_size)).add_(theta)


class Walk(SGMCMCKernel):
    update_rule = WalkRule()


@pytest.mark.filterwarnings("ignore::pyro_advbayes.infer.mcmc.assessment.SamplingWarning")
@pytest.mark.parametrize("batch_size", [None, 10])
def test_a_rule_with_a_step_alone_runs_at_a_given_step_size_and_reports_no_temperature(tmp_path, capsys, batch_size):
    found = []
    for kernel in (Walk, SGLD):
        pyro.set_rng_seed(1)
        mcmc = SGMCMC(kernel(logistic, 1e-3, batch_size=batch_size), 30, 20, 2, checkpoint=tmp_path / kernel.__name__, disable_progbar=True)
        mcmc.run(*data())
        mcmc.summary()
        found.append(mcmc)
    walk, sgld = found
    assert torch.equal(walk.get_samples()["w"], sgld.get_samples()["w"])
    temperatures = [walk.diagnostics()[name] for name in ("T_eff", "T_eff direction", "T_eff epochs")]
    assert temperatures == [None] * 3 and sgld.diagnostics()["T_eff"].keys() == {"w", "b"}
    told = [[text for text in mcmc.diagnostics()["warnings"] if "heats" not in text] for mcmc in found]
    assert told[0] == told[1]
    assert "r_hat" in capsys.readouterr().out
    again = SGMCMC.resume(tmp_path / "Walk", Walk(logistic, 1e-3, batch_size=batch_size), *data(), disable_progbar=True)
    assert torch.equal(again.get_samples()["w"], walk.get_samples()["w"])


def test_auto_is_refused_for_a_rule_that_has_no_largest_step():
    with pytest.raises(ValueError, match=r'step_size="auto": WalkRule has no largest_step\. Give a step size'):
        Walk(logistic)

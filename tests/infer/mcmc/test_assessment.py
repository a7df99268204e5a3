"""A run that is not right says so when it ends, and a good one says nothing."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.infer.mcmc import assessment
from pyro_advbayes.infer.mcmc.assessment import _drifting, _heat, _thrown, drift, fitted_values
from pyro_advbayes.infer.mcmc.summary import effective_size, normal_scores, shrink_factor
from pyro_advbayes.infer.mcmc.temperatures import hottest
from pyro_advbayes.infer.mcmc.trajectory import energy_rise, unstable_share, watch_steepest


def autoregressive(chains, draws, rho, random):
    """Stationary chains of variance 1 ``[chains, draws]``."""
    values = torch.empty(chains, draws, dtype=torch.float64)
    values[:, 0] = torch.randn(chains, generator=random, dtype=torch.float64)
    for i in range(1, draws):
        values[:, i] = rho * values[:, i - 1] + (1 - rho**2) ** 0.5 * torch.randn(chains, generator=random, dtype=torch.float64)
    return values


def alarmed(energy):
    found = drift(energy)
    return abs(found["z"]) > 5.0 and abs(found["shift"]) > 0.5


def test_drift_is_seen_and_is_not_seen_where_there_is_none():
    random = torch.Generator().manual_seed(0)
    stationary = [(rho, shape) for rho in (0.0, 0.5) for shape in ((4, 60), (1, 200), (16, 100))] + [(0.9, (4, 200))]
    alarms = sum(alarmed(autoregressive(*shape, rho, random)) for rho, shape in stationary for _ in range(40))
    assert alarms <= 3, f"{alarms} of 280 good runs"
    for size, time in ((2.0, 60.0), (5.0, 15.0), (20.0, 2.0)):
        decay = size * torch.exp(-torch.arange(200.0, dtype=torch.float64) / time)
        seen = sum(alarmed(autoregressive(4, 200, 0.5, random) + decay) for _ in range(20))
        assert seen == 20, f"a decay of {size} standard deviations over {time} draws is seen {seen} times of 20"


def test_drift_has_its_formula():
    """Draws whose first fifth lies higher: of the three parts that one has the largest z."""
    energy = torch.randn(2, 100, dtype=torch.float64)
    energy[:, :20] += 3.0
    found = drift(energy)
    first, last = energy[:, :20], energy[:, 50:]
    s = last.var(1).mean().sqrt()
    tau = max(1.0, 100.0 / float(effective_sample_size(last, chain_dim=0, sample_dim=1)))
    assert found["first"] == pytest.approx(float(first.mean())) and found["last"] == pytest.approx(float(last.mean()))
    shift = (first.mean() - last.mean()) / s
    assert found["shift"] == pytest.approx(float(shift))
    assert found["z"] == pytest.approx(float(shift) / (tau / 40 + tau / 100) ** 0.5)


# ----------------------------------------------------------------------------------------------------------------- warnings


def test_drift_and_heat_are_warned_of_beyond_their_bounds_only():
    for z, shift, expected in ((5.1, 0.51, True), (-5.1, -0.51, True), (5.1, 0.49, False), (4.9, 0.51, False)):
        assert bool(_drifting({"z": z, "shift": shift, "first": 2.0, "last": 1.0})) == expected

    def told(hottest, along, automatic=True, size=20, coldest=0.5, rows=100):
        kernel = SimpleNamespace(
            automatic=automatic, mixes=True, update_rule=None, potential=SimpleNamespace(size=size, batches=SimpleNamespace(num_data=rows))
        )
        cold = {"a": 0.5, "b": coldest, "c": 0.5}
        return " ".join(_heat(kernel, {"T_eff": {"a": 0.5, "b": hottest, "c": 0.5}, "T_eff epochs": cold, "T_eff direction": along}, 0.5))

    assert "site 'b' to T_eff 0.561 where 0.5 was" in told(0.561, None) and told(0.559, None) == ""
    # a direction may be hotter by 2 * 0.125 * 20 / 10 of 0.5
    assert "is largest to T_eff 0.751 where 0.5 was" in told(0.5, 0.751) and told(0.5, 0.749) == ""
    assert told(0.5, 0.626, size=5) and not told(0.5, 0.624, size=5)
    assert "site 'b' may be as low as 0.439 where 0.5 was" in told(0.5, None, coldest=0.439) and told(0.5, None, coldest=0.441) == ""
    assert told(0.439, None, coldest=0.439) == "" and told(0.5, None, coldest=0.1, rows=None) == ""
    assert '"auto"' not in told(0.6, None) and '"auto"' in told(0.6, None, automatic=False)


def gaussian():
    pyro.sample("x", dist.Normal(torch.zeros(20), 1.0).to_event(1))


def warned(run):
    """The texts of all sampling warnings, one at most."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    texts = [str(each.message) for each in said if issubclass(each.category, ab.SamplingWarning)]
    assert len(texts) <= 1
    return texts[0] if texts else None


def test_a_run_that_starts_far_out_without_a_warm_up_says_so_and_one_from_exact_draws_does_not(capsys):
    for start, expected in ((10.0 + torch.randn(4, 20), True), (torch.randn(4, 20), False)):
        mcmc = ab.SGMCMC(ab.SGLD(gaussian, 0.05), 400, 0, 4, initial_params={"x": start}, disable_progbar=True)
        text = warned(mcmc.run)
        assert ("the kept energies are not stationary" in (text or "")) == expected, text
        found = mcmc.diagnostics()
        assert (abs(found["drift"]["z"]) > 5.0) == expected and any("stationary" in each for each in found["warnings"]) == expected
        mcmc.summary()
        printed = capsys.readouterr().out
        assert "energy: first draws" in printed and ("warning: the kept energies are not stationary" in printed) == expected


def test_good_runs_are_silent():
    """Eight runs with defaults: full data and minibatches."""
    x = torch.randn(60, 3)
    y = torch.bernoulli(torch.sigmoid(x.sum(1)))

    def logistic(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    said = []
    for seed in range(2):
        for make, batch, updates in ((ab.SGLD, None, 20), (ab.SGHMC, 10, 40), (ab.SGAdaLD, 20, 20), (ab.SGHMC, None, 20)):
            pyro.set_rng_seed(seed)
            kernel = make(logistic, batch_size=batch, num_steps_per_sample=updates)
            said.append(warned(lambda: ab.SGMCMC(kernel, 100, 60, 4, disable_progbar=True).run(x, y)))  # noqa: B023
    assert said == [None] * 8


def test_chains_that_have_not_mixed_are_warned_of_by_their_predictions():
    """Chains of a regression that hardly move from where they start: their weights and predictions differ."""
    x, y = torch.randn(30, 2), torch.randn(30)

    def line(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    mcmc = ab.SGMCMC(ab.SGLD(line, 1e-7, num_steps_per_sample=5), 60, 60, 4, disable_progbar=True)
    text = warned(lambda: mcmc.run(x, y))
    assert "R-hat of the predicted means of the data is" in text and "take more samples" in text
    values = fitted_values(mcmc.finished())
    kept = torch.linspace(0, 59, values.shape[1]).round().long()
    torch.testing.assert_close(values, mcmc.get_samples(group_by_chain=True)["w"][:, kept] @ x.T)


def test_few_effective_draws_are_warned_of_with_their_number(monkeypatch):
    """An autoregression of the first order: N h / 2 effective draws of N at a step size of h."""
    monkeypatch.setattr(assessment, "LARGEST_R_HAT", 2.0)  # which so few draws exceed by chance

    def normal():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for step_size, expected in ((0.03, 15), (0.4, None)):
        mcmc = ab.SGMCMC(ab.SGLD(normal, step_size), 1000, 100, 1, disable_progbar=True)
        text = warned(mcmc.run)
        effective = float(effective_size(normal_scores(mcmc.get_samples(group_by_chain=True)["x"][:, ::4].double())).min())
        assert effective > 100 if expected is None else 0.5 * expected < effective < 3.0 * expected
        if expected is None:
            assert text is None
        else:
            assert f"{effective:.0f} effective draws of site 'x' in all chains together" in text
            assert f"uncertain by {effective**-0.5:.2f} posterior standard deviations" in text and "take more samples" in text


def test_a_coefficient_that_few_rows_know_of_is_looked_at_too():
    """Two rows of 400 have the exposure: no prediction that is looked at depends on its effect, which chains have not found yet."""
    x = torch.cat([torch.randn(400, 2), torch.zeros(400, 1)], 1)
    x[[101, 303], 2] = 1.0
    y = x @ torch.tensor([1.0, 2.0, 15.0]) + torch.randn(400)

    def rare(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ b, 1.0), obs=y)

    mcmc = ab.SGMCMC(ab.SGHMC(rare, step_size=2e-5, batch_size=200, num_steps_per_sample=10), 100, 100, 4, disable_progbar=True)
    text = warned(lambda: mcmc.run(x, y))
    assert "R-hat of site 'b' is" in text and float(shrink_factor(fitted_values(mcmc.finished())).max()) < 1.1


def test_weights_of_a_network_that_differ_between_modes_are_no_warning():
    """Two hidden units are one each for x < 0 and x > 0, in two chains the other way round: R-hat of the weights is large."""
    x = 2.0 * torch.randn(40, 1)
    y = torch.bernoulli(torch.sigmoid(4.0 * x[:, 0].abs() - 4.0)).long()
    inner, outer = torch.tensor([[2.0], [-2.0]]), torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    start = {
        "net.1.weight": torch.stack([inner, inner, -inner, -inner]),
        "net.1.bias": torch.zeros(4, 2),
        "net.3.weight": outer.expand(4, 2, 2),
        "net.3.bias": torch.tensor([2.0, -2.0]).expand(4, 2),
    }
    mcmc = ab.SGMCMC(ab.SGHMC(mlp((1, 2, 2)), num_steps_per_sample=20), 100, 100, 4, initial_params=start, disable_progbar=True)
    assert warned(lambda: mcmc.run(x, y)) is None
    assert float(mcmc.diagnostics()["net.1.weight"]["r_hat"].max()) > 1.5
    values = fitted_values(mcmc.finished())
    assert values.shape == (4, 100, 80)
    probs = ab.Predictive(mcmc.kernel.model, mcmc.get_samples(), return_sites=["_RETURN"])(x)["_RETURN"].softmax(-1)
    torch.testing.assert_close(values.reshape(400, 40, 2), probs)


def test_scales_of_groups_and_labels_of_a_mixture_are_compared_and_a_networks_single_weight_is_not():
    """Each chain keeps to where it starts; R-hat of sites tells so, of a network's weights it must not."""

    def groups():
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
        pyro.sample("obs", dist.Normal(torch.zeros(3), scale).to_event(1), obs=torch.ones(3))

    def mixture():
        place = pyro.sample("place", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        law = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(place, 0.1))
        with pyro.plate("data", 20):
            pyro.sample("obs", law, obs=torch.tensor([-3.0, 3.0]).repeat(10))

    def signs():
        first = pyro.sample("first", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        second = pyro.sample("net.second", dist.Normal(torch.zeros(1, 1), 1.0).to_event(2))
        pyro.sample("obs", dist.Normal((torch.ones(20, 3) @ first.T).tanh() @ second.T, 0.3).to_event(2), obs=torch.full((20, 1), 0.5))

    apart = {
        "scale": (groups, {"scale": torch.linspace(-3.0, 3.0, 4).unsqueeze(-1).repeat(1, 3)}),
        "place": (mixture, {"place": 3.0 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 1)}),
        None: (
            signs,
            {
                "first": torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1).repeat(1, 1, 3),
                "net.second": torch.tensor([0.6, -0.6, 0.6, -0.6]).reshape(4, 1, 1),
            },
        ),
    }
    for name, (model, start) in apart.items():
        mcmc = ab.SGMCMC(ab.SGLD(model, 1e-4), 60, 0, 4, initial_params=start, disable_progbar=True)
        text = warned(mcmc.run) or ""
        assert f"R-hat of site {name!r}" in text if name else "R-hat of site" not in text, text


def test_the_step_is_tried_where_a_chain_met_its_largest_gradient():
    """Of a Gaussian with precision 1/2 leapfrog steps are stable below sqrt(8), where the step of SGLD is 4."""
    kernel = ab.SGLD(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 2.0**0.5).to_event(1)), 0.1)
    mcmc = ab.SGMCMC(kernel, 50, 0, 3, disable_progbar=True)
    mcmc.run()
    steepest = kernel.chains.steepest
    assert unstable_share(kernel.run, 3.6, 1.0) == 0.0 and unstable_share(kernel.run, 4.4, 1.0) > 0.5
    watch_steepest(steepest, torch.tensor([[9.0, 9.0], [8.0, 8.0], [7.0, 7.0]]), torch.tensor([100.0, 0.0, torch.nan]))
    assert (steepest.theta[0] == 9.0).all() and (steepest.theta[1:] < 7.0).all() and float(steepest.norm[0]) == 100.0


def test_the_rise_of_energy_is_the_largest_along_the_way():
    """On U = x^2 / 4 + y^2 / 4, by the leapfrog's own matrix; at 1.8 of the limit's 4 energy swings up and down."""
    kernel = ab.SGLD(lambda: pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0**0.5).to_event(1)), 0.1)
    kernel.setup(0)
    theta, seed, step = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 7, (2.0 * 1.8) ** 0.5
    momentum = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stage = torch.tensor([[1.0 - step**2 / 4.0, step], [-0.5 * step * (1.0 - step**2 / 8.0), 1.0 - step**2 / 4.0]], dtype=torch.float64)
    phase, energies = torch.stack([theta, momentum]).flatten(1), []
    for _ in range(11):
        energies.append(float(0.25 * phase[0].square().sum() + 0.5 * phase[1].square().sum()))
        phase = stage @ phase
    rise = max(energies) - energies[0]
    assert rise > 1.2 * (energies[-1] - energies[0]) and rise > 0.0
    assert float(energy_rise(kernel.run, theta, 1.8, 1.0, seed)) == pytest.approx(rise, abs=1e-4)


def test_the_neck_of_a_funnel_is_warned_of():
    """Neal's funnel: chains at a step that fits its mouth leave out the neck; at one that fits the neck they do not mix."""

    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (0.5 * v).exp()).to_event(1))

    texts = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        mcmc = ab.SGMCMC(ab.SGHMC(funnel, num_steps_per_sample=10), 300, 300, 4, disable_progbar=True)
        texts.append(warned(mcmc.run))
    assert all(texts), texts


def test_a_step_that_is_unstable_in_the_steepest_places_is_warned_of():
    """exp(-x⁴ / 4): the curvature 3x² bounds the step at 4 / (3x²), which chains exceed where they seldom go."""

    def quartic():
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 10.0).to_event(1))
        pyro.factor("well", -0.25 * (x**4).sum(-1))

    texts = []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        texts.append(warned(ab.SGMCMC(ab.SGHMC(quartic, 0.15, num_steps_per_sample=10), 300, 100, 4, disable_progbar=True).run))
    assert any("too large for the steepest places" in text for text in texts), texts


def test_a_draw_far_above_its_chain_is_warned_of_where_it_shows_and_the_tail_of_a_gaussian_is_not():
    """Energies of exact draws from 1, 16 and 1000 dimensions, and from a Cauchy law; one draw may be 20 T and four spreads higher."""

    def told(energy, far, T=1.0):
        values = torch.linspace(-1.0, 1.0, energy.shape[1]).repeat(len(energy), 1)
        values[energy == energy.max()] = far
        return " ".join(_thrown(energy, T, {"tau": values}))

    for dim in (1, 16, 1000):
        energy = 0.5 * torch.distributions.Chi2(torch.tensor(float(dim), dtype=torch.float64)).sample((40, 1000))
        assert told(energy, 1e6) == ""
    assert told(torch.randn(40, 1000, 16).cauchy_().square().log1p().sum(-1), 1e6) == ""
    energy = torch.linspace(0.0, 10.0, 101).repeat(3, 1)  # median 5, 95 % at 9.5
    energy[1, 50] = 5.0 + 0.5 * 20.0 + 4.0 * 4.5 - 0.1
    assert told(energy, 30.0, T=0.5) == ""
    energy[1, 50] += 0.3
    assert "chain 1 was thrown out: at draw 50 its energy is 28 nats above its median" in told(energy, 30.0, T=0.5)
    # among 303 draws of variance 0.34, one at 4 makes 1.07 of the standard deviation, and one at 6 1.16
    assert told(energy, 4.0, T=0.5) == "" and "'tau' 1.16 times as wide" in told(energy, 6.0, T=0.5)


def test_a_chain_that_comes_back_from_far_out_is_warned_of_on_the_full_data():
    """Where every draw is exact but for one chain, moved 30 standard deviations out after half of the run."""

    def move(kernel, params, stage, i):
        if stage == "Sample" and i == 100:
            kernel.theta[2] = 30.0

    mcmc = ab.SGMCMC(ab.SGHMC(gaussian, num_steps_per_sample=10), 200, 200, 4, hook_fn=move, disable_progbar=True)
    assert "chain 2 was thrown out: at draw 10" in warned(mcmc.run) and "make site 'x'" in mcmc.diagnostics()["warnings"][0]


def test_no_energy_is_a_rise_and_no_chain_is_no_share():
    kernel = ab.SGLD(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)), 0.1)
    kernel.setup(0)
    assert float(energy_rise(kernel.run, torch.full((1, 2), torch.nan), 0.1, 1.0, 0)) > 1e30
    watch_steepest(kernel.chains.steepest, torch.zeros(1, 2), torch.ones(1))
    assert unstable_share(kernel.run, 0.1, 1.0) == 0.0
    kernel.alive[:] = False
    assert unstable_share(kernel.run, 0.1, 1.0) is None


def test_data_in_their_own_units_are_named_where_a_run_is_not_right():
    x = torch.cat([torch.randn(60, 1), 4000.0 + 900.0 * torch.randn(60, 1)], 1)

    def line(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    texts = []
    for scale, target in ((1.0, 1.0), (1e-3, 1.0), (1.0, 1e5)):
        scaled, y = x * torch.tensor([1.0, scale]), target * torch.randn(60)
        mcmc = ab.SGMCMC(ab.SGLD(line, 1e-12), 60, 10, 4, disable_progbar=True)
        texts.append(warned(lambda: mcmc.run(scaled, y)))  # noqa: B023
    assert re.search(r"column 1 of x has mean 4.*e\+03 and standard deviation .*: standardise", texts[0])
    assert texts[1] and "standardise" not in texts[1]
    assert re.search(r"; y has mean .* and standard deviation .*e\+0.*: standardise", texts[2]) and "column" not in texts[2]


def test_a_site_that_stands_still_is_warned_of():
    def flat():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("tau", dist.HalfCauchy(1.0))  # at 0 in float32, where log tau is -200 and U a straight line

    start = {"x": torch.zeros(2), "tau": torch.full((2,), -200.0)}
    mcmc = ab.SGMCMC(ab.SGLD(flat, 0.01), 30, 5, 2, initial_params=start, disable_progbar=True)
    assert "site 'tau' does not move" in warned(mcmc.run)
    assert mcmc.diagnostics()["tau"]["r_hat"].isnan()


def test_heat_is_warned_of_with_a_remedy_that_is_not_yet_in_force():
    y = torch.randn(400, 2)

    def means(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = ab.SGMCMC(ab.SGLD(means, 1e-4, batch_size=4), 20, 200, 2, disable_progbar=True)
    text = warned(lambda: mcmc.run(y))
    heat = 1.0 + 0.5e-4 * 400**2 / 4 * 0.99 * y.var(0).mean()
    assert re.search("heats site 'x' to T_eff [23]", text) and '"auto" keeps to 1.1' in text
    assert mcmc.diagnostics()["T_eff"]["x"] == pytest.approx(float(heat), rel=0.1)
    assert warned(lambda: ab.SGMCMC(ab.SGLD(means, 1e-4, temperature=0.0, batch_size=4), 20, 20, 2, disable_progbar=True).run(y)) is None


# --------------------------------------------------------------------------------------- the worst chain, the worst direction


def test_a_correction_for_noise_that_epochs_take_back_is_warned_of():
    """
    The noise of 20 rows of 200, far less than curvature: SGAdaLD takes off what a shuffled epoch has taken back, and comes out too narrow;
    at the step that "auto" finds by a few percent.
    """
    y = 2.0 * torch.randn(200)

    def centre(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    precision = 201.0
    auto = ab.SGAdaLD(centre, batch_size=20, num_steps_per_sample=20)
    mcmc = ab.SGMCMC(auto, 200, 150, 16, disable_progbar=True)
    assert warned(lambda: mcmc.run(y)) is None and 0.88 < auto.diagnostics()["T_eff epochs"]["mean"] < 0.97
    wide = ab.SGAdaLD(centre, 2.0 * auto.diagnostics()["step size"], batch_size=20, num_steps_per_sample=20)
    mcmc = ab.SGMCMC(wide, 200, 150, 16, disable_progbar=True)
    text = warned(lambda: mcmc.run(y))
    assert "made up for that shuffled epochs take back" in text and text.split(" (mcmc.")[0].endswith("or noise_correction=False")
    assert float(mcmc.get_samples()["mean"].var()) * precision < 0.88 and wide.diagnostics()["T_eff"]["mean"] == pytest.approx(
        1.0, abs=0.05
    )


def test_the_temperature_that_is_reported_is_the_worst_chains():
    kernel = ab.SGHMC(gaussian, adaptive=True)
    kernel.setup_chains(3, 0, (), {})
    kernel.variables["V"].fill_(1.0)
    kernel.variables["V"][1] = 1e-4  # a collapsed preconditioner: h is a hundred times larger
    kernel.chains.effective = kernel.update_rule.temperatures(torch.full((20,), 0.1), 0.1, 1.0, kernel.variables)
    assert kernel.effective_temperatures() == {"x": pytest.approx(1.0 + 0.01 * 100.0 * 0.1 / (2 * 0.05))}


@pytest.mark.parametrize("make, heating", [(ab.SGLD, 0.5 * 0.02), (ab.SGHMC, 0.02 / (2 * 0.05))])
def test_heat_along_the_noisiest_direction_is_its_variance(make, heating):
    """Noise of variance 4 along one direction, 1 % of it elsewhere: single coordinates see a fraction of it."""
    kernel = make(gaussian, step_size=0.02)
    kernel.setup_chains(2, 0, (), {})
    direction = torch.randn(20)
    direction /= direction.norm()
    estimate = kernel.chains.noise
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(8)
    estimate.differences = [2.0 * sign * direction.expand(2, -1) for sign in signs]
    estimate.variance.copy_(4.0 * direction.square())
    assert hottest(kernel.run, 0.02) == pytest.approx(1.0 + heating * 4.0, rel=1e-5)
    assert float(kernel.update_rule.temperatures(estimate.variance, 0.02, 1.0, kernel.variables).mean()) < 1.0 + heating * 0.5


def test_noise_without_a_direction_is_not_made_hotter_by_looking_for_one():
    kernel = ab.SGLD(gaussian, step_size=0.02)
    kernel.setup_chains(1, 0, (), {})
    found = []
    for _ in range(200):
        kernel.chains.noise.differences = list(torch.randn(32, 1, 20))
        found.append(hottest(kernel.run, 0.02))
    assert sum(found) / len(found) == pytest.approx(1.01, abs=1e-3)


# --------------------------------------------------------------------------------------------------------- what is reported


def test_predictions_are_diagnosed_as_values():
    x, y = torch.randn(30, 3), torch.randint(2, (30,))
    mcmc = ab.SGMCMC(ab.SGHMC(mlp((3, 4, 2)), num_steps_per_sample=5), 40, 20, 2, disable_progbar=True)
    warned(lambda: mcmc.run(x, y))
    found = mcmc.diagnostics(x[:5])["predictions"]
    values = ab.Predictive(mcmc.kernel.model, mcmc.get_samples(), return_sites=["_RETURN"])(x[:5])["_RETURN"].reshape(2, 40, 5, 2)
    assert found["r_hat"].shape == (5, 2) and found["n_eff"].shape == (5, 2)
    assert float(found["r_hat"][3, 1]) == pytest.approx(float(arviz.rhat(values[..., 3, 1].double().numpy(), method="rank")))
    assert "predictions" not in mcmc.diagnostics()


def test_a_site_may_have_the_name_of_what_belongs_to_the_run():
    def named():
        pyro.sample("step size", dist.Normal(0.0, 1.0))
        pyro.sample("drift", dist.Normal(0.0, 1.0))

    mcmc = ab.SGMCMC(ab.SGLD(named, 0.1), 30, 30, 2, disable_progbar=True)
    warned(mcmc.run)
    found = mcmc.diagnostics()
    assert found["step size"] == 0.1 and set(found["sites"]) == {"step size", "drift"} and "z" in found["drift"]

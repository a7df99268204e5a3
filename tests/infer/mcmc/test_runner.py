"""SGMCMC: chains as rows of one state, and what can be asked of it while it runs and after."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from tests.small_models import data, logistic, regression, subsampling

X, Y = data()


def sgld(model=regression, step_size=1e-3, batch_size=10, backend="handlers", **options):
    return ab.SGLD(model, step_size, batch_size=batch_size, backend=backend, **options)


def run(kernel=None, samples=6, warmup=3, chains=3, args=(X, Y), seed=0, **options):
    pyro.set_rng_seed(seed)
    mcmc = ab.SGMCMC(kernel or sgld(), samples, warmup, chains, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


# ------------------------------------------------------------------------------------------------------------------- samples


def test_samples_are_grouped_by_chain_or_in_one_row_chain_after_chain():
    mcmc = run()
    grouped, flat = mcmc.get_samples(group_by_chain=True), mcmc.get_samples()
    assert {name: value.shape for name, value in grouped.items()} == {"w": (3, 6, 3), "scale": (3, 6), "b": (3, 6)}
    for name, value in flat.items():
        assert torch.equal(value, grouped[name].reshape(18, *grouped[name].shape[2:]))


def test_a_number_of_samples_is_drawn_with_replacement_as_in_pyro():
    mcmc = run()
    some = mcmc.get_samples(num_samples=50)
    assert some["w"].shape == (50, 3)
    rows = {tuple(row.tolist()) for row in torch.cat([mcmc.get_samples()["w"], mcmc.get_samples()["b"][:, None]], 1)}
    assert {tuple(row.tolist()) for row in torch.cat([some["w"], some["b"][:, None]], 1)} <= rows, "sites have come apart"
    assert mcmc.get_samples(num_samples=50, group_by_chain=True)["w"].shape == (3, 50, 3)


def test_one_seed_gives_one_run_and_another_another():
    one, same, other = run(seed=1), run(seed=1), run(seed=2)
    assert torch.equal(one.get_samples()["w"], same.get_samples()["w"])
    assert not torch.equal(one.get_samples()["w"], other.get_samples()["w"])


def test_chains_are_different_chains():
    w = run().get_samples(group_by_chain=True)["w"]
    assert (w[0] - w[1]).abs().min() > 0 and (w[1] - w[2]).abs().min() > 0


@pytest.mark.parametrize("source", ["full data", "minibatches", "subsampling plate", "loader"])
def test_data_comes_in_every_way(source):
    kernel = sgld(subsampling if source == "subsampling plate" else logistic, batch_size=10 if source == "minibatches" else None)
    args = (DataLoader(TensorDataset(X, Y), 25, shuffle=True),) if source == "loader" else (X, Y)
    assert run(kernel, args=args).get_samples(group_by_chain=True)["w"].shape == (3, 6, 3)


def test_each_sample_is_so_many_updates_and_warmup_counts_samples_too():
    seen = []
    mcmc = run(sgld(num_steps_per_sample=5), hook_fn=lambda kernel, params, stage, i: seen.append((stage, i, kernel.steps)))
    assert seen == [("Warmup", i, 5 * (i + 1)) for i in range(3)] + [("Sample", i, 5 * (i + 4)) for i in range(6)]
    assert mcmc.num_samples == 6 and mcmc.warmup_steps == 3 and mcmc.num_chains == 3


def test_at_temperature_zero_and_a_tiny_step_nothing_moves_and_with_a_step_energy_falls():
    still = run(sgld(step_size=1e-30, temperature=0.0)).get_samples(group_by_chain=True)["w"]
    assert torch.equal(still[:, 0], still[:, -1])
    energy = run(sgld(batch_size=None, temperature=0.0), samples=20).sample_stats()["energy"]
    assert (energy.diff(dim=1) < 0).all()


# ----------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_every_draw_are_those_of_its_last_update():
    mcmc = run(sgld(batch_size=None, temperature=0.5), samples=8)
    stats, samples = mcmc.sample_stats(), mcmc.get_samples(group_by_chain=True)
    assert {name: value.shape for name, value in stats.items()} == dict.fromkeys(
        ("energy", "step_size", "temperature", "gradient_norm", "diverging"), (3, 8)
    )
    assert (stats["step_size"] == 1e-3).all() and (stats["temperature"] == 0.5).all() and not stats["diverging"].any()
    potential = ab.Potential(regression, (X, Y), num_chains=3, backend="handlers")
    for i in range(7):  # the update that led to draw i + 1 started at draw i
        state = potential.unconstrain({name: value[:, i] for name, value in samples.items()})
        gradient, energy = potential.evaluate("both", state, temperature=0.5)
        torch.testing.assert_close(stats["energy"][:, i + 1].float(), energy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stats["gradient_norm"][:, i + 1].float(), gradient.norm(dim=-1), rtol=1e-3, atol=1e-2)


def test_diagnostics_hold_every_site_and_what_the_kernel_found():
    diagnostics = run(ab.SGAdaLD(logistic, batch_size=10, backend="handlers"), samples=8, warmup=20).diagnostics()
    run_level = {
        "sites",
        "drift",
        "warnings",
        "lost",
        "divergences",
        "step size",
        "step sizes",
        "step fell",
        "energy error",
        "T_eff",
        "T_eff direction",
        "T_eff epochs",
        "restarts",
        "clamped",
    }
    assert set(diagnostics) == run_level and set(diagnostics["sites"]) == {"w", "b"}
    assert diagnostics["w"] is diagnostics["sites"]["w"]
    assert diagnostics["w"]["n_eff"].shape == (3,) and diagnostics["w"]["r_hat"].shape == (3,)
    assert diagnostics["divergences"] == {"chain 0": [], "chain 1": [], "chain 2": []}
    assert set(diagnostics["T_eff"]) == {"w", "b"} and diagnostics["step size"] > 0


def test_labels_of_many_chains_sort_as_their_numbers():
    labels = list(run(chains=11, samples=1, warmup=0).diagnostics()["divergences"])
    assert labels == sorted(labels) and labels[0] == "chain 00" and labels[-1] == "chain 10"


def test_sites_larger_than_asked_are_diagnosed_in_part():
    assert run().diagnostics(max_elements=2)["w"]["n_eff"].shape == (2,)


# --------------------------------------------------------------------------------------------------- before, between and after


@pytest.mark.parametrize(
    "ask", [lambda mcmc: mcmc.get_samples(), lambda mcmc: mcmc.sample_stats(), lambda mcmc: mcmc.diagnostics(), lambda mcmc: mcmc.summary()]
)
def test_before_a_run_there_is_nothing(ask):
    with pytest.raises(RuntimeError, match=r"no samples yet: call run\(...\) first"):
        ask(ab.SGMCMC(sgld(), 3))


def test_a_second_run_is_a_new_run():
    mcmc = run()
    first = mcmc.get_samples()["w"].clone()
    mcmc.run(X[:50], Y[:50])
    assert mcmc.get_samples()["w"].shape == first.shape and not torch.equal(mcmc.get_samples()["w"], first)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_an_interrupted_run_has_is_there(tmp_path, where, capsys):
    def stop(kernel, params, stage, i):
        if (stage, i) == ("Sample", 4):
            raise KeyboardInterrupt

    options = {} if where == "memory" else {"draws": tmp_path / "draws"}
    whole = run(samples=20)
    pyro.set_rng_seed(0)
    mcmc = ab.SGMCMC(sgld(), 20, 3, 3, hook_fn=stop, disable_progbar=True, **options)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(X, Y)
    assert torch.equal(mcmc.get_samples(group_by_chain=True)["w"], whole.get_samples(group_by_chain=True)["w"][:, :5])
    assert mcmc.sample_stats()["energy"].shape == (3, 5) and mcmc.diagnostics()["w"]["n_eff"].shape == (3,)
    mcmc.summary()
    assert "chains lost: 0 of 3" in capsys.readouterr().out


def test_a_run_needs_no_autograd_and_leaves_its_mode_and_validation_as_they_were():
    with torch.no_grad(), pyro.validation_enabled(True):
        inside = run().get_samples()["w"]
        assert not torch.is_grad_enabled()
        with pytest.raises(ValueError, match="scale"):
            pyro.distributions.Normal(0.0, -1.0)
    assert torch.is_grad_enabled() and torch.equal(inside, run().get_samples()["w"])


def test_arguments_that_want_gradients_get_none():
    x = X.clone().requires_grad_()
    mcmc = run(args=(x, Y))
    assert x.grad is None and not mcmc.get_samples()["w"].requires_grad and not mcmc._args[0].requires_grad


def test_the_data_stays_as_it_was():
    x, y = X.clone(), Y.clone()
    run(sgld(backend="graph"), args=(x, y))
    assert torch.equal(x, X) and torch.equal(y, Y)


def test_a_run_inside_of_a_trace_leaves_nothing_there():
    with pyro.poutine.trace() as outer:
        run()
    assert list(outer.trace.nodes) == []


def test_a_kernel_can_be_copied():
    kernel = sgld()
    first = run(kernel).get_samples()["w"]
    assert torch.equal(run(copy.deepcopy(kernel)).get_samples()["w"], first)


@pytest.mark.parametrize(
    "options,says", [({"draws_dtype": torch.int8}, "draws_dtype=torch.int8"), ({"draws_dtype": "half"}, "draws_dtype=half")]
)
def test_draws_are_kept_in_floating_point(options, says):
    with pytest.raises(ValueError, match=says):
        ab.SGMCMC(sgld(), 3, **options)


def test_a_progress_bar_is_shown_on_a_terminal_only(capsys):
    pyro.set_rng_seed(0)
    ab.SGMCMC(sgld(), 3, 2).run(X, Y)
    assert capsys.readouterr().err == ""

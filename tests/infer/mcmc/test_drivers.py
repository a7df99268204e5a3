"""The kernels in Pyro's drivers and ours: what each driver asks of a kernel, and the traps on the way."""

from __future__ import annotations

import json
import pickle
import warnings
from collections import defaultdict

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc import StreamingMCMC
from pyro.nn import PyroModule
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from tests.small_models import data, logistic, mixed, regression, weights

KERNELS = {
    "SGLD": lambda model, **options: ab.SGLD(model, **options),
    "SGAdaLD": lambda model, **options: ab.SGAdaLD(model, **options),
    "SGHMC": lambda model, **options: ab.SGHMC(model, **options),
    "MCLMC": lambda model, **options: ab.MCLMC(model, **options),
    "adaptive SGHMC": lambda model, **options: ab.SGHMC(model, adaptive=True, **options),
}


def sgld(model=logistic, step_size=1e-3, **options):
    return ab.SGLD(model, step_size, batch_size=10, backend="handlers", **options)


def run(driver, kernel, samples=5, warmup=3, args=None, **options):
    mcmc = driver(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True, **options)
    mcmc.run(*(data() if args is None else args))
    return mcmc


def cpus(monkeypatch, count):
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: count)


def run_two(monkeypatch, how, kernel, **options):
    """Two chains in Pyro's MCMC: one after the other, or in processes that are forked or spawned."""
    cpus(monkeypatch, 2 if how == "sequential" else 8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="num_chains=2 is more than available_cpu")
        return run(MCMC, kernel, num_chains=2, mp_context=None if how == "sequential" else how, **options)


# ------------------------------------------------------------------------------------------------------------ Pyro's MCMC


@pytest.mark.parametrize("name,backend", [(name, "handlers") for name in KERNELS] + [("SGLD", "graph"), ("SGAdaLD", "graph")])
def test_pyros_mcmc_runs_every_kernel_and_gives_values_in_the_models_space(name, backend):
    kernel = KERNELS[name](regression, step_size=1e-3, batch_size=10, backend=backend)
    samples = run(MCMC, kernel).get_samples()
    assert {site: value.shape for site, value in samples.items()} == {"w": (5, 3), "scale": (5,), "b": (5,)}
    assert (samples["scale"] > 0).all() and not any(value.requires_grad for value in samples.values())


@pytest.mark.parametrize("how", ["sequential", pytest.param("fork", marks=pytest.mark.forks)])
def test_two_chains_in_pyros_mcmc_are_two_chains(monkeypatch, how):
    mcmc = run_two(monkeypatch, how, sgld(regression))
    grouped = mcmc.get_samples(group_by_chain=True)
    assert grouped["w"].shape == (2, 5, 3)
    assert not torch.equal(grouped["w"][0], grouped["w"][1])
    assert (grouped["scale"] > 0).all(), "samples of processes are in unconstrained space"
    assert torch.equal(mcmc.get_samples()["w"], grouped["w"].reshape(10, 3))
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": []}


@pytest.mark.parametrize("how", [pytest.param("fork", marks=pytest.mark.forks), "spawn"])
def test_chain_k_of_a_process_pool_is_the_chain_of_seed_plus_k(monkeypatch, how):
    pyro.set_rng_seed(5)
    parallel = run_two(monkeypatch, how, sgld(regression)).get_samples(group_by_chain=True)
    assert not torch.equal(parallel["w"][0], parallel["w"][1])
    for chain in range(2):
        pyro.set_rng_seed(5 + chain)
        alone = run(MCMC, sgld(regression)).get_samples()
        assert all(torch.equal(parallel[site][chain], alone[site]) for site in alone)


def test_sequential_chains_start_apart(monkeypatch):
    starts = []
    kernel = sgld(step_size=1e-12, temperature=0.0)
    run_two(monkeypatch, "sequential", kernel, hook_fn=lambda kernel, params, stage, i: starts.append(params["w"]))
    assert (starts[0] - starts[-1]).abs().min() > 1e-3


def test_a_second_run_of_a_driver_starts_anew():
    mcmc = run(MCMC, sgld())
    first = mcmc.get_samples()["w"].clone()
    mcmc.run(*data())
    assert not torch.equal(first, mcmc.get_samples()["w"])


def test_streaming_mcmc_sees_the_samples_of_mcmc():
    pyro.set_rng_seed(2)
    samples = run(MCMC, sgld(regression)).get_samples()
    pyro.set_rng_seed(2)
    streaming = run(StreamingMCMC, sgld(regression))
    statistics = streaming.get_statistics(group_by_chain=False)
    for site, value in samples.items():
        torch.testing.assert_close(statistics[site]["mean"], value.mean(0))
    assert streaming.diagnostics()["divergences"] == {"chain 0": []}


@pytest.mark.parametrize("driver", [MCMC, StreamingMCMC])
def test_save_params_in_any_order_keeps_each_sites_values_apart(driver):
    mcmc = run(driver, sgld(regression, 1e-4), save_params=["w", "scale", "b"])
    if driver is MCMC:
        means = {site: value.mean(0) for site, value in mcmc.get_samples().items()}
    else:
        means = {site: value["mean"] for site, value in mcmc.get_statistics(group_by_chain=False).items()}
    assert means["w"].shape == (3,)
    assert means["scale"] > 0 and means["b"] < -50, "values have been swapped between sites"


def test_save_params_may_name_some_sites_only():
    assert set(run(MCMC, sgld(regression), save_params=["w", "b"]).get_samples()) == {"w", "b"}


def test_pyros_driver_saves_sites_in_the_order_in_which_it_reads_them():
    kernel = sgld(regression)
    kernel.save_params = ["w", "b"]
    assert kernel.save_params == ["b", "w"]


def test_pyros_mcmc_promotes_mixed_dtypes_and_sgmcmc_keeps_each_sites():
    promoted, kept = run(MCMC, sgld(mixed)).get_samples(), run(ab.SGMCMC, sgld(mixed)).get_samples()
    assert {site: value.dtype for site, value in promoted.items()} == {"w": torch.float64, "b": torch.float64}
    assert {site: value.dtype for site, value in kept.items()} == {"w": torch.float32, "b": torch.float64}


@pytest.mark.parametrize("driver", [MCMC, ab.SGMCMC])
@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_than_four_samples_are_samples(driver, samples):
    assert run(driver, sgld(), samples=samples).get_samples()["w"].shape == (samples, 3)


def test_diagnostics_of_few_samples_are_unknown_rather_than_an_error():
    mcmc = run(ab.SGMCMC, sgld(), samples=3)
    assert mcmc.diagnostics()["w"]["n_eff"].isnan().all() and mcmc.diagnostics()["w"]["r_hat"].isnan().all()
    mcmc.summary()


def test_a_driver_without_warmup_samples_from_the_first_step():
    for driver in (MCMC, ab.SGMCMC):
        for step_size in (1e-3, "auto"):
            assert run(driver, sgld(step_size=step_size), warmup=0).get_samples()["w"].isfinite().all()


# ------------------------------------------------------------------------------------------------------ what a kernel owes


def test_logging_is_json_at_every_step():
    shown = []
    run(MCMC, sgld(step_size="auto"), hook_fn=lambda kernel, params, stage, i: shown.append(json.loads(json.dumps(kernel.logging()))))
    assert len(shown) == 8 and all(set(row) == {"step size", "energy"} for row in shown)


@pytest.mark.parametrize("driver", [MCMC, ab.SGMCMC])
def test_diagnostics_name_sites_and_what_the_kernel_knows(driver, capsys):
    mcmc = run(driver, KERNELS["SGAdaLD"](logistic, batch_size=10, backend="handlers"))
    diagnostics = mcmc.diagnostics()
    known = {
        "divergences",
        "step size",
        "step sizes",
        "step fell",
        "T_eff",
        "T_eff direction",
        "T_eff epochs",
        "restarts",
        "clamped",
        "energy error",
    }
    assert set(diagnostics) == known | ({"w", "b"} if driver is MCMC else {"sites", "drift", "warnings", "lost"})
    assert set(diagnostics["w"]) == {"n_eff", "r_hat"} and diagnostics["w"]["n_eff"].shape == (3,)
    assert list(diagnostics["divergences"].values()) == [[]]
    mcmc.summary()
    assert "0" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("chains,stage", [(1, "Sample"), (2, "Sample [1]")])
def test_pyros_hooks_get_each_sample_unconstrained_and_detached(monkeypatch, chains, stage):
    cpus(monkeypatch, 2)
    seen = defaultdict(list)
    kernel = sgld(regression)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc = run(MCMC, kernel, num_chains=chains, hook_fn=lambda kernel, params, stage, i: seen[stage].append((i, params)))
    assert [i for i, _ in seen[stage]] == [0, 1, 2, 3, 4] and len(seen) == 2 * chains
    params = [params for _, params in seen[stage]]
    assert not any(value.requires_grad for row in params for value in row.values())
    kept = torch.stack([row["scale"] for row in params])
    torch.testing.assert_close(kept.exp(), mcmc.get_samples(group_by_chain=True)["scale"][-1])
    assert len(set(kept.tolist())) == 5, "what a hook keeps is overwritten by later samples"


def test_hooks_of_sgmcmc_get_all_chains_at_once():
    seen = []
    mcmc = run(ab.SGMCMC, sgld(regression), num_chains=3, hook_fn=lambda *call: seen.append(call))
    assert [(stage, i) for _, _, stage, i in seen] == [("Warmup", i) for i in range(3)] + [("Sample", i) for i in range(5)]
    assert all(kernel is mcmc.kernel for kernel, *_ in seen)
    params = [params for _, params, stage, _ in seen if stage == "Sample"]
    assert {site: value.shape for site, value in params[0].items()} == {"w": (3, 3), "scale": (3,), "b": (3,)}
    assert not any(value.requires_grad for row in params for value in row.values())
    kept = torch.stack([row["scale"] for row in params], dim=1)
    torch.testing.assert_close(kept.exp(), mcmc.get_samples(group_by_chain=True)["scale"])


@pytest.mark.parametrize("driver", [MCMC, ab.SGMCMC])
def test_a_hook_that_writes_into_its_params_changes_no_sample(driver):
    def hook(kernel, params, stage, i):
        for value in params.values():
            value.zero_()

    pyro.set_rng_seed(1)
    plain = run(ab.SGMCMC, sgld()).get_samples()["w"]
    pyro.set_rng_seed(1)
    mcmc = run(driver, sgld(), hook_fn=hook)
    if driver is ab.SGMCMC:  # Pyro's driver saves what the hook leaves
        assert torch.equal(mcmc.get_samples()["w"], plain)
    assert mcmc.kernel.theta.abs().sum() > 0


def test_cleanup_may_be_called_twice_and_forgets_the_start():
    kernel = sgld()
    kernel.setup(0, *data())
    assert set(kernel.initial_params) == {"w", "b"}
    kernel.cleanup()
    kernel.cleanup()
    assert kernel.initial_params is None


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("step_size", [1e-3, "auto"])
def test_a_kernel_set_up_without_warmup_samples(name, step_size):
    kernel = KERNELS[name](logistic, step_size=step_size, batch_size=10, backend="handlers")
    kernel.setup(0, *data())
    params = kernel.sample(kernel.sample(kernel.initial_params))
    assert {site: value.shape for site, value in params.items()} == {"w": (3,), "b": ()}
    assert all(value.isfinite().all() and not value.requires_grad for value in params.values())


def test_sampling_leaves_the_start_and_earlier_samples_alone():
    kernel = sgld()
    kernel.setup(0, *data())
    start = {site: value.clone() for site, value in kernel.initial_params.items()}
    first = kernel.sample(kernel.initial_params)
    copy = {site: value.clone() for site, value in first.items()}
    kernel.sample(first)
    assert all(torch.equal(kernel.initial_params[site], start[site]) and torch.equal(first[site], copy[site]) for site in start)


def test_a_driver_may_hand_in_another_state_than_the_last():
    kernel = sgld(step_size=1e-12, temperature=0.0)
    kernel.setup(0, *data())
    kernel.sample(kernel.initial_params)
    moved = kernel.sample({"w": torch.full((3,), 5.0), "b": torch.tensor(-5.0)})
    torch.testing.assert_close(moved, {"w": torch.full((3,), 5.0), "b": torch.tensor(-5.0)})


@pytest.mark.parametrize("driver", [MCMC, StreamingMCMC])
def test_initial_params_are_where_pyros_chain_starts(driver):
    seen = []
    initial = {"w": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.tensor(0.5), "b": torch.tensor(-90.0)}
    kernel = sgld(regression, step_size=1e-12, temperature=0.0)
    run(driver, kernel, initial_params=initial, hook_fn=lambda kernel, params, stage, i: seen.append(params))
    torch.testing.assert_close(seen[0], initial)


# In processes, Pyro 1.9 starts every chain where the last one was to start: its workers share one kernel until they begin.
@pytest.mark.parametrize("how", ["sequential", "sgmcmc"])
def test_initial_params_of_two_chains_are_in_unconstrained_space_with_the_chains_first(monkeypatch, how):
    initial = {"w": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor([0.5, 1.5]), "b": torch.tensor([-90.0, -80.0])}
    kernel = sgld(regression, step_size=1e-12, temperature=0.0)
    if how == "sgmcmc":
        mcmc = run(ab.SGMCMC, kernel, num_chains=2, initial_params=initial)
    else:
        mcmc = run_two(monkeypatch, how, kernel, initial_params=initial)
    samples = mcmc.get_samples(group_by_chain=True)
    for site, value in {**initial, "scale": initial["scale"].exp()}.items():
        torch.testing.assert_close(samples[site][:, 0], value)


@pytest.mark.parametrize("moment", ["before a run", "after a run"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_pickled_kernel_samples_like_the_original(name, moment):
    kernel = KERNELS[name](regression, step_size=1e-3, batch_size=10, backend="handlers")
    if moment == "after a run":
        run(MCMC, kernel)
    copy = pickle.loads(pickle.dumps(kernel))
    samples = []
    for each in (kernel, copy):
        pyro.set_rng_seed(4)
        samples.append(run(MCMC, each).get_samples())
    assert all(torch.equal(samples[0][site], samples[1][site]) for site in samples[0])


def test_a_kernel_used_in_one_driver_can_be_used_in_another():
    kernel = sgld()
    for driver in (MCMC, ab.SGMCMC, StreamingMCMC, ab.SGMCMC):
        run(driver, kernel)
    assert run(ab.SGMCMC, kernel, num_chains=2).get_samples()["w"].shape == (10, 3)


class Featured(PyroModule):
    """A regression on the features of a fixed network, which Pyro registers under one name in all such models."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, x, y=None):
        mean = self.features(x) @ weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("backend", ["handlers", "graph"])
def test_two_models_whose_fixed_networks_have_one_name_keep_their_weights_apart(backend):
    models = [Featured(torch.nn.Linear(3, 3)) for _ in range(2)]
    alone = []
    for model in models:
        pyro.clear_param_store()
        alone.append(ab.Potential(model, data(), backend=backend).energy(torch.ones(1, 3)))
    pyro.clear_param_store()
    for model in models:
        ab.SGMCMC(ab.SGLD(model, 1e-3, backend=backend), 2, 0, disable_progbar=True).run(*data())
    together = [ab.Potential(model, data(), backend=backend).energy(torch.ones(1, 3)) for model in models]
    assert not torch.equal(*alone) and all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_run_leaves_trained_parameters_and_the_networks_own_alone():
    def model(x, y=None):
        mean = x @ weights()
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, pyro.param("scale", torch.tensor(1.0))), obs=y)

    network = torch.nn.Linear(3, 3)
    before = [value.clone() for value in network.parameters()]
    pyro.param("scale", torch.tensor(7.0))
    run(ab.SGMCMC, sgld(model))
    run(ab.SGMCMC, sgld(Featured(network)))
    assert pyro.param("scale").item() == 7.0 and pyro.param("scale").grad is None
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, network.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------------- ArviZ's reader


@pytest.mark.parametrize("case", ["MCMC", "two chains", "SGMCMC", "keywords", "loader", "bfloat16"])
def test_arviz_reads_what_a_driver_leaves(monkeypatch, case):
    x, y = data()
    if case == "two chains":
        mcmc = run_two(monkeypatch, "sequential", sgld(regression))
    elif case == "MCMC":
        mcmc = run(MCMC, sgld(regression))
    else:
        kernel = ab.SGLD(regression, 1e-3, backend="handlers")
        options = {"draws_dtype": torch.bfloat16} if case == "bfloat16" else {}
        mcmc = ab.SGMCMC(kernel, 5, 3, 12, disable_progbar=True, **options)
        if case == "loader":
            mcmc.run(DataLoader(TensorDataset(x, y), 10))
        elif case == "keywords":
            mcmc.run(x=x, y=y)
        else:
            mcmc.run(x, y)
    inference = arviz.from_pyro(mcmc, log_likelihood=False)
    samples = mcmc.get_samples(group_by_chain=True)
    for site, value in samples.items():
        np.testing.assert_array_equal(inference.posterior[site], value)
    assert inference.sample_stats["diverging"].shape == (mcmc.num_chains, 5) and not inference.sample_stats["diverging"].any()
    np.testing.assert_array_equal(inference.observed_data["obs"], y[:10] if case == "loader" else y)
    assert len(arviz.summary(inference)) == 5


def test_arviz_sees_which_of_twelve_chains_were_lost():
    """
    Labels of chains are sorted as strings: without zeros before them chain 10 would come after chain 1. A chain that was lost is left
    out, and the others keep their order.
    """

    def cliff():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("cliff", (10.5 - w).sqrt())

    mcmc = ab.SGMCMC(ab.SGLD(cliff, 1e-6, backend="handlers"), 3, 0, 12, initial_params={"w": torch.arange(12.0).clamp_max(10.4)})
    mcmc.kernel.temperature = lambda step: 1e-6
    mcmc.hook_fn = lambda kernel, params, stage, i: kernel.theta[2].fill_(11.0) if i == 1 else None
    with pytest.warns(ab.SamplingWarning, match=r"1 of 12 chains were lost \(1 from sample 2 on\)"):
        mcmc.run()
    inference_data = arviz.from_pyro(mcmc, log_likelihood=False)
    assert inference_data.sample_stats["diverging"].shape == (11, 3) and not inference_data.sample_stats["diverging"].any()
    np.testing.assert_array_equal(inference_data.posterior["w"], mcmc.get_samples(group_by_chain=True)["w"])
    kept = mcmc.get_samples(group_by_chain=True)["w"][:, 0]
    assert kept.round().tolist() == [0.0, 1.0, *map(float, range(3, 11)), 10.0]
    assert mcmc.get_samples(group_by_chain=True, lost_chains=True)["w"].shape == (12, 3)
    assert mcmc.diagnostics()["lost"] == {"chain 02": [2]} and "chain 02" not in mcmc.diagnostics()["divergences"]

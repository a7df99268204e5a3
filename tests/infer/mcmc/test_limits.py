"""Limits that hold: graphs that are kept, threads, interrupts at any moment, steps too small for the state."""

from __future__ import annotations

import threading

import pyro
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc import runner
from pyro_advbayes.model.functions import Functions
from tests.small_models import data, logistic


def sampler(**options):
    return ab.SGLD(logistic, 1e-3, backend="handlers", **options)


def test_the_graphs_of_many_lengths_are_not_all_kept(monkeypatch):
    monkeypatch.setattr("pyro_advbayes.infer.mcmc.kernel.KEPT", 4, raising=False)
    kernel = ab.SGLD(logistic, 1e-3)
    for rows in range(20, 26):
        ab.SGMCMC(kernel, 1, 0, disable_progbar=True).run(*data(rows))
        held = {shape for key in kernel._graphs for shape, _ in key[4] if len(shape) == 2}
        assert (rows, 3) in held, "what was used last stays"
    assert len(kernel._graphs) == 4 and (20, 3) not in held


def test_a_graph_that_is_used_again_outlives_newer_ones(monkeypatch):
    monkeypatch.setattr("pyro_advbayes.infer.mcmc.kernel.KEPT", 4, raising=False)
    kernel, traced = ab.SGLD(logistic, 1e-3), []
    trace = Functions._trace
    monkeypatch.setattr(Functions, "_trace", lambda self, kind, *rest: (traced.append(kind), trace(self, kind, *rest))[1])
    for rows in range(20, 24):
        ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(*data(rows))
        before = len(traced)
        ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(*data(60))
        assert rows == 20 or len(traced) == before
    ab.SGMCMC(kernel, 2, 0, disable_progbar=True).run(*data(20))
    assert len(traced) > before


def test_a_run_over_more_lengths_than_are_kept_traces_each_of_them_once(monkeypatch):
    monkeypatch.setattr("pyro_advbayes.infer.mcmc.kernel.KEPT", 2, raising=False)
    traced, trace = [], Functions._trace
    monkeypatch.setattr(Functions, "_trace", lambda self, kind, *rest: (traced.append(kind), trace(self, kind, *rest))[1])
    kernel = ab.SGLD(logistic, 1e-3, num_data=60)
    ab.SGMCMC(kernel, 9, 2, disable_progbar=True).run(DataLoader(TensorDataset(*data()), batch_sampler=RandomLengths([20, 15, 25])))
    assert sorted(traced) == ["both"] * 3 and len(kernel._graphs) <= 2


class RandomLengths:
    """Batches of these lengths, which come in another order in every epoch."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        rows = torch.randperm(sum(self.lengths))
        return iter([part.tolist() for part in rows.split([self.lengths[i] for i in torch.randperm(len(self.lengths))])])


@pytest.mark.parametrize("second", ["run", "resume"])
def test_a_second_thread_that_samples_is_refused_and_the_first_goes_on(tmp_path, second):
    whole = ab.SGMCMC(sampler(), 4, 0, disable_progbar=True)
    pyro.set_rng_seed(1)
    whole.run(*data())
    ab.SGMCMC(sampler(), 2, 0, disable_progbar=True, checkpoint=tmp_path / "other").run(*data())
    found = []

    def other():
        try:
            if second == "run":
                ab.SGMCMC(sampler(), 2, 0, disable_progbar=True).run(*data())
            else:
                ab.SGMCMC.resume(tmp_path / "other", sampler(), *data(), disable_progbar=True)
        except Exception as error:
            found.append(error)

    def hook(kernel, params, stage, i):
        if i == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    mcmc = ab.SGMCMC(sampler(), 4, 0, disable_progbar=True, hook_fn=hook)
    pyro.set_rng_seed(1)
    mcmc.run(*data())
    assert torch.equal(mcmc.get_samples()["w"], whole.get_samples()["w"])
    assert [type(error) for error in found] == [RuntimeError]
    assert "another thread of this process samples" in str(found[0]) and "processes" in str(found[0])


def test_a_run_within_a_run_of_the_same_thread_and_one_after_it_in_another_are_no_threads_at_once():
    def hook(kernel, params, stage, i):
        ab.SGMCMC(sampler(), 1, 0, disable_progbar=True).run(*data())

    thread = threading.Thread(target=lambda: ab.SGMCMC(sampler(), 2, 0, disable_progbar=True, hook_fn=hook).run(*data()))
    thread.start()
    thread.join()
    mcmc = ab.SGMCMC(sampler(), 2, 0, disable_progbar=True, hook_fn=hook)
    mcmc.run(*data())
    assert len(mcmc.get_samples()["w"]) == 2


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("moment", ["loop", "first sample"])
def test_a_run_interrupted_before_its_first_draw_has_diagnostics(tmp_path, monkeypatch, where, moment):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    options = {} if where == "memory" else {"checkpoint": tmp_path / "run"}
    mcmc = ab.SGMCMC(sampler(), 3, 0, 2, disable_progbar=True, overwrite=True, **options)
    for _ in range(2):
        with monkeypatch.context() as patch:
            if moment == "loop":
                patch.setattr(runner, "tqdm", interrupt)
            else:
                patch.setattr(ab.SGLD, "sample", interrupt)
            with pytest.raises(KeyboardInterrupt):
                mcmc.run(*data())
        found = mcmc.diagnostics()
        assert found["divergences"] == {"chain 0": [], "chain 1": []} and found["drift"] is None
        assert found["w"]["n_eff"].isnan().all() and mcmc.get_samples()["w"].shape == (0, 3)
    mcmc.run(*data())  # and the file is nobody's
    assert mcmc.get_samples()["w"].shape == (6, 3)


def test_a_run_interrupted_while_it_is_set_up_again_says_that_it_has_no_samples(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    mcmc = ab.SGMCMC(sampler(), 3, 0, 2, disable_progbar=True)
    mcmc.run(*data())
    monkeypatch.setattr(ab.SGLD, "setup_chains", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(*data())
    for look in (mcmc.diagnostics, mcmc.summary, mcmc.get_samples):
        with pytest.raises(RuntimeError, match="there are no samples yet"):
            look()


@pytest.mark.parametrize("value", [1e-46, 1e-300])
@pytest.mark.parametrize("make", [lambda value: value, lambda value: lambda step: 1e-3 if step < 2 else value], ids=["number", "schedule"])
def test_a_step_that_is_zero_in_the_models_dtype_is_refused_before_sampling(value, make):
    mcmc = ab.SGMCMC(ab.SGLD(logistic, make(value), backend="handlers"), 3, 2, disable_progbar=True)
    with pytest.raises(ValueError, match=f"step_size={value:.3g}: updates so small are 0 in torch.float32"):
        mcmc.run(*data())
    x, y = data()
    ab.SGMCMC(ab.SGLD(wide, make(value), backend="handlers"), 1, 1, disable_progbar=True).run(x.double(), y.double())


def wide(x, y):
    w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", pyro.distributions.Bernoulli(logits=x @ w), obs=y)

"""Many updates in one call take the steps, bit for bit, of as many calls."""

from __future__ import annotations

import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc import update
from pyro_advbayes.tracing.compiled import compile_graph
from tests.small_models import data, logistic, regression, subsampling

X, Y = data()
compiles = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")


def counts(x: Tensor, y: Tensor) -> None:
    """With an exponential link, whose chains are lost where a step is too long."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson((x @ w).exp()), obs=y)


def run(kernel, monkeypatch, together, args=(X, Y), warmup=12, samples=8, chains=3):
    """Everything that a run leaves, and how many updates each call made."""
    sizes = []
    call = update.ChunkUpdates._call

    def counted(self, run, kind, ahead):
        sizes.append(len(ahead.batches))
        return call(self, run, kind, ahead)

    monkeypatch.setattr(update, "MOST_TOGETHER", together)
    monkeypatch.setattr(update.ChunkUpdates, "_call", counted)
    pyro.set_rng_seed(0)
    mcmc = ab.SGMCMC(kernel, samples, warmup, chains, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.SamplingWarning)
        mcmc.run(*args)
    monkeypatch.setattr(update.ChunkUpdates, "_call", call)
    diagnostics = mcmc.diagnostics()
    kept = {key: diagnostics[key] for key in ("divergences", "restarts", "step size", "T_eff", "clamped")}
    state = {name: value for name, value in kernel.state().items() if isinstance(value, Tensor)}
    return mcmc.get_samples(group_by_chain=True), {**state, **kernel.variables}, kept, torch.rand(3), sizes


def assert_same(one, other):
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    assert one[2] == other[2] and torch.equal(one[3], other[3])


KERNELS = {
    "SGLD": ab.SGLD,
    "SGAdaLD": ab.SGAdaLD,
    "SGHMC": ab.SGHMC,
    "SGHMC-adaptive": lambda *args, **options: ab.SGHMC(*args, adaptive=True, **options),
    "SGHMC-corrected": lambda *args, **options: ab.SGHMC(*args, noise_correction=True, **options),
    "MCLMC": ab.MCLMC,
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_updates_in_one_call_are_those_of_as_many_calls_in_warm_up_and_after(name, batch_size, monkeypatch):
    make = lambda: KERNELS[name](regression, batch_size=batch_size, num_steps_per_sample=12)  # noqa: E731
    # of 408 updates of warm-up, a rule learns something else from the 286th on, which is in the middle of a call
    one, many = (run(make(), monkeypatch, together, warmup=34, samples=4) for together in (1, 16))
    assert_same(many, one)
    assert set(one[4]) == {1} and max(many[4]) == 11, "a sample of twelve updates has eleven without a report"
    assert sum(many[4]) == sum(one[4]) == 38 * 12


@pytest.mark.parametrize(
    "options, args, chains",
    [
        ({"chunk_size": 1, "batch_size": 7}, (X, Y), 3),
        ({"chunk_size": 2, "batch_size": 7}, (X, Y), 3),
        ({"batch_size": 7}, (X, Y), 1),
        ({"step_size": lambda step: 1e-3 / (1.0 + step), "temperature": lambda step: 1.0 + 1.0 / (1.0 + step), "batch_size": 7}, (X, Y), 3),
        ({"step_size": ab.schedules.Cyclical(1e-3, 10), "batch_size": 7}, (X, Y), 2),
    ],
    ids=["one by one", "in chunks", "one chain", "schedules", "cycles"],
)
def test_chunks_and_schedules_are_as_in_single_calls(options, args, chains, monkeypatch):
    make = lambda: ab.SGHMC(logistic, num_steps_per_sample=9, **options)  # noqa: E731
    many = run(make(), monkeypatch, 16, args, chains=chains)
    assert_same(many, run(make(), monkeypatch, 1, args, chains=chains))
    assert max(many[4]) == 8


def test_a_plate_that_subsamples_is_as_in_single_calls(monkeypatch):
    make = lambda: ab.SGLD(subsampling, 1e-4, num_steps_per_sample=9)  # noqa: E731
    many = run(make(), monkeypatch, 16)
    assert_same(many, run(make(), monkeypatch, 1))
    assert max(many[4]) == 8


@pytest.mark.parametrize("kernel_type, step_size", [(ab.SGLD, 1e-3), (ab.SGHMC, 1e-4)])
def test_a_chain_that_is_lost_in_the_middle_of_a_call_is_lost_at_the_same_update(kernel_type, step_size, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    y = torch.poisson((x @ torch.tensor([1.5, -1.0, 0.5])).exp())
    kernels = [kernel_type(counts, step_size, batch_size=8, num_steps_per_sample=12) for _ in range(2)]
    many, one = (run(kernel, monkeypatch, most, (x, y), warmup=0, chains=6) for kernel, most in zip(kernels, (16, 1), strict=True))
    assert_same(many, one)
    assert torch.equal(kernels[0].alive, kernels[1].alive) and torch.equal(kernels[0].theta, kernels[1].theta)
    assert max(many[4]) == 11 and 0 < int((~kernels[0].alive).sum()) < 6


def test_no_state_is_too_large_and_no_minibatch_too_long_for_memory(monkeypatch):
    monkeypatch.setattr(update, "LARGEST_STATE", 3)
    assert set(run(ab.SGLD(regression, 1e-4, batch_size=7, num_steps_per_sample=9), monkeypatch, 16)[4]) == {1}
    monkeypatch.setattr(update, "LARGEST_STATE", 50_000)
    batch = 3 * 7 * (3 + 1)  # three chains, seven rows, three inputs and a label
    monkeypatch.setattr(update, "LARGEST_BATCHES", 7 * batch)
    assert run(ab.SGLD(regression, 1e-4, batch_size=7, num_steps_per_sample=9), monkeypatch, 16, warmup=0, samples=2)[4] == [7, 1, 1] * 2


@compiles
def test_compiled_updates_are_the_same_in_one_call_and_in_many(monkeypatch):
    make = lambda: ab.SGHMC(regression, 1e-4, batch_size=7, num_steps_per_sample=5, backend="compile")  # noqa: E731
    kernel = make()
    many = run(kernel, monkeypatch, 16, warmup=0)
    assert kernel.compile_seconds > 0.0
    again = run(kernel, monkeypatch, 16, warmup=0)
    assert_same(many, again)
    assert kernel.compile_seconds == 0.0
    one = run(make(), monkeypatch, 1, warmup=0)
    assert max(many[4]) == 4 and set(one[4]) == {1}
    for name, value in one[0].items():
        torch.testing.assert_close(many[0][name], value, rtol=1e-6, atol=1e-7)
    graph = run(ab.SGHMC(regression, 1e-4, batch_size=7, num_steps_per_sample=5), monkeypatch, 16, warmup=0)
    for name, value in graph[0].items():
        torch.testing.assert_close(many[0][name], value, rtol=1e-4, atol=1e-5)


@compiles
def test_a_compiled_graph_overwrites_what_it_is_told_to_and_sees_live_tensors_change():
    live, total = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def fn(x: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        y = 2.0 * x + live.exp()
        return y.sum(), total + y

    compiled = compile_graph(fn, (torch.ones(2), total), [1], [live])
    x = torch.tensor([3.0, 4.0])
    for value in (0.0, 1.0):
        live.fill_(value)
        (result,) = compiled(x, total)
        torch.testing.assert_close(result, (2.0 * x + live.exp()).sum())
    torch.testing.assert_close(total, 4.0 * x + 1.0 + torch.e)

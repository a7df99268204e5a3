"""A chain killed with SIGKILL and resumed gives the samples, bit for bit, of one that was never killed; nothing else is resumed."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.infer.mcmc.schedules import Cyclical
from pyro_advbayes.storage import files
from pyro_advbayes.storage.draws import read_draws
from tests.small_models import data, logistic, regression, subsampling, weights

pytestmark = pytest.mark.forks  # see pyproject.toml

X, Y = data()
WARMUP, SAMPLES, EVERY = 9, 11, 4
IN_WARMUP, IN_SAMPLING = 6, 15  # samples after which the process is killed; the checkpoint before it is two or three samples old


def rows():
    return X, Y


def loader(generator=False, shuffle=True, batch_size=25, labels=Y):
    options = {"generator": torch.Generator().manual_seed(9)} if generator else {}
    return (DataLoader(TensorDataset(X, labels), batch_size, shuffle=shuffle, **options),)


def runner(kernel, seed=3, chains=2, **options):
    pyro.set_rng_seed(seed)
    return ab.SGMCMC(kernel, SAMPLES, WARMUP, chains, disable_progbar=True, **options)


def killed(kernel, arguments, checkpoint, at, **options):
    """Runs in a process of its own, which kills itself after so many samples."""

    def hook(kernel, params, stage, i):
        if kernel.chains.counts.samples == at:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            runner(kernel, checkpoint=checkpoint, checkpoint_every=EVERY, hook_fn=hook, **options).run(*arguments)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def resumed(checkpoint, kernel, arguments):
    """In another process all random generators stand elsewhere."""
    pyro.set_rng_seed(12345)
    torch.randn(7)
    return ab.SGMCMC.resume(checkpoint, kernel, *arguments, disable_progbar=True)


def assert_same(one, other):
    for get in (lambda mcmc: mcmc.get_samples(group_by_chain=True), lambda mcmc: mcmc.sample_stats()):
        a, b = get(one), get(other)
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name].nan_to_num(-1.0), b[name].nan_to_num(-1.0)), name
    for name, value in one.kernel.diagnostics().items():
        assert value == other.kernel.diagnostics()[name], name


def check(tmp_path, make, arguments, at, **options):
    checkpoint = tmp_path / "run.checkpoint"
    kernel = make()
    whole = runner(kernel, **options)
    whole.run(*arguments())
    killed(kernel, arguments(), checkpoint, at, **options)
    again = make()
    again._graphs = kernel._graphs  # traced once for all three runs
    mcmc = resumed(checkpoint, again, arguments())
    assert_same(whole, mcmc)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.checkpoint", "run.checkpoint.draws.safetensors"}, "something is left over"
    return mcmc


SOURCES = {
    "tensors": (regression, rows, {"batch_size": 7}),
    "subsampling plate": (subsampling, rows, {}),
    "loader": (logistic, loader, {}),
    "loader with a generator": (logistic, functools.partial(loader, generator=True), {}),
}


@pytest.mark.parametrize("backend,at", [("handlers", IN_WARMUP), ("handlers", IN_SAMPLING), ("graph", IN_SAMPLING)])
@pytest.mark.parametrize("source", SOURCES)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, source, backend, at):
    model, arguments, options = SOURCES[source]
    check(tmp_path, lambda: ab.SGLD(model, 1e-3, num_steps_per_sample=2, backend=backend, **options), arguments, at)


ANCHOR = {"w": torch.tensor([1.0, 0.1, -0.1]), "b": torch.tensor(0.2)}
KERNELS = {
    "automatic step": lambda **options: ab.SGLD(logistic, **options),
    "SGAdaLD": lambda **options: ab.SGAdaLD(logistic, **options),
    "SGAdaLD with a window": lambda **options: ab.SGAdaLD(logistic, averaging_window=20, clamp=True, **options),
    "SGHMC": lambda **options: ab.SGHMC(logistic, **options),
    "MCLMC": lambda **options: ab.MCLMC(logistic, **options),
    "adaptive SGHMC, noise taken off": lambda **options: ab.SGHMC(logistic, adaptive=True, noise_correction=True, **options),
    "control variate": lambda **options: ab.SGLD(logistic, 1e-3, control_variate=ANCHOR, **options),
    "cycles": lambda **options: ab.SGLD(logistic, Cyclical(1e-3, 6), temperature=lambda step: 1.0 / (1 + step), **options),
    "one chain a call": lambda **options: ab.SGLD(logistic, 1e-3, chunk_size=1, **options),
}


@pytest.mark.parametrize("at", [IN_WARMUP, IN_SAMPLING])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernels_own_variables_go_on(tmp_path, name, at):
    check(tmp_path, lambda: KERNELS[name](batch_size=7, backend="handlers"), rows, at)


@pytest.mark.parametrize("at", [IN_WARMUP, IN_SAMPLING])
def test_an_anchor_and_a_loader_with_its_own_generator_go_on(tmp_path, at):
    make = lambda: ab.SGLD(logistic, 1e-3, control_variate=ANCHOR, backend="handlers")  # noqa: E731
    check(tmp_path, make, functools.partial(loader, generator=True, batch_size=4), at)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draws_in_half_precision_go_on(tmp_path, dtype):
    mcmc = check(tmp_path, lambda: ab.SGLD(logistic, 1e-3, batch_size=7, backend="handlers"), rows, IN_SAMPLING, draws_dtype=dtype)
    assert mcmc.draws_dtype == dtype


def test_a_model_whose_graph_was_given_up_goes_on(tmp_path):
    def counts(x, y):
        w, classes = weights(), len(torch.unique(y))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, float(classes)), obs=y)

    with pytest.warns(UserWarning, match="falls back to 'handlers'"):
        check(tmp_path, lambda: ab.SGLD(counts, 1e-3, batch_size=3, batch_dependent=True), rows, IN_SAMPLING)


def test_a_lost_chain_stays_lost(tmp_path):
    def cliff():
        w = pyro.sample("w", dist.Normal(torch.full((2,), 5.0), 1.0).to_event(1))
        pyro.factor("edge", 1e-3 * (1.5 - w[0]).sqrt())

    start = {"w": torch.tensor([[0.9, 0.0], [-1e4, 0.0]])}
    make = lambda: ab.SGLD(cliff, 0.05, backend="handlers")  # noqa: E731
    mcmc = check(tmp_path, make, lambda: (), IN_SAMPLING, initial_params=start)
    assert mcmc.diagnostics()["lost"]["chain 0"] and mcmc.diagnostics()["divergences"] == {"chain 1": []}


class Called:
    def __call__(self, x, y=None):
        return logistic(x, y)


def shifted(shift, scale, x, y=None):
    return logistic(scale * x + shift, y)


@pytest.mark.parametrize(
    "model,name",
    [
        (poutine.scale(logistic, 0.5), "logistic"),
        (poutine.scale(scale=0.5)(logistic), "logistic"),
        (poutine.mask(poutine.scale(logistic, 0.5), True), "logistic"),
        (functools.partial(shifted, torch.zeros(3), torch.ones(3)), "shifted"),
        (functools.partial(poutine.scale(shifted, 0.5), 0.0, 1.0), "shifted"),
        (Called(), "Called"),
    ],
)
def test_a_model_that_is_no_plain_function_is_known_by_the_name_of_what_it_wraps(tmp_path, model, name):
    mcmc = check(tmp_path, lambda: ab.SGLD(model, 1e-3, batch_size=7, backend="handlers"), rows, IN_SAMPLING)
    assert mcmc._fingerprint()["model"] == name
    with pytest.raises(ValueError, match=f"is of another run: its model is {name}, here it is regression"):
        resumed(tmp_path / "run.checkpoint", ab.SGLD(regression, 1e-3, batch_size=7, backend="handlers"), rows())


def test_a_killed_runs_draws_can_be_read_and_those_after_the_checkpoint_are_drawn_again(tmp_path):
    make = lambda: ab.SGLD(logistic, 1e-3, batch_size=7, backend="handlers")  # noqa: E731
    whole, checkpoint = runner(make()), tmp_path / "run.checkpoint"
    whole.run(X, Y)
    killed(make(), (X, Y), checkpoint, IN_SAMPLING)
    left = read_draws(tmp_path / "run.checkpoint.draws.safetensors")["w"]
    assert left.shape == (2, IN_SAMPLING - WARMUP, 3)
    assert torch.equal(left, whole.get_samples(group_by_chain=True)["w"][:, : left.shape[1]])
    seen = []
    pyro.set_rng_seed(1)
    hook = lambda kernel, params, stage, i: seen.append((stage, i))  # noqa: E731
    ab.SGMCMC.resume(checkpoint, make(), X, Y, hook_fn=hook, disable_progbar=True)
    first = IN_SAMPLING // EVERY * EVERY - WARMUP
    assert seen == [("Sample", i) for i in range(first, SAMPLES)]


def test_a_run_killed_twice_goes_on_twice(tmp_path):
    make = lambda: ab.SGAdaLD(logistic, batch_size=7, backend="handlers")  # noqa: E731
    whole, checkpoint = runner(make()), tmp_path / "run.checkpoint"
    whole.run(X, Y)
    killed(make(), (X, Y), checkpoint, IN_WARMUP)

    def stop(kernel, params, stage, i):
        if kernel.chains.counts.samples == IN_SAMPLING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ab.SGMCMC.resume(checkpoint, make(), X, Y, hook_fn=stop, disable_progbar=True)
    assert_same(whole, resumed(checkpoint, make(), (X, Y)))


def test_a_finished_run_is_read_back(tmp_path):
    make = lambda: ab.SGLD(logistic, 1e-3, batch_size=7, backend="handlers")  # noqa: E731
    whole = runner(make(), checkpoint=tmp_path / "run.checkpoint")
    whole.run(X, Y)
    assert_same(whole, resumed(tmp_path / "run.checkpoint", make(), (X, Y)))


def test_checkpoint_and_draws_may_move_together(tmp_path):
    make = lambda: ab.SGLD(logistic, 1e-3, batch_size=7, backend="handlers")  # noqa: E731
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    whole = runner(make(), checkpoint=before / "run.checkpoint", draws=before / "samples")
    whole.run(X, Y)
    expected = whole.get_samples()["w"].clone()
    shutil.move(before, after)
    assert torch.equal(resumed(after / "run.checkpoint", make(), (X, Y)).get_samples()["w"], expected)


FRESH = """
import os, signal, sys
import pyro
import pyro_advbayes as ab
from tests.small_models import data, logistic

def hook(kernel, params, stage, i):
    if kernel.chains.counts.samples == 7:
        os.kill(os.getpid(), signal.SIGKILL)

pyro.set_rng_seed(3)
kernel = ab.SGLD(logistic, 1e-3, batch_size=7, backend=sys.argv[2])
options = dict(checkpoint=sys.argv[1], checkpoint_every=4, hook_fn=hook, disable_progbar=True)
ab.SGMCMC(kernel, 11, 0, 2, **options).run(*data())
"""


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_that_was_killed_in_another_interpreter_goes_on_bit_for_bit(tmp_path, recwarn):
    make = lambda: ab.SGLD(logistic, 1e-3, batch_size=7, backend="compile")  # noqa: E731
    checkpoint = tmp_path / "run.checkpoint"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", FRESH, str(checkpoint), "compile"], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pyro.set_rng_seed(3)
    whole, again = ab.SGMCMC(make(), SAMPLES, 0, 2, disable_progbar=True), make()  # no warm-up: half the compiling
    whole.run(X, Y)
    again._graphs = whole.kernel._graphs
    assert_same(whole, resumed(checkpoint, again, (X, Y)))
    assert whole.kernel.potential.backend == "compile" and not [w for w in recwarn if "falls back" in str(w.message)]


# --------------------------------------------------------------------------------------------------- what is not the same run


def sgld(model=logistic, step_size=1e-3, batch_size=7, backend="handlers", **options):
    return ab.SGLD(model, step_size, batch_size=batch_size, backend=backend, **options)


def other_site(x, y):
    logits = x @ weights() + pyro.sample("bias", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)


def renamed(model):
    model.__qualname__ = logistic.__qualname__
    return model


def with_prior(scale):
    def model(x, y):
        logits = x @ weights() + pyro.sample("b", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=logits), obs=y)

    return renamed(model)


def with_likelihood(x, y):
    logits = x @ weights() + pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(logits, 1.0), obs=y)


def nudged(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] += 1e-6
    return tensor


def flipped(tensor):
    tensor = tensor.clone()
    tensor[33] = 1 - tensor[33]
    return tensor


@pytest.fixture
def finished(tmp_path):
    """The files of a run, and a function that wants them refused and left as they are."""

    def finished(make, arguments):
        checkpoint = tmp_path / "run.checkpoint"
        mcmc = runner(make(), checkpoint=checkpoint)
        mcmc.run(*arguments)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert len(before) == 2

        def refused(kernel, arguments, says, error=ValueError):
            with pytest.raises(error) as caught:
                ab.SGMCMC.resume(checkpoint, kernel, *arguments, disable_progbar=True)
            message = str(caught.value)
            assert "\n" not in message and all(part in message for part in says), message
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before, "a file was written to"

        return refused

    return finished


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda: sgld(regression), ["run.checkpoint is of another run", "model", "regression"]),
        (lambda: sgld(renamed(other_site)), ["another run", "sites", "'bias'"]),
        (lambda: sgld(with_prior(2.0)), ["another model", "['b', 'w']", "energy", "prior or likelihood"]),
        (lambda: sgld(with_prior(1.001)), ["another model", "energy"]),
        (lambda: sgld(renamed(with_likelihood)), ["another model", "energy"]),
        (lambda: ab.SGHMC(logistic, 1e-3, batch_size=7, backend="handlers"), ["another run", "kernel", "SGHMC"]),
        (lambda: sgld(step_size=1.1e-3), ["another run", "step_size"]),
        (lambda: sgld(step_size="auto"), ["another run", "settings", "AutoStepSize"]),
        (lambda: sgld(temperature=0.5), ["another run", "temperature"]),
        (lambda: sgld(batch_size=8), ["another run", "batch_size"]),
        (lambda: sgld(num_steps_per_sample=2), ["another run", "num_steps_per_sample"]),
        (lambda: sgld(control_variate=ANCHOR), ["another run", "control_variate"]),
        (lambda: sgld(backend="graph"), ["another run", "backend", "'graph'"]),
        (lambda: sgld(chunk_size=1), ["another run", "backend", "1]"]),
    ],
)
def test_another_model_kernel_or_setting_is_refused(finished, make, says):
    finished(sgld, (X, Y))(make(), (X, Y), says)


@pytest.mark.parametrize(
    "arguments",
    [(nudged(X), Y), (X, flipped(Y)), (X[:-1], Y[:-1]), (X.flip(0), Y.flip(0)), (X, Y.double())],
    ids=["one number", "one label", "fewer rows", "another order", "another dtype"],
)
def test_other_data_is_refused(finished, arguments):
    finished(sgld, (X, Y))(sgld(), arguments, ["run.checkpoint is of another run", "data"])


def test_one_value_among_many_is_other_data(finished):
    x = torch.arange(20_000.0).reshape(-1, 1) / 20_000.0

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=x[:, 0])

    other = x.clone()
    other[12_347] += 1e-3
    finished(lambda: sgld(model, 1e-6), (x,))(sgld(model, 1e-6), (other,), ["another run", "data"])


@pytest.mark.parametrize("step_size", [lambda step: 2e-3 / (1 + step), lambda step: 1e-3 / (1 + 1.01 * step)])
def test_another_function_of_the_same_name_is_another_schedule(finished, step_size):
    refused = finished(lambda: sgld(step_size=lambda step: 1e-3 / (1 + step)), (X, Y))
    refused(sgld(step_size=step_size), (X, Y), ["another run", "step_size"])


@pytest.mark.parametrize(
    "rule",
    [{"friction": 0.1}, {"adaptive": True}, {"noise_correction": True}, {"averaging_window": 5}],
    ids=lambda rule: next(iter(rule)),
)
def test_another_rule_is_refused(finished, rule):
    make = functools.partial(ab.SGHMC, logistic, 1e-3, batch_size=7, backend="handlers")
    finished(make, (X, Y))(make(**rule), (X, Y), ["another run", "settings", next(iter(rule))])


class Decay:
    def __init__(self, start):
        self.start = start

    def __call__(self, step, power=0.55):
        return self.start * (1 + step) ** -power


def decay(step, start):
    return start / (1 + step)


@pytest.mark.parametrize(
    "make,name",
    [
        (Decay, "Decay"),
        (lambda start: functools.partial(Decay(start), power=0.6), "Decay"),
        (lambda start: functools.partial(decay, start=start), "decay"),
        (lambda start: Decay(start).__call__, "Decay.__call__"),
    ],
    ids=["object", "partial of an object", "partial", "method"],
)
def test_a_schedule_is_known_by_its_name_and_values_and_not_by_its_address(tmp_path, make, name):
    checkpoint, first = tmp_path / "run.checkpoint", sgld(step_size=make(1e-3), temperature=make(1.0))
    whole = runner(first, checkpoint=checkpoint)
    whole.run(X, Y)
    assert first.settings()["step_size"] == first.settings()["temperature"] == name
    assert_same(whole, resumed(checkpoint, sgld(step_size=make(1e-3), temperature=make(1.0)), (X, Y)))
    for other in ({"step_size": make(1.1e-3), "temperature": make(1.0)}, {"step_size": make(1e-3), "temperature": make(0.9)}):
        with pytest.raises(ValueError, match=r"is of another run: its (step_size|temperature) is"):
            resumed(checkpoint, sgld(**other), (X, Y))


def test_another_anchor_is_refused(finished):
    other = {**ANCHOR, "b": torch.tensor(0.3)}
    refused = finished(lambda: sgld(control_variate=ANCHOR), (X, Y))
    refused(sgld(control_variate=other), (X, Y), ["control_variate", "other values"])


@pytest.mark.parametrize(
    "arguments",
    [loader(batch_size=10), loader(batch_size=20, shuffle=False), loader(batch_size=20, labels=flipped(Y)), (X, Y)],
    ids=["batch size", "order", "labels", "tensors"],
)
def test_another_loader_is_refused(finished, arguments):
    refused = finished(lambda: sgld(batch_size=None), loader(batch_size=20))
    refused(sgld(batch_size=None), arguments, ["run.checkpoint is of another run", "data"])


def test_another_plain_argument_is_refused(finished):
    def model(x, y, strength):
        w = weights() * strength
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)

    finished(lambda: sgld(model), (X, Y, 1.0))(sgld(model), (X, Y, 1.1), ["another model", "energy"])


def test_other_threads_are_worth_a_warning(tmp_path, monkeypatch):
    runner(sgld(), checkpoint=tmp_path / "run.checkpoint").run(X, Y)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.warns(UserWarning, match="written with threads=.*here it is 64: results may differ in the last bits"):
        resumed(tmp_path / "run.checkpoint", sgld(), (X, Y))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path):
    path.write_bytes(random.Random(0).randbytes(len(path.read_bytes())))


@pytest.mark.parametrize("spoil", [truncate, scramble])
def test_a_corrupt_checkpoint_is_refused_and_left_as_it_is(tmp_path, spoil):
    checkpoint = tmp_path / "run.checkpoint"
    runner(sgld(), checkpoint=checkpoint).run(X, Y)
    spoil(checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"run\.checkpoint is truncated, or no file of this package"):
        resumed(checkpoint, sgld(), (X, Y))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_nothing(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    runner(sgld(), checkpoint=checkpoint).run(X, Y)
    whole, generator = checkpoint.read_bytes(), random.Random(0)
    good = repr(files.load(checkpoint, "checkpoint of SGMCMC"))
    for _ in range(60):
        corrupt = bytearray(whole)
        corrupt[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        checkpoint.write_bytes(corrupt)
        with contextlib.suppress(ValueError):
            assert repr(files.load(checkpoint, "checkpoint of SGMCMC")) == good


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "run.checkpoint"
    for kind in ("checkpoint of APD", "values"):
        files.save(path, {"settings": {}}, kind)
        with pytest.raises(ValueError, match=f"run.checkpoint is no checkpoint of SGMCMC: it is a file of kind '{kind}'"):
            resumed(path, sgld(), (X, Y))


@pytest.mark.parametrize(
    "place,value",
    [
        ((), [1, 2]),
        (("runner",), [1, 2]),
        (("runner",), None),
        (("runner", "num_chains"), 10**12),
        (("runner", "num_chains"), -1),
        (("runner", "num_samples"), -3),
        (("runner", "num_samples"), 10**12),
        (("runner", "num_samples"), [11]),
        (("runner", "warmup_steps"), 10**12),
        (("runner", "checkpoint_every"), 0),
        (("runner", "draws_dtype"), "nonsense"),
        (("runner", "draws"), 3),
        (("kernel",), {}),
        (("kernel", "theta"), torch.zeros(2, 10)),
        (("kernel", "theta"), [0.0, 1.0]),
        (("kernel", "alive"), None),
        (("kernel", "counts"), [1]),
        (("kernel", "counts"), [-5, -5]),
        (("kernel", "counts"), [10**9, 10**9]),
        (("kernel", "info"), None),
        (("kernel", "batches"), None),
        (("kernel", "random"), {}),
        (("energy",), torch.zeros(0)),
        (("energy",), None),
        (("fingerprint",), {}),
        (("fingerprint", "sites"), []),
    ],
)
def test_a_senseless_field_is_refused_by_name_within_a_second(tmp_path, place, value):
    """The file's digest is right: somebody wrote it so."""
    checkpoint = tmp_path / "run.checkpoint"
    ab.SGMCMC(sgld(), 2, 1, 2, disable_progbar=True, checkpoint=checkpoint).run(X, Y)
    content = holder = files.load(checkpoint, "checkpoint of SGMCMC")
    for name in place[:-1]:
        holder = holder[name]
    if place:
        holder[place[-1]] = value
    files.save(checkpoint, content if place else value, "checkpoint of SGMCMC")
    start = time.process_time()
    with pytest.raises(ValueError, match=r"run\.checkpoint"):
        resumed(checkpoint, sgld(), (X, Y))
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("spoil,error", [(truncate, ValueError), (scramble, ValueError), (Path.unlink, FileNotFoundError)])
def test_corrupt_or_missing_draws_are_refused_and_the_checkpoint_stays(tmp_path, spoil, error):
    checkpoint, draws = tmp_path / "run.checkpoint", tmp_path / "run.checkpoint.draws.safetensors"
    runner(sgld(), checkpoint=checkpoint).run(X, Y)
    spoil(draws)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error, match=r"run\.checkpoint\.draws\.safetensors"):
        resumed(checkpoint, sgld(), (X, Y))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_draws_are_no_checkpoint_and_a_missing_one_is_missed_by_name(tmp_path):
    runner(sgld(), checkpoint=tmp_path / "run.checkpoint").run(X, Y)
    with pytest.raises(ValueError, match=r"draws\.safetensors is (truncated, or no file of this package|no checkpoint of SGMCMC)"):
        resumed(tmp_path / "run.checkpoint.draws.safetensors", sgld(), (X, Y))
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file"):
        resumed(tmp_path / "nowhere", sgld(), (X, Y))


# ------------------------------------------------------------------------------------------------------- files that are there


@pytest.mark.parametrize("there", ["run.checkpoint", "run.checkpoint.draws.safetensors", "samples"])
def test_an_existing_file_is_not_overwritten_without_being_asked(tmp_path, monkeypatch, there):
    path = tmp_path / there
    path.write_bytes(b"precious")
    options = {"checkpoint": tmp_path / "run.checkpoint"} if there != "samples" else {"draws": path}
    with monkeypatch.context() as patch:
        patch.setattr(ab.SGLD, "setup_chains", lambda *_: pytest.fail("the model was looked at first"))
        with pytest.raises(FileExistsError, match=f"{there} exists: .*overwrite=True"):
            runner(sgld(), **options).run(X, Y)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(there, b"precious")]
    runner(sgld(), overwrite=True, **options).run(X, Y)
    assert path.read_bytes() != b"precious" and not list(tmp_path.glob("*.part"))


def test_a_run_killed_before_its_first_checkpoint_is_not_resumed_from_that_of_the_run_it_overwrote(tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    runner(sgld(), checkpoint=checkpoint).run(X, Y)
    killed(sgld(), (X, Y), checkpoint, EVERY - 1, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"run\.checkpoint: there is no such file"):
        resumed(checkpoint, sgld(), (X, Y))


def test_a_checkpoint_beside_fewer_draws_than_it_was_written_after_is_refused(tmp_path):
    checkpoint, draws = tmp_path / "run.checkpoint", tmp_path / "run.checkpoint.draws.safetensors"
    runner(sgld(), checkpoint=checkpoint).run(X, Y)

    def stop(kernel, params, stage, i):
        if kernel.chains.counts.samples == IN_SAMPLING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner(sgld(), draws=draws, overwrite=True, hook_fn=stop).run(X, Y)
    before = draws.read_bytes()
    with pytest.raises(ValueError, match=f"holds {IN_SAMPLING - WARMUP} draws, where the checkpoint was written after {SAMPLES}"):
        resumed(checkpoint, sgld(), (X, Y))
    assert draws.read_bytes() == before


def test_a_run_that_is_refused_leaves_existing_files_alone(tmp_path):
    for name in ("run.checkpoint", "run.checkpoint.draws.safetensors"):
        (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(ValueError, match="batch_size=0"):
        runner(sgld(batch_size=0), checkpoint=tmp_path / "run.checkpoint", overwrite=True).run(X, Y)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"precious"}


def test_a_folder_that_is_not_there_is_missed_before_sampling(tmp_path):
    for options in ({"checkpoint": tmp_path / "no" / "run"}, {"draws": tmp_path / "no" / "samples"}):
        with pytest.raises(FileNotFoundError, match=r"the folder .*no does not exist"):
            runner(sgld(), **options).run(X, Y)


@pytest.mark.parametrize("spelling", ["run", "folder/../run", "link", "linked/run"])
def test_checkpoint_and_draws_are_two_files_however_they_are_spelt(tmp_path, spelling):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is the path of the checkpoint too"):
        runner(sgld(), checkpoint=tmp_path / "run", draws=tmp_path / spelling)


def test_a_link_made_later_makes_no_one_file_of_two(tmp_path):
    (tmp_path / "other").write_bytes(b"precious")
    mcmc = runner(sgld(), checkpoint=tmp_path / "run", draws=tmp_path / "link", overwrite=True)
    (tmp_path / "run").touch()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="is the path of the checkpoint too"):
        mcmc.run(X, Y)


def test_a_run_on_the_files_of_another_is_refused_before_the_model_is_looked_at(tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.checkpoint"
    seen = []

    def hook(kernel, params, stage, i):
        if kernel.chains.counts.samples != IN_SAMPLING:
            return
        random = files.random_state(X.device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ab.SGLD, "setup_chains", lambda *_: pytest.fail("the model was looked at first"))
            with pytest.raises(RuntimeError, match=r"run\.checkpoint\.draws\.safetensors is in use") as caught:
                runner(sgld(), checkpoint=checkpoint, overwrite=True).run(X, Y)
        seen.append(caught.value)
        assert checkpoint.exists()
        with pytest.raises(RuntimeError, match="is in use"):
            resumed(checkpoint, sgld(), (X, Y))
        files.set_random_state(random, X.device)

    mcmc = runner(sgld(), checkpoint=checkpoint, checkpoint_every=EVERY, hook_fn=hook)
    mcmc.run(X, Y)
    whole = runner(sgld())
    whole.run(X, Y)
    assert seen
    assert_same(whole, mcmc)
    assert_same(whole, resumed(checkpoint, sgld(), (X, Y)))


@pytest.mark.parametrize("which", ["checkpoint", "draws"])
def test_a_path_that_is_no_files_is_refused_before_the_model_is_looked_at(tmp_path, monkeypatch, which):
    monkeypatch.setattr(ab.SGLD, "setup_chains", lambda *_: pytest.fail("the model was looked at first"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, says in (("folder", "is a directory"), ("link", "is a link to"), ("n\udcff", "no UTF-8")):
        with pytest.raises(ValueError, match=says):
            runner(sgld(), overwrite=True, **{which: tmp_path / name}).run(X, Y)


@pytest.mark.parametrize(
    "checkpoint,draws",
    [("run.safetensors", "run.draws.safetensors"), ("lr0.1", "lr0.1.draws.safetensors"), ("lr0.2", "lr0.2.draws.safetensors")],
)
def test_every_checkpoint_has_a_file_of_draws_of_its_own(tmp_path, checkpoint, draws):
    assert runner(sgld(), checkpoint=tmp_path / checkpoint).draws_path == tmp_path / draws


def test_a_checkpoint_changes_no_sample(tmp_path):
    plain = runner(sgld())
    plain.run(X, Y)
    saved = runner(sgld(), checkpoint=tmp_path / "run.checkpoint", checkpoint_every=1)
    saved.run(X, Y)
    assert_same(plain, saved)

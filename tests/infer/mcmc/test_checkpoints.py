"""A checkpoint is one run's, and is of use to nobody else; what is senseless in it is refused by name, at once and in little memory."""

from __future__ import annotations

import os
import resource
import time
import warnings

import pyro
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes.infer.autoguide.generators import MLPGenerator
from pyro_advbayes.infer.autoguide.implicit import AutoImplicit
from pyro_advbayes.infer.distill.apd import APD
from pyro_advbayes.infer.distill.online import OnlineAPD
from pyro_advbayes.storage import files
from tests.infer import test_active
from tests.small_models import data, logistic

X, Y = data()
W = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
SAMPLES = {"w": W, "b": W[:, 0] + W[:, 1]}
ONLINE = {"buffer": 40, "num_samples": 20, "warmup_steps": 5, "num_chains": 2, "batch_size": 20, "num_steps": 20, "check_every": 10}


def sgld():
    return ab.SGLD(logistic, 1e-2, batch_size=20, backend="handlers")


def guide():
    return AutoImplicit(logistic, MLPGenerator(noise=4, hidden=(8,)))


def fit(x, y):
    return test_active.Centroids(x, y)


def learn(path, num_rounds=2):
    return ab.active_learning(fit, test_active.blobs(), test_active.blobs(40), num_rounds=num_rounds, per_round=3, path=path)


def sample(path):
    ab.SGMCMC(sgld(), 4, 2, 2, checkpoint=path, checkpoint_every=2, disable_progbar=True).run(X, Y)


WRITERS = {  # how a run of each kind begins, how it is resumed, and what its file is
    "SGMCMC": (sample, lambda path: ab.SGMCMC.resume(path, sgld(), X, Y, disable_progbar=True), "checkpoint of SGMCMC"),
    "APD": (
        lambda path: APD(guide(), batch_size=40, num_steps=20, check_every=10, checkpoint=path, checkpoint_every=5).fit(SAMPLES),
        lambda path: APD.resume(path, guide(), SAMPLES),
        "checkpoint of APD",
    ),
    "OnlineAPD": (
        lambda path: OnlineAPD(guide(), sgld(), checkpoint=path, checkpoint_every=5, **ONLINE).run(X, Y),
        lambda path: OnlineAPD.resume(path, guide(), sgld(), X, Y),
        "checkpoint of OnlineAPD",
    ),
    "active learning": (learn, lambda path: learn(path, num_rounds=3), "run of active_learning"),
}


def automatic():
    return ab.SGLD(logistic, batch_size=20, backend="handlers")


def sample_automatic(path):
    ab.SGMCMC(automatic(), 4, 8, 6, checkpoint=path, checkpoint_every=3, disable_progbar=True).run(X, Y)


def write_guide(path):
    made = guide()
    APD(made, batch_size=40, num_steps=2, check_every=None).fit(SAMPLES)
    made.save(path)


FILES = WRITERS | {
    "automatic step": (
        sample_automatic,
        lambda path: ab.SGMCMC.resume(path, automatic(), X, Y, disable_progbar=True),
        "checkpoint of SGMCMC",
    ),
    "guide": (write_guide, lambda path: AutoImplicit.load(path, logistic), "file of AutoImplicit"),
}
pytestmark = pytest.mark.filterwarnings("ignore")


# --------------------------------------------------------------------------------------------------------- one file, one run


@pytest.mark.parametrize("writer", WRITERS)
def test_a_checkpoint_is_locked_as_long_as_its_run_goes_on(tmp_path, monkeypatch, writer):
    """By every kind of run, from its first checkpoint on."""
    begin, resume, _ = WRITERS[writer]
    path, other, save, seen = tmp_path / "run", tmp_path / "other", files.save, []

    def saving(where, *arguments):
        save(where, *arguments)
        if where == path:
            with pytest.raises(RuntimeError, match=r"run is in use: another run writes to it"):
                resume(path)
            with pytest.raises(RuntimeError, match=r"run is in use: another run writes to it"):
                save(path, {}, "values")
            seen.append(where)

    monkeypatch.setattr(files, "save", saving)
    begin(path)
    assert len(seen) >= 2
    seen.clear()
    resume(path)  # its run has ended
    begin(other)
    names = {entry.name.removesuffix(".draws.safetensors") for entry in tmp_path.iterdir()}
    assert names == {"run", "other"}, "nothing is left over"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_run_that_failed_or_was_refused_holds_no_checkpoint(tmp_path, monkeypatch, writer):
    begin, resume, kind = WRITERS[writer]
    path, save, saved = tmp_path / "run", files.save, []

    def stop(*arguments):
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "save", stop)
        begin(path)
    before = path.read_bytes()
    content = files.load(path, kind)
    files.save(path, {**content, "fingerprint": {}, "settings": {}}, kind)
    with pytest.raises(ValueError, match="run"):
        resume(path)
    path.write_bytes(before)
    resume(path)


def test_two_runs_with_files_of_their_own_for_draws_do_not_share_a_checkpoint(tmp_path):
    path, found = tmp_path / "run", []

    def other(kernel, params, stage, i):
        if (stage, i) == ("Sample", 2):
            for overwrite in (True, False):
                mcmc = ab.SGMCMC(sgld(), 4, 2, 2, checkpoint=path, draws=tmp_path / "draws", overwrite=overwrite, disable_progbar=True)
                with pytest.raises((RuntimeError, FileExistsError)) as caught:
                    mcmc.run(X, Y)
                found.append(str(caught.value))

    ab.SGMCMC(sgld(), 4, 2, 2, checkpoint=path, checkpoint_every=2, hook_fn=other, disable_progbar=True).run(X, Y)
    assert "is in use" in found[0] and "exists" in found[1] and not (tmp_path / "draws").exists()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_second_run_is_refused_at_once_before_the_first_has_written_a_checkpoint(tmp_path, monkeypatch, writer):
    begin, resume, _ = WRITERS[writer]
    path, found, save = tmp_path / "run", [], files.Held.save

    def saving(held, *arguments):
        if not found:
            assert not path.exists()
            (left,) = tmp_path.glob("run.*.part")
            found.append(left)
            for _ in range(2):  # the first refusal must not free the path
                with pytest.raises(RuntimeError, match="run is in use: another run writes to it"), files.Held(path):
                    pass
            assert set(tmp_path.glob("run.*.part")) == {left}
        save(held, *arguments)
        assert not found[0].exists()

    monkeypatch.setattr(files.Held, "save", saving)
    begin(path)
    assert found
    resume(path)


def test_a_second_run_is_refused_while_the_first_overwrites_an_old_checkpoint(tmp_path):
    path, found = tmp_path / "run", []
    sample(path)

    def second(kernel, params, stage, i):
        if stage == "Warmup":
            assert not path.exists()
            with pytest.raises(RuntimeError, match="run is in use"):
                ab.SGMCMC(sgld(), 4, 2, 2, checkpoint=path, draws=tmp_path / "draws", disable_progbar=True).run(X, Y)
            found.append(i)

    ab.SGMCMC(sgld(), 4, 2, 2, checkpoint=path, hook_fn=second, overwrite=True, disable_progbar=True).run(X, Y)
    assert found == [0, 1]
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "run.draws.safetensors"}


def test_a_run_killed_before_its_first_checkpoint_holds_nothing(tmp_path):
    pid = os.fork()
    if pid == 0:
        with files.Held(tmp_path / "run"):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".part"]
    with files.Held(tmp_path / "run") as held:
        held.save({"value": 1}, "values")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_a_file_that_is_replaced_while_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    """A lock on a file that is no longer at the path protects nothing."""
    path, lock, replaced = tmp_path / "run", files.try_lock, []

    def late(file):
        if not replaced:
            replaced.append(1)
            (tmp_path / "new").write_bytes(b"new")
            os.replace(tmp_path / "new", path)
        return lock(file)

    path.write_bytes(b"old")
    monkeypatch.setattr(files, "try_lock", late)
    with files.Held(path), pytest.raises(RuntimeError, match="in use"), files.unused(path):
        pass


def test_a_missing_run_is_not_resumed_and_leaves_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ab.SGMCMC.resume(tmp_path / "nowhere" / "run", sgld(), X, Y)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ab.SGMCMC.resume(tmp_path / "run", sgld(), X, Y)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_frees_its_checkpoint_even_if_a_process_that_it_forked_lives_on(tmp_path):
    ready, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.Held(tmp_path / "run") as held:
            held.save({"value": 1}, "values")
            child = os.fork()
            if child:
                os.write(write, b"%d" % child)
            time.sleep(60)
            os._exit(0)
    child = int(os.read(ready, 20))
    try:
        with pytest.raises(RuntimeError, match="in use"), files.Held(tmp_path / "run"):
            pass
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        with files.Held(tmp_path / "run"):
            assert files.load(tmp_path / "run") == {"value": 1}
    finally:
        os.kill(child, 9)


# ---------------------------------------------------------------------------------------------------- the generator's network


class Net(torch.nn.Sequential):
    noise = 4


def network_guide(activation):
    torch.manual_seed(0)
    return AutoImplicit(logistic, Net(torch.nn.Linear(4, 8), activation, torch.nn.Linear(8, 4)))


def check_activation(resume):
    """Refused with another activation, resumed with the same one."""
    for activation in (torch.nn.Tanh(), torch.nn.LeakyReLU(0.1)):
        with pytest.raises(ValueError, match="its generator computes other numbers from the same inputs"):
            resume(network_guide(activation))
    resume(network_guide(torch.nn.ReLU()))


def test_a_fit_is_not_resumed_with_a_network_of_another_activation(tmp_path):
    path = tmp_path / "run"
    options = {"batch_size": 40, "num_steps": 20, "check_every": 10, "checkpoint": path, "checkpoint_every": 5}
    APD(network_guide(torch.nn.ReLU()), **options).fit(SAMPLES)
    check_activation(lambda guide: APD.resume(path, guide, SAMPLES))


@pytest.mark.parametrize("every", [5, 100], ids=["before it learns", "learning"])
def test_an_online_fit_is_not_resumed_with_a_network_of_another_activation(tmp_path, monkeypatch, every):
    path, save = tmp_path / "run", files.Held.save

    def stop(held, *arguments):
        save(held, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.Held, "save", stop)
        OnlineAPD(network_guide(torch.nn.ReLU()), sgld(), checkpoint=path, checkpoint_every=every, **ONLINE | {"num_steps": 200}).run(X, Y)
    check_activation(lambda guide: OnlineAPD.resume(path, guide, sgld(), X, Y))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_guide_is_not_loaded_with_a_network_of_another_activation(tmp_path, dtype):
    path, fitted = tmp_path / "guide", network_guide(torch.nn.ReLU())
    APD(fitted, batch_size=40, num_steps=2).fit(SAMPLES)
    fitted.save(path, dtype=dtype)
    check_activation(lambda guide: AutoImplicit.load(path, logistic, dict(guide.named_children())["generator"].network))


# ---------------------------------------------------------------------------------------------------------- senseless fields


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Of one file of each kind, and the file."""
    found = {}
    for writer, (begin, _, kind) in FILES.items():
        path = tmp_path_factory.mktemp(writer) / "run"
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begin(path)
        found[writer] = path, files.load(path, kind), path.read_bytes()
    return found


def placed(content, place, value):
    """The content with another value in one place."""
    if not place:
        return value
    name, *rest = place
    if isinstance(content, dict):
        return {**content, name: placed(content.get(name), rest, value)}
    return type(content)([*content[:name], placed(content[name], rest, value), *content[name + 1 :]])


NAN = torch.full((), torch.nan)
HUGE = 10**12
SENSELESS = [
    *[(writer, (), value) for writer in WRITERS for value in ([], {})],
    *[(writer, ("random",), value) for writer in ("APD", "OnlineAPD", "active learning") for value in ({}, None)],
    *[
        ("APD", place, value)
        for place, value in (
            (("settings",), []),
            (("settings", "num_steps"), -1),
            (("settings", "nonsense"), 1),
            (("settings", "batch_size"), HUGE),
            (("every",), 0),
            (("every",), -1),
            (("every",), "x"),
            (("fingerprint",), {}),
            (("reference",), {}),
            (("reference", "generator"), NAN),
            (("training",), {}),
            (("training", "steps"), -1),
            (("training", "steps"), HUGE),
            (("training", "steps"), "x"),
            (("training", "generator"), {}),
            (("training", "average"), []),
            (("training", "optimizers"), []),
            (("training", "average", 0), NAN),
            (("training", "average", 0), torch.zeros(3)),
            (("stopping",), {}),
            (("stopping",), None),
            (("stopping", "distances"), "x"),
            (("stopping", "since_best"), -1),
            (("stopping", "threshold"), None),
            (("stopping", "nonsense"), 1),
        )
    ],
    *[
        ("OnlineAPD", place, value)
        for place, value in (
            (("run",), []),
            (("run", "buffer"), HUGE),
            (("run", "buffer"), -1),
            (("run", "num_chains"), HUGE),
            (("run", "num_samples"), HUGE),
            (("run", "num_samples"), 21),
            (("generator reference",), {}),
            (("run", "warmup_steps"), HUGE),
            (("run", "checkpoint_every"), 0),
            (("run", "nonsense"), 1),
            (("settings", "batch_size"), HUGE),
            (("fingerprint",), {}),
            (("reference",), {}),
            (("energy",), None),
            (("kernel",), {}),
            (("kernel", "theta"), torch.zeros(2, 9)),
            (("reservoir",), {}),
            (("reservoir", "rows"), torch.zeros(9, 9)),
            (("reservoir", "rows"), None),
            (("reservoir", "seen"), -1),
            (("reservoir", "seen"), HUGE),
            (("reservoir", "seen"), None),
            (("progress",), {}),
            (("progress", "samples"), -1),
            (("progress", "samples"), HUGE),
            (("progress", "next_look"), -1),
            (("progress", "last"), HUGE),
            (("progress", "steps"), "x"),
            (("training",), []),
            (("training",), {}),
            (("stopping",), []),
        )
    ],
    ("APD", ("fingerprint", "sites", 0, 1, 0), torch.zeros(3, 3)),
    ("OnlineAPD", ("kernel", "theta"), NAN),
    *[
        ("active learning", place, value)
        for place, value in (
            (("settings",), []),
            (("settings", "per_round"), HUGE),
            (("settings", "per_round"), torch.zeros(3, 3)),
            (("settings", "test", 0), torch.zeros(3, 3)),
            (("labelled",), None),
            (("labelled",), torch.zeros(4)),
            (("labelled",), torch.full((10,), HUGE)),
            (("labelled",), torch.full((10,), -1)),
            (("labelled",), torch.zeros(10, dtype=torch.long)),
            (("labelled",), torch.arange(5)),
            (("labelled",), torch.zeros(2, 5, dtype=torch.long)),
            (("accuracies",), []),
            (("accuracies",), [0.5] * 1000),
            (("accuracies", 0), "x"),
            (("accuracies", 0), None),
            (("accuracies", 0), 7.0),
            (("fit",), []),
            (("fit",), {}),
            (("fit", "Python"), 3),
        )
    ],
]


@pytest.mark.parametrize(("writer", "place", "value"), SENSELESS)
def test_what_is_senseless_is_refused_by_name_at_once(contents, writer, place, value):
    """The file's digest is right: somebody wrote it so."""
    (path, content, good), (_, resume, kind) = contents[writer], WRITERS[writer]
    files.save(path, placed(content, place, value), kind)
    start = time.process_time()
    try:
        with pytest.raises(ValueError, match="run"):
            resume(path)
        assert time.process_time() - start < 1.0
    finally:
        path.write_bytes(good)


ADAM = ("training", "optimizers", 0)
NAMED = [  # the last name of the place is in the message
    *[
        ("SGMCMC", ("kernel", "effective"), value)
        for value in (True, HUGE, "x", [], {}, NAN, torch.zeros(3), torch.zeros(3, 4), torch.zeros(4).int())
    ],
    *[
        ("SGMCMC", ("kernel", *place), value)
        for place, value in (
            (("auto",), 1.0),
            (("auto",), [1.0]),
            (("hottest",), "x"),
            (("hottest",), True),
            (("coldest",), 1),
            (("coldest",), {"w": torch.zeros(3, 3)}),
            (("clamped",), -1),
            (("clamped",), 2.0),
            (("settled",), 0.5),
            (("info",), []),
            (("info", "step_size"), []),
            (("info", "energy"), [1]),
            (("info", "gradient_norm"), torch.zeros(3)),
            (("variables",), []),
            (("variables",), {"x": torch.zeros(2, 4)}),
            (("divergences",), [-1, []]),
            (("divergences",), [[0.5], []]),
            (("divergences",), [[-1], []]),
            (("restarts",), 1),
            (("restarts",), [[0, 0]]),
            (("noise",), {}),
            (("steepest",), [torch.zeros(3), None]),
            (("steepest",), [None, torch.zeros(2, 5)]),
            (("steepest",), ["x", None]),
            (("batches", "seed"), [1]),
            (("batches", "seed"), -1),
            (("batches", "position"), "x"),
        )
    ],
    *[("automatic step", ("kernel", "auto"), value) for value in (None, HUGE, {}, [], [0.1] * 7, "x")],
    *[
        ("automatic step", ("kernel", "auto", place), value)
        for place, values in enumerate(
            [
                ["x", -1.0, 0.0, float("nan"), float("inf"), NAN, True, []],  # value
                ["x", -1.0, float("nan"), []],  # curvature
                [-1, 0.5, None],  # measured
                ["x", 0.0, float("nan")],  # ceiling
                ["x", -1.0],  # warm_value
                [0.5, None],  # growing
                [-0.1, 2.0, None],  # measured_at
                [[], {"0, 0": 1.0}, {"0, 0": torch.zeros(3)}],  # directions
            ]
        )
        for value in values
    ],
    *[
        ("OnlineAPD", (*ADAM, *place), value)
        for place, value in (
            (("state", "0", "exp_avg"), torch.zeros(3, 3)),
            (("state", "0", "exp_avg"), torch.zeros(2)),
            (("state", "1", "exp_avg"), "x"),
            (("state", "0", "exp_avg_sq"), []),
            (("state", "1", "exp_avg_sq"), torch.full((8,), -1.0)),
            (("state", "1", "exp_avg_sq"), torch.ones(8, dtype=torch.int64)),
            (("state", "2", "step"), NAN),
            (("state", "2", "step"), -1),
            (("state", "2", "step"), torch.zeros(2)),
            (("state", "3"), {}),
            (("state",), {"0": {}}),
            (("param_groups", 0, "betas"), torch.full((2,), HUGE)),
            (("param_groups", 0, "betas"), [1]),
            (("param_groups", 0, "eps"), []),
            (("param_groups", 0, "amsgrad"), True),
            (("param_groups", 0, "weight_decay"), [1]),
            (("param_groups", 0, "fused"), None),
            (("param_groups", 0, "params"), [0, 1]),
            (("param_groups", 0, "lr"), [1]),
            (("param_groups", 0, "lr"), -1.0),
        )
    ],
    *[("SGMCMC", ("kernel", "coldest"), value) for value in (None, {}, {"a": 1.0})],
    ("SGMCMC", ("energy",), torch.full((2,), HUGE)),
    ("OnlineAPD", ("kernel", "counts"), [-1, 5]),
    ("OnlineAPD", ("kernel", "effective"), True),
    *[
        ("guide", place, value)
        for place, value in (
            (("sites", 0, "name"), []),
            (("sites", 0, "name"), {}),
            (("sites", 0, "name"), 1),
            (("sites", 0, "name"), ""),
            (("sites", 1, "name"), "w"),
            (("sites", 0, "shape"), {}),
            (("sites", 0, "shape"), [-3]),
            (("sites", 0, "shape"), [HUGE]),
            (("sites", 0, "unconstrained_shape"), torch.full((2,), HUGE)),
            (("sites", 0, "dtype"), "int64"),
            (("sites", 0, "dtype"), "nn"),
            (("sites", 0, "transform"), 1),
            (("sites", 0, "transform"), None),
            (("sites", 1, "start"), {}),
            (("sites", 1, "start"), True),
            (("sites", 1, "start"), 0),
            (("num_draws",), 0),
            (("state", "scale"), torch.zeros(3, 3)),
            (("state", "loc"), NAN),
            (("state", "loc"), "x"),
            (("reference", "generator"), [[0.0, float("inf"), 0.0]]),
        )
    ],
]


@pytest.mark.parametrize(("writer", "place", "value"), NAMED)
def test_a_senseless_field_of_a_whole_file_is_named(contents, writer, place, value):
    """Not by an error from inside. Moments of Adam in other shapes than the parameters would be written past their ends."""
    (path, content, good), (_, resume, kind) = contents[writer], FILES[writer]
    files.save(path, placed(content, place, value), kind)
    try:
        with pytest.raises(files.FileError, match="run") as caught:
            resume(path)
        assert next(name for name in reversed(place) if isinstance(name, str) and not name.isdigit()) in str(caught.value)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("writer", FILES)
def test_a_file_that_nobody_changed_is_read(contents, writer):
    (path, content, good), (_, resume, kind) = contents[writer], FILES[writer]
    try:
        files.save(path, content, kind)
        resume(path)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("width", [100_000, HUGE])
def test_a_critic_of_more_numbers_than_the_file_holds_is_refused_before_there_is_memory_for_it(tmp_path, width):
    """40 GB of layers."""
    path, options = tmp_path / "run", {"batch_size": 40, "num_steps": 2, "check_every": None, "critic_hidden": (8, 8)}
    APD(guide(), "paper", checkpoint=path, checkpoint_every=1, **options).fit(SAMPLES)
    content = files.load(path, "checkpoint of APD")
    files.save(path, placed(content, ("settings", "critic_hidden"), (width, width)), "checkpoint of APD")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"run is .* corrupt: critic_hidden=\(\d+, \d+\) is of a critic of more than its \d+ numbers"):
        APD.resume(path, guide(), SAMPLES)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB
    files.save(path, content, "checkpoint of APD")
    assert APD.resume(path, guide(), SAMPLES).steps == 2


@pytest.mark.parametrize("hidden", [[100_000, 100_000], [HUGE]])
def test_a_guide_of_more_numbers_than_its_file_holds_is_refused_before_there_is_memory_for_it(tmp_path, hidden):
    path, fitted = tmp_path / "guide", guide()
    APD(fitted, batch_size=40, num_steps=2).fit(SAMPLES)
    fitted.save(path)
    content = files.load(path, "file of AutoImplicit")
    files.save(path, placed(content, ("settings", "hidden"), hidden), "file of AutoImplicit")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"guide is .* corrupt: its settings .* are of a generator of more than its \d+ numbers"):
        AutoImplicit.load(path, logistic)
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024

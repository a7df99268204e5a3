"""
Kills runs of every kind at random moments and resumes them: ``make kill-test``. Each must end as a run that was never killed, bit for bit.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.infer.distill.apd import APD
from pyro_advbayes.infer.distill.online import OnlineAPD
from pyro_advbayes.storage.draws import read_draws
from tests.infer import test_active
from tests.infer.mcmc.test_checkpoints import SAMPLES, guide
from tests.small_models import data, logistic, regression, subsampling

X, Y = data()
Result = Mapping[str, Tensor]


class Case(NamedTuple):
    """How a run begins and how it goes on, each to the end; both return what it made."""

    begin: Callable[[Path], Result]
    resume: Callable[[Path], Result]


def _sampling(make: Callable[[], Any], arguments: Callable[[], tuple], **options: Any) -> Case:
    def begin(path: Path) -> Result:
        mcmc = ab.SGMCMC(make(), 30, 15, 2, checkpoint=path, checkpoint_every=3, overwrite=True, disable_progbar=True, **options)
        mcmc.run(*arguments())
        return _drawn(mcmc)

    return Case(begin, lambda path: _drawn(ab.SGMCMC.resume(path, make(), *arguments(), disable_progbar=True)))


def _drawn(mcmc: ab.SGMCMC) -> Result:
    extras = {f"extra {name}": value for name, value in mcmc.get_extras().items()}
    return {**mcmc.get_samples(group_by_chain=True), **mcmc.sample_stats(), **extras}


def _apd(preset: str, **changes: Any) -> Case:
    def begin(path: Path) -> Result:
        made = guide()
        APD(made, preset, checkpoint=path, checkpoint_every=5, overwrite=True, batch_size=40, disable_progbar=True, **changes).fit(SAMPLES)
        return made.network.state_dict()

    def resume(path: Path) -> Result:
        made = guide()
        APD.resume(path, made, SAMPLES, disable_progbar=True)
        return made.network.state_dict()

    return Case(begin, resume)


def _online() -> Case:
    options = {"buffer": 40, "num_samples": 30, "warmup_steps": 10, "num_chains": 2, "batch_size": 20, "num_steps": 40, "check_every": 10}

    def begin(path: Path) -> Result:
        made = guide()
        OnlineAPD(made, _sgld(), checkpoint=path, checkpoint_every=7, overwrite=True, disable_progbar=True, **options).run(X, Y)
        return made.network.state_dict()

    def resume(path: Path) -> Result:
        made = guide()
        OnlineAPD.resume(path, made, _sgld(), X, Y, disable_progbar=True)
        return made.network.state_dict()

    return Case(begin, resume)


def _fit(x: Tensor, y: Tensor) -> Any:
    time.sleep(0.005)  # or all rounds are over before a signal arrives
    return test_active.Centroids(x + 0.3 * torch.randn(x.shape), y)  # so that the state of the random generators matters


def _learn(path: Path) -> Result:
    curve = ab.active_learning(
        _fit, test_active.blobs(), test_active.blobs(40), num_rounds=20, per_round=2, path=path, disable_progbar=True
    )
    return curve._asdict()


def _sgld(**options: Any) -> ab.SGLD:
    return ab.SGLD(logistic, 1e-2, **{"batch_size": 20, "backend": "handlers", **options})


def _rows() -> tuple[Tensor, Tensor]:
    return X, Y


def _loader(**options: Any) -> tuple[DataLoader]:
    return (DataLoader(TensorDataset(X, Y), 25, shuffle=True, **options),)


def _bal() -> ab.BAL:
    return ab.BAL(logistic, "x", 20, temperature=1.0, clip=(-9.0, 9.0), keep=(0, 1), backend="handlers")


ROWS = {"batch_size": 7, "backend": "handlers"}
CASES = {
    "SGLD, graph": _sampling(lambda: _sgld(backend="graph"), _rows),
    "SGLD, automatic step": _sampling(lambda: ab.SGLD(logistic, **ROWS), _rows),
    "SGAdaLD": _sampling(lambda: ab.SGAdaLD(logistic, **ROWS), _rows),
    "SGHMC": _sampling(lambda: ab.SGHMC(logistic, adaptive=True, noise_correction=True, **ROWS), _rows),
    "transformed site, half precision": _sampling(lambda: ab.SGLD(regression, 1e-3, **ROWS), _rows, draws_dtype=torch.float16),
    "subsampling plate": _sampling(lambda: ab.SGLD(subsampling, 1e-3, backend="handlers"), _rows),
    "loader": _sampling(lambda: ab.SGLD(logistic, 1e-3, backend="handlers"), _loader),
    "loader with a generator": _sampling(
        lambda: ab.SGLD(logistic, 1e-3, backend="handlers"), lambda: _loader(generator=torch.Generator().manual_seed(9))
    ),
    "BAL": _sampling(_bal, _rows),
    "APD": _apd("fast", num_steps=300, check_every=10),
    "APD of the paper": _apd("paper", num_steps=60, critic_hidden=(8, 8)),
    "OnlineAPD": _online(),
    "active learning": Case(_learn, _learn),
}


def _quietly(run: Callable[[Path], Result], path: Path, seed: int) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pyro.set_rng_seed(seed)
        return {name: value.clone() for name, value in run(path).items()}


def _forked(case: Case, path: Path, begun: bool) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _quietly(case.resume if begun else case.begin, path, seed=4 if begun else 3)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _killed(case: Case, path: Path, after: float, begun: bool) -> str:
    pid = _forked(case, path, begun)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed before a checkpoint" if not path.exists() else "killed"
    return "ended before" if os.WEXITSTATUS(status) == 0 else "failed"


@functools.cache
def _whole(name: str) -> tuple[Result, float]:
    """What a run makes that nobody kills, and the seconds that it takes in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        expected = _quietly(CASES[name].begin, Path(folder) / "run", seed=3)
        start = time.monotonic()
        os.waitpid(_forked(CASES[name], Path(folder) / "again", begun=False), 0)
        return expected, time.monotonic() - start


def kill(name: str, generator: random.Random) -> list[str]:
    """
    Kills a run of this case at a random moment, in a third of the cases its resumed run too, and lets it end.

    :return: what happened, ``"lost"`` at the end if it made something else.
    """
    case, (expected, duration) = CASES[name], _whole(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        happened = [_killed(case, path, generator.uniform(0.0, 1.1 * duration), begun=False)]
        if path.exists() and generator.random() < 1 / 3:
            happened.append(_killed(case, path, generator.uniform(0.0, duration), begun=True))
        draws = path.with_name("run.draws.safetensors")
        if draws.exists():
            read_draws(draws, check=True)
        begun = path.exists()
        found = _quietly(case.resume if begun else case.begin, path, seed=4 if begun else 3)
        left = {entry.name for entry in Path(folder).iterdir()} - {"run", "run.draws.safetensors"}
    if "failed" in happened or left or not same(found, expected):
        happened.append("lost")
    return happened


def same(found: Result, expected: Result) -> bool:
    """Whether two runs made the same, to the last bit."""
    return set(found) == set(expected) and all(
        found[name].dtype == value.dtype and torch.equal(found[name].nan_to_num(-1.0), value.nan_to_num(-1.0))
        for name, value in expected.items()
    )


def main() -> None:
    """Prints what was killed when, and fails if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator, counts = random.Random(options.seed), Counter()
    start = time.monotonic()
    runs = 0
    while counts["killed"] + counts["killed before a checkpoint"] < options.kills and not counts["lost"]:
        name = list(CASES)[runs % len(CASES)]
        happened = kill(name, generator)
        counts.update(happened)
        runs += 1
        print(f"{name}: {', '.join(happened)}", flush=True)
    print(f"{runs} runs of {len(CASES)} kinds in {time.monotonic() - start:.0f} s: {dict(counts)}")
    sys.exit(bool(counts["lost"]))


if __name__ == "__main__":
    main()

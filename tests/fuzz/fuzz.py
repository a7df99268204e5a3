"""
Calls everything public with edge values: ``make fuzz``.

A call is right if it returns, or if it raises a ValueError or TypeError (or an error of the file system) that names the argument. What is
found wrong is printed with a line that repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

# all that a call may import for the first time: its time limit would leave half a module behind
import arviz  # noqa: F401
import matplotlib
import matplotlib.pyplot as plt
import pyro
import sklearn.datasets
import sklearn.metrics  # noqa: F401
import torch

from tests.fuzz.targets import EXTERNAL, FREE_TEXT, Target, targets
from tests.fuzz.values import edges, is_senseless

LIMIT = 12.0  # seconds of a call
WORK = ("num_epochs", "num_steps")  # counts of what takes as long as it is asked to
RIGHT, OBSCURE, ACCEPTED, SLOW = "right", "obscure", "senseless and accepted", "slow"
CLEAR = (ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError)
# What an argument is also called where it is spoken of.
ALSO = {
    "posterior_samples": ("samples", "site"),
    "samples": ("site",),
    "labels": ("classes",),
    "x": ("input", "inputs", "data"),
    "y": ("labels", "obs", "data"),
    "args": ("data", "obs"),
    "net": ("layer",),
    "model": ("plate", "site"),
}


class Outcome(NamedTuple):
    """What came of one call. ``repeat``: target and seed."""

    kind: str
    target: str
    given: dict[str, str]
    error: str
    repeat: tuple[int, int]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.given.items())
        return f"{self.kind}: {self.target}({given}): {self.error}  [--only {self.repeat[0]} --seed {self.repeat[1]}]"


class _Slow(BaseException):
    pass


def _stop(*_: Any) -> None:
    raise _Slow


def call(number: int, target: Target, seed: int, limit: float = LIMIT) -> Outcome:
    """One call of a target, with one edge value, in a quarter of the calls with two."""
    generator = random.Random(f"{target.name} {seed}")
    pyro.set_rng_seed(seed % 2**31)
    pyro.clear_param_store()
    function, arguments = target.make()
    valid = {**_defaults(function), **arguments}
    names = sorted(valid)
    chosen = generator.sample(names, min(len(names), 1 + (generator.random() < 0.25)))
    given = {}
    for name in chosen:
        found = edges(valid[name])
        what = generator.choice(list(found))
        try:
            arguments[name] = found[what]()
        except (RuntimeError, TypeError, ValueError):  # PyTorch has no such form of it
            arguments[name], what = None, "None"
        given[name] = what
    kind, error = _outcome(function, arguments, valid, given, limit)
    return Outcome(kind, target.name, given, error, (number, seed))


def _outcome(function: Callable, arguments: dict[str, Any], valid: dict[str, Any], given: dict[str, str], limit: float) -> tuple[str, str]:
    try:
        with _quiet(), _alarm(limit):
            function(**arguments)
    except _Slow:
        if any(given.get(name) == "10**12" for name in WORK):  # is what was asked for
            return RIGHT, ""
        return SLOW, f"longer than {limit:.0f} s"
    except CLEAR as error:
        missing = isinstance(error, FileNotFoundError) and any(str(path) in str(error) for path in (EXTERNAL, *_paths(arguments)))
        right = missing or _begins_with_path(error, arguments) or _of_model(error) or _names(str(error), given)
        return (RIGHT, "") if right else (OBSCURE, _described(error))
    except Exception as error:
        return (RIGHT, "") if _of_model(error) else (OBSCURE, _described(error))
    finally:
        plt.close("all")
        pyro.poutine.runtime._PYRO_STACK.clear()
    for name in given:
        if name not in FREE_TEXT and is_senseless(valid[name], arguments[name]):
            return ACCEPTED, name
    return RIGHT, ""


def _names(message: str, given: dict[str, str]) -> bool:
    names = {word for name in given for word in (name, *ALSO.get(name, ()))}
    return any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)


def _begins_with_path(error: BaseException, arguments: dict[str, Any]) -> bool:
    """Whether a message says what is wrong with a file that was given."""
    paths = [arguments.get(name) for name in ("path", "root", "samples")]
    return any(isinstance(path, (str, Path)) and str(error).startswith(f"{Path(path)} ") for path in paths)


def _paths(arguments: dict[str, Any]) -> list[Any]:
    return [arguments[name] for name in ("path", "root") if name in arguments]


def _of_model(error: BaseException) -> bool:
    """Whether a line of the user's model failed, which the traceback shows him."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).name in ("small_models.py", "targets.py")


def _described(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {text[:160]}"


def _defaults(function: Callable) -> dict[str, Any]:
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and parameter.default is not parameter.empty:
            found[name] = parameter.default
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _alarm(limit: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run(count: int, seed: int, only: int | None = None, show: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """
    Calls targets in turn.

    :param count: calls.
    :param only: the number of the one target to call, with this very seed.
    :param show: gets every outcome as soon as it is known.
    """
    matplotlib.use("Agg")
    known, found = targets(), []
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some edge values are names of files
        try:
            for i in range(count):
                number = i % len(known) if only is None else only
                found.append(call(number, known[number], seed + i // len(known)))
                show(found[-1])
        finally:
            os.chdir(home)
    return found


def main() -> None:
    """Prints what is wrong, and how much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeats one call of this target")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()

    def show(outcome: Outcome) -> None:
        if outcome.kind != RIGHT:
            print(outcome, flush=True)

    found = run(options.calls if options.only is None else 1, options.seed, options.only, show)
    kinds = Counter(outcome.kind for outcome in found)
    print(f"{len(found)} calls in {time.monotonic() - start:.0f} s: {dict(kinds)}")
    print("most often:", Counter(outcome.target for outcome in found if outcome.kind != RIGHT).most_common(20))
    if kinds[OBSCURE] > 0.02 * len(found) or kinds[ACCEPTED] or kinds[SLOW]:
        sys.exit(1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

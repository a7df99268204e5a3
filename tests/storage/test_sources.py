"""Functions are the same if their code and what they hold are, whatever they are called and wherever they stand."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_advbayes as ab
from pyro_advbayes.storage import sources
from tests.infer.test_active import Centroids, blobs

RATE = 0.1


class Settings(NamedTuple):
    rate: float = 0.1
    rounds: int = 4


class Fitter:
    def __init__(self, rate=0.1, rounds=4):
        self.rate, self.rounds = rate, rounds

    def __call__(self, x, y):
        return self.rate * x


def helper(x, power=2):
    return x**power


def net(scale):
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(scale)
    return layer


def holding(value):
    return lambda x, y: (x, value)


def using(value):
    return lambda x, y: x * value.rate


def written(source, **values):
    """A function of a text, which stands in no file."""
    space = dict(values)
    exec(source, space)
    return space["fit"]


SAME = [
    (written("def fit(x, y): return x * 2"), written("\n\ndef fit(x, y):\n    # the same\n    return x * 2")),
    (written("def fit(x, y): return x * RATE", RATE=0.1), written("def fit(x, y): return x * RATE", RATE=0.1, OTHER=1)),
    (holding(0.1), holding(0.1)),
    (holding(torch.ones(3)), holding(torch.ones(3))),
    (holding(net(1.0)), holding(net(1.0))),
    (using(Settings()), using(Settings(rounds=9))),
    (using(argparse.Namespace(rate=0.1, out="a")), using(argparse.Namespace(rate=0.1, out="b"))),
    (Fitter(), Fitter(rounds=9)),
    (holding(dist.Normal(torch.zeros(2), 1.0).to_event(1)), holding(dist.Normal(torch.zeros(2), 1.0).to_event(1))),
    (holding(print), holding(print)),
    (functools.partial(helper, power=3), functools.partial(helper, power=3)),
]
OTHER = [
    (written("def fit(x, y): return x * 2"), written("def fit(x, y): return x * 3"), "its code"),
    (written("def fit(x, y): return x + y"), written("def fit(x, y): return x - y"), "its code"),
    (written("def fit(x, y): return x.sin()"), written("def fit(x, y): return x.cos()"), "its code"),
    (written("def fit(x, y, z=1): return x"), written("def fit(x, y, z=2): return x"), "z"),
    (written("def fit(x, y, *, z=1): return x"), written("def fit(x, y, *, z=2): return x"), "z"),
    (written("def fit(x, y): return x * RATE", RATE=0.1), written("def fit(x, y): return x * RATE", RATE=0.2), "RATE"),
    (
        written("def help(x): return x + 1\ndef fit(x, y): return help(x)"),
        written("def help(x): return x + 2\ndef fit(x, y): return help(x)"),
        "help",
    ),
    (
        written("class Net:\n  def forward(self, x): return x + 1\ndef fit(x, y): return Net()"),
        written("class Net:\n  def forward(self, x): return x + 2\ndef fit(x, y): return Net()"),
        r"Net\.forward",
    ),
    (written("def fit(x, y): return [z + 1 for z in x]"), written("def fit(x, y): return [z + 2 for z in x]"), "its code"),
    (holding(0.1), holding(0.2), "value"),
    (holding(True), holding(1), "value"),
    (holding("sgld"), holding("sghmc"), "value"),
    (holding({"rate": 0.1}), holding({"rate": 0.2}), r"value\.rate"),
    (holding([1, (2, 3)]), holding([1, (2, 4)]), r"value\.1\.1"),
    (holding(torch.ones(3)), holding(torch.ones(3) + 1e-6), "value"),
    (holding(np.ones(3)), holding(np.zeros(3)), "value"),
    (holding(net(1.0)), holding(net(1.001)), r"value\.weight"),
    (holding(net(1.0)), holding(nn.Sequential(net(1.0))), "class"),
    (holding(dist.Normal(0.0, 1.0)), holding(dist.Normal(0.0, 1.00001)), "value"),
    (using(Settings()), using(Settings(rate=0.2)), r"value\.rate"),
    (using(argparse.Namespace(rate=0.1)), using(argparse.Namespace(rate=0.2)), r"value\.rate"),
    (Fitter(), Fitter(rate=0.2), "rate"),
    (Fitter().__call__, Fitter(rate=0.2).__call__, "rate"),
    (functools.partial(helper, power=3), functools.partial(helper, power=4), "power"),
    (functools.partial(helper, power=3), helper, ""),
    (holding(print), holding(len), "value"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_functions_that_are_the_same(one, other, tmp_path):
    sources.check(sources.parts(one), sources.parts(other), "fit", tmp_path)


@pytest.mark.parametrize(("one", "other", "what"), OTHER)
def test_functions_that_are_others(one, other, what, tmp_path):
    for now, then in ((one, other), (other, one)):
        with pytest.raises(ValueError, match=rf"is of another run: its fit is another function \(.*{what}.* differs\)"):
            sources.check(sources.parts(now), sources.parts(then), "fit", tmp_path)


def test_a_function_that_holds_itself_or_more_and_more_comes_to_an_end():
    def endless(x, y):
        return endless(x, y), chain

    chain = []
    chain.append(chain)
    assert sources.parts(endless)


def test_another_process_finds_the_same_parts():
    """Whose addresses, and order of sets of text, are others."""
    code = (
        "import json; from tests.storage import test_sources as t; from pyro_advbayes.storage import sources;"
        "print(json.dumps([sources.parts(f) for f in (t.known, t.Fitter(), t.holding(t.net(1.0)))]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == [sources.parts(f) for f in (known, Fitter(), holding(net(1.0)))]


def known(x, y):
    return x in {"a", "b", "c", "d"} and RATE and helper(y) and net(1.0)


def test_another_python_has_other_code_and_is_worth_a_warning(tmp_path):
    then = {**sources.parts(holding(1)), "Python": "3.1"}
    with pytest.warns(UserWarning, match=r"was written by Python 3.1, here it is 3.*cannot be checked"):
        sources.check(sources.parts(holding(2)), then, "fit", tmp_path)


# --------------------------------------------------------------------------------------------------------- in active learning


def learn(path, fit, num_rounds=2):
    return ab.active_learning(fit, blobs(), blobs(40), num_rounds=num_rounds, per_round=3, path=path, disable_progbar=True)


def fits(draws, log=None):
    log, calls = [] if log is None else log, {"count": 0}

    def fit(x, y):
        log.append(len(x))
        calls["count"] += 1
        return Centroids(x, y, draws)

    return fit


def test_active_learning_goes_on_with_the_same_fit_alone(tmp_path):
    path = tmp_path / "run.safetensors"
    whole = learn(tmp_path / "whole", fits(6), num_rounds=4)
    learn(path, fits(6))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"run.safetensors is of another run: its fit is another function \(draws differs\)"):
        learn(path, fits(7), num_rounds=4)
    with pytest.raises(ValueError, match=r"its fit is another function \(its code differs\)"):
        learn(path, lambda x, y: Centroids(x, y, 6), num_rounds=4)
    assert path.read_bytes() == before
    log = []
    curve = learn(path, fits(6, log), num_rounds=4)
    assert torch.equal(curve.accuracy, whole.accuracy) and len(log) == 2


def test_what_a_fit_itself_changes_is_no_part_of_it(tmp_path):
    path, log, layer = tmp_path / "run.safetensors", [], net(1.0)

    def fit(x, y):
        log.append(len(x))
        with torch.no_grad():
            layer.weight.add_(1.0)
        return Centroids(x, y)

    learn(path, fit)
    learn(path, fit, num_rounds=4)
    assert len(log) == 5

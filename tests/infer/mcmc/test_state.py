"""The state of chains is one value: a checkpoint holds all of it, and a pickled kernel none."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch

import pyro_advbayes as ab
from tests.small_models import data, logistic

KERNELS = {
    "SGLD": lambda: ab.SGLD(logistic, batch_size=10),
    "SGHMC": lambda: ab.SGHMC(logistic, batch_size=10, adaptive=True, noise_correction=True),
    "BAL": lambda: ab.BAL(logistic, "x", 10, clip=(-9.0, 9.0)),
}


def after(make, samples, warmup=6):
    kernel = make()
    kernel.setup_chains(3, warmup, data(), {})
    params = kernel.initial_params
    for _ in range(samples):
        params = kernel.sample(params)
    return kernel


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("samples", [4, 9])
@pytest.mark.parametrize("name", KERNELS)
def test_a_checkpoint_holds_every_field_of_the_state_and_sets_a_new_kernel_to_it(name, samples):
    kernel, again = after(KERNELS[name], samples), after(KERNELS[name], 0)
    state = copy.deepcopy(kernel.state())  # which holds the kernel's own tensors
    assert {each.name for each in fields(kernel.chains)} - state.keys() == {"buffer", "some_lost"}, "noise and a shorthand for alive"
    assert not same(again.state(), state)
    again.load(copy.deepcopy(state))
    assert same(again.state(), state)
    params = again.sample(again.initial_params)
    kernel.load(state)
    assert same(kernel.sample(kernel.initial_params), params)


@pytest.mark.parametrize(
    "place, value", [("theta", torch.zeros(3, 5)), ("alive", torch.ones(3)), ("noise", [1]), ("restarts", [[0], None, None, {}])]
)
def test_a_field_of_other_chains_is_refused(place, value):
    kernel = after(KERNELS["SGLD"], 2)
    with pytest.raises((TypeError, ValueError)):
        kernel.load({**kernel.state(), place: value})


def test_lost_chains_stay_lost_after_a_checkpoint():
    kernel = after(KERNELS["SGLD"], 8)
    kernel.theta[1] = torch.nan
    kernel.sample({"w": kernel.theta[:, :3], "b": kernel.theta[:, 3]})
    again = after(KERNELS["SGLD"], 0)
    again.load(copy.deepcopy(kernel.state()))
    assert again.alive.tolist() == [True, False, True] and again.chains.some_lost


def test_a_kernel_without_a_run_says_so_and_a_pickled_one_has_none():
    for kernel in (ab.SGLD(logistic), pickle.loads(pickle.dumps(after(KERNELS["SGLD"], 1)))):
        with pytest.raises(RuntimeError, match=r"SGLD has no chains yet: call setup\(...\)"):
            kernel.diagnostics()
        with pytest.raises(RuntimeError, match="found in a run"):
            kernel.step_size(0)

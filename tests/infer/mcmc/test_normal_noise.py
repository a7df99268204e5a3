"""Standard normal numbers for long rows: their law, their streams, and that they can be gone on with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch

from pyro_advbayes.infer.mcmc.noise import LONG, NormalNoise


def rows(chains=4, size=250_001, seed=0):
    pyro.set_rng_seed(seed)
    state = torch.empty(chains, size)
    NormalNoise(state).fill(state)
    return state


def test_numbers_are_standard_normal():
    """By the distribution function at 61 places and four moments, each within 4.5 standard errors; the last of an odd row included."""
    drawn = rows().double()
    count = drawn.numel()
    for place in torch.linspace(-3.0, 3.0, 61, dtype=torch.float64):
        p = float(torch.special.ndtr(place))
        assert abs(float((drawn <= place).double().mean()) - p) < 4.5 * (p * (1 - p) / count) ** 0.5
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((drawn**power).mean()) - mean) < 4.5 * (variance / count) ** 0.5
    assert float(drawn.abs().max()) > 4.5 and bool(drawn.isfinite().all())


def test_tails_go_as_far_as_32_bits_let_them():
    """The smallest uniform number is 2⁻³², so that no number is beyond 6.7; the share beyond 4 is right."""
    drawn = torch.cat([rows(seed=seed).flatten() for seed in range(8)])
    share = 2.0 * float(torch.special.ndtr(torch.tensor(-4.0, dtype=torch.float64)))
    assert abs(int((drawn.abs() > 4.0).sum()) - share * len(drawn)) < 4.5 * (share * len(drawn)) ** 0.5
    assert float(drawn.abs().max()) < math.sqrt(2 * 32 * math.log(2))


def test_numbers_are_those_of_the_formula_for_the_smallest_and_the_largest_bits():
    """u is 2⁻³², 1 and a half (a negative word is that of its last 31 bits), the angles 0, π / 4 and -π / 2."""
    words = np.array([0, 2**31 - 1, -(2**30), 0, 2**29, -(2**30), 5, 5], dtype=np.int32)
    noise, row = NormalNoise(torch.empty(1, LONG)), torch.empty(6)
    noise._bits = SimpleNamespace(random_raw=lambda count: words.view(np.uint64)[:count])
    noise.fill(row[None])
    expected = [(64 * math.log(2)) ** 0.5, 0.0, 0.0, 0.0, 0.0, -((2 * math.log(2)) ** 0.5)]
    assert row.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_two_halves_of_a_row_and_the_rows_are_independent():
    """Also in their squares: cosine and sine share a radius."""
    drawn = rows(chains=3, size=200_000)
    half = drawn.shape[1] // 2
    pairs = [(drawn[0, :half], drawn[0, half:]), (drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0, :-1], drawn[0, 1:])]
    for a, b in pairs:
        for power in (1, 2):
            correlation = float(torch.corrcoef(torch.stack([a**power, b**power]))[0, 1])
            assert abs(correlation) < 4.5 / len(a) ** 0.5


def test_a_seed_gives_the_same_numbers_and_another_gives_others():
    assert torch.equal(rows(seed=1), rows(seed=1))
    assert not torch.equal(rows(seed=1), rows(seed=2))


@pytest.mark.parametrize("size", [10, LONG])
def test_the_stream_goes_on_from_its_state(size):
    state = torch.empty(2, size)
    noise = NormalNoise(state)
    noise.fill(state)
    then, random = noise.state(), torch.get_rng_state()
    noise.fill(state)
    expected = state.clone()
    again = NormalNoise(state)
    again.load(then)
    torch.set_rng_state(random)
    again.fill(state)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("size, dtype", [(LONG - 1, torch.float32), (LONG, torch.float64)])
def test_short_rows_and_other_dtypes_are_pytorchs(size, dtype):
    state = torch.empty(2, size, dtype=dtype)
    noise = NormalNoise(state)
    random = torch.get_rng_state()
    noise.fill(state)
    torch.set_rng_state(random)
    assert noise.state() is None and torch.equal(state, torch.empty_like(state).normal_())


@pytest.mark.parametrize("size", [5, LONG, LONG + 1])
def test_a_mark_is_where_the_same_numbers_come_again(size):
    """With a last number of PyTorch's in rows of odd length."""
    noise, states = NormalNoise(torch.empty(2, size)), [torch.empty(2, size) for _ in range(3)]
    mark = noise.mark()
    noise.fill(states[0])
    noise.fill(states[1])
    noise.rewind(mark)
    noise.fill(states[2])
    assert torch.equal(states[2], states[0]) and not torch.equal(states[1], states[0])

"""When training stops: the arithmetic, with distances that are told in place of measured ones."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_advbayes.infer.distill import stopping
from pyro_advbayes.infer.distill.stopping import PATIENCE, SPLITS, Stopping

SPLIT = [0.1 + 0.01 * i for i in range(SPLITS)]


@pytest.fixture
def told(monkeypatch):
    """Makes a :class:`Stopping` of 100 draws whose looks find these distances; and what was compared."""

    def make(looks):
        found, compared = iter([*SPLIT, *looks]), []
        monkeypatch.setattr(stopping, "sliced_wasserstein", lambda x, y: compared.append((x, y)) or next(found))
        return Stopping(lambda index: index[:, None].double(), 100, 1), compared

    return make


def measure(stops, value=0.0):
    return stops.measure(lambda count: torch.zeros(count, 1), [torch.tensor(value)])


def test_the_bound_is_the_mean_of_the_splits_and_a_deviation(told):
    stops, compared = told([])
    mean = sum(SPLIT) / SPLITS
    deviation = math.sqrt(sum((d - mean) ** 2 for d in SPLIT) / (SPLITS - 1))
    assert stops.floor == pytest.approx(mean, rel=1e-5) and stops.threshold == pytest.approx(mean + deviation, rel=1e-5)
    for one, two in compared:  # halves of all draws
        assert sorted(torch.cat([one, two]).flatten().tolist()) == list(range(100))


def test_it_stops_where_the_mean_of_three_looks_is_within_the_bound(told):
    stops, _ = told([0.30, 0.26, 0.23, 0.20])
    assert 0.25 < stops.threshold < 0.26
    assert math.isnan(stops.distance)
    assert [measure(stops) for _ in range(4)] == [False, False, False, True]
    assert stops.distance == pytest.approx(0.23) and stops.arrived


def test_it_gives_up_where_no_look_was_better_for_long_and_keeps_the_best(told):
    stops, _ = told([3.0, 3.0, 1.0, 1.0, 1.0] + [5.0] * PATIENCE)
    ends = [measure(stops, float(i)) for i in range(5 + PATIENCE)]
    assert ends == [False] * (4 + PATIENCE) + [True]
    distance, (kept,) = stops.best
    assert distance == 1.0 and float(kept) == 4.0 and not stops.arrived

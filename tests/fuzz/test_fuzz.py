"""Bad input gets a clear answer: 500 calls of what is public, with edge values. ``make fuzz`` makes 10 000."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch

from tests.fuzz import fuzz
from tests.fuzz.targets import RESULTS, ROOMS, Target, targets
from tests.fuzz.values import is_senseless


def test_few_of_500_calls_end_in_an_obscure_error_and_none_accepts_nonsense():
    found = fuzz.run(500, seed=100)
    kinds = Counter(outcome.kind for outcome in found)
    wrong = "\n".join(str(outcome) for outcome in found if outcome.kind != fuzz.RIGHT)
    assert len(found) == 500 and kinds[fuzz.OBSCURE] < 0.02 * 500, wrong
    assert not kinds[fuzz.ACCEPTED] and not kinds[fuzz.SLOW], wrong


def test_everything_public_is_called_and_works_with_the_arguments_given():
    """Or edge values of one argument would meet an error of another."""
    known = {target.name for target in targets()}
    for room in ROOMS:
        names = {name for name in room.__all__ if callable(getattr(room, name))}
        assert names <= known | RESULTS, names - known
    for target in targets():
        function, arguments = target.make()
        kind, error = fuzz._outcome(function, arguments, {}, {}, 12.0)
        assert kind == fuzz.RIGHT, f"{target.name}: {error}"


def takes_anything(flag: bool = False) -> None:
    """Takes anything for a flag."""


def fails(rate: float = 1.0) -> None:
    raise RuntimeError("something inside")


def names(rate: float = 1.0) -> None:
    raise ValueError("rate must be a number")


def hides(rate: float = 1.0) -> None:
    raise ValueError("operate must be a number")


def sleeps(rate: float = 1.0) -> None:
    time.sleep(5.0)


@pytest.mark.parametrize(
    "function,kind",
    [(fails, fuzz.OBSCURE), (names, fuzz.RIGHT), (hides, fuzz.OBSCURE), (sleeps, fuzz.SLOW)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_fuzzer_tells_outcomes_apart(function, kind, monkeypatch):
    monkeypatch.setattr(fuzz, "_of_model", lambda error: False)
    outcome = fuzz.call(0, Target("it", lambda: (function, {"rate": 1.0})), 0, limit=0.2)
    assert outcome.kind == kind and list(outcome.given) == ["rate"]
    assert (kind == fuzz.RIGHT) or f"{kind}: it(rate=" in str(outcome)


def test_the_fuzzer_notices_nonsense_that_is_accepted():
    found = {fuzz.call(0, Target("it", lambda: (takes_anything, {"flag": False})), seed).kind for seed in range(30)}
    assert found == {fuzz.RIGHT, fuzz.ACCEPTED}


@pytest.mark.parametrize(
    "valid,given,senseless",
    [
        (True, "nonsense", True),
        (True, 2.5, True),
        (True, 1, False),
        (1.0, math.inf, True),
        (1.0, math.nan, True),
        (1.0, 3, False),
        (3, "nonsense", True),
        ("choice", "nonsense", False),
        (torch.ones(3), b"x", True),
        (torch.ones(3), torch.zeros(3), False),
    ],
)
def test_what_counts_as_nonsense(valid, given, senseless):
    assert is_senseless(valid, given) == senseless

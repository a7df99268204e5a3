"""Rivals of an attack do the same arithmetic."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import rows_attacks
from tests.benchmarks.measure import Stopwatch
from tests.benchmarks.rows_prediction import draws_of
from tests.benchmarks.workloads import SMALL


@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
def test_the_loop_written_by_hand_and_foolbox_find_what_the_attack_finds(objective):
    samples = draws_of(SMALL, 20, torch.device("cpu"))
    samples = {name: 10 * values for name, values in samples.items()}
    arguments = 5, SMALL, samples, 0.2 + 0.6 * torch.rand(30, 2), torch.randint(2, (30,))
    expected = rows_attacks._attack(objective, *arguments).call()
    found = [rows_attacks._loop(objective, *arguments).call()]
    if objective == "loss_of_mean":
        found.append(rows_attacks._foolbox(*arguments).call()[1])
    for attacked in found:
        assert ((attacked - expected).abs() < 1e-6).double().mean() > 0.98  # a gradient near zero has either sign
        assert not torch.equal(attacked, arguments[3])


def test_the_rows_name_what_they_compare():
    results = rows_attacks.attack_small(Stopwatch(torch.device("cpu"), quick=True))
    compared = [comparison.what for result in results for comparison in result.comparisons]
    assert compared == [
        "loop over draws, mean_loss / PGD, mean_loss",
        "loop over draws, loss_of_mean / PGD, loss_of_mean",
        "PGD, loss_of_mean / foolbox",
    ]
    (result,) = rows_attacks.attack_distribution(Stopwatch(torch.device("cpu"), quick=True))
    assert [comparison.what for comparison in result.comparisons] == ["distribution / PGD"]

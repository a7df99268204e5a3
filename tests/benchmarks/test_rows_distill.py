"""The rows about distilling run, and say what they compare."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import rows_distill
from tests.benchmarks.measure import Stopwatch


@pytest.mark.parametrize(
    ("row", "compared"),
    [
        (rows_distill.distill_small, "WGAN / hand-written loop"),
        (rows_distill.distill_medium, "WGAN / hand-written loop"),
        (rows_distill.distill_large, "WGAN / hand-written loop"),
        (rows_distill.factored_draws, "FactoredGenerator / its random numbers and product"),
    ],
)
def test_the_rows_name_what_they_compare(row, compared):
    results = row(Stopwatch(torch.device("cpu"), quick=True))
    assert {comparison.what for result in results for comparison in result.comparisons} == {compared}

"""
First runs with default arguments and ``step_size="auto"`` on posteriors with known moments: right, or a warning. What is measured at
length by ``make trust`` is measured here on a few cases, of the kinds that have been silently wrong.
"""

from __future__ import annotations

import pytest

from tests.benchmarks.trust import KERNELS, run_once

KINDS = [
    ("linear 100x10 N/B=10", "SGHMC"),  # noise ignored in warm-up
    ("poisson 100x10 N/B=1", "SGHMC"),  # chains lost within a few updates
    ("eight schools non-centred", "SGHMC"),  # chains that run away to where U is flat
    ("collinear 100x5 16 chains", "SGHMC"),  # lost chains among the samples
    ("input around 100", "SGAdaLD"),  # a refusal that advises what is in force
    ("plain gaussian N/B=10 16 chains", "SGHMC-adaptive"),  # one chain's V collapses
    ("own units N/B=1", "SGLD"),  # too slow to reach the posterior
]


@pytest.mark.parametrize(("case", "kernel"), KINDS)
def test_a_first_run_is_right_or_says_that_it_is_not(case, kernel):
    row = run_once((case, kernel, 0), num_samples=250, warmup_steps=250)
    assert row["verdict"] in ("right", "warned"), row


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_good_first_run_does_not_warn(kernel):
    row = run_once(("linear 200x3 N/B=1", kernel, 0), num_samples=150, warmup_steps=150)
    assert row["verdict"] == "right" and not row["warned"], row

"""Bad probabilities, labels and scores, for every function that takes them."""

from __future__ import annotations

import pytest
import torch

from pyro_advbayes import diagnostics

OF_DRAWS = [diagnostics.expected_entropy, diagnostics.mutual_information, diagnostics.model_variance, diagnostics.vote_variation_ratio]
OF_THE_MEAN = [diagnostics.predictive_entropy, diagnostics.variation_ratio]
JUDGED = [diagnostics.accuracy, diagnostics.nll, diagnostics.brier, diagnostics.ece, diagnostics.reliability]
COMPARED = [diagnostics.auroc, diagnostics.aupr_out, diagnostics.aupr_in]
LABELS = torch.tensor([0, 2])


def name(f) -> str:
    return getattr(f, "__name__", None)


def good() -> torch.Tensor:
    return torch.tensor([[[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], [[0.1, 0.1, 0.8], [0.6, 0.2, 0.2]]])


def changed(entry: float) -> torch.Tensor:
    probs = good()
    probs[1, 0, 1] = entry
    return probs


@pytest.mark.parametrize("f", [*OF_DRAWS, *OF_THE_MEAN, *JUDGED], ids=name)
@pytest.mark.parametrize(
    ("probs", "reason"),
    [
        (changed(0.2), "sum to 1.*off by 0.1"),
        (changed(float("nan")), "NaN"),
        (changed(float("inf")), "infinite"),
        (good() + torch.tensor([-0.4, 0.0, 0.4]), "negative.*-0.4"),
        (good() * 2 - 1, "negative"),
        (good()[0, 0], r"not \[3\]"),
        (good()[None], r"not \[1, 2, 2, 3\]"),
        (good()[:0], "at least one"),
        (good()[:, :0], "at least one"),
        ((10 * good()).int(), "floating type"),
        (good().numpy(), "tensor"),
    ],
    ids=["sum", "nan", "inf", "negative", "logits", "rank-1", "rank-4", "no-draws", "no-rows", "integers", "numpy"],
)
def test_what_is_not_a_probability_is_refused(f, probs, reason):
    arguments = (probs, LABELS) if f in JUDGED else (probs,)
    with pytest.raises(ValueError, match=reason):
        f(*arguments)


@pytest.mark.parametrize("f", OF_DRAWS, ids=name)
def test_what_needs_draws_says_so(f):
    with pytest.raises(ValueError, match=r"must be \[draws, N, K\], not \[2, 3\]; one draw is probs\[None\]"):
        f(good()[0])
    assert f(good()[0][None]).shape == (2,)


@pytest.mark.parametrize("f", JUDGED, ids=name)
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([0, 3]), "from 0 to 3.*classes 0 to 2"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([0, 1, 2]), r"must be \[2\].*not \[3\]"),
        (torch.tensor([[0], [1]]), r"must be \[2\]"),
        (torch.tensor([0.0, 1.0]), "integers, not torch.float32"),
        (torch.tensor([True, False]), "integers, not torch.bool"),
        ([0, 1], "labels is a list: give a tensor"),
    ],
    ids=["high", "low", "too-many", "column", "floats", "bools", "list"],
)
def test_labels_that_do_not_go_with_the_probabilities_are_refused(f, labels, reason):
    with pytest.raises(ValueError, match=reason):
        f(good(), labels)


@pytest.mark.parametrize("f", COMPARED, ids=name)
@pytest.mark.parametrize("bad", [torch.ones(2, 1), torch.ones(0), torch.tensor([float("nan")]), torch.tensor([float("inf")]), [1.0]])
def test_scores_that_are_not_finite_vectors_are_refused(f, bad):
    for arguments in [(bad, torch.ones(2)), (torch.ones(2), bad)]:
        with pytest.raises(ValueError, match="scores"):
            f(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_rounding_of_every_floating_type_is_allowed(dtype):
    probs = torch.randn(20, 50, 100).softmax(-1).to(dtype)
    assert diagnostics.predictive_entropy(probs).dtype == torch.promote_types(dtype, torch.float32)
    assert diagnostics.accuracy(probs, torch.zeros(50, dtype=torch.uint8)) >= 0


def test_float32_probabilities_off_by_a_thousandth_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        diagnostics.predictive_entropy(good() * 1.001)

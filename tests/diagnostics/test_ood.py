from __future__ import annotations

import pytest
import torch

from pyro_advbayes.diagnostics import (
    adversarial_detection,
    aupr_in,
    aupr_out,
    auroc,
    fpr95,
    model_variance,
    mutual_information,
    ood_detection,
    predictive_entropy,
    variation_ratio,
)

ALL = [auroc, aupr_out, aupr_in]


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(200), torch.randn(300) + 1


def test_auroc_is_the_probability_that_one_of_the_others_scores_higher():
    own, others = scores()
    own, others = own.mul(4).round(), others.mul(4).round()  # with ties
    higher = (others[:, None] > own).double() + 0.5 * (others[:, None] == own).double()
    assert auroc(own, others) == pytest.approx(higher.mean().item())


def average_precision(positive: list[float], negative: list[float]) -> float:
    """The precision at every positive, going down the scores, averaged; no ties."""
    total = 0.0
    for threshold in positive:
        kept = sum(s >= threshold for s in positive)
        total += kept / (kept + sum(s >= threshold for s in negative))
    return total / len(positive)


def test_aupr_is_the_average_precision_of_the_kind_that_it_names():
    own, others = scores()
    assert aupr_out(own, others) == pytest.approx(average_precision(others.tolist(), own.tolist()))
    assert aupr_in(own, others) == pytest.approx(average_precision((-own).tolist(), (-others).tolist()))


def test_aupr_of_the_two_kinds_swap_when_labels_and_sign_are_swapped():
    own, others = scores()
    assert aupr_in(own, others) == pytest.approx(aupr_out(-others, -own))
    assert aupr_out(own, others) == pytest.approx(aupr_in(-others, -own))
    assert aupr_in(own, others) != pytest.approx(aupr_out(own, others))
    assert auroc(own, others) == pytest.approx(auroc(-others, -own))


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.__name__)
def test_scores_that_are_all_higher_elsewhere_are_perfect(f):
    own, others = torch.rand(10), torch.rand(20) + 1
    assert f(own, others) == pytest.approx(1)
    assert f(others, own) < 0.9


@pytest.mark.parametrize(("f", "value"), [(auroc, 0.5), (aupr_out, 0.75), (aupr_in, 0.25)])
def test_scores_that_are_all_alike_are_chance(f, value):
    assert f(torch.zeros(10), torch.zeros(30)) == value


def test_scores_may_be_of_half_precision_and_require_gradients():
    own, others = scores()
    own_16, others_16 = own.bfloat16().requires_grad_(), others.bfloat16().requires_grad_()
    assert auroc(own_16, others_16) == pytest.approx(auroc(own, others), abs=0.01)


def test_fpr95_is_the_share_that_passes_with_95_percent_of_the_own():
    own, others = torch.arange(100.0), torch.tensor([10.0, 93.9, 94.0, 94.1, 200.0])
    assert fpr95(own, others) == pytest.approx(3 / 5)
    assert fpr95(torch.arange(10.0), torch.tensor([9.0, 9.5])) == pytest.approx(1 / 2)


def draws(confident: float, count: int = 40) -> torch.Tensor:
    return (confident * torch.randn(5, count, 3)).softmax(-1)


def test_the_table_holds_every_measure_of_every_score():
    own, letters, noise = draws(8.0), draws(1.0), draws(0.1, 30)
    table = ood_detection(own, {"letters": letters, "noise": noise})
    assert list(table) == ["letters", "noise"]
    scores = {"entropy": predictive_entropy, "variation ratio": variation_ratio}
    scores |= {"mutual information": mutual_information, "model variance": model_variance}
    for name, others in (("letters", letters), ("noise", noise)):
        assert list(table[name]) == list(scores)
        for score, f in scores.items():
            assert table[name][score] == tuple(measure(f(own), f(others)) for measure in (*ALL, fpr95))
    assert list(ood_detection(own[0], {"noise": noise[0]})["noise"]) == ["entropy", "variation ratio"]
    with pytest.raises(ValueError, match=r"out_probs\['noise'\]: probabilities"):
        ood_detection(own, {"noise": noise[0]})


def test_adversarial_inputs_that_missed_are_counted_apart():
    clean, attacked = draws(8.0), draws(8.0)
    hit = torch.arange(40) % 4 == 0
    attacked[:, hit] = draws(0.1, 10)
    found = adversarial_detection(clean, attacked, hit)
    assert found.hit_share == 0.25
    assert found.hit["entropy"].auroc > 0.9 > found.missed["entropy"].auroc
    mixed = 0.25 * found.hit["entropy"].auroc + 0.75 * found.missed["entropy"].auroc
    assert found.all["entropy"].auroc == pytest.approx(mixed)
    assert adversarial_detection(clean, attacked, torch.ones(40, dtype=torch.bool)).missed is None
    with pytest.raises(ValueError, match=r"hit is .*: a bool for each of the 40"):
        adversarial_detection(clean, attacked, hit[:3])


def test_what_is_no_dict_of_tensors_and_an_attack_on_nothing_are_refused_by_name():
    clean, attacked, hit = draws(8.0), draws(1.0), torch.arange(40) % 4 == 0
    with pytest.raises(ValueError, match="out_probs is a list: a dict from a string to a tensor is needed"):
        ood_detection(clean, [attacked])
    with pytest.raises(ValueError, match=r"out_probs\['noise'\] is a list: give a tensor"):
        ood_detection(clean, {"noise": attacked.tolist()})
    with pytest.raises(ValueError, match="hit is a list: give a tensor"):
        adversarial_detection(clean, attacked, hit.tolist())
    with pytest.raises(ValueError, match="attacked_probs is a list: give a tensor"):
        adversarial_detection(clean, attacked.tolist(), hit)
    with pytest.raises(ValueError, match=r"attacked_probs is \[5, 0, 3\]: .* one attacked input at least"):
        adversarial_detection(clean, attacked[:, :0], hit[:0])

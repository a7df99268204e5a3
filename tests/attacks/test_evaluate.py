"""The table is right, and says when not to believe it."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch import nn

from pyro_advbayes.attacks import APGD, FGSM, PGD, CarliniWagner, FeatureAttack, Square, Uniform, evaluate
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior

ATTACKS = [Uniform(0.1), FGSM(0.1), PGD(0.1, 10), PGD(0.2, 10), PGD(1.0, 10, norm="l2"), CarliniWagner(20, 0.05)]


def no_warning(classifier, x, y, attacks, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return evaluate(classifier, x, y, attacks, **options)


@pytest.mark.parametrize("batch_size", [None, 30])
def test_numbers_are_those_of_the_attacked_inputs(batch_size):
    net = digits_network()
    x, y = digits_examples(120)
    attack = FGSM(0.1)
    report = no_warning(net, x, y, [attack], batch_size=batch_size)
    attacked = attack(net, x, y)
    clean, after = net(x).argmax(-1) == y, net(attacked).argmax(-1) == y
    (result,) = report.results
    assert (result.attack, result.norm, result.eps) == ("FGSM(eps=0.1)", "linf", 0.1)
    share = int(after.sum()) / 120
    assert result.accuracy == pytest.approx(share) and result.std_error == pytest.approx(math.sqrt(share * (1 - share) / 120))
    assert result.success == pytest.approx(int((clean & ~after).sum()) / int(clean.sum()))
    assert result.linf == pytest.approx(float((attacked - x).abs().amax(1).mean()), rel=1e-5)
    assert result.l2 == pytest.approx(float((attacked - x).norm(dim=1).mean()), rel=1e-5)
    assert result.seconds > 0
    assert report.num_inputs == 120 and report.already_wrong == int((~clean).sum()) > 0
    assert report.accuracy == pytest.approx(int(clean.sum()) / 120)
    assert torch.equal(report.clean_right, clean) and torch.equal(report.right[0], after) and report.warnings == []
    assert torch.equal(report.worst_right, clean & after)


def test_the_worst_case_is_taken_input_by_input_within_each_ball():
    net = digits_network()
    x, y = digits_examples(120)
    report = no_warning(net, x, y, ATTACKS)
    assert [(w.norm, w.eps, w.attacks) for w in report.worst] == [("linf", 0.1, 3), ("linf", 0.2, 1), ("l2", 1.0, 1), (None, None, 1)]
    stays = report.clean_right & report.right[:3].all(0)
    assert report.worst[0].accuracy == pytest.approx(float(stays.double().mean()))
    assert report.worst[0].accuracy <= min(r.accuracy for r in report.results[:3])
    assert torch.equal(report.worst_right, report.clean_right & report.right.all(0))


def test_an_input_that_was_wrong_counts_as_it_is_after_the_attack_and_as_wrong_in_the_worst_case():
    """The only class that noise can reach from the wrong one is the right one."""

    class Threshold(nn.Module):
        def forward(self, x):
            return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], -1)

    x, y = torch.tensor([[0.49], [0.99]]), torch.tensor([1, 1])
    for _ in range(20):  # until chance moves the first to where it is right
        report = evaluate(Threshold(), x, y, [Uniform(0.1)])
        if report.right[0, 0]:
            break
    assert report.already_wrong == 1 and report.results[0].accuracy == 1.0 and report.results[0].success == 0.0
    assert report.worst[0].accuracy == 0.5 and report.worst_right.tolist() == [False, True]


def test_a_report_is_a_table_and_plain_values():
    net = digits_network()
    x, y = digits_examples(50)
    report = no_warning(net, x, y, ATTACKS)
    lines = str(report).splitlines()
    assert lines[0].split() == ["attack", "norm", "eps", "accuracy,", "%", "success,", "%", "mean", "linf", "mean", "l2"]
    assert any(line.startswith("FGSM(eps=0.1)") and " linf " in line for line in lines)
    assert any(line.startswith("(worst of 3)") for line in lines)
    assert lines[-1] == f"50 inputs, {report.already_wrong} of them wrong before any attack"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["num_inputs"] == 50 and plain["results"][0]["attack"] == "Uniform(eps=0.1)" and plain["worst"][0]["attacks"] == 3
    assert "right" not in plain


def test_a_posterior_is_evaluated_like_a_network_and_left_as_it_is():
    classifier, _ = posterior(5, dtype=torch.float)
    x, _ = examples(20, dtype=torch.float)
    y = classifier(x).argmax(-1)
    report = no_warning(classifier, x, y, [PGD(0.3, 10), FGSM(0.3), PGD(0.3, 10, objective="mean_loss"), FeatureAttack(0.3, "net.1", 3)])
    assert report.accuracy == 1.0 and report.worst[0].accuracy < 0.9
    assert classifier.training


def test_a_random_classifier_is_warned_of():
    net = nn.Sequential(digits_network(), nn.Dropout(0.5)).train()
    x, y = digits_examples(50)
    with pytest.warns(UserWarning, match=r"the classifier is random.*eot=10"):
        report = evaluate(net, x, y, [FGSM(0.1)])
    assert len(report.warnings) == 1 and "warning: the classifier is random" in str(report)


def test_probabilities_in_the_place_of_logits_are_warned_of():
    net = nn.Sequential(digits_network(), nn.Softmax(-1))
    x, y = digits_examples(50)
    with pytest.warns(UserWarning, match=r"outputs look like probabilities"):
        evaluate(net, x, y, [FGSM(0.1)])


def test_a_saturated_posterior_is_warned_of_and_the_remedy_helps():
    classifier, _ = posterior(5, (64, 32, 10), torch.float)
    net = digits_network()
    for values, trained in zip(classifier.buffers(), net.parameters(), strict=True):
        values.copy_(1000 * trained if len(trained) == 10 else trained + 0.01 * values)
    x, y = digits_examples()
    x, y = (t[classifier(x).argmax(-1) == y] for t in (x, y))
    with pytest.warns(UserWarning, match=r"gradient of the loss 'cross_entropy' \(loss_of_mean\) is exactly zero at (9\d|8\d) of"):
        report = evaluate(classifier, x, y, [PGD(0.1, 10)])
    assert report.results[0].accuracy > 0.7
    helped = no_warning(classifier, x, y, [PGD(0.1, 10, loss="margin"), APGD(0.1, 10, loss="dlr")])
    assert max(result.accuracy for result in helped.results) < 0.5


def test_a_loss_that_is_at_its_top_for_an_input_that_is_wrong_is_no_reason_to_warn():
    """The ratio of logits is 1, whatever they are, where the label is the third best."""
    net = nn.Linear(6, 4)
    x, _ = examples(20, dtype=torch.float)
    y = net(x).argsort(-1)[:, 1]
    y[:2] = net(x[:2]).argmax(-1)
    assert no_warning(net, x, y, [PGD(0.1, 3, loss="dlr")]).already_wrong == 18


def test_gradients_that_mislead_are_found_by_a_gradient_free_attack():
    class Masked(nn.Module):
        """Its gradient is that of another network."""

        def __init__(self):
            super().__init__()
            self.net, self.other = digits_network(), nn.Linear(64, 10)

        def forward(self, x):
            wrong = self.other(x)
            return self.net(x).detach() + wrong - wrong.detach()

    x, y = digits_examples()
    with pytest.warns(UserWarning, match=r"Square\(eps=0.15, queries=200\), which uses no gradient.*gradients are masked"):
        evaluate(Masked(), x, y, [FGSM(0.15), PGD(0.15, 10), Square(0.15, 200)])
    no_warning(Masked(), x, y, [FGSM(0.15), Square(0.2, 200)])  # another ball


def test_nan_that_an_attack_runs_into_is_an_error():
    def breaks(x):
        logits = torch.stack([x[:, 0], 1 - x[:, 0]], -1)
        return torch.where(x[:, :1] > 0.8, torch.nan, logits)

    x, y = torch.tensor([[0.3], [0.7]]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match=r"gives NaN or infinite logits for 1 of 2 inputs, the first in row 1"):
        evaluate(breaks, x, 1 - y, [Uniform(0.05), FGSM(0.2)])


def test_there_is_no_progress_bar_off_a_terminal(capfd):
    x, y = digits_examples(10)
    evaluate(digits_network(), x, y, [FGSM(0.1)])
    assert capfd.readouterr() == ("", "")

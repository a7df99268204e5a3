"""The attacks are those of other libraries, and a posterior is a network to those."""

from __future__ import annotations

import foolbox
import pytest
import torch
import torchattacks
from torch import nn

from pyro_advbayes.attacks import FGSM, IFGSM, MIM, PGD
from tests.attacks.posteriors import digits_examples, digits_network, examples, posterior

EPS = {"linf": 0.1, "l2": 0.7}
THEIRS = {
    ("linf", 1): lambda: foolbox.attacks.LinfFastGradientAttack(),
    ("l2", 1): lambda: foolbox.attacks.L2FastGradientAttack(),
    ("linf", 10): lambda: foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=10, random_start=False),
    ("l2", 10): lambda: foolbox.attacks.L2PGD(rel_stepsize=0.25, steps=10, random_start=False),
}


def of_foolbox(attack, network, x, y, eps):
    model = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    return attack(model, x, y, epsilons=eps)[1]


@pytest.mark.parametrize("objective", ["mean_loss", "loss_of_mean"])
@pytest.mark.parametrize(("norm", "steps"), THEIRS)
def test_fgsm_and_pgd_on_one_draw_are_those_of_foolbox_on_the_network(norm, steps, objective):
    classifier, (network,) = posterior(1)
    x, y = examples(50)
    settings = {"norm": norm, "objective": objective}
    ours = FGSM(EPS[norm], **settings) if steps == 1 else PGD(EPS[norm], steps, random_start=False, **settings)
    expected = of_foolbox(THEIRS[norm, steps](), network, x, y, EPS[norm])
    torch.testing.assert_close(ours(classifier, x, y), expected, rtol=0, atol=1e-12)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize(("norm", "steps"), THEIRS)
def test_foolbox_takes_a_posterior_for_a_network_and_finds_what_we_find(norm, steps):
    """It differentiates the outputs, which is the loss of the mean prediction."""
    classifier, _ = posterior(20, chunk_size=7)
    x, y = examples(50)
    ours = FGSM(EPS[norm], norm=norm) if steps == 1 else PGD(EPS[norm], steps, random_start=False, norm=norm)
    expected = of_foolbox(THEIRS[norm, steps](), classifier, x, y, EPS[norm])
    torch.testing.assert_close(ours(classifier, x, y), expected, rtol=0, atol=1e-10)


def test_torchattacks_takes_a_posterior_for_a_network_and_finds_what_we_find():
    classifier, _ = posterior(20, dtype=torch.float, chunk_size=7)
    classifier.eval()
    x, y = examples(50, dtype=torch.float)
    pairs = [
        (torchattacks.FGSM(classifier, eps=0.1), FGSM(0.1)),
        (torchattacks.BIM(classifier, eps=0.1, alpha=0.02, steps=10), IFGSM(0.1, 10, 0.02)),
        (torchattacks.PGD(classifier, eps=0.1, alpha=0.025, steps=10, random_start=False), PGD(0.1, 10, random_start=False)),
    ]
    for theirs, ours in pairs:
        found, expected = ours(classifier, x, y), theirs(x, y)
        # a gradient of the order of rounding may have another sign
        assert ((found - expected).abs() < 1e-5).double().mean() > 0.999
        assert not torch.equal(found, x)


def test_mim_is_that_of_torchattacks():
    net = digits_network(nn.Tanh)
    x, y = digits_examples(50)
    expected = torchattacks.MIFGSM(net, eps=0.1, alpha=0.02, steps=10, decay=1.0)(x.view(-1, 1, 8, 8), y).view_as(x)
    found = MIM(0.1, 10, 0.02)(net, x, y)
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.999


def test_foolbox_and_torchattacks_run_their_stronger_attacks_on_a_posterior():
    classifier, _ = posterior(20, dtype=torch.float)
    classifier.eval()
    x, y = examples(30, dtype=torch.float)
    y = classifier(x).argmax(-1)
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1))
    for attack in (foolbox.attacks.L2DeepFoolAttack(), foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=3, steps=50)):
        assert bool(attack(model, x, y, epsilons=1.0)[2].any())
    images = nn.Sequential(nn.Flatten(), classifier)
    attacked = torchattacks.APGD(images, eps=0.5, steps=20, loss="dlr")(x.view(-1, 1, 2, 3), y)
    assert (images(attacked).argmax(-1) != y).any()

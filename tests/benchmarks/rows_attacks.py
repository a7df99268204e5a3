"""Rows about the time of an attack on a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_advbayes import PosteriorClassifier
from pyro_advbayes.attacks import PGD, AdversarialDistribution, Attack
from tests.benchmarks.measure import Contender, Missing, Result, Stopwatch, Target
from tests.benchmarks.rows_prediction import draws_of
from tests.benchmarks.rows_sampling import Against, compare
from tests.benchmarks.workloads import LARGE, ROWS, SMALL, Network, data

EPS = 0.1
INPUTS = 500
STEPS = 10  # of the forty that such an attack takes: all that comes before them weighs more, not less
OURS, LOOP, FOOLBOX = "PGD, {}", "loop over draws, {}", "foolbox"
DISTRIBUTION = "distribution"


def _attack(objective: str, steps: int, network: Network, samples: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Contender:
    classifier = PosteriorClassifier(network.model().to(x.device), samples)
    attack = PGD(EPS, steps, random_start=False, objective=objective)
    return Contender(lambda: attack(classifier, x, y), steps)


def _loop(objective: str, steps: int, network: Network, samples: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Contender:
    """As one writes it in PyTorch: draw by draw, each with its own backward pass; the mean's gradient weighs them by their likelihood."""
    net = network.plain().to(x.device)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    draws = len(next(iter(samples.values())))
    weights = [{name: samples[f"net.{name}"][i] for name, _ in net.named_parameters()} for i in range(draws)]

    def call() -> Tensor:
        attacked = x
        for _ in range(steps):
            losses, gradients = [], []
            for weight in weights:
                point = attacked.detach().requires_grad_()
                loss = F.cross_entropy(torch.func.functional_call(net, weight, point), y, reduction="none")
                gradients.append(torch.autograd.grad(loss.sum(), point)[0])
                losses.append(loss.detach())
            if objective == "mean_loss":
                gradient = sum(gradients)
            else:
                share = (-torch.stack(losses)).softmax(0)
                gradient = sum(s.unsqueeze(1) * g for s, g in zip(share, gradients, strict=True))
            attacked = attacked + 2.5 * EPS / steps * gradient.sign()
            attacked = (x + (attacked - x).clamp(-EPS, EPS)).clamp(0, 1)
        return attacked

    return Contender(call, steps)


def _foolbox(steps: int, network: Network, samples: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Contender:
    try:
        import foolbox
    except ImportError as why:
        raise Missing("it is not installed") from why
    classifier = PosteriorClassifier(network.model().to(x.device), samples).eval()
    model = foolbox.PyTorchModel(classifier, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps, random_start=False)
    return Contender(lambda: attack(model, x, y, epsilons=EPS), steps)


def _race(watch: Stopwatch, network: Network, draws: int, target: Target, faster: bool) -> list[Result]:
    steps, draws = (2, 4) if watch.quick else (STEPS, draws)
    samples = draws_of(network, draws, watch.device)
    x, y = (t[:INPUTS] for t in data(network.inputs, network.classes, ROWS, watch.device))
    arguments = steps, network, samples, x, y
    results = []
    for objective in ("mean_loss", "loss_of_mean"):
        ours, loop = OURS.format(objective), LOOP.format(objective)
        makers = {ours: partial(_attack, objective, *arguments), loop: partial(_loop, objective, *arguments)}
        wanted: list[Against] = [(loop, ours, target) if faster else (ours, loop, target)]
        if objective == "loss_of_mean":  # the only one that a library which sees outputs can follow
            makers[FOOLBOX] = partial(_foolbox, *arguments)
            wanted.append((ours, FOOLBOX, Target("<", 1.0)))
        what = f"a step of PGD on {draws} draws of {network.name}, {INPUTS} inputs, {objective}"
        results.append(compare(watch, what, makers, wanted))
    return results


def attack_large(watch: Stopwatch) -> list[Result]:
    """A step of ``PGD`` on a posterior of 784-400-400-10, against a loop over draws, and foolbox on ``PosteriorClassifier``."""
    return _race(watch, LARGE, 50, Target("<=", 1.05), faster=False)


def attack_small(watch: Stopwatch) -> list[Result]:
    """The same on 2-20-20-2 with more draws: times faster than the loop."""
    return _race(watch, SMALL, 200, Target(">=", 5.0), faster=True)


def attack_distribution(watch: Stopwatch) -> list[Result]:
    """A gradient of ``AdversarialDistribution``, its noise and its laws with it, against a gradient of ``PGD``, on 784-400-400-10."""
    gradients, draws = (2, 2) if watch.quick else (STEPS, 10)
    samples = draws_of(LARGE, draws, watch.device)
    x, y = (t[:INPUTS] for t in data(LARGE.inputs, LARGE.classes, ROWS, watch.device))

    def maker(attack: Attack) -> Contender:
        classifier = PosteriorClassifier(LARGE.model().to(x.device), samples)
        return Contender(lambda: attack(classifier, x, y), gradients)

    ours = AdversarialDistribution(EPS, gradients // 2, 2)
    makers = {DISTRIBUTION: partial(maker, ours), "PGD": partial(maker, PGD(EPS, gradients))}
    what = f"a gradient of an attack on {draws} draws of {LARGE.name}, {INPUTS} inputs"
    return [compare(watch, what, makers, [(DISTRIBUTION, "PGD", Target("<=", 1.1))])]

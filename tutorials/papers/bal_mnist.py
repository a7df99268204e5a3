"""
MNIST: Bayesian Adversarial Learning against adversarial training.

After N. Ye and Z. Zhu, Bayesian adversarial learning, NeurIPS 2018, section 6: the convolutional network (dropout left out), inputs in
[0, 1], every method from one network trained on clean images (ERM), then for two more epochs. Attacked by FGSM from 0 to 0.15, by PGD,
by Square, which needs no gradient, and by the authors' one step of a C-W loss; the attacker sees the posterior that the defender
predicts with.

What the authors' code does and this does not:

- Both samplers have the signs, the noise and the scale that their equations should have: U is in nats over all the data.
- The adversary's step size stays; perturbed images are clipped to [0, 1]; no clean term is added to the loss.
- Its "PGD" baseline is one step along a squared gradient. Here PGD is PGD.
- Its trainings move images by less than BAL does. Here they are given the size that BAL's perturbations have, by their mean Euclidean
  length, at which their strength is held as the network changes, and PGD the size of the largest attack as well; the trainings of the
  published sizes are rows of their own.
- BAL updates weights 15 times on a minibatch and has several learners, and so takes far more gradients than any training on as many
  minibatches. One row trains as many networks against PGD apart, until they have taken as many gradients as BAL. Their learning rate stays:
  where it fell to 0, as BAL's does, the one network that was tried, on half of the test images, was less robust.
- Probabilities are averaged, not logits.

The rows of "settings" vary BAL's choices, the first as published, the others one at a time. They have one learner: what they are to be
held beside is the row "BAL, 1 learners".

A row is written to ``bal_mnist-<scale>.json`` when it is finished, and not computed again by the next start; chains that were
interrupted go on from their checkpoint, in ``bal_mnist-<scale>-work/``, and networks that are trained already are not trained again: the
seconds of a row are those of the start that finished it. Processes that are given different rows by ``--only`` may run beside each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from pyro.optim import Adam
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # models/ and tutorials/ are parts of the checkout, not installed

import pyro_advbayes as ab
from models.bal_convnet import bal_convnet
from pyro_advbayes import diagnostics as dg
from pyro_advbayes.attacks import FGSM, IFGSM, PGD, WRM, Attack, OneStepCarliniWagner, Square
from tutorials.papers.bal_tables import EPS, LARGEST, picture, table
from tutorials.papers.experiments import Results, Task, parser, settings

BATCH_SIZE = 256
CLIP = (0.0, 1.0)
LOOKED_AT = 100  # images on which the size of an attack is measured
Draws = dict[str, Tensor]


class Scale(NamedTuple):
    """How much data, and how long things run."""

    num_train: int
    num_test: int
    erm_epochs: int
    minibatches: int  # that every method sees after ERM
    updates: int  # of inputs and of weights, at every minibatch of BAL's
    learners: tuple[int, ...]
    pgd_steps: int  # of the attack
    queries: int  # of Square
    squared: int  # test images that Square is run on


SCALES = {
    "smoke": Scale(300, 20, 2, 2, 1, (1, 2), 2, 3, 20),
    "cpu": Scale(60_000, 2000, 15, 120, 15, (1, 3, 5, 10), 20, 500, 500),
    "paper": Scale(60_000, 10_000, 15, 470, 15, (1, 3, 5, 10), 20, 1000, 1000),
}


class Setting(NamedTuple):
    """BAL's choices; U is in nats, inputs are in [0, 1]."""

    cost: ab.L2 | ab.Box
    step_size: float  # of the inputs
    input_temperature: float = 1e-5
    copies: int = 1
    clean_share: float = 0.0
    temperature: float = 1e-5  # of the weights
    annealed: bool = True  # the weights' step size, by a cosine to 0 at the end


# A step of 30 is a jump to the side of the box wherever the loss has a slope of 0.01 nats per unit. That the weights' steps become small
# is meant to make a last state a good network, without the noise of minibatches, on each of which 15 updates are made; the row
# "constant steps of weights" says what it is worth.
MAIN = Setting(ab.Box(LARGEST), 30.0)
SEARCH = {
    "published cost and steps": Setting(ab.L2(0.0256), 0.13, annealed=False),  # 300 / (4 + 16 + ...) / 256 for the sum over learners
    "constant steps of weights": MAIN._replace(annealed=False),
    "small steps of inputs": MAIN._replace(step_size=1.0),
    "hot inputs": MAIN._replace(input_temperature=1e-4),
    "two copies": MAIN._replace(copies=2),
    "half clean": MAIN._replace(clean_share=0.5),
    "warm weights": MAIN._replace(temperature=1.0),
    "box 0.1": MAIN._replace(cost=ab.Box(0.1)),
    "box 0.2": MAIN._replace(cost=ab.Box(0.2)),
}
PUBLISHED = {"FGSM": FGSM(0.02), "IFGSM": IFGSM(0.021, steps=15), "WRM": WRM(1.3)}


class Found(NamedTuple):
    """A defender: draws, the mean size of the perturbations that it was trained on, and what its sampler says of itself."""

    samples: Draws
    size: dict[str, float] | None
    about: dict[str, Any]


def load(name: str, scale: Scale, data: Path | None, device: str) -> Task:
    """MNIST; at the smallest scale scikit-learn's digits, enlarged, which need no files."""
    if name == "smoke":
        sets = (ab.datasets.digits(split) for split in ("train", "test"))
        sets = [(torch.nn.functional.interpolate(x, (28, 28), mode="bilinear"), y) for x, y in sets]
    else:
        sets = [ab.datasets.mnist(split, data) for split in ("train", "test")]
    (x, y), (x_test, y_test) = sets
    return Task(*(t.to(device) for t in (x[: scale.num_train], y[: scale.num_train], x_test[: scale.num_test], y_test[: scale.num_test])))


def new_model(device: str) -> torch.nn.Module:
    """The network with Normal(0, 1) priors."""
    return bal_convnet(prior=Normal(0.0, 1.0)).to(device)


# ------------------------------------------------------------------------------------------------------------------ defenders


class OfSize:
    """
    An attack whose strength follows a network as it is trained, so that the mean Euclidean length of what it does stays the same.

    :param make: an attack of a strength.
    :param l2: the length.
    """

    def __init__(self, make: Callable[[float], Attack], l2: float, task: Task) -> None:
        self.make, self.l2, self.task, self.strength = make, l2, task, None

    def __call__(self, classifier: ab.PosteriorClassifier) -> Attack:
        """For a network: at first by bisection, then from the strength that the network before had."""
        if self.strength is None:
            low, high = 1e-3, 1e3
            for _ in range(12):
                self.strength = (low * high) ** 0.5
                low, high = (self.strength, high) if self._length(classifier) < self.l2 else (low, self.strength)
        else:
            self.strength *= min(max(self.l2 / self._length(classifier), 0.25), 4.0) ** 0.5
        return self.make(self.strength)

    def _length(self, classifier: ab.PosteriorClassifier) -> float:
        return size_of(self.make(self.strength), classifier, self.task)["l2"]


def point(model: torch.nn.Module, task: Task, minibatches: int, attack: Attack | OfSize | None, start: Draws | None) -> Draws:
    """A MAP estimate, by Adam: on clean images, or on what an attack makes of them."""
    pyro.clear_param_store()
    own = {site: value.clone() for site, value in (start or {}).items()}  # a guide trains the tensors that it was given
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=own) if own else ab.init_to_fan_in)
    first = attack(ab.PosteriorClassifier(model, stacked(start))) if isinstance(attack, OfSize) else attack
    loss = Trace_ELBO() if first is None else ab.TraceRobust_ELBO(first)
    svi = SVI(ab.minibatch(model, size=len(task.x)), guide, Adam({"lr": 1e-3}), loss)
    epochs = -(-minibatches * BATCH_SIZE // len(task.x))
    rows = torch.cat([torch.randperm(len(task.x)) for _ in range(epochs)])[: minibatches * BATCH_SIZE].to(task.x.device)
    for i, batch in enumerate(tqdm(rows.split(BATCH_SIZE), desc="clean images" if first is None else repr(first), disable=None)):
        if i and i % 10 == 0 and isinstance(attack, OfSize):
            loss.attack = attack(ab.PosteriorClassifier(model, {site: value.detach()[None] for site, value in guide().items()}))
        svi.step(task.x[batch], task.y[batch])
    return {site: value.detach().clone() for site, value in guide().items()}


def trained(attack: Attack | OfSize | None, model: torch.nn.Module, task: Task, scale: Scale, start: Draws) -> Found:
    """Training against an attack, from the trained network; without one, that network."""
    if attack is None:
        return Found(stacked(start), None, {})
    samples = stacked(point(model, task, scale.minibatches, attack, start))
    classifier = ab.PosteriorClassifier(model, samples)
    last = attack(classifier) if isinstance(attack, OfSize) else attack
    return Found(samples, size_of(last, classifier, task), {"attack": repr(last)})


def trained_apart(attack: Attack, minibatches: int, count: int, model: torch.nn.Module, task: Task, start: Draws, folder: Path) -> Found:
    """As many networks, each trained against the attack with minibatches of its own; they are kept one by one."""
    networks = []
    for i in range(count):
        path = folder / f"trained-apart-{i}.safetensors"
        if not path.exists():
            pyro.set_rng_seed(i)
            save_file(point(model, task, minibatches, attack, start), path)
        networks.append({site: value.to(task.x.device) for site, value in load_file(path).items()})
    samples = {site: torch.stack([network[site] for network in networks]) for site in networks[0]}
    size = size_of(attack, ab.PosteriorClassifier(model, samples), task)
    return Found(samples, size, {"attack": repr(attack), "networks": count, "minibatches of each": minibatches})


def kernel_of(setting: Setting | None, model: torch.nn.Module, scale: Scale, start: Draws) -> ab.BAL | ab.SGAdaLD:
    """BAL from the trained network. Without a setting there is no adversary: the same sampler of weights, as many updates, clean images."""
    step: float | Callable[[int], float] = 0.015
    if setting is None or setting.annealed:
        step = ab.schedules.Cyclical(0.015, period=scale.minibatches * scale.updates)
    common: dict[str, Any] = {"batch_size": BATCH_SIZE, "init_strategy": init_to_value(values=start)}
    if setting is None:
        return ab.SGAdaLD(model, step, temperature=1e-5, clamp=True, num_steps_per_sample=scale.updates, **common)
    return ab.BAL(
        model,
        "x",
        inputs=ab.SGLD.rule(step_size=setting.step_size, num_steps=scale.updates),
        cost=setting.cost,
        weights=ab.SGAdaLD.rule(step_size=step, num_steps=scale.updates, clamp=True),
        temperature=setting.temperature,
        input_temperature=setting.input_temperature,
        clip=CLIP,
        copies=setting.copies,
        clean_share=setting.clean_share,
        **common,
    )


def sampled(
    setting: Setting | None, learners: int, model: torch.nn.Module, task: Task, scale: Scale, start: Draws, checkpoint: Path
) -> Found:
    """The last states of chains, as in the paper; the chains go on from the checkpoint, if there is one."""
    kernel = kernel_of(setting, model, scale, start)
    if checkpoint.exists():
        mcmc = ab.SGMCMC.resume(checkpoint, kernel, task.x, task.y)
    else:
        files = {"checkpoint": checkpoint, "checkpoint_every": 10, "overwrite": True}
        mcmc = ab.SGMCMC(kernel, num_samples=1, warmup_steps=scale.minibatches - 1, num_chains=learners, **files)
        mcmc.run(task.x, task.y)
    found, about = mcmc.kernel.diagnostics(), {"setting": repr(setting)}
    if setting is not None and not setting.annealed:  # else the last steps are so small that T_eff is T, which it was not on the way
        about |= {"T_eff": max(found["T_eff"].values()), "clamped": found["clamped"]}
    return Found(mcmc.get_samples(), found.get("perturbation"), about)


def stacked(values: Draws) -> Draws:
    """One network as one draw."""
    return {site: value.unsqueeze(0) for site, value in values.items()}


def size_of(attack: Attack, classifier: ab.PosteriorClassifier, task: Task) -> dict[str, float]:
    """How far an attack moves images: the means of the largest change of a pixel and of the Euclidean length."""
    x, y = task.x[:LOOKED_AT], task.y[:LOOKED_AT]
    moved = (attack(classifier, x, y) - x).flatten(1)
    return {"linf": float(moved.abs().amax(1).mean()), "l2": float(torch.linalg.vector_norm(moved, dim=1).mean())}


def methods(scale: Scale, work: Path) -> dict[str, Callable]:
    """From a row's name to a function of ``(model, task, start, l2)`` to a :class:`Found`; l2 is the length of BAL's perturbations."""

    usual = usual_learners(scale)

    def bal(name: str, setting: Setting | None, learners: int) -> Callable:
        checkpoint = work / f"{name}.safetensors"
        return lambda model, task, start, l2: sampled(setting, learners, model, task, scale, start, checkpoint)

    def sized(make: Callable[[float], Attack]) -> Callable:
        def train(model: torch.nn.Module, task: Task, start: Draws, l2: float | None) -> Found:
            if l2 is None:
                raise ValueError(f"this row is trained at the size of BAL's perturbations: first --only 'BAL, {usual} learners'")
            return trained(OfSize(make, l2, task), model, task, scale, start)

        return train

    def as_it_is(attack: Attack | None) -> Callable:
        return lambda model, task, start, l2: trained(attack, model, task, scale, start)

    steps = min(15, scale.pgd_steps)
    largest = PGD(LARGEST, steps=steps)
    equal = scale.minibatches * 2 * scale.updates // (steps + 1)  # minibatches of as many gradients as a learner of BAL's
    apart = f"PGD, eps 0.15, {usual} networks"
    rows = {
        "ERM": as_it_is(None),
        f"BAL, {usual} learners": bal(f"bal-{usual}", MAIN, usual),
        "PGD, eps 0.15": as_it_is(largest),
        "FGSM, size of BAL": sized(FGSM),
        "IFGSM, size of BAL": sized(partial(IFGSM, steps=steps)),
        "WRM, size of BAL": sized(partial(WRM, steps=steps)),
        "PGD, size of BAL": sized(partial(PGD, steps=steps)),
        "BNN": bal("bnn", None, usual),
        apart: lambda model, task, start, l2: trained_apart(largest, equal, usual, model, task, start, work),
    }
    rows |= {f"BAL, {count} learners": bal(f"bal-{count}", MAIN, count) for count in scale.learners if count != usual}
    rows |= {f"{name}, published size": as_it_is(attack) for name, attack in PUBLISHED.items()}
    rows |= {f"settings: {name}": bal(f"settings-{name}", setting, 1) for name, setting in SEARCH.items()}
    return rows


def usual_learners(scale: Scale) -> int:
    """The paper's number where it is among those of the scale."""
    return 5 if 5 in scale.learners else max(scale.learners)


# ------------------------------------------------------------------------------------------------------------------- numbers


def measure(model: torch.nn.Module, samples: Draws, task: Task, scale: Scale) -> dict[str, Any]:
    """Accuracies, each with its binomial error, of the mean prediction."""
    classifier = ab.PosteriorClassifier(model, samples)

    def accuracy(attack: Attack | None, count: int = scale.num_test) -> tuple[float, float]:
        right, x, y = [], task.x_test[:count], task.y_test[:count]
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            attacked = images if attack is None else attack(classifier, images, labels)
            with torch.no_grad():
                right.append(classifier(attacked).exp())
        return tuple(dg.accuracy_under_attack(torch.cat(right), y))

    found: dict[str, Any] = {"FGSM": {str(eps): accuracy(FGSM(eps) if eps else None) for eps in EPS}}
    found["PGD"] = {str(LARGEST): accuracy(PGD(LARGEST, steps=scale.pgd_steps))}
    found["Square"] = {str(LARGEST): accuracy(Square(LARGEST, queries=scale.queries), scale.squared)}
    found["one-step C-W"] = accuracy(OneStepCarliniWagner())
    return found


def first_network(model: torch.nn.Module, task: Task, scale: Scale, seed: int, path: Path) -> Draws:
    """The network that all set out from, trained once."""
    if not path.exists():
        pyro.set_rng_seed(seed)
        minibatches = scale.erm_epochs * -(-len(task.x) // BATCH_SIZE)
        save_file(point(model, task, minibatches, None, None), path)
    return {site: value.to(task.x.device) for site, value in load_file(path).items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, samples and attacks what is not in the file yet; writes the files and prints the table."""
    arguments = parser("Bayesian Adversarial Learning on MNIST.", SCALES, "; cpu: a quarter of the updates")
    arguments.add_argument("--only", nargs="+", metavar="ROW", help="rows to compute, all by default")
    args = arguments.parse_args(argv)
    scale = SCALES[args.scale]
    numbers = {"numbers": scale._asdict(), "eps": EPS, "batch_size": BATCH_SIZE}
    results = Results(args.out / f"bal_mnist-{args.scale}.json", settings(args.scale, args.seed, args.device, **numbers))
    rows = methods(scale, results.work)
    if unknown := sorted(set(args.only or ()) - set(rows)):
        arguments.error(f"--only {', '.join(unknown)}: the rows are {', '.join(rows)}")
    task, model = load(args.scale, scale, args.data, args.device), new_model(args.device)
    for name in tqdm(args.only or rows, desc="BAL on MNIST", disable=None):
        if name not in results:
            start = first_network(model, task, scale, args.seed, results.work / f"start-{args.seed}.safetensors")
            pyro.set_rng_seed(args.seed + 1)
            begin = time.perf_counter()
            bal = results.found.get(f"BAL, {usual_learners(scale)} learners")
            found = rows[name](model, task, start, bal and bal["size"]["l2"])
            seconds = time.perf_counter() - begin
            about = {"size": found.size, "about": found.about, "seconds": seconds}
            results.add(name, {**about, **measure(model, found.samples, task, scale)})
            results.show(picture, rows)
    results.show(picture, rows, last=True)
    ordered = results.in_order(rows)
    print(table(ordered))
    return {"settings": results.settings, "results": ordered}


if __name__ == "__main__":
    main()

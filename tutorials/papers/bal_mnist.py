"""
MNIST: Bayesian Adversarial Learning against adversarial training.

After N. Ye and Z. Zhu, Bayesian adversarial learning, NeurIPS 2018, section 6: the convolutional network (dropout left out), inputs in
[0, 1], every method from one network trained on clean images (ERM), then for two more epochs. Attacked by FGSM from 0 to 0.15, by PGD,
by Square, which needs no gradient, and by the authors' one step of a C-W loss; the attacker sees the posterior that the defender
predicts with.

What the authors' code does and this does not:

- Both samplers have the signs, the noise and the scale that their equations should have: U is in nats over all the data.
- The adversary's step size stays; perturbed images are clipped to [0, 1]; no clean term is added to the loss.
- Its "PGD" baseline is one step along a squared gradient. Here PGD is PGD, at two sizes: the largest of the attacks, and the mean size that
  BAL's own perturbations have.
- Probabilities are averaged, not logits.

Every method's row is written to ``bal_mnist-<scale>.json`` when it is finished, and not computed again by the next start.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from pyro.optim import Adam
from torch import Tensor
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # models/ and tutorials/ are part of the checkout, not of the installed package

import pyro_advbayes as ab
from models.bal_convnet import bal_convnet
from pyro_advbayes import diagnostics as dg
from pyro_advbayes.attacks import FGSM, IFGSM, PGD, WRM, Attack, OneStepCarliniWagner, Square
from tutorials.papers.experiments import Results, settings

EPS = tuple(round(0.15 * i / 9, 4) for i in range(10))
LARGEST = EPS[-1]
BATCH_SIZE = 256
CLIP = (0.0, 1.0)
Draws = dict[str, Tensor]


class Scale(NamedTuple):
    """How much data, and how long things run."""

    num_train: int
    num_test: int
    erm_epochs: int
    epochs: int  # of every method, from ERM
    updates: int  # of inputs and of weights in an iteration of BAL
    learners: tuple[int, ...]
    pgd_steps: int  # of the attack
    queries: int  # of Square


SCALES = {
    "smoke": Scale(300, 40, 2, 1, 1, (1, 2), 2, 3),
    "cpu": Scale(10_000, 1000, 5, 2, 15, (1, 5), 40, 500),
    "paper": Scale(60_000, 10_000, 15, 2, 15, (1, 3, 5, 10), 40, 5000),
}


class Task(NamedTuple):
    """Images ``[N, 1, 28, 28]`` in [0, 1] with their classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load(name: str, scale: Scale, data: Path | None, device: str) -> Task:
    """MNIST; at the smallest scale scikit-learn's digits, enlarged, which need no files."""
    if name == "smoke":
        sets = (ab.datasets.digits(split) for split in ("train", "test"))
        sets = [(torch.nn.functional.interpolate(x, (28, 28), mode="bilinear"), y) for x, y in sets]
    else:
        sets = [ab.datasets.mnist(data, split) for split in ("train", "test")]
    (x, y), (x_test, y_test) = sets
    return Task(*(t.to(device) for t in (x[: scale.num_train], y[: scale.num_train], x_test[: scale.num_test], y_test[: scale.num_test])))


def new_model(device: str) -> torch.nn.Module:
    """The network with Normal(0, 1) priors."""
    return bal_convnet(prior=Normal(0.0, 1.0)).to(device)


def point(model: torch.nn.Module, task: Task, epochs: int, attack: Attack | None, start: Draws | None, lr: float = 1e-3) -> dict:
    """A MAP estimate, by Adam: on clean images, or on what an attack makes of them."""
    pyro.clear_param_store()
    own = {site: value.clone() for site, value in (start or {}).items()}  # a guide trains the tensors that it was given
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=own) if own else ab.init_to_fan_in)
    loss = Trace_ELBO() if attack is None else ab.TraceRobust_ELBO(attack)
    svi = SVI(ab.minibatch(model, size=len(task.x)), guide, Adam({"lr": 1e-3}), loss)
    steps = epochs * math.ceil(len(task.x) / BATCH_SIZE)
    rows = torch.cat([torch.randperm(len(task.x)) for _ in range(epochs + 1)])[: steps * BATCH_SIZE].to(task.x.device)
    for batch in tqdm(rows.split(BATCH_SIZE), desc=repr(attack) if attack else "clean images", disable=None):
        svi.step(task.x[batch], task.y[batch])
    return {site: value.detach().clone() for site, value in guide().items()}


def sampled(make: Callable, model: torch.nn.Module, task: Task, scale: Scale, num_chains: int, start: Draws) -> tuple[dict, dict]:
    """The last states of chains that set out from the trained network, as in the paper; and what the kernel says of itself."""
    iterations = scale.epochs * math.ceil(len(task.x) / BATCH_SIZE)
    kernel = make(model, init_strategy=init_to_value(values=start), batch_size=BATCH_SIZE)
    mcmc = ab.SGMCMC(kernel, num_samples=1, warmup_steps=iterations - 1, num_chains=num_chains)
    mcmc.run(task.x, task.y)
    found = mcmc.kernel.diagnostics()
    about = {"T_eff": max(found["T_eff"].values()), "clamped": found["clamped"], "perturbation": found.get("perturbation")}
    return mcmc.get_samples(), about


def bal(scale: Scale) -> Callable:
    """The paper's adversary, in the units of U: its cost is a squared distance."""

    def make(model: torch.nn.Module, **options: Any) -> ab.BAL:
        inputs = ab.SGLD.rule(step_size=0.13, num_steps=scale.updates)  # 300 / (4 + 16 + ...) / 256, of five learners' sum
        weights = ab.SGAdaLD.rule(step_size=0.015, num_steps=scale.updates, clamp=True)
        return ab.BAL(model, "x", inputs=inputs, cost=ab.L2(1e-4 * BATCH_SIZE), weights=weights, clip=CLIP, **options)

    return make


def boxed(scale: Scale, radius: float) -> Callable:
    """BAL with the box of its defaults in the place of the penalty."""

    def make(model: torch.nn.Module, **options: Any) -> ab.BAL:
        inputs = ab.SGLD.rule(step_size=1.0, num_steps=scale.updates)
        weights = ab.SGAdaLD.rule(step_size=0.015, num_steps=scale.updates, clamp=True)
        return ab.BAL(model, "x", inputs=inputs, cost=ab.Box(radius), weights=weights, clip=CLIP, **options)

    return make


def bnn(scale: Scale) -> Callable:
    """The same sampler of weights without an adversary, as many updates."""

    def make(model: torch.nn.Module, **options: Any) -> ab.SGAdaLD:
        return ab.SGAdaLD(model, step_size=0.015, temperature=1e-5, clamp=True, num_steps_per_sample=scale.updates, **options)

    return make


def measure(model: torch.nn.Module, samples: Draws, task: Task, scale: Scale) -> dict[str, Any]:
    """Accuracies, each with its binomial error, of the mean prediction."""
    classifier = ab.PosteriorClassifier(model, samples)
    x, y = task.x_test, task.y_test

    def accuracy(attack: Attack | None) -> tuple[float, float]:
        right = []
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            attacked = images if attack is None else attack(classifier, images, labels)
            with torch.no_grad():
                right.append(classifier(attacked).exp())
        return tuple(dg.accuracy_under_attack(torch.cat(right), y))

    found: dict[str, Any] = {"FGSM": {str(eps): accuracy(FGSM(eps) if eps else None) for eps in EPS}}
    found["PGD"] = {str(LARGEST): accuracy(PGD(LARGEST, steps=scale.pgd_steps))}
    found["Square"] = {str(LARGEST): accuracy(Square(LARGEST, queries=scale.queries))}
    found["one-step C-W"] = accuracy(OneStepCarliniWagner())
    return found


def methods(scale: Scale, size: float) -> dict[str, Callable]:
    """From the name of a row to a function of ``(model, task, start)`` to draws and what is to be said about them; BAL's come first."""

    def trained(attack: Attack) -> Callable:
        return lambda model, task, start: (stacked(point(model, task, scale.epochs, attack, start)), {})

    most = max(scale.learners)
    usual = 5 if 5 in scale.learners else most
    rows: dict[str, Callable] = {
        f"BAL, {count} learners": lambda model, task, start, count=count: sampled(bal(scale), model, task, scale, count, start)
        for count in scale.learners
    }
    rows["BAL, box 0.15"] = lambda model, task, start: sampled(boxed(scale, LARGEST), model, task, scale, usual, start)
    rows["BNN"] = lambda model, task, start: sampled(bnn(scale), model, task, scale, usual, start)
    return rows | {
        "ERM": lambda model, task, start: (stacked(start), {}),
        "FGSM": trained(FGSM(0.02)),
        "IFGSM": trained(IFGSM(0.021, steps=15)),
        "WRM": trained(WRM(1.3)),
        "PGD, 0.15": trained(PGD(LARGEST, steps=min(15, scale.pgd_steps))),
        "PGD, size of BAL's": trained(PGD(max(size, 1e-3), steps=min(15, scale.pgd_steps))),
    }


def stacked(values: Draws) -> Draws:
    """One network as one draw."""
    return {site: value.unsqueeze(0) for site, value in values.items()}


def picture(rows: dict[str, Any], path: Path) -> None:
    """Accuracy under FGSM against its size."""
    curves = {}
    for name, row in rows.items():
        values, errors = zip(*(row["FGSM"][str(eps)] for eps in EPS), strict=True)
        curves[name] = dg.AccuracyCurve(*(torch.tensor(column) for column in (EPS, values, errors)))
    figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    dg.plot_accuracy_curves(curves, xlabel="FGSM's eps", ax=ax)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """A line for each method."""
    lines = [f"{'':22}{'clean':>14}{'FGSM .15':>14}{'PGD .15':>14}{'Square .15':>14}{'C-W step':>14}{'seconds':>9}"]
    for name, row in rows.items():
        numbers = (
            row["FGSM"]["0.0"],
            row["FGSM"][str(LARGEST)],
            row["PGD"][str(LARGEST)],
            row["Square"][str(LARGEST)],
            row["one-step C-W"],
        )
        lines.append(f"{name:22}" + "".join(f"{value:>8.4f}±{error:.3f}" for value, error in numbers) + f"{row['seconds']:9.0f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, samples and attacks what is not in the file yet; writes the files and prints the table."""
    parser = argparse.ArgumentParser(description="Bayesian Adversarial Learning on MNIST.")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="smoke: only to see that everything runs; cpu: a sixth of the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of MNIST's; by default PYRO_ADVBAYES_DATA")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the files")
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    numbers = {"numbers": scale._asdict(), "eps": EPS, "batch_size": BATCH_SIZE}
    results = Results(args.out / f"bal_mnist-{args.scale}.json", settings(args.scale, args.seed, args.device, **numbers))
    task, model, size = load(args.scale, scale, args.data, args.device), new_model(args.device), 0.0
    start: Draws | None = None
    names = list(methods(scale, size))
    for name in tqdm(names, desc="BAL on MNIST", disable=None):
        if name not in results:
            if start is None:  # the same for all, whenever they are computed
                pyro.set_rng_seed(args.seed)
                start = point(model, task, scale.erm_epochs, None, None)
            pyro.set_rng_seed(args.seed + 1)
            begin = time.perf_counter()
            samples, about = methods(scale, size)[name](model, task, start)
            seconds = time.perf_counter() - begin
            results.add(name, {"about": about, **measure(model, samples, task, scale), "seconds": seconds})
        if name == f"BAL, {5 if 5 in scale.learners else max(scale.learners)} learners":
            size = results.found[name]["about"]["perturbation"]["linf"]
    ordered = {name: results.found[name] for name in names}
    picture(ordered, results.path.with_suffix(".png"))
    print(table(ordered))
    return {"settings": results.settings, "results": ordered}


if __name__ == "__main__":
    main()

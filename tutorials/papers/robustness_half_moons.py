"""
Half moons: how accuracy and robustness of Bayesian neural networks depend on width, data and inference.

After G. Carbone et al., Robustness of Bayesian neural networks to gradient-based attacks, NeurIPS 2020. Networks 2-w-w-2 with leaky ReLU
and Normal(0, 1) priors are inferred from n points, by Hamiltonian Monte Carlo (Pyro's own kernel), by variational inference, by SGLD, and
by SGD as a single network; each is attacked as one classifier, its mean prediction, with the draws it predicts with. The paper's grid is
``--scale paper``: 30 000 points of noise 0.1, scaled to [0, 1] by their common range, 80 % of them to learn from; w = 32, 128, 256, 512;
n = 5 000, 10 000, 15 000; 250 draws of HMC after 100, 200 or 500 of warm-up.

What the published code does and this does not:

- Losses and attacks see log-probabilities; no second softmax is applied to probabilities, nor in the softmax robustness, which it kept
  above 0.538 for two classes.
- PGD's step is 2.5 eps / steps from a random start, not larger than the ball.
- The likelihood of a minibatch is scaled to all the data, so that variational inference and SGLD have the posterior at temperature 1.
- HMC sees all the data at once; its draws are one chain's, none twice.
- Attack and evaluation use the same fixed draws: nothing is gained by drawing anew. Gradients of the mean loss and of the mean prediction
  are both followed, and compared with random points and with Square, which needs no gradient.
- A step size of 0.001 with 10 steps is a trajectory, which Pyro keeps while it adapts the step, down to a single step: here the number
  of leapfrog steps is kept.

Every cell of the grid is written to ``robustness_half_moons-<scale>.json`` when it is finished, and not computed again by the next start.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import arviz as az
import matplotlib.pyplot as plt
import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import MCMC, SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc import HMC
from pyro.optim import SGD, ClippedAdam
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # models/ and tutorials/ are parts of the checkout, not installed

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes import diagnostics as dg
from pyro_advbayes.attacks import FGSM, PGD, Attack, Square, Uniform
from tutorials.papers.experiments import Results, Task, parser, settings

EPS = (0.025, 0.05, 0.1, 0.15)
SHOWN_EPS = 0.1  # in the scatter plot
SHOWN_ATTACK = "PGD, mean loss"
LEAST_ACCURACY = 0.7  # networks below it are not plotted, as in the paper
BATCH_SIZE = 128


class Scale(NamedTuple):
    """The grid, and how long things run."""

    total: int  # points, 80 % of them to learn from
    widths: tuple[int, ...]
    num_data: tuple[int, ...]
    attacked: int  # test points
    draws: int  # of a posterior
    hmc_warmup: tuple[int, ...]
    leapfrog_steps: int
    sgld: tuple[int, int]  # samples of warm-up, updates per sample
    svi_steps: int
    sgd_steps: int
    pgd_steps: int
    queries: int  # of Square


SCALES = {
    "smoke": Scale(400, (8,), (100,), 20, 8, (8,), 3, (8, 5), 60, 300, 5, 10),
    "cpu": Scale(30_000, (8, 32, 128), (250, 1000, 4000), 100, 100, (100,), 30, (200, 50), 2000, 2000, 40, 100),
    "paper": Scale(30_000, (32, 128, 256, 512), (5_000, 10_000, 15_000), 100, 250, (100, 200, 500), 10, (250, 100), 5000, 5000, 40, 1000),
}


class Cell(NamedTuple):
    """One network of the grid."""

    inference: str
    width: int
    num_data: int
    warmup: int | None = None  # in samples; of HMC, where it is part of the grid

    @property
    def name(self) -> str:
        """Its key in the file."""
        return "-".join([self.inference, f"w{self.width}", f"n{self.num_data}", *([f"warmup{self.warmup}"] if self.warmup else [])])


class FixedLengthHMC(HMC):
    """Pyro's HMC with a fixed number of leapfrog steps, whatever the step size becomes."""

    def __init__(self, model: Any, num_steps: int, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._leapfrog_steps = num_steps

    @property
    def num_steps(self) -> int:
        """Leapfrog steps of a sample."""
        return self._leapfrog_steps


def load(scale: Scale, device: str) -> Task:
    """The moons of the paper, always the same points."""
    x, y = ab.datasets.two_moons(scale.total, noise=0.1, seed=0)
    x = ((x - x.min()) / (x.max() - x.min())).to(device)
    split = int(0.8 * scale.total)
    y = y.to(device)
    return Task(x[:split], y[:split], x[split:], y[split:])


def grid(scale: Scale) -> list[Cell]:
    """All cells, small ones first."""
    cells = []
    for width, num_data in product(scale.widths, scale.num_data):
        cells += [Cell(inference, width, num_data) for inference in ("SGD", "VI", "SGLD")]
        cells += [Cell("HMC", width, num_data, warmup) for warmup in scale.hmc_warmup]
    return cells


def new_model(width: int, device: str) -> torch.nn.Module:
    """2-width-width-2 with leaky ReLU. The prior takes values that are no numbers: HMC rejects trajectories that end there."""
    return mlp((2, width, width, 2), activation=torch.nn.LeakyReLU, prior=Normal(0.0, 1.0, validate_args=False)).to(device)


def sgd(model: torch.nn.Module, data: tuple[Tensor, Tensor], cell: Cell, scale: Scale) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One network, at a learning rate of 0.01 for the mean loss: the prior is its weight decay."""
    optim = SGD({"lr": 0.01 / cell.num_data, "momentum": 0.9})
    return ab.deep_ensemble(
        model, data, num_members=1, num_steps=scale.sgd_steps, optim=optim, batch_size=min(BATCH_SIZE, cell.num_data)
    ), {}


def vi(model: torch.nn.Module, data: tuple[Tensor, Tensor], cell: Cell, scale: Scale) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draws of a mean-field normal; the learning rate ends at a tenth."""
    pyro.clear_param_store()
    guide = AutoNormal(model, init_loc_fn=ab.init_to_fan_in, init_scale=0.05)
    optim = ClippedAdam({"lr": 0.01, "lrd": 0.1 ** (1 / scale.svi_steps), "clip_norm": math.inf})
    svi = SVI(ab.minibatch(model, size=cell.num_data), guide, optim, TraceMeanField_ELBO())
    x, y = data
    losses = []
    for _ in tqdm(range(scale.svi_steps), desc=cell.name, disable=None):
        rows = torch.randperm(cell.num_data, device=x.device)[:BATCH_SIZE]
        losses.append(svi.step(x[rows], y[rows]))
    last = losses[-max(1, len(losses) // 10) :]
    classifier = ab.PosteriorClassifier(model, guide=guide, num_samples=scale.draws)
    return classifier.posterior_samples, {"negative ELBO per point": sum(last) / len(last) / cell.num_data}


def sgld(model: torch.nn.Module, data: tuple[Tensor, Tensor], cell: Cell, scale: Scale) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One chain, its step found by itself."""
    warmup, updates = scale.sgld
    kernel = ab.SGLD(model, batch_size=min(BATCH_SIZE, cell.num_data), num_steps_per_sample=updates)
    mcmc = ab.SGMCMC(kernel, num_samples=scale.draws, warmup_steps=warmup)
    mcmc.run(*data)
    found = mcmc.kernel.diagnostics()
    return mcmc.get_samples(), {"step size": found["step size"], "T_eff": max(found["T_eff"].values())}


def hmc(model: torch.nn.Module, data: tuple[Tensor, Tensor], cell: Cell, scale: Scale) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One chain of Pyro's kernel, which adapts its step size and diagonal mass matrix in warm-up."""
    kernel = FixedLengthHMC(model, scale.leapfrog_steps, step_size=0.001, init_strategy=ab.init_to_fan_in)
    log: dict[str, str] = {}
    mcmc = MCMC(
        kernel,
        num_samples=scale.draws,
        warmup_steps=cell.warmup,
        disable_progbar=not sys.stderr.isatty(),
        hook_fn=lambda kernel, *_: log.update(kernel.logging()),
    )
    mcmc.run(*data)
    return mcmc.get_samples(), {"step size": float(log["step size"]), "acceptance": float(log["acc. prob"])}


INFERENCE = {"SGD": sgd, "VI": vi, "SGLD": sgld, "HMC": hmc}


def attacks(eps: float, scale: Scale) -> dict[str, Attack]:
    """What every classifier meets: the paper's three, the other objective, and one without gradients."""
    return {
        "random": Uniform(eps),
        "FGSM, mean loss": FGSM(eps, objective="mean_loss"),
        "PGD, mean loss": PGD(eps, steps=scale.pgd_steps, objective="mean_loss"),
        "PGD, loss of mean": PGD(eps, steps=scale.pgd_steps),
        "Square": Square(eps, queries=scale.queries),
    }


def measure(model: torch.nn.Module, samples: dict[str, Tensor], task: Task, cell: Cell, scale: Scale) -> dict[str, Any]:
    """Accuracy on all test points; under attack, accuracy, robustness and gradients of the first of them."""
    classifier = ab.PosteriorClassifier(model, samples)
    with torch.no_grad():
        accuracy = dg.accuracy_under_attack(classifier(task.x_test).exp(), task.y_test)
        x, y = task.x_test[: scale.attacked], task.y_test[: scale.attacked]
        clean = classifier(x).exp()
    found: dict[str, Any] = {"accuracy": accuracy, "attacked accuracy": dg.accuracy_under_attack(clean, y), "attacks": {}}
    for eps in EPS:
        for name, attack in attacks(eps, scale).items():
            with torch.no_grad():
                attacked = classifier(attack(classifier, x, y)).exp()
            numbers = {"accuracy": dg.accuracy_under_attack(attacked, y), "robustness": dg.softmax_robustness(clean, attacked)}
            found["attacks"].setdefault(name, {})[str(eps)] = numbers
    if classifier.num_samples > 1:
        order = torch.randperm(classifier.num_samples, device=x.device)  # neighbours in a chain are alike
        norms = dg.gradient_norms(loss_gradients(model, {site: value[order] for site, value in samples.items()}, x, y))
        found["gradients"] = {"draws": norms.draws.tolist(), "share falling": norms.share_falling}
        for name in ("linf", "l2", "l2_by_chance"):
            values = getattr(norms, name)
            found["gradients"][name] = [[row.mean().item(), (row.std() / math.sqrt(len(row))).item()] for row in values]
    if cell.inference in ("SGLD", "HMC"):
        found["ess"] = effective_size(classifier, x, y)
    return found


def loss_gradients(model: torch.nn.Module, samples: dict[str, Tensor], x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The gradient of each draw's cross-entropy, ``[1, N, 2]`` at a time."""
    x = x.clone().requires_grad_()
    for log_probs in ab.PosteriorClassifier(model, samples, chunk_size=1).log_probs(x):
        (gradient,) = torch.autograd.grad(torch.nn.functional.nll_loss(log_probs[0], y, reduction="sum"), x)
        yield gradient[None]


@torch.no_grad()
def effective_size(classifier: ab.PosteriorClassifier, x: Tensor, y: Tensor) -> dict[str, float]:
    """Bulk effective sample size of the predicted probability of the true class, over the attacked points."""
    probs = torch.cat(list(classifier.log_probs(x)))[:, torch.arange(len(y)), y].exp()
    ess = az.ess(az.convert_to_dataset({"p": probs.double().cpu().numpy()[None]}))["p"].values
    return {"min": float(ess.min()), "median": float(sorted(ess)[len(ess) // 2])}


def run(cell: Cell, task: Task, scale: Scale, seed: int, device: str) -> dict[str, Any]:
    """One cell, from its own seed: the same numbers whatever was computed before."""
    pyro.set_rng_seed(seed)
    model = new_model(cell.width, device)
    data = task.x[: cell.num_data], task.y[: cell.num_data]
    start = time.perf_counter()
    samples, about = INFERENCE[cell.inference](model, data, cell, scale)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = measure(model, samples, task, cell, scale)
    return {**cell._asdict(), "inferred": about, **found, "seconds": {"inference": seconds, "measuring": time.perf_counter() - start}}


def picture(cells: dict[str, Any], path: Path) -> None:
    """Robustness against accuracy; then, of the largest networks, accuracy against eps and gradients against draws."""
    shown = [cell for cell in cells.values() if cell["accuracy"][0] >= LEAST_ACCURACY]
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    axes[2].plot([], [])  # the colour of SGD, which has one draw and no such curve
    points, curves, norms = {}, {}, {}
    for inference in INFERENCE:
        family = [cell for cell in shown if cell["inference"] == inference]
        if family:
            pairs = [(cell["accuracy"][0], cell["attacks"][SHOWN_ATTACK][str(SHOWN_EPS)]["robustness"][0]) for cell in family]
            points[inference] = tuple(torch.tensor(column) for column in zip(*pairs, strict=True))
            largest = max(family, key=lambda cell: (cell["width"], cell["num_data"], cell["warmup"] or 0))
            curves[inference] = curve(largest)
            if "gradients" in largest:
                found = largest["gradients"]
                means = (torch.tensor(found[name])[:, :1] for name in ("linf", "l2", "l2_by_chance"))
                norms[inference] = dg.GradientNorms(torch.tensor(found["draws"]), *means)
    for plot, values, ax, title in (
        (dg.plot_accuracy_robustness, points, axes[0], f"{SHOWN_ATTACK}, eps = {SHOWN_EPS}"),
        (dg.plot_accuracy_curves, curves, axes[1], f"{SHOWN_ATTACK}, widest network, most data"),
        (dg.plot_gradient_norms, norms, axes[2], "widest network, most data"),
    ):
        if values:
            plot(values, ax=ax)
        ax.set_title(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def curve(cell: dict[str, Any]) -> dg.AccuracyCurve:
    """Accuracy against eps, from what the file holds."""
    numbers = [cell["attacked accuracy"], *(cell["attacks"][SHOWN_ATTACK][str(eps)]["accuracy"] for eps in EPS)]
    values, errors = zip(*numbers, strict=True)
    return dg.AccuracyCurve(torch.tensor([0.0, *EPS]), torch.tensor(values), torch.tensor(errors))


def table(cells: dict[str, Any]) -> str:
    """A line for each cell."""
    lines = [f"{'':28} accuracy  {SHOWN_ATTACK}, eps {SHOWN_EPS}: accuracy  robustness  seconds"]
    for name, cell in cells.items():
        numbers = cell["attacks"][SHOWN_ATTACK][str(SHOWN_EPS)]
        columns = (f"{value:.3f} ± {error:.3f}" for value, error in (cell["accuracy"], numbers["accuracy"], numbers["robustness"]))
        lines.append(f"{name:28} {'  '.join(columns)}  {sum(cell['seconds'].values()):.0f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Goes through the grid, writes the files and prints the table."""
    args = parser("Robustness of Bayesian neural networks on half moons.", SCALES, "; cpu: a small grid", data=False).parse_args(argv)
    scale = SCALES[args.scale]
    known = {"grid": scale._asdict(), "eps": EPS, "batch_size": BATCH_SIZE, "prior": "Normal(0, 1)"}
    results = Results(args.out / f"robustness_half_moons-{args.scale}.json", settings(args.scale, args.seed, args.device, **known))
    task = load(scale, args.device)
    for cell in tqdm([cell for cell in grid(scale) if cell.name not in results], desc="half moons", disable=None):
        results.add(cell.name, run(cell, task, scale, args.seed, args.device))
    picture(results.found, results.path.with_suffix(".png"))
    print(table(results.found))
    return {"settings": results.settings, "results": results.found}


if __name__ == "__main__":
    main()

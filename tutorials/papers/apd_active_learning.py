"""
MNIST: which labels to ask for, by the uncertainty of SGLD's draws and of what they are distilled into.

After K.-C. Wang et al., Adversarial distillation of Bayesian neural network posteriors, ICML 2018, section 5.3: two labels of each digit
at the start, ten more in every round, weights started anew in each; full-batch SGLD at the paper's temperature, which is 1/1000: the
authors' code divides the variance of the noise by 1000. Predictions are means over 50 draws, or over as many as there are.

Where this differs from the authors' code:

- The posterior is that of several chains, started apart. At so low a temperature the draws of one chain agree, and the entropy of their
  mean is that of a single network, which asks for the same kind of image ten times in a round. The authors' draws differ by dropout, too.
- The network is a smaller one: images are halved, and there are two convolutions with GroupNorm where they have six with BatchNorm.
- Its weight decay is that of the paper's other networks for MNIST, 0.001. With 0.05 this one, which has no BatchNorm to undo it, learns
  less from 20 labels the longer it is trained. Chains that are a tenth as long have four times the paper's learning rate. What is not
  fitted well is unsure of whole classes, and the entropy asks for nothing else: from 20 to 200 labels that are asked for so, chains a third
  shorter and with the paper's learning rate came to 87 % (one seed). Settings were tried on 1000 images of the training split; that several
  chains of this network would do was first seen with five networks trained by Adam, on the test images of one seed.
- In each round ten images of the pool for each label, drawn anew, are looked at, at the scale of a CPU. The ten that are most uncertain
  among thousands are of one kind, and a round of them teaches little while there are few labels: with 100 of them, networks had 89 % to
  90 % right where they were chosen among 200 or 500 images, 86 % where they were chosen among 2000, and 86 % where they were random
  (one seed). The authors look at the whole pool, and so does the largest scale.
- APD is the factored generator that keeps the codes of the draws: five clusters of draws are little to train a network on.

A curve is written to ``apd_active_learning-<scale>.json`` when it is finished, and not computed again by the next start; one that was
interrupted goes on from its last round, in ``apd_active_learning-<scale>-work/``. Processes that are given different curves by ``--only``
may run beside each other.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # models/ and tutorials/ are parts of the checkout, not installed

import pyro_advbayes as ab
from pyro_advbayes import diagnostics as dg
from pyro_advbayes.infer.distill import APD, FactoredGenerator
from pyro_advbayes.nn import Classifier, bayesianize
from tutorials.papers.experiments import Results, parser, settings

RANGE = (-1.0, 1.0)
WEIGHT_DECAY, TEMPERATURE = 1e-3, 1e-3
DRAWS = 50
RANK = 8
CURVES = ("SGLD, entropy", "SGLD, random", "SGLD, bald", "APD, entropy")  # a posterior, and what is asked for by it


class Scale(NamedTuple):
    """How much is asked for, and how long chains are."""

    num_rounds: int
    candidates: int
    num_test: int
    lr: float
    updates: int  # of a chain
    warmup: int
    every: int  # updates between two draws
    seeds: int
    width: int  # of the network: channels of its first layer
    chains: int


SCALES = {
    "smoke": Scale(1, 60, 40, 0.05, 24, 4, 1, 1, width=8, chains=2),
    "cpu": Scale(18, 100, 2000, 0.2, 300, 200, 5, 3, width=16, chains=5),
    "paper": Scale(50, 50_000, 10_000, 0.05, 3000, 500, 5, 3, width=48, chains=5),
}


def load(name: str, scale: Scale, data: Path | None, device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pool and test data ``[N, 1, 28, 28]``; at the smallest scale scikit-learn's digits, enlarged, which need no files."""
    if name == "smoke":
        sets = [ab.datasets.digits(split, scale=RANGE) for split in ("train", "test")]
        (x, y), (x_test, y_test) = ((interpolate(x, (28, 28), mode="bilinear"), y) for x, y in sets)
    else:
        (x, y), (x_test, y_test) = (ab.datasets.mnist(split, data, scale=RANGE) for split in ("train", "test"))
    count = scale.num_test
    return (x.to(device), y.to(device)), (x_test[:count].to(device), y_test[:count].to(device))


def new_network(width: int) -> nn.Sequential:
    """From images ``[N, 1, 28, 28]`` to logits ``[N, 10]``."""
    return nn.Sequential(
        *(nn.AvgPool2d(2), nn.Conv2d(1, width, 3), nn.GroupNorm(width // 4, width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3), nn.GroupNorm(width // 2, 2 * width), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * width, 10)),
    )


def fitted(x: Tensor, y: Tensor, posterior: str, scale: Scale) -> ab.PosteriorClassifier:
    """Chains on the labels so far, or what they are distilled into."""
    networks = [new_network(scale.width).to(x.device) for _ in range(scale.chains)]
    starts = {
        f"net.{name}": torch.stack([net.get_parameter(name).detach() for net in networks]) for name, _ in networks[0].named_parameters()
    }
    model = Classifier(bayesianize(networks[0], ab.weight_decay_prior(WEIGHT_DECAY, len(x))))  # of a mean over so many labels
    kernel = ab.SGLD(model, step_size=scale.lr / (2 * len(x)), temperature=TEMPERATURE, num_steps_per_sample=scale.every)
    lengths = (scale.updates - scale.warmup) // scale.every, scale.warmup // scale.every, scale.chains
    mcmc = ab.SGMCMC(kernel, *lengths, initial_params=starts, disable_progbar=True)
    mcmc.run(x, y)
    samples = mcmc.get_samples()  # of one chain after the other
    kept = len(next(iter(samples.values())))
    if posterior == "APD":
        guide = ab.AutoImplicit(model, FactoredGenerator(RANK, hidden=None))
        APD(guide, batch_size=min(256, kept), disable_progbar=True).fit(samples, x, y)
        return ab.PosteriorClassifier(model, guide.sample(DRAWS))
    places = torch.linspace(0, kept - 1, min(DRAWS, kept)).round().long().to(x.device)
    return ab.PosteriorClassifier(model, {site: value[places] for site, value in samples.items()})


def curves(rows: dict[str, Any]) -> dict[str, dg.LearningCurve]:
    """Of each posterior and acquisition, over the seeds that there are."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        found.setdefault(name.rsplit(", ", 1)[0], []).append(row)
    return {
        name: dg.LearningCurve(torch.tensor(seeds[0]["num_labels"]), torch.tensor([row["accuracy"] for row in seeds]))
        for name, seeds in found.items()
    }


def picture(rows: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of labels."""
    figure, ax = plt.subplots(figsize=(9, 6.5), layout="constrained")
    dg.plot_learning_curves(curves(rows), ax=ax)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows: dict[str, Any]) -> str:
    """Mean accuracy and its standard error at some numbers of labels."""
    lines = []
    for name, curve in curves(rows).items():
        chosen = range(0, len(curve.num_labels), max(1, len(curve.num_labels) // 6))
        cells = [f"{int(curve.num_labels[i]):5}: {100 * curve.mean[i]:.2f}±{100 * curve.error[i]:.2f}" for i in chosen]
        lines.append(f"{name:24}" + "".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the curves that are not in the file yet; writes the files and prints the table."""
    arguments = parser("Active learning on MNIST with SGLD and with Adversarial Posterior Distillation.", SCALES)
    arguments.add_argument("--only", nargs="+", choices=CURVES, default=CURVES, help="curves to compute: all by default")
    args = arguments.parse_args(argv)
    scale = SCALES[args.scale]
    numbers = {"numbers": scale._asdict(), "weight_decay": WEIGHT_DECAY, "temperature": TEMPERATURE, "draws": DRAWS}
    results = Results(args.out / f"apd_active_learning-{args.scale}.json", settings(args.scale, args.seed, args.device, **numbers))
    pool, test = load(args.scale, scale, args.data, args.device)
    options = {"num_rounds": scale.num_rounds, "per_round": 10, "per_class": 2, "candidates": scale.candidates}
    names = [f"{curve}, seed {args.seed + i}" for i in range(scale.seeds) for curve in CURVES]
    chosen = [(name, *name.split(", ")) for name in names if name.rsplit(", ", 1)[0] in args.only]
    for name, posterior, acquisition, seed in tqdm(chosen, desc="active learning", disable=None):
        if name not in results:
            begin = time.perf_counter()
            curve = ab.active_learning(
                lambda x, y, posterior=posterior: fitted(x, y, posterior, scale),
                pool,
                test,
                acquisition=acquisition,
                seed=int(seed.removeprefix("seed ")),
                path=results.work / f"{name}.safetensors",
                **options,
            )
            row = {"num_labels": curve.num_labels.tolist(), "accuracy": curve.accuracy[0].tolist()}
            results.add(name, {**row, "seconds": time.perf_counter() - begin})
            results.show(picture, names)
    results.show(picture, names, last=True)
    found = results.in_order(names)
    print(table(found))
    return {"settings": results.settings, "results": found}


if __name__ == "__main__":
    main()

"""
The picture of the front page: one network and a posterior, asked about clothing and about something that they have never seen.

Both learn from 2000 images of Fashion-MNIST. MNIST's digits are out-of-distribution: no answer can be right, so that a good model should be
unsure. From a checkout::

    python tutorials/front_page.py --data FOLDER        # FOLDER holds FashionMNIST and MNIST; or PYRO_ADVBAYES_DATA names it

writes ``docs/front-page.png`` and ``docs/front-page.json``, from which the front page's numbers are taken.
"""

from __future__ import annotations

import argparse
import json
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
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a checkout need not be installed

import pyro_advbayes as ab
from pyro_advbayes import diagnostics as dg

HIDDEN = 200
PRIOR = ab.nn.FanIn(scale=2.0, bias_scale=0.5)


class Task(NamedTuple):
    """Standardised images ``[N, 784]``: to learn from, to test on, and out-of-distribution ones."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    x_out: Tensor


def load(root: Path | None, count: int) -> Task:
    """The first images of each set, centred by the training images' mean and divided by their standard deviation."""
    train, test, digits = (
        ab.datasets.fashion_mnist("train", root, flatten=True),
        ab.datasets.fashion_mnist("test", root, flatten=True),
        ab.datasets.mnist("test", root, flatten=True),
    )
    x = train.x[:count]
    mean, std = x.mean(0), x.std()
    x, x_test, x_out = ((images[:count] - mean) / std for images in (x, test.x, digits.x))
    return Task(x, train.y[:count], x_test, test.y[:count], x_out)


def new_network() -> nn.Sequential:
    """784-200-10 with ReLU."""
    return nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def train_network(task: Task, num_epochs: int) -> Callable[[Tensor], Tensor]:
    """One network by Adam, as it is usually trained."""
    net = new_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(task.x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(task.x[rows]), task.y[rows]).backward()
            optimizer.step()
    return lambda images: net(images).detach().softmax(-1)[None]


def sample_posterior(task: Task, num_samples: int) -> tuple[Callable[[Tensor], Tensor], float]:
    """Four chains of SGHMC, and the largest R-hat of predictions."""
    model = ab.nn.Classifier(ab.nn.bayesianize(new_network(), prior=PRIOR))
    kernel = ab.SGHMC(model, batch_size=100, num_steps_per_sample=20)
    mcmc = ab.SGMCMC(kernel, num_samples=num_samples, warmup_steps=num_samples, num_chains=4)
    mcmc.run(task.x, task.y)
    predictive = ab.Predictive(model, mcmc.get_samples(), return_sites=["_RETURN"])
    r_hat = float(mcmc.diagnostics(task.x_test[:200])["predictions"]["r_hat"].max())
    return lambda images: predictive(images)["_RETURN"].softmax(-1), r_hat


def scores(probs: Callable[[Tensor], Tensor], task: Task) -> tuple[dict[str, float], Tensor, Tensor]:
    """What a method says of both sets; also the entropies of its predictions."""
    inside, outside = probs(task.x_test), probs(task.x_out)
    entropies = dg.predictive_entropy(inside), dg.predictive_entropy(outside)
    found = {
        "accuracy": dg.accuracy(inside, task.y_test),
        "nll": dg.nll(inside, task.y_test),
        "ece": dg.ece(inside, task.y_test),
        "auroc": dg.auroc(*entropies),
    }
    if len(inside) > 1:
        found["auroc_mutual_information"] = dg.auroc(dg.mutual_information(inside), dg.mutual_information(outside))
    return found, *entropies


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, samples, draws, and writes."""
    parser = argparse.ArgumentParser(description="One network and a posterior on Fashion-MNIST and on MNIST's digits.")
    parser.add_argument("--data", type=Path, help="folder of FashionMNIST and MNIST; by default what PYRO_ADVBAYES_DATA names")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the picture and the numbers, which are replaced")
    parser.add_argument("--count", type=int, default=2000, help="images of each set")
    parser.add_argument("--samples", type=int, default=200, help="draws of each of four chains, after a warm-up as long")
    parser.add_argument("--epochs", type=int, default=50, help="of the one network")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task, results, drawn = load(args.data, args.count), {}, {}

    for name in ("one network", "posterior"):
        pyro.set_rng_seed(0)
        start = time.perf_counter()
        r_hat = None
        if name == "posterior":
            probs, r_hat = sample_posterior(task, args.samples)
        else:
            probs = train_network(task, args.epochs)
        results[name], *drawn[name] = scores(probs, task)
        results[name] |= {"seconds": round(time.perf_counter() - start, 1)} | ({} if r_hat is None else {"r_hat": r_hat})
        print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharex=True, sharey=True)
    for ax, (name, (inside, outside)) in zip(axes, drawn.items(), strict=True):
        dg.plot_scores({"clothing, as in training": inside, "digits, never seen": outside}, ax=ax)
        ax.set(title=f"{name}: AUROC {results[name]['auroc']:.2f}", xlabel="entropy of the prediction [nats]")
    figure.savefig(args.out / "front-page.png", dpi=110)
    plt.close(figure)
    content = {"count": args.count, "prior": repr(PRIOR), "results": results}
    (args.out / "front-page.json").write_text(json.dumps(content, indent=2) + "\n")
    return content


if __name__ == "__main__":
    main()

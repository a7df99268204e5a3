"""
How wide should a prior be? One network on scikit-learn's digits under several priors, beside the same network by Adam.

``python tutorials/prior_scales.py`` takes two minutes and writes ``docs/prior-scales.json``, from which the page on priors has its table.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a checkout need not be installed

import pyro_advbayes as ab
from pyro_advbayes import diagnostics as dg

PRIORS = {f"FanIn(scale={scale})": ab.nn.FanIn(scale=scale) for scale in (1.0, 1.4, 2.0, 3.0, 4.0, 6.0)} | {
    "Normal(0, 1)": Normal(0.0, 1.0),
    "LearnedScale()": ab.nn.LearnedScale(),
}


def new_network() -> nn.Sequential:
    """64-50-10 with ReLU."""
    return nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))


def scores(probs: Tensor, y: Tensor) -> dict[str, float]:
    """Of class probabilities ``[N, K]``."""
    return {"accuracy": dg.accuracy(probs, y), "nll": dg.nll(probs, y), "ece": dg.ece(probs, y)}


def train_network(x: Tensor, y: Tensor, x_test: Tensor, num_epochs: int = 60) -> Tensor:
    """One network by Adam; its probabilities of the test images."""
    net = new_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net(x_test).detach().softmax(-1)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs all priors and writes the file."""
    parser = argparse.ArgumentParser(description="Priors of several widths on scikit-learn's digits.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the file, which is replaced")
    parser.add_argument("--updates", type=int, default=50, help="between samples, of which 100 warm up and 200 are kept")
    parser.add_argument(
        "--only", nargs="+", choices=PRIORS, default=list(PRIORS), metavar="PRIOR", help="the file keeps the others' results"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    x, y = ab.datasets.digits("train", flatten=True)
    x_test, y_test = ab.datasets.digits("test", flatten=True)
    x, x_test = ((images - x.mean(0)) / x.std() for images in (x, x_test))

    path, results = args.out / "prior-scales.json", {}
    if len(args.only) < len(PRIORS) and path.exists():
        results = json.loads(path.read_text())["results"]
    pyro.set_rng_seed(0)
    results["one network"] = scores(train_network(x, y, x_test), y_test)
    for name in args.only:
        prior = PRIORS[name]
        pyro.set_rng_seed(0)
        model = ab.nn.Classifier(ab.nn.bayesianize(new_network(), prior=prior))
        believed = ab.Predictive(model, num_samples=100, return_sites=["_RETURN"])(x_test)["_RETURN"]
        kernel = ab.SGHMC(model, batch_size=100, num_steps_per_sample=args.updates)
        mcmc = ab.SGMCMC(kernel, num_samples=200, warmup_steps=100, num_chains=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ab.SamplingWarning)  # R-hat is in the table
            mcmc.run(x, y)
        found = scores(ab.PosteriorClassifier(model, mcmc.get_samples())(x_test).exp(), y_test)
        found["r_hat"] = float(mcmc.diagnostics(x_test)["predictions"]["r_hat"].max())
        found |= {"prior_logits": float(believed.std()), "prior_top": float(believed.softmax(-1).amax(-1).mean())}
        results[name] = found
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    content = {"updates": args.updates, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return content


if __name__ == "__main__":
    main()

"""
A first posterior: scanned digits, one network, four ways to train it. ``make quickstart`` runs this file.

The digits that come with scikit-learn are real scans of 8x8 pixels. The classes 0 to 7 are learnt from half of their images and tested on
the other half; the 8s and 9s are never seen in training. They are the out-of-distribution set: handwriting of the same people from the
same scanner, about which no answer of the network can be right, so that a good model should be unsure of it.

The same Pyro model is given to a point estimate (MAP) and to SGLD, SGAdaLD and SGHMC, four chains each, with ``step_size="auto"``. What
comes out, in ``tutorials/results/``: ``quickstart.json`` with all numbers, ``quickstart.png``, and ``posterior.nc`` for ArviZ.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # models/ is part of the checkout, not of the installed package

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes import diagnostics as dg

NUM_CHAINS = 4
BATCH_SIZE = 100
LEARNT = 8  # the classes 0 to 7; 8 and 9 are out-of-distribution
HIDDEN = 50


class Scale(NamedTuple):
    """How long things run."""

    map_steps: int
    num_samples: int
    warmup: int  # in samples
    updates: dict[str, int]  # per sample, by method
    followed: int  # test images whose predictions are followed along the chains


SCALES = {
    "full": Scale(1000, 200, 60, {"SGLD": 100, "SGAdaLD": 100, "SGHMC": 25}, 200),
    "small": Scale(100, 20, 20, {"SGLD": 10, "SGAdaLD": 10, "SGHMC": 5}, 20),
}


class Task(NamedTuple):
    """Images ``[N, 64]`` to learn from, to test on, and of digits never seen."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    x_out: Tensor


def load() -> Task:
    """The digits, centred by the training images' mean and divided by their standard deviation (over all pixels)."""
    train = ab.datasets.digits("train", test_fraction=0.5, flatten=True)
    test = ab.datasets.digits("test", test_fraction=0.5, flatten=True)
    known, known_test = train.y < LEARNT, test.y < LEARNT
    mean, std = train.x[known].mean(0), train.x[known].std()
    images = (train.x[known], test.x[known_test], torch.cat([train.x[~known], test.x[~known_test]]))
    x, x_test, x_out = ((pixels - mean) / std for pixels in images)
    return Task(x, train.y[known], x_test, test.y[known_test], x_out)


def new_model() -> torch.nn.Module:
    """64-50-8 with ReLU; the prior's width leaves the logits of a random network a standard deviation of about 3."""
    return mlp((64, HIDDEN, LEARNT), prior=ab.nn.FanIn(scale=2.0, bias_scale=0.3))


def predict(predictive: ab.Predictive, task: Task) -> tuple[Tensor, Tensor]:
    """Class probabilities ``[draws, N, K]`` of the test images and of the out-of-distribution ones."""
    logits = predictive(torch.cat([task.x_test, task.x_out]))["_RETURN"]
    return logits.softmax(-1).split([len(task.x_test), len(task.x_out)], dim=1)


def fit_map(model: torch.nn.Module, task: Task, num_steps: int) -> AutoDelta:
    """The weights of greatest posterior density, by SVI on minibatches."""
    pyro.clear_param_store()
    guide = AutoDelta(model, init_loc_fn=ab.init_to_fan_in)
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)})  # the learning rate ends at a hundredth
    svi = SVI(ab.minibatch(model, size=len(task.x)), guide, optimizer, Trace_ELBO())
    bar = tqdm(range(num_steps), desc="MAP", disable=None)
    for step in bar:
        rows = torch.randperm(len(task.x))[:BATCH_SIZE]
        loss = svi.step(task.x[rows], task.y[rows])
        if step % 50 == 0:
            bar.set_postfix({"energy": f"{loss:.4e}"}, refresh=False)
    return guide


def new_kernel(method: str, model: torch.nn.Module, updates: int) -> Any:
    """One of the three kernels, as it comes."""
    return getattr(ab, method)(model, batch_size=BATCH_SIZE, num_steps_per_sample=updates)


def sample(method: str, model: torch.nn.Module, task: Task, scale: Scale) -> tuple[ab.SGMCMC, np.ndarray]:
    """Runs four chains; also the energy after every sample ``[samples, chains]``, warm-up included."""
    energies: list[Tensor] = []
    mcmc = ab.SGMCMC(
        new_kernel(method, model, scale.updates[method]),
        num_samples=scale.num_samples,
        warmup_steps=scale.warmup,
        num_chains=NUM_CHAINS,
        hook_fn=lambda kernel, *_: energies.append(kernel.info["energy"].clone()),
    )
    mcmc.run(task.x, task.y)
    return mcmc, torch.stack(energies).numpy()


def quality(inside: Tensor, outside: Tensor, task: Task) -> dict[str, float]:
    """Scores of the predictions; AUROC is that of predictive entropy as a detector of out-of-distribution images."""
    return {
        "accuracy": dg.accuracy(inside, task.y_test),
        "nll": dg.nll(inside, task.y_test),
        "ece": dg.ece(inside, task.y_test),
        "auroc": dg.auroc(dg.predictive_entropy(inside), dg.predictive_entropy(outside)),
    }


def mixing(true_class: np.ndarray) -> dict[str, float]:
    """
    Whether the chains agree, in function space: weights of a network cannot be compared between chains, its predictions can.

    :param true_class: the probability of the true class of some test images, ``[chains, draws, N]``.
    :return: rank-normalised split R-hat and bulk effective sample size (Vehtari et al., 2021), over images.
    """
    data = az.convert_to_dataset({"p": true_class})
    ess, rhat = az.ess(data)["p"].values, az.rhat(data)["p"].values
    return {
        "ess_min": float(ess.min()),
        "ess_median": float(np.median(ess)),
        "rhat_median": float(np.median(rhat)),
        "rhat_max": float(rhat.max()),
    }


def run(task: Task, scale: Scale, seed: int, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything: the numbers by method, and what the plots show."""
    model, results, shown = new_model(), {}, {}

    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    guide = fit_map(model, task, scale.map_steps)
    seconds = time.perf_counter() - start
    inside, outside = predict(ab.Predictive(model, guide=guide, num_samples=1, return_sites=["_RETURN"]), task)
    results["MAP"] = {**quality(inside, outside, task), "updates": scale.map_steps, "seconds": seconds}
    shown["MAP"] = {"inside": inside.mean(0), "outside": outside.mean(0)}

    for method, updates in scale.updates.items():
        total = updates * (scale.warmup + scale.num_samples)
        print(f"{method}: {NUM_CHAINS} chains of {total} updates", flush=True)
        pyro.set_rng_seed(seed)
        start = time.perf_counter()
        mcmc, energies = sample(method, model, task, scale)
        seconds = time.perf_counter() - start
        inside, outside = predict(ab.Predictive(model, mcmc.get_samples(), return_sites=["_RETURN"]), task)
        of_true_class = inside[:, torch.arange(scale.followed), task.y_test[: scale.followed]]
        found = mixing(of_true_class.reshape(NUM_CHAINS, -1, scale.followed).double().numpy())
        diagnostics = mcmc.kernel.diagnostics()
        results[method] = {
            **quality(inside, outside, task),
            **found,
            "auroc_mutual_information": dg.auroc(dg.mutual_information(inside), dg.mutual_information(outside)),
            "step_size": diagnostics["step size"],
            "T_eff": diagnostics["T_eff"],
            "divergences": sum(map(len, diagnostics["divergences"])),
            "updates": total,
            "seconds": seconds,
            "ess_min_per_second": found["ess_min"] / seconds,
            "ess_median_per_second": found["ess_median"] / seconds,
        }
        shown[method] = {"inside": inside.mean(0), "outside": outside.mean(0), "energies": energies}
    save_posterior(mcmc, of_true_class, out / "posterior.nc")  # of the last method, SGHMC
    return results, shown


def save_posterior(mcmc: ab.SGMCMC, of_true_class: Tensor, path: Path) -> None:
    """Draws, sampler statistics, training log-likelihood and predictions of the test images, for ArviZ."""
    idata = ab.to_arviz(
        mcmc,
        sites=["net.3.weight", "net.3.bias"],  # the output layer; the hidden one would make the file ten times as large
        log_likelihood=True,
        posterior_predictive={"probability of the true class": of_true_class},
        dims={"probability of the true class": ["test image"]},
    )
    dg.save_netcdf(idata, path, overwrite=True)


COLUMNS = {
    "accuracy": ("accuracy", ".4f"),
    "NLL": ("nll", ".4f"),
    "ECE": ("ece", ".4f"),
    "AUROC": ("auroc", ".4f"),
    "updates": ("updates", "d"),
    "R-hat max": ("rhat_max", ".3f"),
    "ESS min": ("ess_min", ".0f"),
    "median": ("ess_median", ".0f"),
    "ESS/s min": ("ess_min_per_second", ".1f"),
    "median ": ("ess_median_per_second", ".1f"),
    "seconds": ("seconds", ".1f"),
}


def table(results: dict[str, Any]) -> str:
    """The numbers by method, in words."""
    rows = [["", *COLUMNS]]
    for method, numbers in results.items():
        cells = [format(numbers[key], form) if key in numbers else "-" for key, form in COLUMNS.values()]
        rows.append([method, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def notes(results: dict[str, Any], task: Task, scale: Scale) -> str:
    """What the table's numbers are, and how far to trust them."""
    accuracy = results["MAP"]["accuracy"]
    error = (accuracy * (1 - accuracy) / len(task.y_test)) ** 0.5
    hottest = max(max(numbers["T_eff"].values()) for numbers in results.values() if "T_eff" in numbers)
    return (
        f"Accuracy, NLL (nats) and ECE (15 bins): {len(task.y_test)} test images of the digits 0 to 7; accuracy is good to {error:.4f}\n"
        f"(one standard error). AUROC: predictive entropy tells them from {len(task.x_out)} images of the digits 8 and 9, never seen.\n"
        "R-hat (rank-normalised, split) and ESS (bulk) are those of the predicted probability of the true class, all chains\n"
        f"together: the worst and the median of {scale.followed} test images. ESS/s counts the seconds of warm-up and sampling.\n"
        f"Minibatch noise was predicted to raise the temperature from 1 to at most {hottest:.2f} (mean over a site)."
    )


def picture(results: dict[str, Any], shown: dict[str, Any], task: Task, scale: Scale, path: Path) -> None:
    """Calibration and entropies above, the energies of all chains below."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained")
    for method, values in shown.items():
        dg.plot_reliability(dg.reliability(values["inside"], task.y_test), method, ax=axes[0, 0])
    axes[0, 0].set_title("reliability on test images")
    for ax, method in zip(axes[0, 1:], ("MAP", "SGHMC"), strict=True):
        entropies = {"digits 0 to 7": shown[method]["inside"], "digits 8 and 9, never seen": shown[method]["outside"]}
        dg.plot_scores({name: dg.predictive_entropy(probs) for name, probs in entropies.items()}, ax=ax)
        ax.set_title(f"{method}: AUROC {results[method]['auroc']:.3f}")
    axes[0, 2].set_ylim(axes[0, 1].get_ylim())
    for ax, (method, updates) in zip(axes[1], scale.updates.items(), strict=True):
        energies = shown[method]["energies"]
        ax.plot(np.arange(1, len(energies) + 1) * updates, energies, linewidth=0.6)
        ax.axvspan(0, scale.warmup * updates, color="0.9", zorder=0)
        ax.set(xlabel="update (warm-up in grey)", title=f"{method}: four chains, largest R-hat {results[method]['rhat_max']:.3f}")
        ax.set_ylim(*np.quantile(energies[scale.warmup :], [0, 1]) + np.array([-1, 1]) * 2 * energies[scale.warmup :].std())
    axes[1, 0].set_ylabel("energy of a minibatch, scaled to all data [nats]")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def settings(args: argparse.Namespace, scale: Scale, task: Task) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "scale": args.scale,
        "seed": args.seed,
        "network": [64, HIDDEN, LEARNT],
        "prior": "FanIn(scale=2.0, bias_scale=0.3)",
        "num_chains": NUM_CHAINS,
        "batch_size": BATCH_SIZE,
        "num_samples": scale.num_samples,
        "warmup": scale.warmup,
        "updates_per_sample": scale.updates,
        "num_train": len(task.y),
        "num_test": len(task.y_test),
        "num_out": len(task.x_out),
        "num_followed": scale.followed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyro_advbayes": ab.__version__,
        },
        "machine": platform.machine(),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the comparison, writes its files and prints its table."""
    parser = argparse.ArgumentParser(description="A first posterior on scikit-learn's digits.")
    parser.add_argument("--seed", type=int, default=0, help="governs all random numbers: one seed, the same results")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the files, which are replaced")
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: only to see that everything runs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more would not be faster at this size, and rounding would depend on their number

    start = time.perf_counter()
    scale, task = SCALES[args.scale], load()
    results, shown = run(task, scale, args.seed, args.out)
    print(f"\n{table(results)}\n\n{notes(results, task, scale)}")
    picture(results, shown, task, scale, args.out / "quickstart.png")
    content = {"settings": settings(args, scale, task), "results": results}
    (args.out / "quickstart.json").write_text(json.dumps(content, indent=2) + "\n")
    files = ", ".join(str(args.out / name) for name in ("quickstart.json", "quickstart.png", "posterior.nc"))
    print(f"\nWritten in {time.perf_counter() - start:.0f} s: {files}")
    return content


if __name__ == "__main__":
    main()

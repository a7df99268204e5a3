"""
Adversarial distributional training on scikit-learn's digits, against training on PGD, at equal gradients.

After Y. Dong et al., Adversarial distributional training for robust deep learning, NeurIPS 2020: ADT-EXP, which is
``TraceRobust_ELBO(AdversarialDistribution(...))``. A network 64-64-10 with Normal(0, 1) priors is trained to its mode. The paper compares
methods after as many epochs, in which ADT-EXP takes 36 gradients for a minibatch and PGD-7 takes 8; here every row has the same number of
gradients, those of the weights counted. A_rob is the share of test images that stay right under all of FGSM, PGD, MIM and APGD with both
losses. Differences are paired by test image.

A row's learning rate is the one of two with which more validation images stay right under PGD. The test images are looked at once, after
that choice.

Every row is written to ``adt_digits-<scale>.json`` when it is finished, and not computed again by the next start.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # models/ and tutorials/ are parts of the checkout, not installed

import pyro_advbayes as ab
from models.mlp import mlp
from pyro_advbayes.attacks import APGD, FGSM, MIM, PGD, AdversarialDistribution, Attack, evaluate
from tutorials.papers.experiments import Results, Task, parser, settings

EPS = 0.15
BATCH_SIZE = 128
TEST_FRACTION = 0.4
LEARNING_RATES = (1e-3, 3e-3)  # Adam's at the start; at the end a tenth
BASELINE = "PGD-7"  # of the paired differences


class Scale(NamedTuple):
    """How much is computed."""

    gradients: int  # of each training
    num_train: int
    num_validation: int
    num_test: int
    steps: int  # of the iterated attacks that judge


SCALES = {"smoke": Scale(160, 200, 60, 80, 3), "cpu": Scale(16_000, 878, 200, 719, 30)}


class Method(NamedTuple):
    """A row: what inputs are trained on, and how many gradients a minibatch takes."""

    attack: Attack | None
    gradients: int


METHODS = {
    "ERM": Method(None, 1),
    BASELINE: Method(PGD(EPS, 7), 8),
    "EXP 7x1": Method(AdversarialDistribution(EPS, 7, 1), 8),
    "EXP 7x1, wide start": Method(AdversarialDistribution(EPS, 7, 1, init_scale=math.log(2)), 8),
    "EXP 7x1, no entropy": Method(AdversarialDistribution(EPS, 7, 1, entropy_weight=0.0), 8),
    "EXP 7x5": Method(AdversarialDistribution(EPS, 7, 5), 36),
}


class Split(NamedTuple):
    """Images ``[N, 64]`` and their classes: a task whose training images are parted once more."""

    task: Task
    x_validation: Tensor
    y_validation: Tensor


def load(scale: Scale, device: str) -> Split:
    """The digits, always the same split."""
    x, y = (t.to(device) for t in ab.datasets.digits("train", test_fraction=TEST_FRACTION, flatten=True))
    x_test, y_test = (t[: scale.num_test].to(device) for t in ab.datasets.digits("test", test_fraction=TEST_FRACTION, flatten=True))
    end = scale.num_train + scale.num_validation
    task = Task(x[: scale.num_train], y[: scale.num_train], x_test, y_test)
    return Split(task, x[scale.num_train : end], y[scale.num_train : end])


def train(method: Method, learning_rate: float, task: Task, scale: Scale, name: str) -> ab.PosteriorClassifier:
    """A point estimate after ``scale.gradients``."""
    pyro.clear_param_store()
    model = mlp((64, 64, 10), prior=Normal(0.0, 1.0)).to(task.x.device)
    steps = scale.gradients // method.gradients
    guide = AutoDelta(model, init_loc_fn=ab.init_to_fan_in)
    optim = ClippedAdam({"lr": learning_rate, "lrd": 0.1 ** (1 / steps), "clip_norm": math.inf})
    loss = Trace_ELBO() if method.attack is None else ab.TraceRobust_ELBO(method.attack)
    svi = SVI(ab.minibatch(model, size=len(task.x)), guide, optim, loss)
    for _ in tqdm(range(steps), desc=f"{name}, learning rate {learning_rate}", disable=None, leave=False):
        rows = torch.randperm(len(task.x), device=task.x.device)[:BATCH_SIZE]
        svi.step(task.x[rows], task.y[rows])
    return ab.PosteriorClassifier(model, guide=guide, num_samples=1)


def judges(scale: Scale) -> list[Attack]:
    """The attacks of A_rob."""
    return [
        FGSM(EPS),
        PGD(EPS, scale.steps),
        MIM(EPS, scale.steps),
        APGD(EPS, scale.steps),
        APGD(EPS, scale.steps, loss="dlr"),
    ]


def run(name: str, split: Split, scale: Scale, seed: int) -> dict[str, Any]:
    """One row, from its own seed: the same numbers whatever was computed before."""
    start, method = time.perf_counter(), METHODS[name]
    trained, chosen = {}, {}
    for learning_rate in LEARNING_RATES:
        pyro.set_rng_seed(seed)
        trained[learning_rate] = train(method, learning_rate, split.task, scale, name)
        report = evaluate(trained[learning_rate], split.x_validation, split.y_validation, [PGD(EPS, scale.steps)])
        chosen[learning_rate] = report.worst[0].accuracy
    best = max(chosen, key=lambda learning_rate: chosen[learning_rate])
    report = evaluate(trained[best], split.task.x_test, split.task.y_test, judges(scale))
    return {
        "attack": repr(method.attack),
        "minibatches": scale.gradients // method.gradients,
        "learning rate": best,
        "validation": {str(learning_rate): accuracy for learning_rate, accuracy in chosen.items()},
        "clean": [report.accuracy, report.std_error],
        "attacks": {found.attack: [found.accuracy, found.std_error] for found in report.results},
        "A_rob": [report.worst[0].accuracy, report.worst[0].std_error],
        "stays right": "".join(str(int(right)) for right in report.worst_right),  # image by image
        "warnings": report.warnings,
        "seconds": time.perf_counter() - start,
    }


def difference(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """How much larger A_rob is than that of another row, and the standard error, paired by test image."""
    ours, theirs = (torch.tensor([int(right) for right in found["stays right"]]).double() for found in (row, other))
    gap = ours - theirs
    return float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))


def table(rows: dict[str, Any]) -> str:
    """A line for each row, in percent."""
    lines = [f"{'':22} {'clean':>12} {'PGD':>12} {'A_rob':>12} {'- ' + BASELINE:>12}"]
    for name, row in rows.items():
        pgd = next(value for attack, value in row["attacks"].items() if attack.startswith("PGD"))
        columns = [row["clean"], pgd, row["A_rob"]]
        if BASELINE in rows and name != BASELINE:
            columns.append(difference(row, rows[BASELINE]))
        lines.append(f"{name:22} " + " ".join(f"{100 * value:6.1f} ± {100 * error:3.1f}" for value, error in columns))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains and attacks what is not in the file yet; writes the file and prints the table."""
    args = parser("Adversarial distributional training on the digits.", SCALES, data=False).parse_args(argv)
    scale, ending = SCALES[args.scale], f"-seed{args.seed}" if args.seed else ""
    known = {"numbers": scale._asdict(), "eps": EPS, "batch_size": BATCH_SIZE, "learning_rates": LEARNING_RATES}
    results = Results(args.out / f"adt_digits-{args.scale}{ending}.json", settings(args.scale, args.seed, args.device, **known))
    split = load(scale, args.device)
    for name in tqdm([name for name in METHODS if name not in results], desc="ADT on digits", disable=None):
        results.add(name, run(name, split, scale, args.seed))
    ordered = results.in_order(METHODS)
    print(table(ordered))
    return {"settings": results.settings, "results": ordered}


if __name__ == "__main__":
    main()

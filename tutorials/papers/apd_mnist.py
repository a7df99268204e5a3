"""
MNIST: Adversarial Posterior Distillation, and the tasks that show what it keeps of the posterior.

After K.-C. Wang et al., Adversarial distillation of Bayesian neural network posteriors, ICML 2018, sections 5.2 and 5.4: SGLD at the
paper's settings on 50 000 digits in [-1, 1], and what is to take the place of its draws.

"OOD": networks 784-400-400-10 tell 2000 digits of the test split from 2000 images of other sets, inputs multiplied by 1 and by 5 (the
scale of the authors' settings), by four scores. Mean and standard deviation are over disjoint sets of draws. Rows are the baselines, SGLD,
a few stored draws (what there is to beat), and generators; "kept codes" are factored generators that keep the codes of the draws in place
of a network that makes them, and "packed" ones keep a byte for a number. Generators that are trained on whole rows of 478 410 weights, the
published one and the hypernetwork, are trained to their end at the paper's scale alone; at that of a CPU, for as many steps as one core
does in an hour.

"detection": networks 784-100-10 tell attacked digits from clean ones, FGSM and PGD crafted on each posterior: on what it predicts
("posterior"), and on one draw of it as in the paper ("one draw"; dropout switched off). Attacked are digits of the validation split that
the source gets right; those that are still right afterwards are reported apart ("missed").

What the authors' code does and this does not:

- Omniglot has the range of the other sets here; the authors' images in 0..255 are a set of their own. It is the evaluation set, not the
  background set, and images of sorted files are drawn at random.
- The entropy is that of the mean prediction, without their smoothing.
- FGSM takes one step of the full size for all, and does not search the smallest. The size is 0.3 of the length of the inputs' range.
- Attacked inputs are at most 1000, seen by 100 draws (MC dropout: 200) in place of up to 6000 and 1000. "One draw" is the last of a
  chain.
- SGD, MC dropout and the deep ensemble are trained for fewer updates than SGLD's chain has, at the scale of a CPU for 20 000.
- Dropout masks hold for all rows of a minibatch.

A row is written to ``apd_mnist-<scale>.json`` when it is finished, and not computed again by the next start; a chain that was interrupted
goes on from its checkpoint, in ``apd_mnist-<scale>-work/``, and so do the trainings on whole rows. Seconds are those of the start that
finished a row. Processes that are given different rows by ``--only`` may run beside each other, once SGLD's row is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # models/ and tutorials/ are parts of the checkout, not installed

import pyro_advbayes as ab
from pyro_advbayes import diagnostics as dg
from pyro_advbayes.attacks import FGSM, PGD, Attack
from pyro_advbayes.infer.distill import FactoredGenerator, HyperGenerator, MLPGenerator
from tutorials.papers import apd_networks as nets
from tutorials.papers.apd_networks import Chain, Draws, Posterior
from tutorials.papers.apd_tables import PACKED_RANK, RANK, SCALES_OF_INPUTS, picture, table
from tutorials.papers.experiments import Results, parser, settings

RANGE = (-1.0, 1.0)
EPS, PGD_STEP = 0.6, 0.02  # 0.3 and 0.01 of the range's length
PASSES = 2  # of MC dropout for each draw of another posterior, as in the paper: 200 for 100
ATTACKED_AT_ONCE = 250
PARTS = ("OOD", "detection")
PUBLISHED_HOUR, HYPER_HOUR = 300, 2000  # steps that a core does in an hour, of the published training and of the hypernetwork's
HYPER_BATCH = 64  # a step on whole rows takes most of its time for the distances between them


class Scale(NamedTuple):
    """How much data, and how long things run."""

    num_train: int
    num_images: int  # of each set in a table
    large: tuple[int, ...]  # widths of the network of "OOD", and of that of "detection"
    small: tuple[int, ...]
    chain: Chain  # of the large network
    small_chain: Chain
    sgd_steps: int
    members: int  # of the deep ensemble
    draws: int  # that a number of a table is made from
    repeats: int
    ranks: tuple[int, ...]  # beside RANK and PACKED_RANK
    stored: tuple[int, ...]  # draws that are kept as they are
    pgd_steps: int
    steps: int  # of a generator that is trained, at most
    whole_steps: int  # of generators that are trained on whole rows, the published one's among them; 0: what a core does in an hour


FULL = (784, 400, 400, 10), (784, 100, 10)
PAPER_CHAINS = Chain(200_000, 20), Chain(200_000, 20)
SCALES = {
    "smoke": Scale(300, 40, (784, 12, 12, 10), (784, 12, 10), Chain(80, 2, 2), Chain(80, 2, 2), 4, 2, 4, 2, (4,), (2,), 2, 20, 2),
    "cpu": Scale(50_000, 2000, *FULL, Chain(80_000, 50), Chain(20_000, 20), 20_000, 5, 100, 2, (16, 4, 64), (10,), 40, 20_000, 0),
    "paper": Scale(50_000, 2000, *FULL, *PAPER_CHAINS, 200_000, 5, 100, 10, (16, 4, 64), (10, 20), 40, 20_000, 100_000),
}


class Task(NamedTuple):
    """Digits ``[N, 784]`` in [-1, 1] with their classes, and what are no digits, by scale and set."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    others: dict[str, dict[str, Tensor]]


class Setup(NamedTuple):
    """What every row is made from."""

    task: Task
    scale: Scale
    work: Path
    seed: int


def load(name: str, scale: Scale, data: Path | None, device: str) -> Task:
    """MNIST and the sets that are not MNIST; at the smallest scale scikit-learn's digits, enlarged, and what needs no files."""
    others: dict[str, dict[str, Tensor]] = {}
    if name == "smoke":
        sets = (ab.datasets.digits(split, scale=RANGE) for split in ("train", "test"))
        (x, y), (x_test, y_test) = ((interpolate(x, (28, 28), mode="bilinear").flatten(1), y) for x, y in sets)
        for s in SCALES_OF_INPUTS:
            noise = torch.Generator().manual_seed(0)
            shape = (scale.num_images, 784)
            others[f"s = {s:g}"] = {
                "negatives": -s * x_test[: scale.num_images],
                "Gaussian": s * torch.randn(shape, generator=noise),
                "Uniform": s * torch.rand(shape, generator=noise),
            }
    else:
        (x, y), (x_test, y_test) = (ab.datasets.mnist(split, data, scale=RANGE, flatten=True) for split in ("train", "test"))
        for s in SCALES_OF_INPUTS:
            others[f"s = {s:g}"] = ab.datasets.mnist_ood(data, s, num_images=scale.num_images, flatten=True)
    train, rest = slice(scale.num_train), slice(scale.num_train, None)
    own = (t.to(device) for t in (x[train], y[train], x[rest], y[rest], x_test, y_test))
    return Task(*own, {s: {name: images.to(device) for name, images in sets.items()} for s, sets in others.items()})


# --------------------------------------------------------------------------------------------- out-of-distribution detection


def ood_posteriors(setup: Setup) -> dict[str, Callable[[], Posterior]]:
    """From a row's name to what makes its posterior, with the draws of one repeat after those of another."""
    task, scale, work, seed = setup
    x, y, count = task.x, task.y, scale.draws * scale.repeats
    model = nets.new_model(scale.large, x)

    def chain() -> tuple[Path, dict[str, Any]]:
        return nets.sgld(model, x, y, scale.chain, work / f"sgld-{seed}.safetensors", seed)

    def sampled() -> Posterior:
        path, about = chain()
        samples = nets.taken(path, nets.spread(scale.chain.kept, scale.draws, scale.repeats))
        return Posterior(model, samples, nets.bytes_of(samples, scale.chain.kept), about)

    def stored(number: int) -> Posterior:
        samples = nets.taken(chain()[0], nets.spread(scale.chain.kept, number, scale.repeats))
        return Posterior(model, samples, nets.bytes_of(samples, number), {})

    def made(generator: Callable[[], Any], **options: Any) -> Posterior:
        path, about = chain()
        return nets.distilled(model, generator(), path, about["kept"], noise_data(task), count, **options)

    def on_whole_rows(generator: Callable[[], Any], steps: int, name: str, **options: Any) -> Callable[[], Posterior]:
        options = {"num_steps": scale.whole_steps or steps, "checkpoint": work / f"{name}-{seed}.safetensors", **options}
        return lambda: made(generator, **options)

    def networks() -> Draws:
        return nets.trained(model, x, y, scale.sgd_steps, scale.members, work / f"sgd-{seed}.safetensors", seed)

    def dropout() -> Posterior:
        model = nets.with_dropout(scale.large, x, y, scale.sgd_steps, work / f"dropout-{seed}.safetensors", seed)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return Posterior(model, nets.masks(model, x, PASSES * count), weights, {"steps": scale.sgd_steps})

    def sgd(members: int) -> Posterior:
        samples = networks()
        return Posterior(model, samples, nets.bytes_of(samples, members), {"steps": scale.sgd_steps})

    def factored(rank: int, **options: Any) -> Callable[[], Posterior]:
        return lambda: made(lambda: FactoredGenerator(rank, **options), num_steps=scale.steps)

    rows: dict[str, Callable[[], Posterior]] = {
        "SGLD": sampled,
        f"APD, rank {RANK}": factored(RANK),
        f"APD, rank {PACKED_RANK}, kept codes, packed": factored(PACKED_RANK, hidden=None, packed=True),
        f"APD, rank {RANK}, kept codes": factored(RANK, hidden=None),
        **{f"{number} stored draws": lambda number=number: stored(number) for number in scale.stored},
        "SGD": lambda: sgd(1),
        "MC dropout": dropout,
        "deep ensemble": lambda: sgd(scale.members),
        f"APD, rank {PACKED_RANK}, packed": factored(PACKED_RANK, packed=True),
        f"APD, rank {PACKED_RANK}, kept codes": factored(PACKED_RANK, hidden=None),
        f"APD, rank {PACKED_RANK}": factored(PACKED_RANK),
    }
    for rank in scale.ranks:
        rows[f"APD, rank {rank}, kept codes"] = factored(rank, hidden=None)
        rows[f"APD, rank {rank}"] = factored(rank)
    rows["APD, as published"] = on_whole_rows(MLPGenerator, PUBLISHED_HOUR, "published", preset="paper")
    rows["APD, hypernetwork"] = on_whole_rows(HyperGenerator, HYPER_HOUR, "hypernetwork", batch_size=HYPER_BATCH)
    return rows


def noise_data(task: Task) -> tuple[Tensor, Tensor]:
    """Digits that no chain has seen."""
    return task.x_val[: nets.NOISE_ROWS], task.y_val[: nets.NOISE_ROWS]


@torch.no_grad()
def probabilities(classifier: ab.PosteriorClassifier, x: Tensor) -> Tensor:
    """Of all draws, ``[draws, N, K]``."""
    return torch.cat(list(classifier.log_probs(x))).exp()


def ood_row(posterior: Posterior, repeats: int, setup: Setup) -> dict[str, Any]:
    """Accuracy and the table of one posterior; every draw is run on every input once."""
    task, scale = setup.task, setup.scale
    classifier = ab.PosteriorClassifier(posterior.model, posterior.samples)
    per_repeat = classifier.num_samples // repeats
    own = probabilities(classifier, task.x_test[: scale.num_images]).split(per_repeat)
    first = ab.PosteriorClassifier(posterior.model, {site: value[:per_repeat] for site, value in posterior.samples.items()})
    rest = task.x_test[scale.num_images :].split(scale.num_images)
    predicted = torch.cat([own[0].mean(0), *(probabilities(first, x).mean(0) for x in rest)])
    tables = {}
    for s, sets in tqdm(task.others.items(), desc="other sets", disable=None, leave=False):
        others = {name: probabilities(classifier, x).split(per_repeat) for name, x in sets.items()}
        found = [_table(own[i], {name: probs[i] for name, probs in others.items()}) for i in range(repeats)]
        tables[s] = {
            name: {score: {what: _mean_sd([table[name][score][what] for table in found]) for what in row} for score, row in scores.items()}
            for name, scores in found[0].items()
        }
    return {
        "accuracy": tuple(dg.accuracy_under_attack(predicted, task.y_test)),
        "draws": per_repeat,
        "bytes": posterior.bytes,
        "about": posterior.about,
        "ood": tables,
    }


def _table(own: Tensor, others: dict[str, Tensor]) -> dict[str, dict[str, dict[str, float]]]:
    """A table of percentages; a single network has no draws that could disagree."""
    if len(own) == 1:
        own, others = own[0], {name: probs[0] for name, probs in others.items()}
    table = dg.ood_detection(own, others)
    return {name: {score: _percent(found) for score, found in scores.items()} for name, scores in table.items()}


def _percent(found: dg.Detection) -> dict[str, float]:
    return {name: 100.0 * value for name, value in found._asdict().items()}


def _mean_sd(values: list[float]) -> tuple[float, float | None]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std()) if len(values) > 1 else None


def ood_repeats(name: str, scale: Scale) -> int:
    """A single network is repeated as often as there are members of the ensemble, and the ensemble not at all."""
    return {"SGD": scale.members, "deep ensemble": 1}.get(name, scale.repeats)


# ------------------------------------------------------------------------------------------- detection of attacked inputs


class Detector(NamedTuple):
    """A posterior, and what it predicts of clean digits: ``[draws, N, K]``, the same whatever is attacked."""

    posterior: Posterior
    classifier: ab.PosteriorClassifier
    clean: Tensor


def detectors(setup: Setup) -> dict[str, Detector]:
    """Of the three posteriors of the small network."""
    task, scale, work, seed = setup
    model = nets.new_model(scale.small, task.x)
    path, about = nets.sgld(model, task.x, task.y, scale.small_chain, work / f"small-sgld-{seed}.safetensors", seed)
    samples = nets.taken(path, nets.spread(scale.small_chain.kept, scale.draws, 1))
    pyro.set_rng_seed(seed + 1)
    apd = nets.distilled(
        model, FactoredGenerator(PACKED_RANK, hidden=None, packed=True), path, about["kept"], noise_data(task), scale.draws
    )
    dropped = nets.with_dropout(scale.small, task.x, task.y, scale.sgd_steps, work / f"small-dropout-{seed}.safetensors", seed)
    posteriors = {
        "MC dropout": Posterior(dropped, nets.masks(dropped, task.x, PASSES * scale.draws), 0, {}),
        "SGLD": Posterior(model, samples, 0, about),
        "APD": apd,
    }
    found = {}
    for name, posterior in posteriors.items():
        classifier = ab.PosteriorClassifier(posterior.model, posterior.samples)
        found[name] = Detector(posterior, classifier, probabilities(classifier, task.x_test[: scale.num_images // 2]))
    return found


def one_of(name: str, samples: Draws) -> Draws:
    """The last draw, farthest from where the chain started; of masks, those that leave nothing out."""
    return {site: torch.full_like(value[-1:], 1 - nets.DROPOUT) if name == "MC dropout" else value[-1:] for site, value in samples.items()}


def detection_row(attack: Attack, source: str, one: bool, found: dict[str, Detector], setup: Setup) -> dict[str, Any]:
    """Digits of the validation split, attacked on a source; and how each detector tells them from digits of the test split."""
    task, count = setup.task, setup.scale.num_images // 2
    model, samples = found[source].posterior.model, found[source].posterior.samples
    target = ab.PosteriorClassifier(model, one_of(source, samples) if one else samples)
    with torch.no_grad():
        right = (target(task.x_val[: 2 * count]).argmax(-1) == task.y_val[: 2 * count]).nonzero().flatten()[:count]
    attacked = attack(target, task.x_val[right], task.y_val[right])
    with torch.no_grad():
        hit = target(attacked).argmax(-1) != task.y_val[right]
    row: dict[str, Any] = {"attack": repr(attack), "images": len(right), "hit_share": float(hit.double().mean()), "detectors": {}}
    for name, detector in found.items():
        seen = probabilities(detector.classifier, attacked)
        parts = dg.adversarial_detection(detector.clean, seen, hit)._asdict()
        row["detectors"][name] = {
            part: table and {score: _percent(numbers) for score, numbers in table.items()}
            for part, table in parts.items()
            if part != "hit_share"
        }
        right_after = seen.mean(0).argmax(-1) == task.y_val[right]
        row["detectors"][name]["accuracy under attack"] = float(right_after.double().mean())
    return row


def detection_rows(setup: Setup) -> Iterator[tuple[str, Attack, str, bool]]:
    """Name, attack, source, and whether one draw of it is attacked."""
    options = {"clip": RANGE, "batch_size": ATTACKED_AT_ONCE}
    pgd = PGD(EPS, steps=setup.scale.pgd_steps, step_size=PGD_STEP, random_start=False, **options)
    for source in ("MC dropout", "SGLD", "APD"):
        for name, attack in (("FGSM", FGSM(EPS, **options)), ("PGD", pgd)):
            for one in (False, True):
                yield f"{name} on {source}, {'one draw' if one else 'posterior'}", attack, source, one


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Samples, distils, trains and attacks what is not in the file yet; writes the files and prints the table."""
    arguments = parser("Adversarial Posterior Distillation on MNIST.", SCALES)
    arguments.add_argument("--only", nargs="+", metavar="ROW", default=PARTS, help="rows to compute, or parts: all by default")
    args = arguments.parse_args(argv)
    scale = SCALES[args.scale]
    numbers = {"numbers": scale._asdict(), "lr": nets.LR, "weight_decay": nets.WEIGHT_DECAY, "batch_size": nets.BATCH_SIZE, "eps": EPS}
    results = Results(args.out / f"apd_mnist-{args.scale}.json", settings(args.scale, args.seed, args.device, **numbers))
    setup = Setup(load(args.scale, scale, args.data, args.device), scale, results.work, args.seed)

    posteriors = {f"OOD: {name}": (make, ood_repeats(name, scale)) for name, make in ood_posteriors(setup).items()}
    cases = {f"detection: {name}": case for name, *case in detection_rows(setup)}
    rows = [*posteriors, *cases]
    if unknown := [name for name in args.only if name not in (*PARTS, *rows)]:
        arguments.error(f"--only {', '.join(unknown)}: the parts are {', '.join(PARTS)}, and the rows in them {'; '.join(rows)}")
    found: dict[str, Detector] = {}
    try:
        for row in tqdm([row for row in rows if {row, row.split(": ")[0]} & set(args.only)], desc="APD on MNIST", disable=None):
            if row in results:
                continue
            if row in cases:
                found = found or detectors(setup)
            pyro.set_rng_seed(args.seed + 1)
            begin = time.perf_counter()
            if row in cases:
                result = detection_row(*cases[row], found, setup)
            else:
                make, repeats = posteriors[row]
                result = ood_row(make(), repeats, setup)
            results.add(row, {"seconds": time.perf_counter() - begin, **result})
    finally:  # of an interrupted run too
        picture(results.in_order(rows), results.path.with_suffix(".png"))
    ordered = results.in_order(rows)
    print(table(ordered))
    return {"settings": results.settings, "results": ordered}


if __name__ == "__main__":
    main()

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

import pyro_advbayes as ab
from pyro_advbayes.nn.classifier import Classifier


class Centroids:
    """Draws of a classifier by the distance to the centroids of resampled inputs; counts how often it is asked."""

    calls = 0

    def __init__(self, x, y, draws=6):
        rows = [torch.cat([(y == k).nonzero().flatten()[torch.randint(int((y == k).sum()), (2,))] for k in (0, 1)]) for _ in range(draws)]
        self.centroids = torch.stack([x[r].view(2, 2, -1).mean(1) for r in rows])

    def log_probs(self, x):
        Centroids.calls += 1
        for part in self.centroids.split(4):
            yield (-torch.cdist(x.expand(len(part), *x.shape), part)).log_softmax(-1)


def blobs(count=60):
    torch.manual_seed(0)
    y = torch.arange(count) % 2
    return torch.randn(count, 2) + 2.0 * y[:, None], y


def run(**options):
    seen = []

    def fit(x, y):
        seen.append((x, y))
        return Centroids(x, y)

    pool, test = blobs(), blobs(40)
    curve = ab.active_learning(fit, pool, test, **{"num_rounds": 4, "per_round": 3, "disable_progbar": True, **options})
    return curve, seen


@pytest.mark.parametrize("acquisition", ["entropy", "bald", "variation_ratio", "batch_bald", "random"])
def test_every_round_adds_new_labels_to_those_before(acquisition):
    curve, seen = run(acquisition=acquisition)
    assert curve.num_labels.tolist() == [4, 7, 10, 13, 16] == [len(y) for _, y in seen]
    assert curve.accuracy.shape == (1, 5)
    first, last = seen[0][0], seen[-1][0]
    assert torch.equal(last[:4], first) and len(last.unique(dim=0)) == 16
    assert seen[0][1].tolist() == [0, 0, 1, 1]


def test_the_start_is_the_same_for_all_acquisitions_and_random_asks_no_classifier():
    starts = [run(acquisition=a)[1][0][0] for a in ("bald", "random")]
    assert torch.equal(*starts)
    Centroids.calls = 0
    run(acquisition="random")
    assert Centroids.calls == 5  # for accuracy alone


def test_what_is_asked_for_is_where_the_classifier_is_unsure():
    _, seen = run(acquisition="entropy", num_rounds=1, per_round=5)
    asked, pool = seen[-1][0][4:], blobs()[0]
    probs = torch.cat(list(fitted(seen[0]).log_probs(pool))).exp()
    scores = ab.diagnostics.predictive_entropy(probs)
    rows = [(pool == x).all(1).nonzero().item() for x in asked]
    assert scores[rows].min() > scores.median()


def fitted(data):
    torch.manual_seed(0)
    return Centroids(*data, draws=50)


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path):
    whole = run(path=tmp_path / "whole.safetensors")[0]
    rounds = []

    def killed(x, y):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return Centroids(x, y)

    options = {"num_rounds": 4, "per_round": 3, "disable_progbar": True, "path": tmp_path / "part.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        ab.active_learning(killed, blobs(), blobs(40), **options)
    curve, seen = run(path=tmp_path / "part.safetensors")
    assert len(seen) == 3  # two rounds were kept
    assert torch.equal(curve.accuracy, whole.accuracy)
    assert not run(path=tmp_path / "part.safetensors")[1]
    with pytest.raises(ValueError, match=r"of another run: its seed is 0, here it is 1"):
        run(path=tmp_path / "part.safetensors", seed=1)


def test_candidates_are_a_part_of_the_pool():
    curve, seen = run(acquisition="bald", candidates=5)
    assert len(seen[-1][0].unique(dim=0)) == 16 and curve.accuracy.min() > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acquisition": "BALD"}, "acquisition='BALD'"),
        ({"per_round": 0}, "per_round=0"),
        ({"num_rounds": -1}, "num_rounds=-1"),
        ({"per_class": 31}, "30 inputs of class 0, fewer than per_class"),
        ({"num_rounds": 30}, "60 inputs, fewer than the 94 labels"),
        ({"candidates": 2}, "candidates=2"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_first_fit(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_sampler_learns_actively():
    x, y = ab.datasets.digits("train", flatten=True)
    x_test, y_test = ab.datasets.digits("test", flatten=True)
    model = Classifier(ab.nn.bayesianize(nn.Linear(64, 10)))

    def fit(x, y):
        mcmc = ab.SGMCMC(ab.SGLD(model, step_size=0.01, num_steps_per_sample=10), num_samples=20, warmup_steps=40, disable_progbar=True)
        mcmc.run(x, y)
        return ab.PosteriorClassifier(model, mcmc.get_samples())

    curve = ab.active_learning(fit, (x, y), (x_test, y_test), num_rounds=2, per_round=20, disable_progbar=True)
    assert curve.num_labels.tolist() == [20, 40, 60]
    assert curve.accuracy[0, -1] > curve.accuracy[0, 0] > 0.3
    assert not list(pyro.get_param_store())

from __future__ import annotations

from typing import ClassVar

import pyro
import pytest
import torch
from torch import nn

import pyro_advbayes as ab
from models.linear_regression import LinearRegression
from pyro_advbayes.nn.classifier import Classifier
from pyro_advbayes.storage import files


class Centroids:
    """Draws of a classifier by the distance to the centroids of resampled inputs; keeps what it is asked of."""

    asked: ClassVar[list[torch.Tensor]] = []

    def __init__(self, x, y, draws=6):
        rows = [torch.cat([(y == k).nonzero().flatten()[torch.randint(int((y == k).sum()), (2,))] for k in (0, 1)]) for _ in range(draws)]
        self.centroids = torch.stack([x[r].view(2, 2, -1).mean(1) for r in rows])

    def log_probs(self, x):
        Centroids.asked.append(x)
        for part in self.centroids.split(4):
            yield (-torch.cdist(x.expand(len(part), *x.shape), part)).log_softmax(-1)


def blobs(count=60):
    torch.manual_seed(0)
    y = torch.arange(count) % 2
    return torch.randn(count, 2) + 2.0 * y[:, None], y


def run(pool=None, test=None, **options):
    seen = []

    def fit(x, y):
        seen.append((x, y))
        return Centroids(x, y)

    pool, test = pool or blobs(), test or blobs(40)
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
    Centroids.asked.clear()
    run(acquisition="random")
    assert [len(x) for x in Centroids.asked] == [40] * 5  # for accuracy alone


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


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    whole = run(path=tmp_path / "whole.safetensors")[0]
    saved, save = [], files.save

    def killed(*arguments):
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "save", killed)
        run(path=tmp_path / "part.safetensors")
    curve, seen = run(path=tmp_path / "part.safetensors")
    assert len(seen) == 3  # two rounds were kept
    assert torch.equal(curve.accuracy, whole.accuracy)
    assert not run(path=tmp_path / "part.safetensors")[1]
    with pytest.raises(ValueError, match=r"of another run: its seed is 0, here it is 1"):
        run(path=tmp_path / "part.safetensors", seed=1)


def test_more_rounds_go_on_from_those_kept_and_fewer_are_the_first_of_them(tmp_path):
    whole, path = run()[0], tmp_path / "rounds.safetensors"
    run(path=path, num_rounds=2)
    curve, seen = run(path=path)
    assert len(seen) == 2 and torch.equal(curve.accuracy, whole.accuracy)
    curve, seen = run(path=path, num_rounds=1)
    assert not seen and torch.equal(curve.accuracy, whole.accuracy[:, :2]) and curve.num_labels.tolist() == [4, 7]
    assert not run(path=path)[1]  # which left the file as it was
    run(path=path, num_rounds=18)
    assert not run(path=path, num_rounds=18)[1]  # 58 labels of a pool of 60, with no room for another round


def test_a_run_goes_on_with_its_own_data_alone(tmp_path):
    (x, y), test, path = blobs(), blobs(40), tmp_path / "run.safetensors"
    run(path=path)
    others = {
        "pool": [(x, 1 - y), (x.flip(0), y.flip(0)), (x.double(), y)],
        "test": [(test[0][:9], test[1][:9]), (test[0], 1 - test[1])],
    }
    for name, sets in others.items():
        for other in sets:
            with pytest.raises(ValueError, match=f"of another run: its {name} is "):
                run(path=path, **{name: other})
    missing = x.clone(), y
    missing[0][3] = torch.nan
    for rounds in (5, 0):  # NaN is equal to itself here
        assert len(run(pool=missing, acquisition="random", path=tmp_path / "nan.safetensors")[1]) == rounds


def test_a_run_goes_on_under_another_number_of_threads_with_a_warning(tmp_path, monkeypatch):
    run(path=tmp_path / "run.safetensors")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.warns(UserWarning, match=f"written with threads={threads}"):
        assert not run(path=tmp_path / "run.safetensors")[1]


def test_files_that_cannot_be_gone_on_with_are_refused_before_the_first_fit(tmp_path):
    def fit(x, y):
        raise AssertionError("fitted")

    options, path = {"num_rounds": 4, "per_round": 3, "disable_progbar": True}, tmp_path / "run.safetensors"
    with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
        ab.active_learning(fit, blobs(), blobs(40), path=tmp_path / "missing" / "run.safetensors", **options)
    former = {"acquisition": "bald", "num_rounds": 4, "per_round": 3, "per_class": 2, "candidates": None, "seed": 0, "pool": [60, 8.5]}
    for content in ([1, 2], {"settings": former, "labelled": torch.arange(4), "accuracies": [0.5]}, {"settings": 3}):
        files.save(path, content, "run of active_learning")
        with pytest.raises(ValueError, match=r"run.safetensors holds no active learning that this version can resume: delete it"):
            ab.active_learning(fit, blobs(), blobs(40), path=path, **options)


KINDS = {  # of four draws, the probabilities of three classes
    "even": [[0.5, 0.5, 0.0]] * 4,
    "spread": [[0.55, 0.225, 0.225]] * 4,
    "disputed": [[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]] * 2,
    "disputed by others": [[0.88, 0.12, 0.0]] * 2 + [[0.2, 0.8, 0.0]] * 2,
    "sure": [[1.0, 0.0, 0.0]] * 4,
}


class OfKinds:
    """Draws whose predictions depend on nothing but the kind of an input."""

    def log_probs(self, x):
        yield torch.tensor(list(KINDS.values()))[x].log().transpose(0, 1)


@pytest.mark.parametrize(
    ("acquisition", "wanted"),
    [
        ("entropy", {"spread"}),
        ("variation_ratio", {"even"}),
        ("bald", {"disputed"}),
        ("batch_bald", {"disputed", "disputed by others"}),
    ],
)
def test_every_acquisition_asks_for_what_it_wants_most(acquisition, wanted):
    x, y, labelled = torch.arange(20) % 5, torch.arange(20) // 10, []

    def fit(x, y):
        labelled.append(x)
        return OfKinds()

    options = {"num_rounds": 1, "per_round": 2, "per_class": 1, "disable_progbar": True}
    ab.active_learning(fit, (x, y), (x, y), acquisition=acquisition, **options)
    assert {list(KINDS)[kind] for kind in labelled[1][2:]} == wanted


def test_candidates_are_a_part_of_the_pool_drawn_anew_in_every_round():
    Centroids.asked.clear()
    curve, seen = run(acquisition="bald", candidates=5)
    assert len(seen[-1][0].unique(dim=0)) == 16 and curve.accuracy.min() > 0.5
    assert [len(x) for x in Centroids.asked] == [40, 5] * 4 + [40]
    rounds = Centroids.asked[1::2]
    for before, candidates, after in zip(seen, rounds, seen[1:], strict=False):
        assert not _of(candidates, before[0]).any()
        assert _of(after[0][-3:], candidates).all()
    assert len(torch.cat(rounds).unique(dim=0)) > 10


def _of(rows, others):
    """Which rows are among others."""
    return (rows[:, None] == others).all(-1).any(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acquisition": "BALD"}, "acquisition='BALD'"),
        ({"per_round": 0}, "per_round=0"),
        ({"num_rounds": -1}, "num_rounds=-1"),
        ({"acquisition": "variance"}, "acquisition='variance': .* a regression needs num_initial"),
        ({"per_class": 2, "num_initial": 4}, "per_class=2 is for classes, and num_initial=4 for a regression: give one of them"),
        ({"per_class": 31}, "30 inputs of class 0, fewer than per_class"),
        ({"num_rounds": 30}, "60 inputs, fewer than the 94 labels"),
        ({"candidates": 2}, "candidates=2: an int >= per_round"),
        ({"candidates": 5.5}, "candidates=5.5: an int >= per_round"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_first_fit(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_inputs_without_their_classes_are_refused_before_the_first_fit():
    x, y = torch.randn(60, 2), torch.arange(60) % 2
    for name, data in (("pool", ((x, y[:50]), (x, y))), ("test", ((x, y), (x[:50], y)))):
        with pytest.raises(ValueError, match=rf"{name}: \d+ inputs and \d+ classes"):
            ab.active_learning(lambda x, y: pytest.fail("fitted"), *data, num_rounds=1)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("test", lambda y: y[:, None], r"test\[1\] has shape \[40, 1\]: .* \[40\]"),
        ("pool", lambda y: y[:, None], r"pool\[1\] has shape \[60, 1\]: .* \[60\]"),
        ("test", lambda y: y.clone().index_fill_(0, torch.tensor([3]), 99), r"test: class 99 is not among the pool's classes"),
        ("test", lambda y: y - 1, r"test: class -1 is not among the pool's classes"),
        ("test", lambda y: y + 0.5, r"the test's classes are not whole numbers"),
        ("test", lambda y: torch.where(y == 0, torch.nan, y.float()), r"the test's classes are not whole numbers"),
        ("pool", lambda y: torch.where(y == 0, torch.nan, y.float()), r"the pool's classes are not whole numbers"),
    ],
)
def test_labels_that_would_be_judged_wrongly_are_refused_before_the_first_fit(which, change, message):
    sets = {"pool": blobs(), "test": blobs(40)}
    sets[which] = sets[which][0], change(sets[which][1])
    with pytest.raises(ValueError, match=message):
        ab.active_learning(lambda x, y: pytest.fail("fitted"), sets["pool"], sets["test"], num_rounds=1, per_round=3)


@pytest.mark.parametrize("which", ["pool", "test"])
@pytest.mark.parametrize("options", [{}, {"num_initial": 4}], ids=["classes", "regression"])
def test_no_inputs_at_all_are_refused_by_name(which, options):
    sets = {"pool": blobs(), "test": blobs(40)}
    sets[which] = tuple(value[:0] for value in sets[which])
    if options:
        sets = {name: (x, y.float()) for name, (x, y) in sets.items()}
    with pytest.raises(ValueError, match=f"{which}: it is empty"):
        ab.active_learning(lambda x, y: pytest.fail("fitted"), sets["pool"], sets["test"], num_rounds=1, **options)


def test_targets_that_are_no_numbers_are_refused_by_name():
    for which in (0, 1):
        sets = [(x, y.float()) for x, y in (blobs(), blobs(40))]
        sets[which][1][3] = torch.nan
        with pytest.raises(ValueError, match=f"{('pool', 'test')[which]}: 1 of its targets is not finite"):
            ab.active_learning(lambda x, y: pytest.fail("fitted"), *sets, num_rounds=1, num_initial=4)


def test_classes_may_be_whole_numbers_of_any_dtype():
    (x, y), (x_test, y_test) = blobs(), blobs(40)
    whole = run()[0]
    for dtype in (torch.float32, torch.int32, torch.uint8):
        assert torch.equal(run(pool=(x, y.to(dtype)), test=(x_test, y_test.to(dtype)))[0].accuracy, whole.accuracy)


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


def lines(count=60):
    """A line, in noise of 0.3."""
    torch.manual_seed(0)
    x = torch.randn(count, 2)
    return x, x @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(count)


def regress(pool=None, fit=None, **options):
    model, seen, test = LinearRegression(2, noise_scale=0.3), [], lines(40)

    def exact(x, y):
        seen.append((x, y))
        weights = model.exact_posterior(x, y).sample((50,))
        return ab.PosteriorRegressor(model, {"net.weight": weights[:, None, :2], "net.bias": weights[:, 2:]})

    defaults = {"num_initial": 3, "num_rounds": 4, "per_round": 2, "disable_progbar": True}
    return ab.active_learning(fit or exact, pool or lines(), test, **{**defaults, **options}), seen


@pytest.mark.parametrize("acquisition", [None, "mean_variance", "random"])
def test_a_regression_learns_actively_and_is_judged_by_rmse_and_log_density(acquisition):
    curve, seen = regress(acquisition=acquisition)
    assert curve.num_labels.tolist() == [3, 5, 7, 9, 11] == [len(y) for _, y in seen]
    assert len(seen[-1][0].unique(dim=0)) == 11 and torch.equal(seen[-1][0][:3], seen[0][0])
    assert curve.rmse.shape == curve.log_density.shape == (1, 5)
    assert curve.rmse[0, -1] < 0.4 and curve.rmse[0, 0] > curve.rmse[0, -1] and curve.log_density[0, -1] > curve.log_density[0, 0]


def test_the_scores_are_those_of_the_law_that_was_fitted():
    x_test, y_test = lines(40)
    slopes = torch.tensor([[1.0, -1.0], [0.5, -1.0]])

    def fit(x, y):
        return lambda x: (slopes @ x.T, torch.tensor([[0.5], [1.0]]).expand(2, len(x)))

    curve, _ = regress(fit=fit, num_rounds=1)
    mean, scale = fit(None, None)(x_test)
    assert curve.rmse.flatten().tolist() == pytest.approx([ab.diagnostics.rmse(mean, y_test)] * 2)
    expected = -ab.diagnostics.gaussian_nll(mean, scale, y_test).mean().item()
    assert curve.log_density.flatten().tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(("acquisition", "wanted"), [("variance", {0, 1}), ("mean_variance", {2, 3})])
def test_a_regression_asks_for_what_it_wants_most(acquisition, wanted):
    """The targets of kinds 0 and 1 are loud, those of 2 and 3 are disputed."""
    kinds, seen = torch.arange(40) % 8, []

    def fit(x, y):
        seen.append(x)
        means = torch.tensor([[0.0, 0.0, 1.0, 0.9, 0.0, 0.0, 0.0, 0.0]])
        scales = torch.tensor([[3.0, 2.9, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5]])
        return lambda x: (torch.cat([means, -means])[:, x], scales.expand(2, 8)[:, x])

    data = (kinds, torch.arange(40.0))
    options = {"num_rounds": 1, "per_round": 6, "disable_progbar": True, "num_initial": 1}
    ab.active_learning(fit, data, data, acquisition=acquisition, **options)
    assert set(seen[1][1:].tolist()) == wanted


def test_an_interrupted_regression_goes_on_to_the_same_end(tmp_path):
    whole, path = regress()[0], tmp_path / "run.safetensors"
    regress(path=path, num_rounds=1)
    curve, seen = regress(path=path)
    assert len(seen) == 3 and torch.equal(curve.rmse, whole.rmse) and torch.equal(curve.log_density, whole.log_density)
    with pytest.raises(ValueError, match="of another run: its num_initial is 3, here it is 4"):
        regress(path=path, num_initial=4)


def test_what_makes_no_sense_for_a_regression_is_refused_before_the_first_fit():
    x, y = lines()
    for options, message in (
        ({"acquisition": "bald"}, "acquisition='bald': choose one of 'variance', 'mean_variance', 'random'"),
        ({"num_initial": 0}, "num_initial=0: an int >= 1"),
        ({"num_initial": 53}, "60 inputs, fewer than the 61 labels"),
        ({"pool": (x, y[:, None])}, r"pool: targets must be floating-point numbers \[N\], not torch.float32 \[60, 1\]"),
        ({"pool": (x, y.long())}, "pool: targets must be floating-point numbers"),
        ({"pool": (x, y[:50])}, "pool: 60 inputs and 50 targets: one target an input"),
    ):
        with pytest.raises(ValueError, match=message):
            regress(fit=lambda x, y: pytest.fail("fitted"), **options)
    with pytest.raises(ValueError, match="classes are not whole numbers: of a regression give num_initial"):
        run(pool=lines())
    with pytest.raises(ValueError, match="fit returned a Averages, which does not give means and standard deviations"):
        regress(fit=lambda x, y: Averages(x, y > 0))


class Averages(Centroids):
    def __init__(self, x, y):
        super().__init__(x, y.long(), draws=1)

    __call__ = Centroids.log_probs

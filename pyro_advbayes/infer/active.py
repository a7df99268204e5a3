"""Active learning, which requests labels where a posterior is uncertain: :func:`active_learning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Normal
from tqdm.auto import tqdm

from pyro_advbayes.checked import checked
from pyro_advbayes.diagnostics import LearningCurve, RegressionCurve, acquire, acquire_regression, log_predictive_density, rmse
from pyro_advbayes.diagnostics.acquisition import ACQUISITIONS, REGRESSION_ACQUISITIONS
from pyro_advbayes.given import check_choice, check_int, need_tensor
from pyro_advbayes.infer.mcmc.fingerprint import check_fingerprint
from pyro_advbayes.storage import files, sources
from pyro_advbayes.storage.digests import tensor_digest

FitPredictor = Callable[[Tensor, Tensor], Any]
_KIND = "run of active_learning"
CHUNK = 1000  # inputs that are predicted together


@checked
def active_learning(
    fit: FitPredictor,
    pool: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    acquisition: str | None = None,
    num_rounds: int = 50,
    per_round: int = 10,
    per_class: int | None = None,
    num_initial: int | None = None,
    candidates: int | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    disable_progbar: bool = False,
) -> LearningCurve | RegressionCurve:
    """
    Fits, requests the labels with the highest acquisition, and fits again, ``num_rounds`` times. ::

        def fit(x, y):
            mcmc = SGMCMC(SGLD(model, step_size=1e-5), num_samples=50, warmup_steps=100)
            mcmc.run(x, y)
            return PosteriorClassifier(model, mcmc.get_samples())

        curves = {name: active_learning(fit, (x, y), (x_test, y_test), acquisition=name) for name in ("random", "bald")}
        diagnostics.plot_learning_curves(curves)

    The setting is that of Adversarial Posterior Distillation (Wang et al., ICML 2018, section 5.3), after Gal et al. (2017): all
    acquisitions start with the same few labels of every class. With ``num_initial`` it is a regression: it starts with this number of
    random rows, ``fit`` returns a :class:`~pyro_advbayes.PosteriorRegressor`, and the scores are RMSE and log predictive density.

    :param fit: function of labelled inputs to a classifier whose ``log_probs(x)`` yields log-probabilities of draws in chunks
        ``[chunk, N, K]``, such as a :class:`~pyro_advbayes.PosteriorClassifier`. For a regression it returns a function of inputs to the
        draws' means and standard deviations, ``[draws, N]`` each. It must fit from scratch at every call.
    :param pool: inputs ``[N, ...]`` and their classes or targets ``[N]``; ``fit`` sees the labelled ones.
    :param test: inputs and classes or targets on which every fit is scored.
    :param str acquisition: ``"entropy"``, ``"bald"`` (the default), ``"variation_ratio"``, ``"batch_bald"`` or ``"random"``; see
        :func:`~pyro_advbayes.diagnostics.acquire`. For a regression ``"variance"`` (the default), ``"mean_variance"`` or ``"random"``; see
        :func:`~pyro_advbayes.diagnostics.acquire_regression`.
    :param int num_rounds: >= 0, after the first fit.
    :param int per_round: labels requested in a round, >= 1.
    :param int per_class: labels of every class at the start, >= 1; 2 by default.
    :param int num_initial: labels at the start of a regression, >= 1.
    :param int candidates: the number of random inputs of the pool that are scored in a round; None for all. The most uncertain of thousands
        tend to be alike; about ten candidates for each requested label keep a round diverse.
    :param int seed: of all random numbers, those of fits included.
    :param path: a file of the finished rounds; if it exists, the run resumes from it, with the same result. Pool, test set and arguments
        must be equal, bit for bit, except ``num_rounds``: more rounds continue, fewer return the first ones. ``fit`` is compared by its
        code and its closure, defaults and globals, except what it changes itself.
    :param bool disable_progbar: no progress bar; there is none where the output is no terminal.
    :return: accuracy of the mean prediction after every fit, or a regression's scores, as one repetition.
    :raises ValueError: naming the argument out of range, a pool that is too small, unequal numbers of inputs and classes, or a file of
        another run.
    :raises FileNotFoundError: if the folder of ``path`` is missing.
    :raises RuntimeError: if another run writes to ``path``.
    """
    x, y = pool
    if num_initial is not None and per_class is not None:
        raise ValueError(f"per_class={per_class!r} is for classes, and num_initial={num_initial!r} for a regression: give one of them")
    task: _Classification | _Regression
    task, usual = _Classification(2 if per_class is None else per_class), "bald"
    if num_initial is not None:
        task, usual = _Regression(num_initial), "variance"
    settings: dict[str, Any] = {
        "acquisition": usual if acquisition is None else acquisition,
        "per_round": per_round,
        **task._asdict(),
        "candidates": candidates,
        "seed": seed,
    }
    _check({**settings, "num_rounds": num_rounds}, pool, test)
    made_of = {} if path is None else sources.parts(fit)
    if path is not None:
        path = Path(path)
        files.refuse_existing(path, overwrite=True)
        settings |= _fingerprint(pool, test)
    with files.Held(path) as held:
        pyro.set_rng_seed(seed)
        labelled = task.first(y)
        scores: list[Any] = []
        first = len(labelled)
        if path is not None and path.exists():
            labelled, scores, then = _load(path, settings, x.device)
            task.check(path, scores)
            _check_labelled(path, labelled, len(y), first, per_round, len(scores))
            sources.check(made_of, then, "fit", path)
            made_of = {part: made_of[part] for part in then if part in made_of}
            scores = scores[: num_rounds + 1]
        fitted = False
        hidden = True if disable_progbar else None
        with tqdm(total=num_rounds + 1, initial=len(scores), desc=settings["acquisition"], disable=hidden) as bar:
            while len(scores) <= num_rounds:
                predictor = fit(x[labelled], y[labelled])
                if path is not None and not fitted:  # what a fit changes (a log, a counter) does not identify it
                    after, fitted = sources.parts(fit), True
                    made_of = {part: digest for part, digest in made_of.items() if after.get(part) == digest}
                scores.append(task.judge(predictor, *test))
                # also after the last round, if the pool suffices, so that a longer run can resume
                if len(scores) <= num_rounds or (path is not None and len(labelled) + per_round <= len(y)):
                    labelled = torch.cat([labelled, _ask(task, predictor, x, labelled, settings)])
                if path is not None:
                    _save(held, settings, labelled, scores, made_of)
                bar.set_postfix(labels=len(labelled), refresh=False, **task.in_words(scores[-1]))
                bar.update()
    return task.curve(first + per_round * torch.arange(num_rounds + 1), torch.tensor(scores, dtype=torch.float64))


def _check(settings: Mapping[str, Any], pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    regression = "num_initial" in settings
    what, one, choices = ("targets", "target", REGRESSION_ACQUISITIONS) if regression else ("classes", "class", ACQUISITIONS)
    for name, (inputs, outcomes) in (("pool", pool), ("test", test)):
        need_tensor(inputs, f"{name}[0]", inputs=True)
        need_tensor(outcomes, f"{name}[1]")
        if len(inputs) != len(outcomes):
            raise ValueError(f"{name}: {len(inputs)} inputs and {len(outcomes)} {what}: one {one} an input")
        if len(inputs) == 0:
            raise ValueError(f"{name}: it is empty: give inputs and their {what}")
        if outcomes.dim() != 1 and not regression:
            squeeze = f", {name}[1].squeeze(-1)" if outcomes.shape == (len(inputs), 1) else ""
            raise ValueError(f"{name}[1] has shape {list(outcomes.shape)}: {what} must be [{len(inputs)}], one an input{squeeze}")
    remedy = "" if regression or settings["acquisition"] not in REGRESSION_ACQUISITIONS else "; a regression needs num_initial"
    check_choice(settings["acquisition"], "acquisition", choices, remedy)
    for name, least in (("num_rounds", 0), ("per_round", 1), ("num_initial" if regression else "per_class", 1)):
        check_int(settings[name], name, least)
    y = pool[1]
    if regression:
        for name, (_, targets) in (("pool", pool), ("test", test)):
            if targets.dim() != 1 or not targets.is_floating_point():
                raise ValueError(f"{name}: targets must be floating-point numbers [N], not {targets.dtype} {list(targets.shape)}")
            bad = int((~targets.isfinite()).sum())
            if bad:
                raise ValueError(f"{name}: {bad} of its targets {'is' if bad == 1 else 'are'} not finite: leave them out")
        at_start = settings["num_initial"]
    else:
        for name, (_, classes) in (("pool", pool), ("test", test)):
            if classes.is_floating_point() and bool((classes != classes.round()).any()):
                raise ValueError(f"the {name}'s classes are not whole numbers: of a regression give num_initial, the labels at the start")
        classes, counts = y.unique(return_counts=True)
        strange = test[1][~torch.isin(test[1].double().cpu(), classes.double().cpu()).to(test[1].device)]
        if len(strange):
            raise ValueError(f"test: class {int(strange[0])} is not among the pool's classes, {_listed(classes)}: no fit can learn it")
        if int(counts.min()) < settings["per_class"]:
            raise ValueError(f"the pool has {int(counts.min())} inputs of class {int(classes[counts.argmin()])}, fewer than per_class")
        at_start = settings["per_class"] * len(classes)
    wanted = at_start + settings["num_rounds"] * settings["per_round"]
    if wanted > len(y):
        raise ValueError(f"the pool has {len(y)} inputs, fewer than the {wanted} labels that the rounds request: take fewer")
    candidates = settings["candidates"]
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < settings["per_round"]):
        raise ValueError(f"candidates={candidates!r}: an int >= per_round, or None for the whole pool")


def _listed(classes: Tensor) -> str:
    return ", ".join(str(int(label)) for label in classes[:10]) + (", ..." if len(classes) > 10 else "")


class _Classification(NamedTuple):
    """Active learning of classes."""

    per_class: int

    def first(self, y: Tensor) -> Tensor:
        """The same number of every class, at random."""
        order = torch.randperm(len(y)).to(y.device)
        return torch.cat([order[y[order] == label][: self.per_class] for label in y.unique()])

    def judge(self, classifier: Any, x: Tensor, y: Tensor) -> float:
        return float((_probs(classifier, x).mean(0).argmax(-1) == y).double().mean())

    def check(self, path: Path, scores: list[Any]) -> None:
        """:raises ValueError: if a file does not hold scores."""
        if not scores or not all(isinstance(score, float) and 0.0 <= score <= 1.0 for score in scores):
            raise files.FileError(f"{path}: its accuracies are {str(scores)[:100]}: it is corrupt")

    def acquire(self, classifier: Any, x: Tensor, count: int, acquisition: str) -> Tensor:
        return acquire(_probs(classifier, x), count, acquisition)

    def in_words(self, score: float) -> dict[str, str]:
        return {"accuracy": f"{score:.4f}"}

    def curve(self, num_labels: Tensor, scores: Tensor) -> LearningCurve:
        """:param scores: ``[rounds]``."""
        return LearningCurve(num_labels, scores[None])


class _Regression(NamedTuple):
    """Active learning of real numbers."""

    num_initial: int

    def first(self, y: Tensor) -> Tensor:
        return torch.randperm(len(y))[: self.num_initial].to(y.device)

    def judge(self, law: Any, x: Tensor, y: Tensor) -> list[float]:
        """RMSE and mean log predictive density."""
        mean, scale = _normals(law, x)
        return [rmse(mean, y), float(log_predictive_density(Normal(mean, scale).log_prob(y)).double().mean())]

    def check(self, path: Path, scores: list[Any]) -> None:
        pairs = [score if isinstance(score, (list, tuple)) else [score] for score in scores]
        if not scores or not all(len(pair) == 2 and all(isinstance(each, float) for each in pair) for pair in pairs):
            raise files.FileError(f"{path}: its scores are {str(scores)[:100]}: it is corrupt")

    def acquire(self, law: Any, x: Tensor, count: int, acquisition: str) -> Tensor:
        return acquire_regression(*_normals(law, x), count, acquisition)

    def in_words(self, score: list[float]) -> dict[str, str]:
        return {"rmse": f"{score[0]:.4g}", "log_density": f"{score[1]:.4g}"}

    def curve(self, num_labels: Tensor, scores: Tensor) -> RegressionCurve:
        """:param scores: ``[rounds, 2]``."""
        return RegressionCurve(num_labels, *scores.T[:, None])


def _check_labelled(path: Path, labelled: Tensor, size: int, first: int, per_round: int, rounds: int) -> None:
    """:raises ValueError: if the labelled inputs of a file are impossible after this number of rounds."""
    whole = labelled.dim() == 1 and labelled.dtype == torch.int64
    lengths = [first + per_round * (rounds - 1), first + per_round * rounds]  # with the labels of the next round, if the pool suffices
    if not whole or len(labelled) not in lengths or len(labelled.unique()) < len(labelled) or not 0 <= int(labelled.min()):
        raise files.FileError(f"{path}: its labelled inputs are not those of {rounds} rounds: it is corrupt")
    if int(labelled.max()) >= size:
        raise files.FileError(f"{path}: input {int(labelled.max())} is labelled of {size}: it is corrupt")


def _ask(task: _Classification | _Regression, predictor: Any, x: Tensor, labelled: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The indices of the inputs to label next."""
    count, candidates = settings["per_round"], settings["candidates"]
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    free[labelled] = False
    rows = free.nonzero().flatten()
    if settings["acquisition"] == "random":  # needs no prediction
        return rows[torch.randperm(len(rows))[:count].to(rows.device)]
    if candidates is not None and candidates < len(rows):
        rows = rows[torch.randperm(len(rows))[:candidates].to(rows.device)]
    return rows[task.acquire(predictor, x[rows], count, settings["acquisition"]).to(rows.device)]


@torch.no_grad()
def _probs(classifier: Any, x: Tensor) -> Tensor:
    """``[draws, N, K]``."""
    return torch.cat([torch.cat(list(classifier.log_probs(part))).exp() for part in x.split(CHUNK)], dim=1)


@torch.no_grad()
def _normals(law: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations, ``[draws, N]`` each."""
    parts = [law(part) for part in x.split(CHUNK)]
    if not all(isinstance(part, tuple) and len(part) == 2 for part in parts):
        raise ValueError(
            f"fit returned a {type(law).__name__}, which does not give means and standard deviations [draws, N]: of a regression "
            "return a PosteriorRegressor"
        )
    mean, scale = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    return mean, scale


def _fingerprint(pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What a run depends on, beside its arguments."""
    digests = {name: [tensor_digest(value) for value in data] for name, data in (("pool", pool), ("test", test))}
    return {**digests, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _save(held: files.Held, settings: Mapping[str, Any], labelled: Tensor, scores: list[Any], made_of: Mapping[str, str]) -> None:
    # all scores are stored under the name of the first kind
    state = {"settings": dict(settings), "fit": dict(made_of), "labelled": labelled, "accuracies": scores}
    held.save({**state, "random": files.random_state(labelled.device)}, _KIND)


def _load(path: Path, settings: Mapping[str, Any], device: torch.device) -> tuple[Tensor, list[Any], dict[str, str]]:
    content = files.load(path, _KIND)
    then = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(then, dict) or set(then) != set(settings):
        raise ValueError(f"{path} holds no active learning that this version can resume: delete it, or choose another path")
    files.check_fields(path, content, {"labelled": Tensor, "accuracies": list, "random": dict, "fit": dict})
    check_fingerprint(dict(settings), then, path)
    with files.reading(path):
        files.set_random_state(content["random"], device)
    return content["labelled"].to(device), list(content["accuracies"]), content["fit"]

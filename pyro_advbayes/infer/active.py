"""Active learning: labels are asked for where a posterior is unsure: :func:`active_learning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_advbayes.diagnostics import LearningCurve, acquire
from pyro_advbayes.diagnostics.acquisition import ACQUISITIONS
from pyro_advbayes.infer.mcmc import files
from pyro_advbayes.infer.mcmc.fingerprint import check_fingerprint, tensor_digest

Fit = Callable[[Tensor, Tensor], Any]
CHUNK = 1000  # inputs that are predicted at a time


def active_learning(
    fit: Fit,
    pool: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    acquisition: str = "bald",
    num_rounds: int = 50,
    per_round: int = 10,
    per_class: int = 2,
    candidates: int | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    disable_progbar: bool = False,
) -> LearningCurve:
    """
    Fits, asks for the labels that are wanted most, and fits anew, ``num_rounds`` times. ::

        def fit(x, y):
            mcmc = SGMCMC(SGLD(model, step_size=1e-5), num_samples=50, warmup_steps=100)
            mcmc.run(x, y)
            return PosteriorClassifier(model, mcmc.get_samples())

        curves = {name: active_learning(fit, (x, y), (x_test, y_test), acquisition=name) for name in ("random", "bald")}
        diagnostics.plot_learning_curves(curves)

    The setting is that of Adversarial Posterior Distillation (Wang et al., ICML 2018, section 5.3), after Gal et al. (2017): it starts
    with the same few labels of every class whatever the acquisition.

    :param fit: from labelled inputs to a classifier whose ``log_probs(x)`` yields log-probabilities of draws, chunk by chunk
        ``[chunk, N, K]``: a :class:`~pyro_advbayes.PosteriorClassifier` of whatever inference. It is to start anew at every call.
    :param pool: inputs ``[N, ...]`` and their classes ``[N]``, of which ``fit`` sees those that were asked for.
    :param test: inputs and classes on which accuracy is measured.
    :param str acquisition: ``"entropy"``, ``"bald"``, ``"variation_ratio"``, ``"batch_bald"`` or ``"random"``; see
        :func:`~pyro_advbayes.diagnostics.acquire`.
    :param int num_rounds: >= 0, after the first fit.
    :param int per_round: labels asked for in a round, >= 1.
    :param int per_class: labels of every class at the start, >= 1.
    :param int candidates: how many inputs of the pool, drawn anew in every round, are looked at; None for all of them. The most
        uncertain of thousands tend to be of one kind; about ten for each label that is asked for keep a round of them varied.
    :param int seed: of everything that is random, fits included.
    :param path: a file that keeps every finished round; where there is one, the run goes on from it, to the same end. Pool, test set and
        arguments must be the same, bit for bit, but for ``num_rounds``: more go on from those kept, fewer return the first of them.
    :param bool disable_progbar: no progress bar; there is none where the output is no terminal.
    :return: accuracy of the mean prediction after every fit, as one repetition.
    :raises ValueError: naming the argument that is out of range, a pool that is too small, inputs that are more or fewer than their
        classes, or a file of another run.
    :raises FileNotFoundError: if the folder of ``path`` is missing.
    """
    x, y = pool
    settings = {
        "acquisition": acquisition,
        "per_round": per_round,
        "per_class": per_class,
        "candidates": candidates,
        "seed": seed,
    }
    _check({**settings, "num_rounds": num_rounds}, pool, test)
    if path is not None:
        path = Path(path)
        files.refuse_existing(path, overwrite=True)
        settings |= _fingerprint(pool, test)
    pyro.set_rng_seed(seed)
    labelled, accuracies = _first(y, per_class), []
    if path is not None and path.exists():
        labelled, accuracies = _load(path, settings, x.device)
        accuracies = accuracies[: num_rounds + 1]
    bar = tqdm(total=num_rounds + 1, initial=len(accuracies), desc=acquisition, disable=True if disable_progbar else None)
    with bar:
        while len(accuracies) <= num_rounds:
            classifier = fit(x[labelled], y[labelled])
            accuracies.append(_accuracy(classifier, *test))
            # a longer run, where the pool has room for one, goes on from what is asked for after the last round
            if len(accuracies) <= num_rounds or (path is not None and len(labelled) + per_round <= len(y)):
                labelled = torch.cat([labelled, _ask(classifier, x, labelled, acquisition, per_round, candidates)])
            if path is not None:
                _save(path, settings, labelled, accuracies)
            bar.set_postfix(labels=len(labelled), accuracy=f"{accuracies[-1]:.4f}", refresh=False)
            bar.update()
    first = per_class * len(y.unique())
    num_labels = first + per_round * torch.arange(num_rounds + 1)
    return LearningCurve(num_labels, torch.tensor([accuracies], dtype=torch.float64))


def _check(settings: Mapping[str, Any], pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
    for name, (inputs, classes) in (("pool", pool), ("test", test)):
        if len(inputs) != len(classes):
            raise ValueError(f"{name}: {len(inputs)} inputs and {len(classes)} classes: one class an input")
    if settings["acquisition"] not in ACQUISITIONS:
        raise ValueError(f"acquisition={settings['acquisition']!r}: choose one of {', '.join(map(repr, ACQUISITIONS))}")
    for name, least in (("num_rounds", 0), ("per_round", 1), ("per_class", 1)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: an int >= {least}")
    y = pool[1]
    classes, counts = y.unique(return_counts=True)
    if int(counts.min()) < settings["per_class"]:
        raise ValueError(f"the pool has {int(counts.min())} inputs of class {int(classes[counts.argmin()])}, fewer than per_class")
    wanted = settings["per_class"] * len(classes) + settings["num_rounds"] * settings["per_round"]
    if wanted > len(y):
        raise ValueError(f"the pool has {len(y)} inputs, fewer than the {wanted} labels that the rounds ask for: take fewer")
    candidates = settings["candidates"]
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < settings["per_round"]):
        raise ValueError(f"candidates={candidates!r}: an int >= per_round, or None for the whole pool")


def _first(y: Tensor, per_class: int) -> Tensor:
    """The same number of every class, at random."""
    order = torch.randperm(len(y)).to(y.device)
    return torch.cat([order[y[order] == label][:per_class] for label in y.unique()])


def _ask(classifier: Any, x: Tensor, labelled: Tensor, acquisition: str, count: int, candidates: int | None) -> Tensor:
    """The numbers of the inputs to label next."""
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    free[labelled] = False
    rows = free.nonzero().flatten()
    if acquisition == "random":  # asks no classifier
        return rows[torch.randperm(len(rows))[:count].to(rows.device)]
    if candidates is not None and candidates < len(rows):
        rows = rows[torch.randperm(len(rows))[:candidates].to(rows.device)]
    return rows[acquire(_probs(classifier, x[rows]), count, acquisition).to(rows.device)]


@torch.no_grad()
def _probs(classifier: Any, x: Tensor) -> Tensor:
    """``[draws, N, K]``."""
    return torch.cat([torch.cat(list(classifier.log_probs(part))).exp() for part in x.split(CHUNK)], dim=1)


def _accuracy(classifier: Any, x: Tensor, y: Tensor) -> float:
    return float((_probs(classifier, x).mean(0).argmax(-1) == y).double().mean())


def _fingerprint(pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What a run depends on beside its arguments."""
    digests = {name: [tensor_digest(value) for value in data] for name, data in (("pool", pool), ("test", test))}
    return {**digests, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _save(path: Path, settings: Mapping[str, Any], labelled: Tensor, accuracies: list[float]) -> None:
    state = {"settings": dict(settings), "labelled": labelled, "accuracies": accuracies, "random": files.random_state(labelled.device)}
    files.save(path, state)


def _load(path: Path, settings: Mapping[str, Any], device: torch.device) -> tuple[Tensor, list[float]]:
    content = files.load(path)
    then = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(then, dict) or set(then) != set(settings):
        raise ValueError(f"{path} holds no active learning that this version can go on with: delete it, or choose another path")
    check_fingerprint(dict(settings), then, path)
    files.set_random_state(content["random"], device)
    return content["labelled"].to(device), list(content["accuracies"])

"""What is public, each with arguments with which it works."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

import pyro_advbayes as ab
from pyro_advbayes import attacks, datasets, diagnostics, distill, schedules
from pyro_advbayes import nn as bayesian
from tests.small_models import data, logistic

ROOMS = (ab, attacks, bayesian, diagnostics, datasets, distill)
# Results, which the package makes and a user only reads; warnings; modules; tables.
RESULTS = {
    *("AccuracyCurve", "AdversarialDetection", "Comparison", "Detection", "DrawQuality", "Estimate", "Examples", "Fit", "GradientNorms"),
    *(
        "IntervalCalibration",
        "Intervals",
        "LearningCurve",
        "MMDTest",
        "RegressionCurve",
        "RegressionScores",
        "RegressionSplit",
        "Reliability",
    ),
    *("EnsembleStart", "Reliability", "Report", "RetainedAccuracy", "PriorPredictive", "SamplingWarning", "TemperedLikelihoodWarning"),
    *("Prior", "PRESETS", "Attack"),
}
FREE_TEXT = {"label", "xlabel", "root", "path", "checkpoint", "shared", "exclude", "coords", "dims"}  # whatever is said there has a meaning

X, Y = data(6)
LABELS = Y.long()
SAMPLES = {"w": torch.linspace(-1.0, 1.0, 30).reshape(10, 3).sin(), "b": torch.linspace(-1.0, 2.0, 10).cos()}
PROBS = torch.softmax(torch.linspace(-2.0, 2.0, 4 * 6 * 3).cos().mul(3.0).reshape(4, 6, 3), -1)  # [draws, rows, classes]
SCORES = torch.linspace(0.1, 0.9, 6)
MEANS = torch.linspace(-1.0, 1.0, 24).sin().reshape(4, 6)  # [draws, rows]
EXTERNAL = Path("/nowhere/at/all")


class Target(NamedTuple):
    """
    A function and arguments with which it works.

    :param make: makes both anew, so that no call depends on an earlier one.
    """

    name: str
    make: Callable[[], tuple[Callable, dict[str, Any]]]


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def classify(x: Tensor) -> Tensor:
    return x[:, :2]


def classifier(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Sites ``w [3]`` and ``b []``, three classes."""
    w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
    logits = x * w + pyro.sample("b", pyro.distributions.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", pyro.distributions.Categorical(logits=logits), obs=y)
    return logits


def intervals() -> diagnostics.Intervals:
    return diagnostics.central_intervals(MEANS, [0.2, 0.5])


def kernel() -> ab.SGLD:
    return ab.SGLD(logistic, 1e-3, backend="handlers")


def guide() -> ab.AutoImplicit:
    return ab.AutoImplicit(logistic, distill.MLPGenerator(noise=2, hidden=(4,)))


@functools.cache
def fitted() -> ab.AutoImplicit:
    made = guide()
    distill.APD(made, batch_size=4, num_steps=2, check_every=None, disable_progbar=True).fit(SAMPLES)
    return made


@functools.cache
def finished() -> ab.SGMCMC:
    pyro.set_rng_seed(0)
    mcmc = ab.SGMCMC(kernel(), 4, 2, 2, disable_progbar=True)
    mcmc.run(X, Y)
    return mcmc


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def written() -> Path:
    """A folder with a finished run and a guide."""
    folder = Path(_folder().name)
    pyro.set_rng_seed(0)
    ab.SGMCMC(kernel(), 4, 2, 2, checkpoint=folder / "run", disable_progbar=True).run(X, Y)
    fitted().save(folder / "guide")
    return folder


def posterior() -> ab.PosteriorClassifier:
    return ab.PosteriorClassifier(classifier, SAMPLES)


def regressor(x: Tensor, y: Tensor) -> Callable:
    return lambda x: (x[:, 0].expand(4, -1), torch.ones(4, len(x)))


class Centroids:
    """A classifier of two draws for active learning."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.classes = torch.stack([x[y == label].mean(0) for label in (0, 1)])

    def log_probs(self, x: Tensor) -> Iterator[Tensor]:
        yield (-torch.cdist(x, self.classes)).log_softmax(-1).expand(2, -1, -1)


def fit(x: Tensor, y: Tensor) -> Centroids:
    return Centroids(x, y)


VALID: dict[str, Callable[[], Any]] = {  # by the argument's name
    **{name: (lambda name=name: SCORES.clone()) for name in ("in_scores", "out_scores", "uncertainty")},
    **dict.fromkeys(("probs", "clean_probs", "attacked_probs"), PROBS.clone),
    **{name: PROBS.mean(0).clone for name in ("in_probs",)},
    "labels": LABELS.clone,
    "x": X.clone,
    "y": LABELS.clone,
    "model": lambda: logistic,
    "kernel": kernel,
    "net": network,
    "guide": guide,
    "samples": lambda: {name: value.clone() for name, value in SAMPLES.items()},
    "posterior_samples": lambda: {name: value.clone() for name, value in SAMPLES.items()},
    "mean": MEANS.clone,
    "scale": lambda: MEANS.abs() + 0.5,
    "draws": MEANS.clone,
    "levels": lambda: [0.2, 0.5],
    "shares": lambda: [0.5, 1.0],
    "intervals": intervals,
    "log_probs": lambda: PROBS.log(),
    "count": lambda: 2,
    "eps": lambda: 0.1,
    "steps": lambda: 2,
    "step_size": lambda: 0.01,
    "batch_size": lambda: 3,
    "queries": lambda: 3,
    "layer": lambda: "0",
    "num_permutations": lambda: 10,
    "num_projections": lambda: 4,
    "num_resamples": lambda: 5,
    "num_samples": lambda: 4,
    "warmup_steps": lambda: 2,
    "chunk_size": lambda: 2,
    "num_steps": lambda: 2,
    "weight": lambda: 0.5,
    "radius": lambda: 0.5,
    "noise": lambda: 2,
    "hidden": lambda: (4,),
    "rank": lambda: 2,
    "width": lambda: 4,
    "weight_decay": lambda: 0.1,
    "num_data": lambda: 100,
    "clip": lambda: (-5.0, 5.0),
    "threshold": lambda: 0.75,
    "shared": lambda: "w",
    "split": lambda: "train",
    "args": lambda: (X.clone(), Y.clone()),
    "kwargs": dict,
    "size": lambda: 60,
    "plate": lambda: "data",
    "prior_factors": lambda: ["prior"],
    "posterior": lambda: lambda: None,
    "hit": lambda: torch.tensor([True, False, True, False, True, False]),
    "attacked": lambda: PROBS.flip(0).clone(),
    "prior": lambda: pyro.distributions.Normal(0.0, 1.0),
}


def _y() -> Tensor:
    return SCORES.clone()


DRAWS = {"posterior_samples": VALID["posterior_samples"]}
LOADED = {"root": lambda: EXTERNAL, "scale": lambda: (0.0, 1.0)}
CURVES = {"curves": lambda: {"a": diagnostics.accuracy_curve([0.0, 0.1], [PROBS, PROBS.flip(0)], LABELS)}}
OVERRIDES: dict[str, dict[str, Callable[[], Any]]] = {  # by the function's name; None leaves an argument out
    "BAL": {"perturb": lambda: "x", "batch_size": lambda: 4, "temperature": lambda: 1e-5, "clip": lambda: (-5.0, 5.0)},
    "BaseNoise": {"noise": lambda: {"w": torch.zeros(3)}},
    "Generator": {"network": network},
    "AutoAdversarialNormal": {},
    "AutoImplicit": {"generator": lambda: distill.MLPGenerator(noise=2, hidden=(4,))},
    "PosteriorClassifier": {"model": lambda: classifier, **DRAWS},
    "PosteriorRegressor": DRAWS,
    "Predictive": DRAWS,
    "Potential": {"args": VALID["args"], "batch_size": lambda: 3, "backend": lambda: "handlers"},
    "SGLD": {
        "model": lambda: logistic,
        "step_size": lambda: 1e-3,
        "temperature": lambda: 1.0,
        "batch_size": lambda: 3,
        "backend": lambda: "graph",
    },
    "SGMCMC": {"draws": lambda: None},
    "TraceRobust_ELBO": {"attack": lambda: attacks.FGSM(0.1)},
    "active_learning": {
        "fit": lambda: fit,
        "pool": lambda: (torch.cat([X, X + 1.0, X - 1.0]), torch.cat([LABELS, LABELS, LABELS])),
        "test": lambda: (X.clone(), LABELS.clone()),
        "num_rounds": lambda: 1,
        "per_round": lambda: 1,
        "path": lambda: None,
        "disable_progbar": lambda: True,
    },
    "bayes_adapter": {
        "model": lambda: bayesian.Classifier(bayesian.bayesianize(network())),
        "pretrained": network,
        "loader": lambda: [(X.clone(), LABELS.clone())],
        "num_data": lambda: 6,
    },
    "deep_ensemble": {"args": VALID["args"], "optim": lambda: pyro.optim.Adam({"lr": 0.01}), "num_members": lambda: 2},
    "ensemble_start": {"num_chains": lambda: 2, "num_epochs": lambda: 1, "batch_size": lambda: 3, "validation_share": lambda: 0.4},
    "prior_predictive": {"num_draws": lambda: 2, "site": None},
    "read_draws": {"path": lambda: written() / "run.draws.safetensors"},
    "to_arviz": {"posterior": finished, "model": None, "num_samples": None},
    "evaluate": {"classifier": lambda: classify, "attacks": lambda: [attacks.FGSM(0.1, clip=(-5.0, 5.0))]},
    "GuideClassifier": {"model": lambda: classifier, "num_samples": lambda: 2},
    "FanIn": {"scale": lambda: 1.0},
    "LearnedScale": {"scale": lambda: 1.0},
    "Classifier": {"net": lambda: bayesian.bayesianize(network())},
    "dropout_guide": {"model": lambda: bayesian.mc_dropout(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))},
    "mc_dropout": {"net": lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))},
    "accuracy_curve": {"eps": lambda: [0.0, 0.1], "attacked": lambda: [PROBS.clone(), PROBS.flip(0).clone()]},
    "acquire": {"acquisition": lambda: "bald"},
    "acquire_regression": {"acquisition": lambda: "variance"},
    **{
        name: {"y": _y}
        for name in ("coverage", "crps", "gaussian_crps", "gaussian_nll", "interval_calibration", "r2", "rmse", "regression_scores")
    },
    **{name: {"mean": MEANS[0].clone} for name in ("r2", "rmse")},
    **{name: {"y": lambda: X.flip(0).clone()} for name in ("mmd_test", "sliced_wasserstein")},
    "central_intervals": {"levels": VALID["levels"]},
    "log_predictive_density": {"log_probs": MEANS.clone},
    "gradient_norms": {"gradients": lambda: torch.linspace(-1.0, 1.0, 72).reshape(4, 6, 3).sin(), "draws": lambda: [1, 4]},
    "ood_detection": {"in_probs": PROBS.clone, "out_probs": lambda: {"other": PROBS.flip(0).clone()}},
    "plot_accuracy_curves": CURVES,
    "plot_accuracy_robustness": {"points": lambda: {"a": (SCORES.clone(), SCORES.clone())}},
    "plot_draw_curves": {"curves": lambda: {"a": [diagnostics.draw_quality(PROBS.log(), LABELS)]}},
    "plot_draw_quality": {"qualities": lambda: {"a": diagnostics.draw_quality(PROBS.log(), LABELS)}},
    "plot_gradient_norms": {"norms": lambda: {"a": diagnostics.gradient_norms(torch.ones(4, 6, 3), [1, 4])}},
    "plot_interval_calibration": {"calibrations": lambda: {"a": diagnostics.interval_calibration(intervals(), SCORES)}},
    "plot_learning_curves": {"curves": lambda: {"a": diagnostics.LearningCurve(torch.tensor([1, 2]), torch.tensor([[0.5, 0.6]]))}},
    "plot_reliability": {"bins": lambda: diagnostics.reliability(PROBS.mean(0), LABELS)},
    "plot_retained_accuracy": {"curves": lambda: {"a": diagnostics.retained_accuracy(PROBS, LABELS)}},
    "plot_scores": {"scores": lambda: {"a": SCORES.clone()}},
    "plot_uncertainty_map": {
        "scores": lambda: torch.linspace(0.0, 1.0, 12),
        "x1": lambda: torch.linspace(0.0, 1.0, 4),
        "x2": lambda: torch.linspace(0.0, 1.0, 3),
    },
    "save_netcdf": {
        "data": lambda: diagnostics.to_inference_data({"posterior": {"w": torch.zeros(2, 5)}}),
        "path": lambda: written() / "run.nc",
        "overwrite": lambda: True,
    },
    "to_inference_data": {"groups": lambda: {"posterior": {"w": torch.zeros(2, 5)}}},
    "two_gaussians": {},
    "two_moons": {"num_data": lambda: 20, "noise": lambda: 0.1},
    "digits": {"scale": lambda: (0.0, 1.0)},
    "uci": {"name": lambda: "yacht", "split": lambda: 0, "root": lambda: EXTERNAL},
    "mnist_ood": {"root": lambda: EXTERNAL, "scale": lambda: 1.0},
    **dict.fromkeys(("cifar10", "cifar10_grey", "fashion_mnist", "mnist", "notmnist", "omniglot"), LOADED),
    "metro_traffic": {"root": lambda: EXTERNAL},
    "APD": {},
    "OnlineAPD": {"buffer": lambda: 300, "num_samples": lambda: 400},
    "compare": {"guide": fitted},
    "init_to_fan_in": {"site": lambda: {"name": "w", "fn": pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1), "type": "sample"}},
    "minibatch": {"fn": lambda: logistic, "size": lambda: 60},
}


def _method(make: Callable[[], Any], name: str, **arguments: Callable[[], Any]) -> Target:
    return Target(name, lambda: (getattr(make(), name.split(".")[1]), {key: value() for key, value in arguments.items()}))


def _sampler() -> ab.SGMCMC:
    return ab.SGMCMC(kernel(), 2, 1, 2, disable_progbar=True)


def _apd() -> distill.APD:
    return distill.APD(guide(), batch_size=4, num_steps=2, check_every=None, disable_progbar=True)


ATTACKED = {"classifier": lambda: classify, "x": X.clone, "y": LABELS.clone}
METHODS = [
    _method(_sampler, "SGMCMC.run", x=X.clone, y=Y.clone),
    _method(lambda: ab.SGMCMC(ab.SGLD(logistic, 1e-3, 1.0, 3), 1, 0, disable_progbar=True), "SGMCMC.run", x=X.clone, y=Y.clone),
    _method(finished, "SGMCMC.get_samples", num_samples=lambda: 2, group_by_chain=lambda: False, lost_chains=lambda: False),
    _method(finished, "SGMCMC.get_extras", group_by_chain=lambda: False),
    _method(finished, "SGMCMC.diagnostics", x=X.clone, max_elements=lambda: 3),
    _method(finished, "SGMCMC.summary", x=X.clone, sites=lambda: None, prob=lambda: 0.9, max_elements=lambda: 3),
    _method(lambda: ab.SGMCMC, "SGMCMC.resume", path=lambda: written() / "run", kernel=kernel, x=X.clone, y=Y.clone),
    _method(fitted, "AutoImplicit.sample", num_samples=lambda: 2),
    _method(fitted, "AutoImplicit.save", path=lambda: written() / "saved", overwrite=lambda: True, dtype=lambda: torch.float16),
    _method(fitted, "AutoImplicit.storage", dtype=lambda: torch.float16),
    _method(lambda: ab.AutoImplicit, "AutoImplicit.load", path=lambda: written() / "guide", model=lambda: logistic),
    _method(_apd, "APD.fit", samples=VALID["samples"], x=X.clone, y=Y.clone),
    _method(posterior, "PosteriorClassifier.forward", x=X.clone),
    _method(posterior, "PosteriorClassifier.log_probs", x=X.clone),
    _method(lambda: ab.Predictive(logistic, SAMPLES), "Predictive.forward", x=X.clone),
    *[
        _method(
            functools.partial(kind, eps=0.1, clip=(-5.0, 5.0)),
            f"{kind.__name__}.__call__",
            classifier=lambda: classify,
            x=X.clone,
            y=LABELS.clone,
        )
        for kind in (attacks.FGSM, attacks.Square, attacks.Uniform)
    ],
    _method(lambda: attacks.PGD(0.1, 2, clip=(-5.0, 5.0)), "PGD.__call__", classifier=posterior, x=X.clone, y=LABELS.clone),
    _method(
        lambda: attacks.AdversarialDistribution(0.1, 2, 2, clip=(-5.0, 5.0)),
        "AdversarialDistribution.fit",
        classifier=lambda: classify,
        x=X.clone,
        y=LABELS.clone,
    ),
    *[
        Target(f"schedules.{name}", lambda name=name, options=options: (getattr(schedules, name), dict(options)))
        for name, options in (
            ("Constant", {"value": 0.1}),
            ("Polynomial", {"initial": 0.1, "scale": 10.0, "power": 0.55}),
            ("Cyclical", {"initial": 0.1, "period": 10}),
        )
    ],
]


def targets() -> list[Target]:
    """Everything in an ``__all__``, and methods that a user calls."""
    found: dict[str, Target] = {}
    for room in ROOMS:
        for name in room.__all__:
            value = getattr(room, name)
            if inspect.ismodule(value) or name in RESULTS:
                continue
            if name in ("ensemble_start", "prior_predictive"):  # take the model's arguments by position
                value = functools.partial(value, logistic, X, Y)
            found[f"{room.__name__.split('.')[-1]}.{name}"] = Target(name, functools.partial(_made, name, value))
    return [*found.values(), *METHODS]


def _made(name: str, value: Callable) -> tuple[Callable, dict[str, Any]]:
    return value, dict(_arguments(inspect.signature(value).parameters, OVERRIDES.get(name, {})))


def _arguments(parameters: Mapping[str, inspect.Parameter], overrides: Mapping[str, Callable | None]) -> Iterator[tuple[str, Any]]:
    yield from ((name, make()) for name, make in overrides.items() if make is not None and name not in parameters)  # of **options
    for name, parameter in parameters.items():
        if name in overrides:
            if overrides[name] is not None:
                yield name, overrides[name]()
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        elif parameter.default is parameter.empty:
            yield name, VALID[name]()
        elif name in VALID and parameter.default is not None and type(parameter.default) in (int, float):
            yield name, VALID[name]()

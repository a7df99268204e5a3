"""Calls whose errors the fuzzer found obscure: each is now refused by the name of its argument."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes import datasets, diagnostics, distill
from tests.fuzz import targets
from tests.fuzz.targets import PROBS, SAMPLES, X
from tests.small_models import logistic

FRAME = pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
SCORES, AXES = torch.linspace(0.0, 1.0, 12), (torch.linspace(0.0, 1.0, 4), torch.linspace(0.0, 1.0, 3))
HUGE = 10**12


def accuracy(eps: Any) -> Any:
    return diagnostics.accuracy_curve(eps, [PROBS, PROBS.flip(0)], targets.LABELS)


def norms(shape: tuple[int, ...], draws: Any = None) -> Any:
    return diagnostics.gradient_norms(torch.ones(shape), draws)


FOUND: list[tuple[Callable[[], Any], str]] = [
    # counts
    (lambda: targets.finished().get_samples(num_samples=True), "num_samples=True"),
    (lambda: datasets.mnist_ood("/nowhere", seed=True), "seed=True"),
    (lambda: datasets.two_moons(HUGE), f"num_data={HUGE}: more than there is memory for"),
    (lambda: datasets.two_gaussians(HUGE), f"num_per_class={HUGE}: more than there is memory for"),
    (lambda: diagnostics.mmd_test(X, X.flip(0), num_permutations=HUGE), f"num_permutations={HUGE}: more than"),
    (lambda: targets.fitted().sample(HUGE), f"num_samples={HUGE}: more than"),
    (lambda: datasets.two_moons(seed=HUGE), f"seed={HUGE}: an int from 0 to"),
    (lambda: datasets.two_moons(seed=-1), "seed=-1: an int from 0 to"),
    (lambda: datasets.digits(seed=-1), "seed=-1: an int from 0 to"),
    (lambda: datasets.two_moons(noise=-0.5), "noise=-0.5"),
    # sequences of numbers
    (lambda: accuracy(FRAME), "eps is a pandas DataFrame"),
    (lambda: accuracy(np.array(["a", "b"])), "eps is a numpy array"),
    (lambda: accuracy(torch.ones(6, 3)), "eps is a torch Tensor"),
    (lambda: norms((4, 6, 3), FRAME), "draws is a pandas DataFrame"),
    (lambda: norms((4, 6, 3), torch.ones(6, 3)), "draws is a torch Tensor"),
    (lambda: norms((0, 6, 3)), "gradients must be"),
    (lambda: ab.BAL(logistic, "x", 4, clip=torch.empty(0)), "clip is a torch Tensor"),
    # schedules
    (lambda: ab.BAL(logistic, "x", 4, clip=(0.0, 1.0), input_temperature=True), "input_temperature=True"),
    (lambda: ab.SGLD(logistic, step_size=torch.nn.Linear(3, 2)), "step_size is a function that fails at step 0"),
    # arguments of the model
    (lambda: targets.posterior()(torch.tensor(0.5)), "argument x is a tensor []"),
    (lambda: targets.posterior()(X[:0]), "argument x is a tensor [0, 3]"),
    (lambda: ab.Predictive(logistic, SAMPLES)(X.to("meta")), "argument x is a tensor of the meta device"),
    (lambda: diagnostics.draw_quality(PROBS.log()[:, :, :2], targets.LABELS), "log_probs.exp() must sum to 1"),
    (lambda: ab.weight_decay_prior(1e300, 100), "weight_decay=1e+300"),
    (lambda: ab.Predictive(logistic, SAMPLES)(X[:0]), "argument x is a tensor [0, 3]"),
    (lambda: targets._sampler().run(X, b"x"), "is given a bytes: give a tensor"),
    (lambda: ab.Potential(logistic, (X, "nonsense")), "is given a str: give a tensor"),
    (lambda: targets._apd().fit(SAMPLES, X, b"x"), "is given a bytes: give a tensor"),
    (lambda: ab.SGMCMC(ab.SGLD(logistic, 1e-3, 1.0, 3), 1).run(3, y="nonsense"), "x is an int, y is a str"),
    (lambda: targets.finished().diagnostics(X.to("meta")), "argument x is a tensor of the meta device"),
    # others
    (lambda: diagnostics.save_netcdf(X, "x.nc"), "data is a torch Tensor"),
    (lambda: diagnostics.save_netcdf(diagnostics.to_inference_data({"posterior": {"w": X}}), ""), "path='.'"),
    (lambda: diagnostics.plot_uncertainty_map(SCORES.to(torch.complex64), *AXES), "scores is a tensor of complex numbers"),
    (lambda: diagnostics.plot_uncertainty_map(SCORES, AXES[0] / 0.0, AXES[1]), "x1 must be"),
    (lambda: ab.init_to_fan_in({}), "site holds []"),
    (lambda: ab.to_arviz(int), "posterior is a guide"),
]


@pytest.mark.parametrize(("call", "says"), FOUND, ids=[says for _, says in FOUND])
def test_what_the_fuzzer_found_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


def test_what_the_fuzzer_found_is_taken_where_it_has_a_meaning(capsys):
    assert datasets.digits(test_fraction=np.float32(0.5)).x.shape == (898, 1, 8, 8)
    assert torch.equal(datasets.two_moons(20, Fraction(1, 4), seed=1).x, datasets.two_moons(20, 0.25, seed=1).x)
    assert torch.equal(accuracy(np.array([0.0, 0.5])).eps, accuracy([0.0, 0.5]).eps)
    targets.finished().summary(X.clone().requires_grad_())
    fit = distill.APD(targets.guide(), batch_size=4, num_steps=2, check_every=None)
    assert fit.fit({name: value.clone().requires_grad_() for name, value in SAMPLES.items()}).steps == 2

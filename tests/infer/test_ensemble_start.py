"""Chains that start from a deep ensemble."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_advbayes as ab
from pyro_advbayes.nn import Classifier, bayesianize

N = 60


def line() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([1.0, -0.5]) + 0.3 + 0.1 * torch.randn(N, generator=torch.Generator().manual_seed(1))


def model(x: Tensor, y: Tensor | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, scale), obs=y)


def predictive_density(samples: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Log-densities ``[members, rows]``, by hand."""
    return dist.Normal(samples["weight"] @ x.T, samples["scale"][:, None]).log_prob(y)


def test_every_member_finds_the_mode_of_the_posterior_of_the_training_rows() -> None:
    x, y = line()

    def known(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 0.05).to_event(1))  # so narrow that the mode is far from least squares
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)

    start = ab.ensemble_start(known, x, y, num_chains=3, num_epochs=200, batch_size=N)
    rows = torch.ones(N, dtype=torch.bool)
    rows[start.held_out] = False
    design, target = x[rows], y[rows]
    mode = torch.linalg.solve(design.T @ design + 0.25 / 0.05**2 * torch.eye(2), design.T @ target)
    assert torch.allclose(start["weight"], mode.expand(3, 2), rtol=0.02)


def test_rows_that_are_held_out_are_never_trained_on_and_alone_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = line()
    x = torch.cat([x, torch.arange(float(N))[:, None]], 1)
    trained, scored = set(), set()

    def watched(x: Tensor, y: Tensor) -> None:
        (trained if torch.is_grad_enabled() else scored).update(x[:, 2].long().tolist())
        model(x[:, :2], y)

    monkeypatch.setattr("pyro_advbayes.infer.ensemble_start.log_likelihoods", _one_by_one)
    start = ab.ensemble_start(watched, x, y, num_chains=2, num_epochs=5, validation_share=0.25, backend="handlers")
    held_out = set(start.held_out.tolist())
    assert len(held_out) == 15
    assert not trained & held_out
    assert trained == set(range(N)) - held_out


def _one_by_one(*args: object) -> dict[str, Tensor]:
    from pyro_advbayes.infer.arviz import log_likelihoods

    return log_likelihoods(*args, chunk_size=1)


def test_a_member_is_kept_as_it_was_when_it_predicted_best() -> None:
    x, y = line()
    start = ab.ensemble_start(model, x, y, num_chains=4, num_epochs=40, lr=0.3)  # so large that the scores go up and down
    density = predictive_density(start.samples, x[start.held_out], y[start.held_out])
    assert torch.allclose(density.mean(-1), torch.tensor(start.member_scores, dtype=density.dtype), atol=1e-4)
    assert math.isclose(float((density.logsumexp(0) - math.log(4)).mean()), start.score, abs_tol=1e-4)
    assert max(start.epochs) < 40


def test_training_ends_when_no_member_has_improved_for_a_while() -> None:
    x, y = line()
    start = ab.ensemble_start(model, x, y, num_chains=2, num_epochs=10_000, patience=3, lr=0.1)
    assert max(start.epochs) < 1000


def test_chains_start_at_the_members_in_unconstrained_space(capsys: pytest.CaptureFixture) -> None:
    x, y = line()
    start = ab.ensemble_start(model, x, y, num_chains=3, num_epochs=5)
    assert set(start) == {"weight", "scale"} and len(start) == 2
    assert torch.allclose(start["scale"].exp(), start.samples["scale"])
    mcmc = ab.SGMCMC(ab.SGLD(model, 1e-9), num_samples=2, warmup_steps=0, num_chains=3, initial_params=start, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.SamplingWarning)
        mcmc.run(x, y)
    assert torch.allclose(mcmc.get_samples(group_by_chain=True)["scale"][:, 0], start.samples["scale"], atol=1e-2)
    capsys.readouterr()
    mcmc.summary()
    assert f"started from: deep ensemble of 3: log density of held-out rows {start.score:.4g} nats" in capsys.readouterr().out


def test_members_start_apart_and_a_seed_fixes_them() -> None:
    x, y = line()
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(ab.ensemble_start(model, x, y, num_chains=2, num_epochs=3))
    assert torch.equal(runs[0]["weight"], runs[1]["weight"])
    assert not torch.allclose(runs[0]["weight"][0], runs[0]["weight"][1], atol=1e-3)


def test_a_classifier_is_scored_by_its_classes() -> None:
    x = torch.randn(N, 2)
    y = (x[:, 0] > 0).long()
    network = Classifier(bayesianize(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))))
    start = ab.ensemble_start(network, x, y, num_chains=3, lr=0.02)
    assert -0.4 < start.score < 0.0
    assert start.score >= sum(start.member_scores) / 3  # Jensen


def test_members_that_have_not_trained_are_named() -> None:
    x, y = line()
    with pytest.raises(RuntimeError, match="no member has trained: at lr=1e"):
        ab.ensemble_start(model, x, y, num_chains=2, num_epochs=3, lr=1e6)

    def far(site: dict) -> Tensor:  # every second start is the mode
        far.calls += 1
        good = {"weight": torch.tensor([0.99, -0.5]), "scale": torch.tensor(0.31)}
        bad = {"weight": torch.tensor([9.0, 9.0]), "scale": torch.tensor(1.0)}
        return (good if (far.calls // 2) % 2 else bad)[site["name"]]

    far.calls = 0
    with pytest.warns(UserWarning, match=r"members? \d.* of 4 have not trained"):
        start = ab.ensemble_start(model, x, y, num_chains=4, num_epochs=2, lr=3.0, init_strategy=far)
    assert 0 < sum(epoch == 0 for epoch in start.epochs) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains=0"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"patience": True}, "patience=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ab.ensemble_start(model, *line(), **options)


def test_data_that_cannot_be_split_are_refused() -> None:
    x, y = line()
    with pytest.raises(ValueError, match="rows out of training, which needs the data as tensors"):
        ab.ensemble_start(model, DataLoader(TensorDataset(x, y), 10))
    with pytest.raises(ValueError, match="at least 2, here is 1"):
        ab.ensemble_start(model, x[:1], y[:1])

    def without_plate(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("obs", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="plate"):
        ab.ensemble_start(without_plate, x, y)

"""The instrument itself: its references, its verdicts, and a run from the command line."""

from __future__ import annotations

import json
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from tests.benchmarks import course_cases, temperature, trust
from tests.benchmarks.trust import CASES
from tests.benchmarks.trust_references import Moments, Quadrature, gaussian_moments, log_grid, unknown_noise
from tests.benchmarks.trust_verdict import VERDICTS, find, verdict

MOMENTS = {
    "a": gaussian_moments(torch.zeros(3).double(), torch.ones(3).double()),
    "b": gaussian_moments(torch.tensor(5.0), torch.tensor(4.0)),
}


def exact_draws(chains=4, draws=1000):
    return {"a": torch.randn(chains, draws, 3), "b": 5.0 + 2.0 * torch.randn(chains, draws)}


def judged(samples, warned=False, lost=0):
    return verdict(find(samples, MOMENTS, 4, lost), warned)


def test_exact_draws_are_right_and_a_warning_about_them_is_a_false_alarm():
    assert {judged(exact_draws()) for _ in range(20)} == {"right"}
    assert judged(exact_draws(), warned=True) == "false alarm"
    alternating = {name: torch.stack([value, 2.0 * value.mean() - value], 2).flatten(1, 2) for name, value in exact_draws().items()}
    assert judged(alternating) == "right"


@pytest.mark.parametrize("scale, shift", [(1.3, 0.0), (0.75, 0.0), (1.0, 0.3), (math.nan, 0.0)])
def test_a_law_that_is_off_is_silent_without_a_warning(scale, shift):
    samples = exact_draws()
    samples["b"] = 5.0 + scale * (samples["b"] - 5.0) + 2.0 * shift
    assert judged(samples) == "SILENT" and judged(samples, warned=True) == "warned"


def test_lost_chains_and_chains_that_stand_still_have_to_be_warned_of():
    assert judged(exact_draws(), lost=1) == "SILENT"
    assert judged({name: value[:3] for name, value in exact_draws().items()}) == "SILENT"
    assert judged({name: value[:, :1].expand_as(value) for name, value in exact_draws().items()}) == "SILENT"


def test_a_slow_chain_may_warn_and_need_not():
    slow = torch.zeros(4, 1000)
    for i in range(1, 1000):  # autocorrelation time 60: about 15 draws a chain
        slow[:, i] = 0.967 * slow[:, i - 1] + (1.0 - 0.967**2) ** 0.5 * torch.randn(4)
    samples = {**exact_draws(), "b": 5.0 + 2.0 * slow}
    assert judged(samples) == "right" and judged(samples, warned=True) == "warned"


def test_quadrature_agrees_with_a_grid_over_everything():
    y, sigma = torch.tensor([0.3, 1.9, 1.1]).double(), log_grid(0.05, 60.0, 1500)
    log_weight = dist.HalfNormal(2.0).log_prob(sigma) + sigma.log() - 3 * sigma.log()
    ones = torch.ones(1, 3, 1, dtype=torch.float64) / sigma.reshape(-1, 1, 1)
    known = Quadrature(ones, y / sigma.unsqueeze(-1), torch.tensor([0.25]).double(), log_weight)
    z = torch.linspace(-12, 12, 2001).double()
    log_joint = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z, sigma.reshape(-1, 1, 1)).log_prob(y.reshape(3, 1)).sum(-2)
    joint = (log_joint + (dist.HalfNormal(2.0).log_prob(sigma) + sigma.log()).unsqueeze(-1)).flatten().softmax(0).reshape(1500, -1)
    for moments, values, law in ((known.linear(torch.ones(1, 1, 1).double()), z, joint.sum(0)), (known.scale(sigma), sigma, joint.sum(1))):
        mean = law @ values
        variance = law @ (values - mean).square()
        seen = torch.stack([part.squeeze() for part in moments[:3]])
        assert torch.allclose(seen, torch.stack([mean, variance.sqrt(), law @ (values - mean).pow(4) / variance**2]), rtol=1e-4)


def test_both_forms_of_the_eight_schools_have_one_posterior():
    centred, other = (CASES[f"eight schools {form}"].make(0).moments for form in ("centred", "non-centred"))
    assert torch.equal(centred["tau"].mean, other["tau"].mean)
    assert float(centred["mu"].mean) == pytest.approx(4.4, abs=0.05)  # 4.4 and 3.6 in posteriordb
    assert float(centred["tau"].mean) == pytest.approx(3.6, abs=0.05)
    assert float(centred["theta"].mean.mean()) == pytest.approx(4.8, abs=0.1)


def test_a_run_is_kept_judged_tabulated_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "run_once", partial(trust.run_once, num_samples=20, warmup_steps=20))
    out = tmp_path / "trust.jsonl"
    for _ in range(2):
        trust.main(["--only", "around", "--kernels", "SGHMC", "--seeds", "1", "--out", str(out)])
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert [(row["case"], row["kernel"], row["seed"]) for row in rows] == [("input around 100", "SGHMC", 0)]
    assert header["updates"] == 20_000 and rows[0]["verdict"] in VERDICTS
    table = out.with_suffix(".md").read_text()
    assert "### input around 100" in table and "| SGHMC |" in table


def test_temperature_is_compared_along_axes_with_its_prediction(tmp_path, monkeypatch):
    for name, value in {"FACTORS": (1,), "WARMUP_STEPS": 5, "NUM_SAMPLES": 5, "CHAINS": 8}.items():
        monkeypatch.setattr(temperature, name, value)
    out = tmp_path / "temperature.json"
    temperature.main(["--kernels", "SGLD", "--ratios", "2", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert len(row["measured"]) == len(row["predicted"]) == temperature.FEATURES + 1
    # curvature and noise each take a share of 0.1 of the temperature; the softest axis is hardly moved by curvature
    assert row["predicted"][0] == pytest.approx(row["T_eff"], rel=0.02) and row["predicted"] == sorted(row["predicted"])
    assert row["predicted"][-1] <= 1.1 * row["T_eff"] + 1e-3
    assert "| SGLD | 2 | auto |" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", course_cases.TARGETS)
def test_a_density_by_hand_is_that_of_the_model_as_a_beginner_writes_it(name):
    """Up to a constant, with the Jacobian of every constrained site."""
    pytest.importorskip("jax")
    target, problem = course_cases.TARGETS[name](), CASES[name].make(0)
    torch.manual_seed(0)
    points = torch.tensor(target.start) + 0.3 * torch.randn(4, len(target.start))
    ours, theirs = [], []
    for point in points:
        row = point.clone().requires_grad_()
        values = {site: value[0, 0] for site, value in target.sites(row.expand(1, 1, -1)).items()}
        flat = torch.cat([value.reshape(-1) for value in values.values()])
        jacobian = torch.stack([torch.autograd.grad(value, row, retain_graph=True)[0] for value in flat])
        log_joint = poutine.trace(poutine.condition(problem.model, data=values)).get_trace(*problem.args).log_prob_sum()
        ours.append(float(log_joint.detach()) + float(torch.linalg.slogdet(jacobian).logabsdet))
        theirs.append(float(target.log_density(point.numpy())))
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one - ours[0] == pytest.approx(other - theirs[0], rel=2e-4, abs=2e-2)


def test_moments_on_a_grid_and_of_one_unknown_noise_scale_are_those_of_long_runs_by_hand():
    """Importance sampling from the prior, which shares nothing with the quadratures."""
    torch.manual_seed(0)
    problem = CASES["course bioassay"].make(0)
    alpha, beta = 2.0 * torch.randn(2_000_000), 10.0 * torch.randn(2_000_000)
    dose, deaths = problem.args
    weight = sum(dist.Binomial(5, logits=alpha + beta * x).log_prob(d) for x, d in zip(dose, deaths, strict=True)).softmax(0)
    x, y = torch.randn(6, 1), torch.randn(6)
    w, sigma = torch.randn(2_000_000), 2.0 * torch.randn(2_000_000).abs()
    both = dist.Normal(w.unsqueeze(-1) * x.squeeze(-1), sigma.unsqueeze(-1)).log_prob(y).sum(-1).softmax(0)
    known = unknown_noise(x, y, 1.0, dist.HalfNormal(2.0), log_grid(0.05, 30.0, 1500))
    line = known.linear(torch.ones(1, 1, 1).double())
    for moments, values, law in (
        (problem.moments["alpha"], alpha, weight),
        (problem.moments["beta"], beta, weight),
        (Moments(*(part.squeeze() for part in line[:3])), w, both),
        (known.scale(log_grid(0.05, 30.0, 1500)), sigma, both),
    ):
        mean = law @ values
        sd = (law @ (values - mean).square()).sqrt()
        assert float(moments.mean) == pytest.approx(float(mean), abs=0.02 * float(sd))
        assert float(moments.sd) == pytest.approx(float(sd), rel=0.02)

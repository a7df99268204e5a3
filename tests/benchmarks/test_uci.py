"""The benchmark on UCI sets: its scores against closed forms, and a run from the command line on a set that the test makes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.distributions import Normal

import pyro_advbayes as ab
from models.heteroscedastic_regression import HeteroscedasticRegression
from tests.benchmarks import uci


@pytest.fixture
def data(tmp_path):
    """A folder with a set of 60 rows."""
    folder = tmp_path / "uci" / "yacht"
    folder.mkdir(parents=True)
    x = torch.randn(60, 3)
    table = torch.cat([x, (x[:, :1] - x[:, 1:2] + 0.1 * torch.randn(60, 1))], dim=1).tolist()
    files = {
        "data": "\n".join(" ".join(map(str, row)) for row in table),
        "index_features": "0\n1\n2\n",
        "index_target": "3\n",
        "n_splits": "1\n",
        "index_train_0": "\n".join(map(str, range(50))),
        "index_test_0": "\n".join(map(str, range(50, 60))),
    }
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return tmp_path


def test_scores_are_the_density_of_the_mean_law_and_the_error_of_the_mean():
    model, x, y = HeteroscedasticRegression(2, (4,)), torch.randn(7, 2), torch.randn(7)
    sites = {"net.1.weight": (4, 2), "net.1.bias": (4,), "net.3.weight": (2, 4), "net.3.bias": (2,)}
    draws = {site: torch.randn(5, *shape) for site, shape in sites.items()}
    mean, scale = ab.Predictive(model, draws, return_sites=["_RETURN"])(x)["_RETURN"].double().unbind(-1)
    density = Normal(mean, scale).log_prob(y.double()).exp().mean(0)
    found = uci.scores(model, draws, x, y)
    assert found["lppd"] == pytest.approx(float(density.log().mean()), abs=1e-3)
    assert found["rmse"] == pytest.approx(float((mean.mean(0) - y).square().mean().sqrt()), abs=1e-3)


def test_independent_draws_have_their_number_as_effective_sample_size_and_chains_apart_a_large_r_hat():
    model, x = HeteroscedasticRegression(2, (4,)), torch.randn(7, 2)
    sites = {"net.1.weight": (4, 2), "net.1.bias": (4,), "net.3.weight": (2, 4), "net.3.bias": (2,)}
    draws = {site: torch.randn(3, 200, *shape) for site, shape in sites.items()}
    found = uci.mixing(model, draws, x, updates=400)
    assert 0.6 < found["f_ess"] / 500 < 1.4 and 0.98 < found["r_hat"] < 1.05
    draws["net.3.bias"] += 20.0 * torch.arange(3.0)[:, None, None]
    assert uci.mixing(model, draws, x, updates=400)["r_hat"] > 3.0


def test_a_run_from_the_command_line_goes_on_where_it_was(data, capsys):
    out = data / "runs.jsonl"
    command = ["--data", str(data), "--sets", "yacht", "--splits", "1", "--seeds", "1", "--kernels", "SGHMC", "MCLMC", "--out", str(out)]
    uci.main([*command, "--updates", "8", "--epochs", "3"])
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert header["updates"] == 16 and [row["kernel"] for row in rows] == ["ensemble", "SGHMC", "MCLMC"]
    assert all(math.isfinite(row[score]) for row in rows for score in ("lppd", "rmse"))
    assert "| yacht | MCLMC |" in out.with_suffix(".md").read_text()
    uci.main([*command, "--updates", "8", "--epochs", "3"])  # what is there is not run again
    assert len(out.read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="runs of another length"):
        uci.main([*command, "--updates", "9", "--epochs", "3"])
    assert "LPPD" in capsys.readouterr().out

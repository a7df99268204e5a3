from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import arviz
import matplotlib.image
import pyro
import pytest
import torch

from tutorials import quickstart

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A small run, as a person starts it: from the command line, in another folder."""
    out = tmp_path_factory.mktemp("quickstart")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tutorials" / "quickstart.py", "--scale", "small", "--seed", "3", "--out", out],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return out, done


def without_times(content: dict) -> dict:
    content = copy.deepcopy(content)
    for numbers in content["results"].values():
        for name in [name for name in numbers if "second" in name]:
            del numbers[name]
    return content


def test_one_seed_gives_identical_numbers_in_another_process(first, tmp_path):
    out, _ = first
    again = quickstart.main(["--scale", "small", "--seed", "3", "--out", str(tmp_path)])
    assert without_times(again) == without_times(json.loads((out / "quickstart.json").read_text()))
    ours, theirs = (arviz.from_netcdf(folder / "posterior.nc") for folder in (tmp_path, out))
    assert ours["posterior"].equals(theirs["posterior"])


def test_all_methods_learn_and_only_samplers_have_chains(first):
    results = json.loads((first[0] / "quickstart.json").read_text())["results"]
    assert list(results) == ["MAP", "SGLD", "SGAdaLD", "SGHMC"]
    for method, numbers in results.items():
        assert numbers["accuracy"] > 0.9 and numbers["auroc"] > 0.85, method
        assert ("rhat_max" in numbers) == (method != "MAP")
        assert numbers.get("divergences", 0) == 0


def test_the_table_shows_the_numbers_of_the_json_and_no_progress_bar(first):
    out, done = first
    results = json.loads((out / "quickstart.json").read_text())["results"]
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in results}
    for method, numbers in results.items():
        assert lines[method][:4] == [f"{numbers[key]:.4f}" for key in ("accuracy", "nll", "ece", "auroc")]
    assert "it/s" not in done.stderr


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # 80 draws of chains that have not mixed
@pytest.mark.parametrize("method", ["SGAdaLD", "SGHMC"])
def test_energies_are_flat_from_the_first_kept_sample_on(method):
    """While V followed the chain through all of warm-up, energies of SGAdaLD fell from 1700 to 370 over the first kept samples."""
    pyro.set_rng_seed(0)
    scale = quickstart.SCALES["full"]._replace(num_samples=30, warmup=40, updates={method: 60})
    _, energies = quickstart.sample(method, quickstart.new_model(), quickstart.load(), scale)
    kept = torch.from_numpy(energies[scale.warmup :]).T
    for part in (kept[:, :3], kept[:, :10]):
        assert abs(float(part.mean() / kept[:, 15:].mean()) - 1.0) < 0.1


def test_arviz_reads_the_posterior(first):
    idata = arviz.from_netcdf(first[0] / "posterior.nc")
    samples = quickstart.SCALES["small"].num_samples
    assert {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"} <= set(idata.groups())
    assert idata["posterior"]["net.3.bias"].shape == (4, samples, 8)
    assert idata["log_likelihood"]["obs"].shape[:2] == (4, samples)
    assert arviz.loo(idata, pointwise=True).n_data_points == len(idata["observed_data"]["obs"])


def test_the_picture_is_not_empty(first):
    pixels = matplotlib.image.imread(first[0] / "quickstart.png")
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1000
    assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_out_of_distribution_digits_are_never_in_training_or_test():
    task = quickstart.load()
    assert task.y.max() == task.y_test.max() == 7
    rows = {tuple(row) for row in torch.cat([task.x, task.x_test]).tolist()}
    assert len(task.x) + len(task.x_test) + len(task.x_out) == 1797
    assert not rows & {tuple(row) for row in task.x_out.tolist()}

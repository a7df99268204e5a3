from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import matplotlib.image
import pyro
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes.attacks import FGSM, WRM
from pyro_advbayes.infer.mcmc import noise_estimate
from tutorials.papers import bal_mnist
from tutorials.papers.experiments import Results

VARIED = ("published cost and steps", "two copies")


@pytest.fixture(scope="module", autouse=True)
def small():
    """A twentieth of the smallest scale's work: what is tested is the experiment's code. Noise is measured by 4 gradients, not 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bal_mnist, "BATCH_SIZE", 32)
        patch.setattr(bal_mnist, "LOOKED_AT", 20)
        patch.setitem(bal_mnist.SCALES, "smoke", bal_mnist.SCALES["smoke"]._replace(num_train=64))
        patch.setattr(noise_estimate, "EVALUATIONS", 2)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The smallest scale, all of it but most of the settings that are varied."""
    out = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bal_mnist, "SEARCH", {name: bal_mnist.SEARCH[name] for name in VARIED})
        bal_mnist.main(["--scale", "smoke", "--out", str(out)])
    return out


def test_every_method_has_every_number_with_its_error(rows):
    content = json.loads((rows / "bal_mnist-smoke.json").read_text())
    assert {"scale", "seed", "numbers", "eps", "batch_size", "device", "versions"} <= set(content["settings"])
    kinds = ("FGSM", "IFGSM", "WRM", "PGD")
    named = {"ERM", "BNN", "BAL, 1 learners", "BAL, 2 learners", "PGD, eps 0.15", *(f"{kind}, size of BAL" for kind in kinds)}
    named |= {f"{kind}, published size" for kind in kinds[:3]} | {"PGD, eps 0.15, 2 networks"}
    named |= {f"settings: {name}" for name in VARIED}
    assert set(content["results"]) == named
    for name, row in content["results"].items():
        assert list(row["FGSM"]) == [str(eps) for eps in bal_mnist.EPS]
        for value, error in (*row["FGSM"].values(), *row["PGD"].values(), *row["Square"].values(), row["one-step C-W"]):
            assert 0.0 <= value <= 1.0 and error > 0.0
        constant = name == "settings: published cost and steps"
        assert ("T_eff" in row["about"]) == constant and row["about"].get("T_eff", 1.0) > 0.999 * bal_mnist.MAIN.temperature
        assert (row["size"] is None) == (name in ("ERM", "BNN"))


def test_an_attack_of_a_size_has_that_size_and_depends_on_the_network():
    scale = bal_mnist.SCALES["smoke"]
    task, model = bal_mnist.load("smoke", scale, None, "cpu"), bal_mnist.new_model("cpu")
    pyro.set_rng_seed(0)
    start = bal_mnist.stacked(bal_mnist.point(model, task, 5, None, None))
    network, steeper = (ab.PosteriorClassifier(model, {site: factor * value for site, value in start.items()}) for factor in (1.0, 1.2))
    for make in (FGSM, partial(WRM, steps=1)):
        attack = bal_mnist.OfSize(make, 1.5, task)
        first = attack(network)
        assert bal_mnist.size_of(first, network, task)["l2"] == pytest.approx(1.5, rel=0.02)
    assert bal_mnist.size_of(first, steeper, task)["l2"] > 1.2 * 1.5
    for _ in range(6):
        followed = attack(steeper)
    assert bal_mnist.size_of(followed, steeper, task)["l2"] == pytest.approx(1.5, rel=0.05)


def test_the_picture_shows_its_numbers(rows):
    pixels = matplotlib.image.imread(rows / "bal_mnist-smoke.png")
    assert pixels.shape[1] >= 800 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_only_what_is_missing_is_computed_again_from_the_same_start(rows, tmp_path, monkeypatch):
    name = "bal_mnist-smoke.json"
    content = json.loads((rows / name).read_text())
    kept = {key: row for key, row in content["results"].items() if key not in ("ERM", "FGSM, published size")}
    (tmp_path / name).write_text(json.dumps({**content, "results": kept}))
    measured = []
    measure = bal_mnist.measure
    monkeypatch.setattr(bal_mnist, "measure", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setattr(bal_mnist, "SEARCH", {})
    bal_mnist.main(["--scale", "smoke", "--out", str(tmp_path)])
    again = json.loads((tmp_path / name).read_text())["results"]
    assert len(measured) == 2
    for key in ("ERM", "FGSM, published size"):
        assert {k: v for k, v in again[key].items() if k != "seconds"} == {
            k: v for k, v in content["results"][key].items() if k != "seconds"
        }


def test_processes_with_rows_of_their_own_fill_one_file(rows, tmp_path):
    name = "bal_mnist-smoke.json"
    wanted = json.loads((rows / name).read_text())["settings"]
    first, second = (Results(tmp_path / name, wanted) for _ in range(2))
    first.add("ERM", {"of": "the first"})
    assert "ERM" in second
    second.add("BNN", {"of": "the second"})
    first.add("WRM", {"of": "the first"})
    assert list(json.loads((tmp_path / name).read_text())["results"]) == ["ERM", "BNN", "WRM"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rows_can_be_chosen_and_an_unknown_one_is_named(tmp_path, capsys):
    only = bal_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", "ERM"])
    assert list(only["results"]) == ["ERM"]
    with pytest.raises(SystemExit):
        bal_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", "FGSM"])
    assert "--only FGSM: the rows are ERM, BAL, 2 learners" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at the size of BAL's perturbations: first --only 'BAL, 2 learners'"):
        bal_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", "WRM, size of BAL"])


def test_settings_are_not_mixed_in_one_file(rows):
    with pytest.raises(ValueError, match="was written with another seed: move it away"):
        bal_mnist.main(["--scale", "smoke", "--seed", "4", "--out", str(rows)])


def test_settings_that_are_varied_are_settings_of_bal():
    scale = bal_mnist.SCALES["cpu"]
    model, rows = bal_mnist.new_model("cpu"), bal_mnist.methods(scale, Path())
    for name, setting in bal_mnist.SEARCH.items():
        assert f"settings: {name}" in rows and setting != bal_mnist.MAIN
        kernel = bal_mnist.kernel_of(setting, model, scale, {})
        assert (kernel.cost, kernel.copies, kernel.clean_share) == (setting.cost, setting.copies, setting.clean_share)


def test_chains_that_were_interrupted_go_on_to_the_same_end(tmp_path, monkeypatch):
    scale = bal_mnist.SCALES["smoke"]._replace(minibatches=12)
    task, model = bal_mnist.load("smoke", scale, None, "cpu"), bal_mnist.new_model("cpu")
    pyro.set_rng_seed(0)
    start = bal_mnist.point(model, task, 5, None, None)

    def end(path):
        pyro.set_rng_seed(1)
        return bal_mnist.sampled(bal_mnist.MAIN, 1, model, task, scale, start, path).samples

    whole = end(tmp_path / "whole.safetensors")
    run, updates = ab.BAL.sample, []

    def killed(*args):
        updates.append(1)
        if len(updates) == 12:
            raise KeyboardInterrupt
        return run(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ab.BAL, "sample", killed)
        end(tmp_path / "parts.safetensors")
    again = end(tmp_path / "parts.safetensors")
    for site, value in whole.items():
        assert torch.equal(value, again[site])

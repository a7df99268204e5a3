"""The scripts whose pictures and numbers are in the documentation run, and write what the pages read."""

from __future__ import annotations

import json
import warnings

import matplotlib.image
import torch

from tutorials import front_page, prior_scales


def test_the_front_page_has_a_picture_and_the_numbers_of_both(tmp_path, monkeypatch):
    x, labels = torch.randn(120, 784), torch.arange(120) % 10
    task = front_page.Task(x + labels[:, None], labels, x.flip(0) + labels.flip(0)[:, None], labels.flip(0), 9.0 * torch.randn(120, 784))
    monkeypatch.setattr(front_page, "load", lambda root, count: task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = front_page.main(["--out", str(tmp_path), "--samples", "2", "--epochs", "1"])
    assert json.dumps(found) == json.dumps(json.loads((tmp_path / "front-page.json").read_text()))  # of two draws R-hat is NaN
    assert set(found["results"]) == {"one network", "posterior"}
    assert {"accuracy", "nll", "ece", "auroc", "auroc_mutual_information", "r_hat"} <= set(found["results"]["posterior"])
    pixels = matplotlib.image.imread(tmp_path / "front-page.png")
    assert pixels.shape[1] >= 1000 and 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_one_prior_is_measured_anew_and_the_others_stay(tmp_path):
    arguments = ["--out", str(tmp_path), "--updates", "1", "--only"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prior_scales.main([*arguments, "FanIn(scale=3.0)"])
        both = prior_scales.main([*arguments, "LearnedScale()"])["results"]
    assert set(both) == {"one network", "FanIn(scale=3.0)", "LearnedScale()"}
    assert both == json.loads((tmp_path / "prior-scales.json").read_text())["results"]
    assert 0.1 < both["FanIn(scale=3.0)"]["prior_top"] < 1.0

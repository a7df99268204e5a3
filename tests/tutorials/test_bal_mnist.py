from __future__ import annotations

import json

import matplotlib.image
import pytest

from tutorials.papers import bal_mnist


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The smallest scale, all of it."""
    out = tmp_path_factory.mktemp("mnist")
    bal_mnist.main(["--scale", "smoke", "--out", str(out)])
    return out


def test_every_method_has_every_number_with_its_error(rows):
    content = json.loads((rows / "bal_mnist-smoke.json").read_text())
    assert {"scale", "seed", "numbers", "eps", "batch_size", "device", "versions"} <= set(content["settings"])
    named = {"BAL, 1 learners", "BAL, 2 learners", "BAL, box 0.15", "BNN", "ERM", "FGSM", "IFGSM", "WRM", "PGD, 0.15", "PGD, size of BAL's"}
    assert set(content["results"]) == named
    for name, row in content["results"].items():
        assert list(row["FGSM"]) == [str(eps) for eps in bal_mnist.EPS]
        for value, error in (*row["FGSM"].values(), *row["PGD"].values(), *row["Square"].values(), row["one-step C-W"]):
            assert 0.0 <= value <= 1.0 and error > 0.0
        assert (row["about"].get("T_eff") is not None) == (name.startswith("BAL") or name == "BNN")
    assert content["results"]["BAL, box 0.15"]["about"]["perturbation"]["linf"] <= 0.15 + 1e-6


def test_the_picture_shows_its_numbers(rows):
    pixels = matplotlib.image.imread(rows / "bal_mnist-smoke.png")
    assert pixels.shape[1] >= 800 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_only_what_is_missing_is_computed_again_from_the_same_start(rows, tmp_path, monkeypatch):
    name = "bal_mnist-smoke.json"
    content = json.loads((rows / name).read_text())
    kept = {key: row for key, row in content["results"].items() if key not in ("ERM", "FGSM")}
    (tmp_path / name).write_text(json.dumps({**content, "results": kept}))
    measured = []
    measure = bal_mnist.measure
    monkeypatch.setattr(bal_mnist, "measure", lambda *args: measured.append(1) or measure(*args))
    bal_mnist.main(["--scale", "smoke", "--out", str(tmp_path)])
    again = json.loads((tmp_path / name).read_text())["results"]
    assert len(measured) == 2
    for key in ("ERM", "FGSM"):
        assert {k: v for k, v in again[key].items() if k != "seconds"} == {
            k: v for k, v in content["results"][key].items() if k != "seconds"
        }


def test_settings_are_not_mixed_in_one_file(rows):
    with pytest.raises(ValueError, match="was written with another seed: move it away"):
        bal_mnist.main(["--scale", "smoke", "--seed", "4", "--out", str(rows)])

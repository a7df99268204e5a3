from __future__ import annotations

import json

import matplotlib.image
import pytest

import pyro_advbayes as ab
from tutorials.papers import apd_active_learning as active

pytestmark = pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator")
ENTROPIES = "SGLD, entropy", "APD, entropy"


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """The smallest scale, all of it."""
    out = tmp_path_factory.mktemp("active")
    active.main(["--scale", "smoke", "--out", str(out)])
    return out


def test_every_posterior_and_acquisition_has_its_curve(curves):
    content = json.loads((curves / "apd_active_learning-smoke.json").read_text())
    assert {"temperature", "numbers", "seed", "versions"} <= set(content["settings"])
    assert set(content["results"]) == {f"{curve}, seed 0" for curve in active.CURVES}
    for row in content["results"].values():
        assert row["num_labels"] == [20, 30] and all(0.0 <= value <= 1.0 for value in row["accuracy"])
    assert len({row["accuracy"][0] for name, row in content["results"].items() if "SGLD" in name}) == 1  # the same start
    pixels = matplotlib.image.imread(curves / "apd_active_learning-smoke.png")
    assert pixels.shape[1] >= 800 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_a_curve_that_was_interrupted_goes_on_from_its_last_round(tmp_path, curves, monkeypatch):
    fits, run = [], ab.SGMCMC.run  # in the library, since a curve goes on with the same code alone

    def killed(*args):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return run(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ab.SGMCMC, "run", killed)
        active.main(["--scale", "smoke", "--out", str(tmp_path), "--only", *ENTROPIES])
    with monkeypatch.context() as patch:
        patch.setattr(ab.SGMCMC, "run", lambda *args: fits.append(1) or run(*args))
        active.main(["--scale", "smoke", "--out", str(tmp_path), "--only", *ENTROPIES])
    assert len(fits) == 2 + 1 + 2  # the curve of SGLD from its second round, and all of APD's
    name = "apd_active_learning-smoke.json"
    whole, again = (json.loads((folder / name).read_text())["results"] for folder in (curves, tmp_path))
    assert all(again[key]["accuracy"] == whole[key]["accuracy"] for key in again)

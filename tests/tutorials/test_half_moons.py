from __future__ import annotations

import json

import matplotlib.image
import pytest

from tutorials.papers import robustness_half_moons as half_moons


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """The smallest grid, all of it."""
    out = tmp_path_factory.mktemp("moons")
    half_moons.main(["--scale", "smoke", "--seed", "3", "--out", str(out)])
    return out


def without_times(cells: dict) -> dict:
    return {name: {key: value for key, value in cell.items() if key != "seconds"} for name, cell in cells.items()}


def test_half_moons_has_every_inference_with_an_error_for_every_number(moons):
    content = json.loads((moons / "robustness_half_moons-smoke.json").read_text())
    assert {"scale", "seed", "grid", "eps", "device", "versions"} <= set(content["settings"])
    assert [cell["inference"] for cell in content["results"].values()] == ["SGD", "VI", "SGLD", "HMC"]
    for cell in content["results"].values():
        assert cell["accuracy"][0] > 0.75 and 0 < cell["accuracy"][1] < 0.1
        for sizes in cell["attacks"].values():
            assert list(sizes) == ["0.025", "0.05", "0.1", "0.15"]
            for numbers in sizes.values():
                assert all(0 <= value <= 1 and error > 0 for value, error in numbers.values())
        assert ("gradients" in cell) == (cell["inference"] != "SGD")
        gentle, hard = (cell["attacks"][name]["0.15"]["robustness"][0] for name in ("random", "PGD, mean loss"))
        assert hard < gentle


def test_half_moons_draws_a_picture_of_its_numbers(moons):
    pixels = matplotlib.image.imread(moons / "robustness_half_moons-smoke.png")
    assert pixels.shape[1] >= 1500 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_half_moons_computes_again_only_what_is_missing_and_the_same_numbers(moons, tmp_path, monkeypatch):
    name = "robustness_half_moons-smoke.json"
    content = json.loads((moons / name).read_text())
    kept = dict(list(content["results"].items())[1:])
    (tmp_path / name).write_text(json.dumps({**content, "results": kept}))
    computed = []
    run = half_moons.run
    monkeypatch.setattr(half_moons, "run", lambda cell, *rest: computed.append(cell.name) or run(cell, *rest))
    half_moons.main(["--scale", "smoke", "--seed", "3", "--out", str(tmp_path)])
    assert computed == ["SGD-w8-n100"]
    again = json.loads((tmp_path / name).read_text())["results"]
    assert without_times(again) == without_times(content["results"])
    half_moons.main(["--scale", "smoke", "--seed", "3", "--out", str(tmp_path)])
    assert len(computed) == 1


def test_half_moons_does_not_mix_settings_in_one_file(moons):
    with pytest.raises(ValueError, match="was written with another seed: move it away"):
        half_moons.main(["--scale", "smoke", "--seed", "4", "--out", str(moons)])

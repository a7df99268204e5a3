from __future__ import annotations

import json
import math

import pytest
import torch

from tutorials.papers import adt_digits

NAME = "adt_digits-smoke-seed3.json"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The smallest scale, all of it."""
    out = tmp_path_factory.mktemp("adt")
    adt_digits.main(["--scale", "smoke", "--seed", "3", "--out", str(out)])
    return out


def without_times(rows: dict) -> dict:
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in rows.items()}


def test_every_training_has_as_many_gradients_and_every_number_has_its_error(digits):
    content = json.loads((digits / NAME).read_text())
    assert {"scale", "seed", "numbers", "eps", "batch_size", "learning_rates", "device", "versions"} <= set(content["settings"])
    assert list(content["results"]) == list(adt_digits.METHODS)
    scale = adt_digits.SCALES["smoke"]
    for name, row in content["results"].items():
        spent = row["minibatches"] * adt_digits.METHODS[name].gradients
        assert scale.gradients - adt_digits.METHODS[name].gradients < spent <= scale.gradients
        assert len(row["attacks"]) == 5 and len(row["stays right"]) == scale.num_test
        for value, error in (row["clean"], row["A_rob"], *row["attacks"].values()):
            assert 0 <= value <= 1 and 0 <= error < 0.1
        assert row["A_rob"][0] == pytest.approx(row["stays right"].count("1") / scale.num_test)
        assert row["A_rob"][0] <= min(value for value, _ in (row["clean"], *row["attacks"].values()))
        best = max(row["validation"].values())
        assert row["validation"][str(row["learning rate"])] == best


def test_a_method_takes_the_gradients_that_its_row_says():
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x[:, :3] * torch.tensor([1.0, 2.0, 3.0])

    for name, method in adt_digits.METHODS.items():
        counted = Counted()
        if method.attack is not None:
            method.attack(counted, torch.full((2, 4), 0.5), torch.tensor([0, 1]))
        assert method.gradients == counted.calls + 1, name  # the last is that of the weights


def test_training_validation_and_test_images_are_different_ones():
    split = adt_digits.load(adt_digits.SCALES["cpu"], "cpu")
    images = torch.cat([split.task.x, split.x_validation, split.task.x_test])
    assert (len(split.task.x), len(split.x_validation), len(split.task.x_test)) == (878, 200, 719)
    assert len(images.unique(dim=0)) == len(images) == 1797


def test_differences_are_paired_by_image():
    difference, error = adt_digits.difference({"stays right": "1101"}, {"stays right": "1000"})
    assert difference == 0.5 and error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_only_what_is_missing_is_computed_again_and_gives_the_same_numbers(digits, tmp_path, monkeypatch):
    content = json.loads((digits / NAME).read_text())
    kept = {name: row for name, row in content["results"].items() if name != "EXP 7x1"}
    (tmp_path / NAME).write_text(json.dumps({**content, "results": kept}))
    computed = []
    run = adt_digits.run
    monkeypatch.setattr(adt_digits, "run", lambda name, *rest: computed.append(name) or run(name, *rest))
    adt_digits.main(["--scale", "smoke", "--seed", "3", "--out", str(tmp_path)])
    assert computed == ["EXP 7x1"]
    again = json.loads((tmp_path / NAME).read_text())["results"]
    assert without_times(again) == without_times(content["results"])

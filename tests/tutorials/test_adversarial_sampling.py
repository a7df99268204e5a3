from __future__ import annotations

import json

import matplotlib.image
import pyro
import pytest
import torch

import pyro_advbayes as ab
from tutorials.papers import adversarial_sampling as script
from tutorials.papers import as_networks as nets
from tutorials.papers import as_tables as tables
from tutorials.papers.adversarial_sampling import MIX, SCALES, Case

SMOKE = SCALES["smoke"]
SCRATCH = "fashion_mnist, scratch, cold: AS"
ONLY = ["--scale", "smoke", "--only", "fashion_mnist", "--out"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The smallest scale, of the convolutional network."""
    out = tmp_path_factory.mktemp("sampling")
    script.main([*ONLY, str(out)])
    return out


def test_every_row_has_every_number(rows):
    content = json.loads((rows / "adversarial_sampling-fashion_mnist-smoke.json").read_text())
    assert {"scale", "seed", "numbers", "lr", "scales", "fine_tuning", "device", "versions"} <= set(content["settings"])
    methods = {
        "scratch": ("plain", "plain, longer", "AS", "AS, mix 1.0", "AS, steps of 0.002", "plain, KL times 0.2"),
        "fine-tuned": ("plain", "plain, longer", "AS", "AS, steps of 0.002", "plain, KL times 0.2"),
        "wide": ("plain", "plain, longer", "AS, steps of 0.002"),
    }
    assert set(content["results"]) == {f"fashion_mnist, {start}, cold: {name}" for start, names in methods.items() for name in names}
    for row in content["results"].values():
        assert 0 <= row["lowest"] <= row["mean"] <= row["highest"] <= 1 and len(row["accuracy"]) == SMOKE.draws
        assert ("trained network" in row) == (row["start"] == "fine-tuned")
        assert row["ensembled"][1] >= 0 and list(row["retained"]) == ["0.2", "0.4", "0.6", "0.8"]
        assert [point["epoch"] for point in row["curve"]] == ([] if row["start"] == "fine-tuned" else [row["epochs"] // 2, row["epochs"]])


def test_budgets_are_equal_as_they_are_called(rows):
    """A gradient evaluation is counted at each draw of the weights that the network is run backwards at."""
    results = json.loads((rows / "adversarial_sampling-fashion_mnist-smoke.json").read_text())["results"]
    for start in ("scratch", "fine-tuned"):
        adversarial, plain, longer = (results[f"fashion_mnist, {start}, cold: {m}"] for m in ("AS", "plain", "plain, longer"))
        assert adversarial["epochs"] == plain["epochs"]
        assert adversarial["gradient evaluations"] == longer["gradient evaluations"] == 7 * plain["gradient evaluations"]

    case, count = Case("fashion_mnist", "scratch", MIX, "proper"), 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal count
            count += 1
            return gradient

    model = nets.new_model("fashion_mnist", SMOKE.depth, "cpu")
    x, y = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    guide = ab.AutoAdversarialNormal(model)
    guide(x, y)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda *args: Counted.apply(args[-1]))
    loss = case.loss()
    handlers = ab.TraceAdversarial_ELBO(loss.ascent.num_steps, loss.ascent.step_size, loss.mix, backend="handlers")
    handlers.differentiable_loss(model, guide, x, y).backward()
    assert count == case.evaluations


def test_a_cold_row_weighs_the_divergence_as_the_authors_code_does():
    """Between no and full weight of likelihood and divergence, at one and the same noise."""
    model = nets.new_model("fashion_mnist", SMOKE.depth, "cpu")
    x, y = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    guide = ab.AutoAdversarialNormal(model, init_scale=0.05)
    guide(x, y)

    def value(loss):
        pyro.set_rng_seed(0)
        return loss.differentiable_loss(model, guide, x, y).item()

    proper, cold, weak, none = (
        value(loss)
        for loss in (
            Case("", "scratch", MIX, "proper").loss(),
            Case("", "scratch", MIX, "cold").loss(),
            Case("", "scratch", MIX, "proper", weak=True).loss(),
            ab.TraceAdversarial_ELBO(mix=MIX, kl_scale=0.0),
        )
    )
    assert cold - none == pytest.approx((proper - none) * (1 - MIX) / 100, rel=1e-2)
    assert weak - none == pytest.approx((proper - none) * (1 - MIX), rel=1e-3)
    scales = [Case("", "scratch", 0.0, "cold", weak=weak).loss().kl_scale for weak in (False, True)]
    assert scales == pytest.approx([0.01, 0.01 * (1 - MIX)])


def test_names_tell_rows_apart():
    assert len({case.name for case in script.grid(SCALES["paper"])}) == len(script.grid(SCALES["paper"]))
    assert Case("a", "b", MIX, "c", step_size=0.01, weak=True).name == "a, b, c: AS, steps of 0.01, KL times 0.2"


@pytest.mark.parametrize("start", ["scratch", "fine-tuned"])
def test_the_residual_network_runs_and_only_training_from_scratch_moves_its_statistics(start, tmp_path):
    task = script.load("smoke", "cifar10", None, "cpu")
    assert task.x.shape[1:] == (3, 16, 16)
    case = Case("cifar10", start, MIX, "cold")
    row = script.run(case, task, SMOKE, 0, tmp_path)
    assert row["gradient evaluations"] == 7 * case.epochs(SMOKE) and 0 <= row["lowest"] <= row["highest"] <= 1
    if start == "fine-tuned":
        weights = nets.trained("cifar10", task, SMOKE.depth, 1, 0, tmp_path / "cifar10-0.safetensors")
        pyro.set_rng_seed(0)
        model = script.fine_tuned(case, task, SMOKE, weights).model
        statistics = {name: value for name, value in model.named_buffers() if "running" in name}
        assert statistics
        for name, value in statistics.items():
            assert torch.equal(value, weights[name.removeprefix("net.")])


def test_augmented_images_are_windows_of_the_padded_ones():
    images = torch.arange(1.0, 1 + 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    pyro.set_rng_seed(0)
    found = [nets.augmented(images) for _ in range(200)]
    windows = torch.nn.functional.pad(images, (4, 4, 4, 4)).unfold(2, 5, 1).unfold(3, 5, 1)  # [2, 3, 9, 9, 5, 5]
    seen = set()
    for moved in found:
        for i in range(2):
            both = torch.stack([moved[i], moved[i].flip(-1)])
            same = (windows[i].movedim(0, 2)[None] == both[:, None, None]).flatten(3).all(-1)  # [2, 9, 9]
            assert same.any()
            seen.update(map(tuple, same.nonzero().tolist()))
    assert len(seen) > 100  # of 162 ways: 81 windows, flipped or not


def small_row(mix, lowest, mistakes):
    return {"mix": mix, "lowest": lowest, "ensembled": [1 - len(mistakes) / 20, 0.0], "images": 20, "mistakes": mistakes}


ROWS = {
    "a: AS": small_row(MIX, 0.8, [0, 1]),
    "a: plain": small_row(0.0, 0.7, [1, 2, 3]),
    "a: plain, longer": small_row(0.0, 0.75, [1]),
    "b: plain": small_row(0.0, 0.1, list(range(18))),
}


def test_gains_are_differences_from_the_rows_of_the_same_kind():
    epochs, gradients = tables.gains(ROWS)
    assert (epochs["budget"], gradients["budget"]) == ("epochs", "gradients")
    assert epochs["lowest"] == pytest.approx(10) and epochs["ensembled"] == pytest.approx(5)
    assert gradients["lowest"] == pytest.approx(5) and gradients["ensembled"] == pytest.approx(-5)
    better = torch.tensor([-1.0, 0, 1, 1] + 16 * [0])  # where plain alone is mistaken, less where AS alone is
    assert epochs["error"] == pytest.approx(100 * (better.var(correction=0) / 20).sqrt().item())


def test_where_the_divergence_is_a_fifth_a_third_gain_is_at_equal_divergence():
    rows = {name.replace("a", "x, cold", 1): row for name, row in ROWS.items()}
    rows["x, cold: plain, KL times 0.2"] = small_row(0.0, 0.79, [0])
    assert [gain["budget"] for gain in tables.gains(rows)] == ["epochs", "gradients", "epochs and divergence"]
    assert tables.gains(rows)[2]["lowest"] == pytest.approx(1) and tables.gains(rows)[2]["ensembled"] == pytest.approx(-5)
    proper = {name.replace("a", "x, proper", 1): row for name, row in ROWS.items()} | {"x, proper: plain, KL times 0.2": ROWS["a: plain"]}
    assert len(tables.gains(proper)) == 2
    proper["x, proper: AS, KL times 0.2"] = ROWS["a: AS"]
    assert len(tables.gains(proper)) == 5


def test_gains_are_means_over_the_seeds_that_have_both_rows():
    """A second seed has one of the comparisons, and rights and wrongs that make up for the first's."""
    other = {"a: AS": small_row(MIX, 0.5, [2, 3, 4]), "a: plain": small_row(0.0, 0.52, [0, 4])}
    epochs, gradients = tables.gains(ROWS, other)
    assert gradients == tables.gains(ROWS)[1]
    assert epochs["each"] == [pytest.approx((10, 5)), pytest.approx((-2, -5))]
    assert epochs["lowest"] == pytest.approx(4) and epochs["ensembled"] == pytest.approx(0, abs=1e-9)
    assert epochs["error"] == pytest.approx(0, abs=1e-9)  # each image is right as often with AS as without


def test_seeds_have_files_of_their_own_and_are_read_together(rows, tmp_path, capsys):
    name = "adversarial_sampling-fashion_mnist-smoke"
    content = json.loads((rows / f"{name}.json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / f"{name}-seed3.json").write_text(json.dumps({**content, "settings": {**content["settings"], "seed": 3}}))
    script.main([*ONLY, str(tmp_path), "--seed", "3"])
    printed = capsys.readouterr().out
    (gain,) = (gain for gain in tables.gains(content["results"]) if (gain["row"], gain["budget"]) == (SCRATCH, "epochs"))
    line = next(line for line in printed.splitlines() if line.startswith(f"{SCRATCH} against plain at equal epochs"))
    one = f"{gain['lowest']:+.1f}/{gain['ensembled']:+.1f}"
    assert line.endswith(f"({one}, {one})")
    assert (tmp_path / f"{name}-gains.png").exists()


def test_the_sweep_of_mix_has_one_row_for_each(rows):
    found = json.loads((rows / "adversarial_sampling-fashion_mnist-smoke.json").read_text())["results"]
    names = [SCRATCH.replace("AS", method) for method in ("plain", "AS", "AS, mix 1.0")]
    assert tables.swept(found, "cold") == [found[name] for name in names] and tables.swept(found, "proper") == []


@pytest.mark.parametrize("name", ["", "-gains"])
def test_pictures_show_numbers(rows, name):
    pixels = matplotlib.image.imread(rows / f"adversarial_sampling-fashion_mnist-smoke{name}.png")
    assert pixels.shape[1] >= 800 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def test_only_what_is_missing_is_computed_again_to_the_same_numbers(rows, tmp_path, monkeypatch):
    name, missing = "adversarial_sampling-fashion_mnist-smoke.json", "fashion_mnist, scratch, cold: plain"
    content = json.loads((rows / name).read_text())
    kept = {key: row for key, row in content["results"].items() if key != missing}
    (tmp_path / name).write_text(json.dumps({**content, "results": kept}))
    measured, measure = [], script.measure
    monkeypatch.setattr(script, "measure", lambda *args: measured.append(1) or measure(*args))
    script.main([*ONLY, str(tmp_path)])
    again = json.loads((tmp_path / name).read_text())["results"]
    assert len(measured) == 1
    drop = {"seconds"}
    assert {k: v for k, v in again[missing].items() if k not in drop} == {
        k: v for k, v in content["results"][missing].items() if k not in drop
    }


def test_settings_are_not_mixed_in_one_file(rows, monkeypatch):
    monkeypatch.setattr(script, "LR", 0.02)
    with pytest.raises(ValueError, match="was written with another lr: move it away"):
        script.main([*ONLY, str(rows)])

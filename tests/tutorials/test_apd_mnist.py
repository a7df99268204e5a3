from __future__ import annotations

import json
import shutil
from collections import Counter

import matplotlib.image
import pyro
import pytest
import torch

import pyro_advbayes as ab
from pyro_advbayes.infer.classifier import _Logits
from tutorials.papers import apd_mnist, apd_networks
from tutorials.papers.apd_tables import gap

pytestmark = pytest.mark.filterwarnings("ignore:.*keep the draws, or take a smaller generator", "ignore:APD has not (converged|measured)")

SCALE = apd_mnist.SCALES["smoke"]
DETECTORS = ("MC dropout", "SGLD", "APD")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The smallest scale, all of it."""
    out = tmp_path_factory.mktemp("apd")
    apd_mnist.main(["--scale", "smoke", "--out", str(out)])
    return out


def content(path):
    return json.loads((path / "apd_mnist-smoke.json").read_text())


def test_every_posterior_has_every_number_of_the_table_with_its_deviation(rows):
    found = content(rows)
    assert {"scale", "seed", "numbers", "lr", "weight_decay", "batch_size", "eps", "device", "versions"} <= set(found["settings"])
    tables = {name[5:]: row for name, row in found["results"].items() if name.startswith("OOD: ")}
    generators = {f"APD, rank {rank}{codes}" for rank in (4, 8, 32) for codes in ("", ", kept codes")}
    generators |= {"APD, rank 32, packed", "APD, rank 32, kept codes, packed", "APD, hypernetwork", "APD, as published"}
    assert set(tables) == {"SGLD", "2 stored draws", "SGD", "deep ensemble", "MC dropout"} | generators
    for name, row in tables.items():
        assert 0.0 <= row["accuracy"][0] <= 1.0 < row["bytes"] and set(row["ood"]) == {"s = 1", "s = 5"}
        for sets in row["ood"].values():
            assert set(sets) == {"negatives", "Gaussian", "Uniform"}
            for scores in sets.values():
                assert len(scores) == (2 if name == "SGD" else 4)
                for numbers in scores.values():
                    assert set(numbers) == {"auroc", "aupr_out", "aupr_in", "fpr95"}
                    for mean, sd in numbers.values():
                        assert 0.0 <= mean <= 100.0 and (sd is None) == (name == "deep ensemble")


def test_the_storage_is_that_of_what_is_kept(rows):
    tables = content(rows)["results"]
    weights = 784 * 12 + 12 + 12 * 12 + 12 + 12 * 10 + 10
    assert tables["OOD: SGLD"]["bytes"] == 4 * weights * SCALE.chain.kept
    assert tables["OOD: 2 stored draws"]["bytes"] == 2 * 4 * weights and tables["OOD: MC dropout"]["bytes"] == 4 * weights
    assert tables["OOD: APD, rank 8, kept codes"]["bytes"] == 4 * (10 * weights + 8 * SCALE.chain.kept)
    packed = tables["OOD: APD, rank 32, kept codes, packed"]["bytes"]
    assert packed == (33 + 4) * weights + 4 * 33 + 4 * 32 * SCALE.chain.kept


def test_a_table_runs_no_draw_twice_on_one_input(tmp_path, monkeypatch):
    task = apd_mnist.load("smoke", SCALE, None, "cpu")
    model, count = apd_networks.new_model(SCALE.large, task.x), SCALE.draws * SCALE.repeats
    samples = {name: value for name, value in ab.Predictive(model, num_samples=count)(task.x[:1]).items() if name.startswith("net.")}
    first, chunks, runs = next(iter(samples)), _Logits.chunks, Counter()

    def counted(self, x):
        start = 0
        for logits in chunks(self, x):
            draws = self.model.samples[first][start : start + len(logits)]
            start += len(logits)
            runs.update((draw.numpy().tobytes(), image.numpy().tobytes()) for draw in draws for image in x)
            assert logits.shape[:2] == (len(draws), len(x))
            yield logits

    monkeypatch.setattr(_Logits, "chunks", counted)
    posterior = apd_networks.Posterior(model, samples, 1, {})
    apd_mnist.ood_row(posterior, SCALE.repeats, apd_mnist.Setup(task, SCALE, tmp_path, 0))
    others = [image for sets in task.others.values() for images in sets.values() for image in images]
    # a table of each repeat needs its draws on its images; the accuracy those of one repeat on the rest of the test set
    images, rest = SCALE.num_images + len(others), len(task.x_test) - SCALE.num_images
    assert runs.total() == images * count + rest * SCALE.draws
    assert set(runs.values()) == {1}


def test_every_detector_finds_attacked_digits_among_clean_ones(rows):
    found = {name[11:]: row for name, row in content(rows)["results"].items() if name.startswith("detection: ")}
    names = [f"{attack} on {source}" for source in DETECTORS for attack in ("FGSM", "PGD")]
    assert list(found) == [f"{name}, {aim}" for name in names for aim in ("posterior", "one draw")]
    for row in found.values():
        assert set(row["detectors"]) == set(DETECTORS) and 0.0 <= row["hit_share"] <= 1.0
        for part, share in (("hit", row["hit_share"]), ("missed", 1 - row["hit_share"])):
            for numbers in row["detectors"].values():
                assert (numbers[part] is None) == (share == 0.0) and set(numbers["all"]) == set(ab.diagnostics.ood.SCORES)


def test_the_picture_shows_its_numbers(rows):
    pixels = matplotlib.image.imread(rows / "apd_mnist-smoke.png")
    assert pixels.shape[1] >= 800 and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9


def without(whole, missing, folder):
    """The file that a run would have left that had not come to these rows."""
    kept = {name: row for name, row in whole["results"].items() if name not in missing}
    (folder / "apd_mnist-smoke.json").write_text(json.dumps({**whole, "results": kept}))


def same(row, other):
    """But for how long it took."""
    timeless = [{**row, "seconds": 0, "about": {**row["about"], "seconds": 0}} for row in (row, other)]
    return timeless[0] == timeless[1]


def test_only_what_is_missing_is_computed_again_to_the_same_numbers(rows, tmp_path, monkeypatch):
    whole, missing = content(rows), ("OOD: APD, rank 8", "OOD: MC dropout")
    without(whole, {*missing, *(name for name in whole["results"] if "detection" in name)}, tmp_path)
    made = []
    row = apd_mnist.ood_row
    monkeypatch.setattr(apd_mnist, "ood_row", lambda *args: made.append(1) or row(*args))
    apd_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", "OOD"])
    again = content(tmp_path)["results"]
    assert len(made) == 2 and set(again) == {name for name in whole["results"] if "OOD" in name}
    for name in missing:
        assert same(again[name], whole["results"][name])


def test_a_row_alone_is_computed_by_its_name_and_shown_in_its_place(rows, tmp_path, capsys):
    whole, name = content(rows), "OOD: APD, rank 8"
    without(whole, {name, "OOD: MC dropout"}, tmp_path)
    found = apd_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", name])["results"]
    assert list(found) == [row for row in whole["results"] if row != "OOD: MC dropout"]
    assert same(found[name], whole["results"][name])
    with pytest.raises(SystemExit):
        apd_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", "rank 8"])
    assert "--only rank 8: the parts are OOD, detection, and the rows in them OOD: SGLD; OOD: APD, rank 8;" in capsys.readouterr().err


def test_a_training_on_whole_rows_that_was_killed_goes_on_to_the_same_numbers(rows, tmp_path, monkeypatch):
    whole, name = content(rows), "OOD: APD, as published"
    without(whole, {name}, tmp_path)
    shutil.copytree(rows / "apd_mnist-smoke-work", tmp_path / "apd_mnist-smoke-work")
    checkpoint = tmp_path / "apd_mnist-smoke-work" / "published-0.safetensors"
    checkpoint.unlink(missing_ok=True)
    monkeypatch.setattr(apd_networks, "CHECKPOINT_EVERY", 1)
    save, resumed = ab.distill.APD._save_checkpoint, []

    def killed(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ab.distill.APD, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        apd_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", name])
    monkeypatch.setattr(ab.distill.APD, "_save_checkpoint", save)
    resume = ab.distill.APD.resume
    monkeypatch.setattr(ab.distill.APD, "resume", lambda path, *args: resumed.append(path) or resume(path, *args))
    apd_mnist.main(["--scale", "smoke", "--out", str(tmp_path), "--only", name])
    assert resumed == [checkpoint] and same(content(tmp_path)["results"][name], whole["results"][name])


def test_settings_are_not_mixed_in_one_file(rows):
    with pytest.raises(ValueError, match="was written with another seed: move it away"):
        apd_mnist.main(["--scale", "smoke", "--seed", "4", "--out", str(rows)])


def test_repeats_share_no_draw_and_are_each_spread_over_the_chain():
    places = apd_networks.spread(1590, 100, 3)
    assert len(places.unique()) == 300 and (int(places.min()), int(places.max())) == (0, 1589)
    for repeat in places.split(100):
        assert repeat.diff().min() >= 15 and repeat.diff().max() <= 17


def test_the_chain_takes_the_steps_of_the_papers_code():
    """lr/2 along the gradient of the mean loss and of the weight decay, with noise of variance lr/N."""
    task = apd_mnist.load("smoke", SCALE, None, "cpu")
    x, y = task.x[:50], task.y[:50]
    model = apd_networks.new_model(SCALE.small, x)
    potential = ab.Potential(model, (x, y))
    theta = potential.init()
    row = theta[0].clone().requires_grad_()
    weights = {s.name.removeprefix("net."): row[s.start : s.start + s.numel].view(s.shape) for s in potential.sites}
    hidden = torch.relu(x @ weights["1.weight"].mT + weights["1.bias"])
    loss = torch.nn.functional.cross_entropy(hidden @ weights["3.weight"].mT + weights["3.bias"], y)
    decay = apd_networks.WEIGHT_DECAY * row.square().sum() / 2
    (slope,) = torch.autograd.grad(loss + decay, row)
    kernel = ab.SGLD(model, step_size=apd_networks.LR / (2 * len(x)), temperature=0.0)
    mcmc = ab.SGMCMC(kernel, 1, 0, initial_params=potential.constrain(theta))
    mcmc.run(x, y)
    expected = potential.constrain(theta - apd_networks.LR / 2 * slope)
    for site, value in mcmc.get_samples().items():
        torch.testing.assert_close(value, expected[site], atol=1e-6, rtol=1e-4)
    assert 2 * kernel.step_size(0) == apd_networks.LR / len(x)  # the variance of the noise at temperature 1


def test_a_chain_that_was_interrupted_goes_on_to_the_same_draws(tmp_path, monkeypatch):
    task = apd_mnist.load("smoke", SCALE, None, "cpu")
    model, chain = apd_networks.new_model(SCALE.small, task.x), apd_networks.Chain(410, 2, 2)

    def draws(name):
        path, about = apd_networks.sgld(model, task.x, task.y, chain, tmp_path / name, 0)
        assert about["kept"] == 204
        return apd_networks.taken(path, torch.arange(204))

    whole = draws("whole.safetensors")
    sample, done = ab.SGLD.sample, []

    def killed(*args):
        done.append(1)
        if len(done) == 150:
            raise KeyboardInterrupt
        return sample(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ab.SGLD, "sample", killed)
        draws("parts.safetensors")
    again = draws("parts.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_one_draw_of_dropout_leaves_nothing_out():
    task = apd_mnist.load("smoke", SCALE, None, "cpu")
    pyro.set_rng_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(784, 12), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(12, 10))
    model = ab.nn.Classifier(ab.nn.mc_dropout(net))
    masks = apd_networks.masks(model, task.x, 3)
    one = apd_mnist.one_of("MC dropout", masks)
    whole = ab.PosteriorClassifier(model, one)(task.x[:5])
    torch.testing.assert_close(whole, net.eval()(task.x[:5]).log_softmax(-1))
    chosen = apd_mnist.one_of("SGLD", masks)  # the last, farthest from where a chain started
    assert all(torch.equal(chosen[name][0], value[-1]) and len(chosen[name]) == 1 for name, value in masks.items())


def test_the_gap_is_the_largest_of_all_scores_sets_and_scales():
    def row(values):
        table = {name: {"variation ratio": {"auroc": (value, 0.1)}} for name, value in values.items()}
        return {"ood": {"s = 1": table, "s = 5": {"a": table["a"]}}}

    assert gap(row({"a": 90.0, "b": 80.0}), row({"a": 91.0, "b": 82.5})) == pytest.approx(2.5)

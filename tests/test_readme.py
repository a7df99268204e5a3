from __future__ import annotations

import json
import re
from pathlib import Path

import pyro_advbayes as ab
from tutorials.papers.adversarial_sampling import gains
from tutorials.papers.apd_active_learning import curves as learning_curves

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    """As they are printed, with fewer samples, less data and a rougher look at curvature."""
    monkeypatch.chdir(tmp_path)
    digits = ab.datasets.digits
    monkeypatch.setattr(ab.datasets, "digits", lambda *args, **kwargs: ab.datasets.Examples(*(t[:300] for t in digits(*args, **kwargs))))
    monkeypatch.setattr("pyro_advbayes.infer.mcmc.step_size.POWER_ITERATIONS", 2)
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len(blocks) >= 5
    names: dict = {}
    for i, block in enumerate(blocks):
        block = re.sub(r"(num_samples|warmup_steps)=\d{2,}", r"\1=10", block)
        block = re.sub(r"num_steps_per_sample=\d+", "num_steps_per_sample=5", block)
        block = re.sub(r"queries=\d+", "queries=5", block)
        block = block.replace("APD(small)", "APD(small, batch_size=20)")  # there are 40 draws
        exec(compile(block, f"README.md, block {i}", "exec"), names)
    assert names["probs"].shape == (40, 300, 10)
    assert names["images"].grad.abs().max() > 0
    assert set(names["found"]["T_eff"]) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert names["mcmc"].get_samples(group_by_chain=True)["net.2.bias"].shape == (2, 10, 10)


def test_every_public_name_has_a_line():
    internal = {"init_to_fan_in", "read_draws"}  # shown in an example; for readers of files
    for name in set(ab.__all__) - internal:
        assert re.search(rf"^\| (`ab\.\w+`, )?`ab\.{name}\b", README, flags=re.M), name


def test_tables_have_the_numbers_of_the_result_files():
    def rows(header: str) -> dict[str, list[str]]:
        table = README.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
        return {label: numbers for label, *numbers in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}

    def results(name: str) -> dict:
        return json.loads((ROOT / "tutorials" / "papers" / "results" / name).read_text())["results"]

    robust, found = rows("| | clean | FGSM 0.15 | PGD 0.15 | Square 0.15 |"), results("bal_mnist-paper.json")
    assert len(robust) >= 5
    for label, numbers in robust.items():
        row = found[label]
        assert numbers == [f"{v[0]:.3f}" for v in (row["FGSM"]["0.0"], *(row[attack]["0.15"] for attack in ("FGSM", "PGD", "Square")))]
    found = {**results("adversarial_sampling-fashion_mnist-cpu.json"), **results("adversarial_sampling-cifar10-cpu.json")}
    compared = gains(found)
    drawn = rows("| | lowest | ensembled | equal epochs: lowest | ensembled | equal gradients: lowest | ensembled |")
    assert set(drawn) == {gain["row"] for gain in compared}
    for label, numbers in drawn.items():
        expected = [f"{100 * value:.1f}" for value in (found[label]["lowest"], found[label]["ensembled"][0])]
        for budget in ("epochs", "gradients"):
            own = [gain for gain in compared if (gain["row"], gain["budget"]) == (label, budget)]
            told = [f"{gain['lowest']:+.1f}" for gain in own], [f"{gain['ensembled']:+.1f} ± {gain['error']:.1f}" for gain in own]
            expected += ["".join(cell) for cell in told]
        assert numbers == expected
    won = sum(gain["lowest"] >= 2 and gain["ensembled"] > 0 for gain in compared)
    assert f"in {won} of {len(compared)} comparisons" in README
    usual, all_adversarial = (
        [100 * found[f"fashion_mnist, scratch, {kl}: {row}"]["ensembled"][0] for kl in ("cold", "proper")] for row in ("AS", "AS, mix 1.0")
    )
    cold, proper = (one - other for one, other in zip(usual, all_adversarial, strict=True))
    assert f"by {cold:.1f} points (cold) and {proper:.1f}\n(proper)" in README
    asked, curves = rows("| labels | 50 | 100 | 150 | 200 |"), learning_curves(results("apd_active_learning-cpu.json"))
    assert {f"SGLD, {label}" for label in asked} == set(curves) and len(asked) >= 2
    for label, numbers in asked.items():
        curve = curves[f"SGLD, {label}"]
        assert numbers == [f"{100 * curve.mean[curve.num_labels == count].item():.1f}" for count in (50, 100, 150, 200)]
    entropy, random = (curves[f"SGLD, {label}"] for label in ("entropy", "random"))
    behind = entropy.num_labels[entropy.mean <= random.mean].max().item()
    assert f"the entropy is ahead from {behind + 10} labels on" in README
    usual_steps = [gain for gain in compared if gain["row"].startswith("fashion_mnist") and gain["row"].endswith("proper: AS")]
    lowest, ensembled = ([gain[part] for gain in usual_steps] for part in ("lowest", "ensembled"))
    assert f"gains {min(lowest):.0f} to {max(lowest):.0f} points with the paper's steps" in README
    assert f"pays for it with {-max(ensembled):.0f} to {-min(ensembled):.0f} points" in README
    strange, found = rows("| | accuracy | MB | notMNIST | Omniglot | CIFAR-10, grey | Gaussian | uniform |"), results("apd_mnist-cpu.json")
    assert len(strange) >= 4
    for label, numbers in strange.items():
        row = found[f"OOD: {label}"]
        aurocs = [row["ood"]["s = 5"][name]["entropy"]["auroc"][0] for name in ("notMNIST", "Omniglot", "CIFAR10bw", "Gaussian", "Uniform")]
        assert numbers == [f"{row['accuracy'][0]:.3f}", f"{row['bytes'] / 1e6:.1f}", *(f"{value:.1f}" for value in aurocs)]


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for command in re.findall(r"`?make (quickstart|test|bench|lint)\b", README):
        assert command in targets
    for heading in re.findall(r"\]\(#([^)]+)\)", README):
        assert heading in {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)", README, flags=re.M)}

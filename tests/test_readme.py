from __future__ import annotations

import json
import re
from pathlib import Path

import pyro_advbayes as ab
from tutorials.papers.adversarial_sampling import gains

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
    drawn = rows("| | lowest | highest | ensembled |")
    found = {**results("adversarial_sampling-fashion_mnist-cpu.json"), **results("adversarial_sampling-cifar10-cpu.json")}
    assert len(drawn) >= 6
    for label, numbers in drawn.items():
        row = found[label]
        assert numbers == [f"{100 * value:.1f}" for value in (row["lowest"], row["highest"], row["ensembled"][0])]
    compared = gains(found)
    won = [gain for gain in compared if gain["lowest"] >= 2 and gain["ensembled"] > 0]
    assert (len(won), len(compared)) == (1, 8) and "One comparison of eight comes out as the paper has it" in README
    epochs, gradients = (gain for gain in compared if gain["row"] == "fashion_mnist, fine-tuned, cold: AS")
    told = README.split("One comparison of eight", 1)[1].split("From scratch", 1)[0].replace("\n", " ")
    assert f"by {epochs['lowest']:.1f} points for the lowest ({gradients['lowest']:.1f} at equal gradients)" in told
    assert all(f"{gain['ensembled']:.1f} ± {gain['error']:.1f}" in told for gain in (epochs, gradients))
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

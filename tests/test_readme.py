from __future__ import annotations

import json
import math
import re
import statistics
import warnings
from collections import Counter
from pathlib import Path

import pytest

import pyro_advbayes as ab
from tutorials.papers.apd_active_learning import curves as learning_curves
from tutorials.papers.apd_tables import gap
from tutorials.papers.as_networks import DATA
from tutorials.papers.as_tables import WEAK, all_seeds, gains

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted(page for folder in ("docs", "docs/results") for page in (ROOT / folder).glob("*.md") if not page.is_symlink())
TOLD = "\n\n".join([README, *(page.read_text() for page in PAGES)])
TEXT = " ".join(TOLD.split())  # where lines end is of no matter
RESULTS = ROOT / "tutorials" / "papers" / "results"
MEASURED = ROOT / "tests" / "benchmarks" / "results"


def blocks(page: Path) -> list[str]:
    """The Python of a page, as it is printed."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def run_small(page: Path, names: dict) -> dict:
    """Runs a page's blocks one after the other, with 300 images, fewer samples and a rougher look at curvature."""
    digits = ab.datasets.digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ab.datasets, "digits", lambda *args, **kwargs: ab.datasets.Examples(*(t[:300] for t in digits(*args, **kwargs))))
        patch.setattr("pyro_advbayes.infer.mcmc.step_size.POWER_ITERATIONS", 2)
        for i, block in enumerate(blocks(page)):
            block = re.sub(r"(num_samples|warmup_steps)=\d{2,}", r"\1=10", block)
            block = re.sub(r"num_steps_per_sample=\d+", "num_steps_per_sample=5", block)
            block = re.sub(r"num_steps=\d{3,}", "num_steps=20", block)
            block = re.sub(r"queries=\d+", "queries=5", block)

            exec(compile(block, f"{page.name}, block {i}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What README's blocks leave behind; the pages go on from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        return run_small(ROOT / "README.md", {})


def test_readme_is_short_and_its_code_runs(names):
    assert len(README.splitlines()) <= 170 and len(blocks(ROOT / "README.md")) >= 3
    assert names["probs"].shape == (300, 10)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_of_a_page_runs_after_that_of_readme(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = run_small(page, dict(names))
    if page.stem == "files":
        assert left["images"].grad.abs().max() > 0
        assert left["mcmc"].get_samples(group_by_chain=True)["net.2.bias"].shape == (2, 10, 10)
    if page.stem == "how-long":
        assert set(left["found"]["T_eff"]) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    if page.stem == "trained-networks":
        assert set(left["chains"].get_samples()) == {"net.2.weight", "net.2.bias"}


def test_the_first_posterior_prints_what_readme_says():
    first = blocks(ROOT / "README.md")[0]
    told = re.search(r"It prints (\S+), (\S+), (\S+) and (\S+)\. ", TEXT).groups()
    printed: list = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ab.SamplingWarning)
        exec(compile(first, "README.md", "exec"), {"print": lambda *values: printed.extend(values)})
    for value, said, error in zip(printed, told, (0.01, 0.015, 0.015, 0.05), strict=True):  # of another seed
        assert float(value) == pytest.approx(float(said), abs=error)
    own = rows("| | accuracy | NLL | ECE | AUROC, out-of-distribution |")
    assert tuple(own["these digits: posterior"][:3]) == told[:3]
    found = {name: json.loads((ROOT / "docs" / name).read_text())["results"] for name in ("prior-scales.json", "front-page.json")}
    cells = {"these digits: one network": found["prior-scales.json"]["one network"]}
    cells |= {f"Fashion-MNIST, 2000 images: {name}": values for name, values in found["front-page.json"].items()}
    for label, values in cells.items():
        assert own[label][:3] == [f"{values[name]:.3f}" for name in ("accuracy", "nll", "ece")], label
        if "auroc" in values:
            further = f"; {values['auroc_mutual_information']:.3f} by mutual information" if "auroc_mutual_information" in values else ""
            assert own[label][3] == f"{values['auroc']:.3f}{further}"


def test_priors_have_the_numbers_of_their_file():
    told = rows("| prior | spread of its logits | its top probability | accuracy | NLL | ECE | R-hat |")
    found = json.loads((ROOT / "docs" / "prior-scales.json").read_text())["results"]
    found["one network, Adam"] = found.pop("one network")
    assert {label.strip("`") for label in told} == set(found)
    formats = {"prior_logits": ".1f", "prior_top": ".2f", "accuracy": ".3f", "nll": ".3f", "ece": ".3f", "r_hat": ".2f"}
    for label, cells in told.items():
        values = found[label.strip("`")]
        assert cells == [format(values[name], form) if name in values else "" for name, form in formats.items()]


def test_every_public_name_has_a_line():
    internal = {"init_to_fan_in", "read_draws"}  # shown in an example; for readers of files
    aliases = {"L2", "Box", "Flow", "Generator"}  # of what ab.adversary holds
    page = (ROOT / "docs" / "names.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| `ab.adversary` |"))
    assert all(getattr(ab, name) is getattr(ab.adversary, name) and f"`ab.{name}`" in line for name in aliases)
    for name in set(ab.__all__) - internal - aliases:
        assert re.search(rf"^\| (`ab\.\w+`, )?`ab\.{name}\b", page, flags=re.M), name


def rows(header: str) -> dict[str, list[str]]:
    """The table below a header, a list of cells for every label."""
    table = TOLD.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return {label: cells for label, *cells in ([cell.strip() for cell in line.removesuffix("|").split("|")[1:]] for line in table)}


def test_the_table_of_adversarial_sampling_has_the_numbers_of_the_result_files():
    seeds = {data: all_seeds(RESULTS, data, "cpu") for data in DATA}
    compared = [gain for found in seeds.values() for gain in gains(*found)]
    drawn = rows("| | seeds | accuracy | equal epochs | equal gradients | equal epochs and divergence |")
    assert set(drawn) == {gain["row"] for gain in compared}
    for label, cells in drawn.items():
        own = [found[label] for found in seeds[label.split(",")[0]] if label in found]
        lowest, ensembled = (100 * statistics.fmean(values) for values in ((r["lowest"] for r in own), (r["ensembled"][0] for r in own)))
        expected = [str(len(own)), f"{lowest:.1f} / {ensembled:.1f}"]
        for budget in ("epochs", "gradients", "epochs and divergence"):
            cell = ""
            for gain in (gain for gain in compared if (gain["row"], gain["budget"]) == (label, budget)):
                fewer = f" ({len(gain['each'])})" if len(gain["each"]) < len(own) else ""
                cell = f"{gain['lowest']:+.1f} / {gain['ensembled']:+.1f} ± {gain['error']:.1f}{fewer}"
            expected.append(cell)
        assert cells == expected


def test_what_is_said_of_adversarial_sampling_is_in_the_result_files():
    fashion = all_seeds(RESULTS, "fashion_mnist", "cpu")
    compared = [gain for data in DATA for gain in gains(*all_seeds(RESULTS, data, "cpu"))]
    same = [gain for gain in compared if gain["budget"] == "epochs and divergence"]
    weak = [gain for gain in compared if gain not in same and gain["row"].endswith(WEAK)]
    other = [gain for gain in compared if gain not in same and gain not in weak]

    def won(found: list[dict]) -> str:
        return f"{sum(gain['lowest'] >= 2 and gain['ensembled'] > 0 for gain in found)} of {len(found)}"

    assert f"appear in {won(weak)} comparisons at equal epochs or gradients with the divergence times 0.2" in TEXT
    assert f"and in {won(other)} of the others" in TEXT
    assert f"with that divergence, at the same cost, they appear in {won(same)}:" in TEXT
    usual = [gain for gain in other if gain["row"].startswith("fashion_mnist") and gain["row"].endswith("proper: AS")]
    lowest, paid = [gain["lowest"] for gain in usual], [-gain["ensembled"] for gain in usual]
    assert f"the worst draw gains {min(lowest):.0f} to {max(lowest):.0f} points with the paper's steps" in TEXT
    assert f"the ensemble loses {min(paid):.0f} to {max(paid):.0f} points" in TEXT
    ensembled = {name: 100 * row["ensembled"][0] for name, row in fashion[0].items()}
    names = [f"fashion_mnist, scratch, {kl}: AS" for kl in ("cold", "proper")]
    cold, proper = (ensembled[name] - ensembled[f"{name}, mix 1.0"] for name in names)
    assert f"by {cold:.1f} points (cold) and {proper:.1f} (proper)" in TEXT


def results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())["results"]


def test_what_is_said_of_bayesian_adversarial_learning_is_in_the_result_file():
    robust, found = rows("| | clean | FGSM 0.15 | PGD 0.15 | Square 0.15 | C-W step |"), results("bal_mnist-paper.json")
    assert len(robust) >= 5
    for label, numbers in robust.items():
        row = found[label]
        cells = (row["FGSM"]["0.0"], *(row[attack]["0.15"] for attack in ("FGSM", "PGD", "Square")), row["one-step C-W"])
        assert numbers == [f"{value:.3f}" for value, _ in cells]
    bal, apart = (found[name] for name in ("BAL, 5 learners", "PGD, eps 0.15, 5 networks"))
    (value, error), (other, other_error) = (row["PGD"]["0.15"] for row in (bal, apart))
    assert f"{value:.3f} and {other:.3f} under PGD, each good to {max(error, other_error):.3f}" in TEXT
    assert abs(value - other) < error + other_error and "no different from BAL with five learners" in TEXT
    for attack in ("FGSM", "Square"):
        (value, error), (other, other_error) = (row[attack]["0.15"] for row in (bal, apart))
        assert abs(value - other) < 2 * math.hypot(error, other_error), attack
    assert "leaves {:.3f} of BAL and {:.3f} of the five networks".format(*(row["one-step C-W"][0] for row in (bal, apart))) in TEXT
    sized = {kind: found[f"{kind}, size of BAL"] for kind in ("FGSM", "IFGSM", "WRM", "PGD")}
    assert [kind for kind, row in sized.items() if row["one-step C-W"][0] < bal["one-step C-W"][0]] == ["FGSM"]
    assert "of the trainings of BAL's size, all but FGSM's" in TEXT
    said = {
        "settings: published cost and steps": "{:.3f} clean, {:.3f} under FGSM and {:.3f} under PGD",
        "BAL, 1 learners": "where the settings of the table have {:.3f}, {:.3f} and {:.3f}",
        "settings: constant steps of weights": "constant steps on the weights it is {:.3f}, {:.3f} and {:.3f}",
    }
    for name, sentence in said.items():
        row = found[name]
        assert sentence.format(*(row[attack][eps][0] for attack, eps in (("FGSM", "0.0"), ("FGSM", "0.15"), ("PGD", "0.15")))) in TEXT
    published, one, constant = (found[name] for name in said)
    assert "{:.2f} long in place of {:.2f}".format(*(row["size"]["l2"] for row in (published, one))) in TEXT
    assert constant["PGD"]["0.15"][0] - published["PGD"]["0.15"][0] > one["PGD"]["0.15"][0] - constant["PGD"]["0.15"][0] > 0
    # what the paper claims of BAL: 90 % at 0.15, 99 % clean, ahead of trainings whose perturbations are as large, and growing with learners
    assert bal["FGSM"]["0.0"][0] >= 0.99 and bal["FGSM"]["0.15"][0] >= 0.90 and bal["PGD"]["0.15"][0] >= 0.90
    for row in sized.values():
        for attack in ("FGSM", "PGD", "Square"):
            (value, error), (other, other_error) = bal[attack]["0.15"], row[attack]["0.15"]
            assert value - other > 2 * math.hypot(error, other_error)
    learners = [found[f"BAL, {count} learners"] for count in (1, 3, 5, 10)]
    for attack in ("FGSM", "PGD"):
        growth = [row[attack]["0.15"] for row in learners]
        assert growth == sorted(growth) and growth[2][0] - growth[0][0] > 2 * math.hypot(growth[0][1], growth[2][1])
        assert growth[3][0] - growth[2][0] < growth[3][1] and "from there to ten the differences are within a standard error" in TEXT


def test_what_is_said_of_active_learning_is_in_the_result_file():
    asked, curves = rows("| labels | 50 | 100 | 150 | 200 |"), learning_curves(results("apd_active_learning-cpu.json"))
    assert set(asked) == set(curves)
    for label, numbers in asked.items():
        curve = curves[label]
        assert numbers == [f"{100 * curve.mean[curve.num_labels == count].item():.1f}" for count in (50, 100, 150, 200)]
    random = curves["SGLD, random"]
    behind = {label: random.num_labels[curve.mean <= random.mean].max().item() for label, curve in curves.items()}
    assert max(behind[label] for label in curves if label != "SGLD, random") < 100
    assert f"the entropy is ahead from {behind['SGLD, entropy'] + 10} labels on" in TEXT


def test_what_is_said_of_a_distilled_posterior_is_in_the_result_file():
    strange, found = rows("| | accuracy | MB | notMNIST | Omniglot | CIFAR-10, grey | Gaussian | uniform |"), results("apd_mnist-cpu.json")
    assert len(strange) >= 4
    for label, numbers in strange.items():
        row = found[f"OOD: {label}"]
        aurocs = [row["ood"]["s = 5"][name]["entropy"]["auroc"][0] for name in ("notMNIST", "Omniglot", "CIFAR10bw", "Gaussian", "Uniform")]
        share = row["draws"] / row["about"]["kept"] if label == "SGLD" else 1.0  # the file has the storage of its whole chain
        assert numbers == [f"{row['accuracy'][0]:.3f}", f"{share * row['bytes'] / 1e6:.1f}", *(f"{value:.1f}" for value in aurocs)]
    whole = [found[f"OOD: APD, {name}"]["about"] for name in ("as published", "hypernetwork")]
    fitted, shown = [about["seconds"] / 60 for about in whole], [label for label in strange if label.startswith("APD, rank")]
    assert "{:.0f} minutes went into {} of the published".format(fitted[0], whole[0]["steps"]) in TEXT
    assert "and {:.0f} into {} of the hypernetwork's".format(fitted[1], whole[1]["steps"]) in TEXT
    assert [round(found[f"OOD: {label}"]["seconds"] / 60) for label in shown] == [4, 4] and "took 4 minutes each" in TEXT
    assert fitted[0] > 10 * 4  # a tenth of the published training's time, which was cut short at that
    for score in ("variation ratio", "mutual information"):
        sets = found["OOD: SGLD"]["ood"]["s = 5"]
        aurocs = [sets[name][score]["auroc"][0] for name in ("notMNIST", "CIFAR10bw", "Gaussian", "Uniform")]
        assert "{:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*aurocs) in TEXT
    by_ratio = (
        f"{numbers['variation ratio']['auroc'][0]:.1f}"
        for name, numbers in found["OOD: MC dropout"]["ood"]["s = 5"].items()
        if "255" not in name
    )
    assert "has {}, {}, {}, {} and {} by the variation ratio".format(*by_ratio) in TEXT
    own = [found[f"detection: PGD on {name}, one draw"]["detectors"][name]["all"]["model variance"]["auroc"] for name in ("SGLD", "APD")]
    assert "an AUROC of {:.1f} is left to the variance of SGLD's draws and {:.1f} to that of APD's".format(*own) in TEXT
    crossed = (("SGLD", "MC dropout"), ("MC dropout", "SGLD"), ("MC dropout", "MC dropout"))  # attacked, detector
    found_by = [found[f"detection: PGD on {a}, one draw"]["detectors"][b]["all"]["model variance"]["auroc"] for a, b in crossed]
    text = "for a draw of SGLD at {:.1f}, and SGLD finds what it made for MC dropout at {:.1f}, where MC dropout itself has {:.1f}"
    assert text.format(*found_by) in TEXT
    assert gap(found["OOD: APD, rank 32, kept codes, packed"], found["OOD: SGLD"]) <= 0.5  # the one that README recommends
    kept = [gap(found[f"OOD: APD, rank {rank}, kept codes"], found["OOD: SGLD"]) for rank in (4, 8, 16, 32, 64)]
    made = [gap(found[f"OOD: APD, rank {rank}"], found["OOD: SGLD"]) for rank in (4, 8, 16, 32, 64)]
    assert "at most {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} points of AUROC from SGLD".format(*kept) in TEXT
    assert "are {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} from it with 4 to 64".format(*made) in TEXT


# a line of the table of speeds: the row of the benchmark, what it measures, and the rival
SPEEDS = {
    "a hand-written PyTorch loop, 784-400-400-10, 1 chain": ("step_large", "784-400-400-10, 1 chain", "hand-written loop"),
    "the same, 2-20-20-2, 1 chain": ("step_small", "2-20-20-2, 1 chain", "hand-written loop"),
    "20 hand-written loops, 2-20-20-2, 20 chains": ("chains_small", "2-20-20-2, 20 chains", "hand-written loop"),
    "5 hand-written loops, 784-400-400-10, 5 chains": ("chains_large", "784-400-400-10, 5 chains", "hand-written loop"),
    "5 hand-written loops, a ConvNet, 5 chains": ("chains_large", "BAL's ConvNet, 5 chains", "hand-written loop"),
    "`posteriors`, 2-20-20-2, 1 chain": ("against_posteriors", "2-20-20-2, 1 chain", "posteriors, in place"),
    "`posteriors` under `vmap`, 2-20-20-2, 20 chains": ("against_posteriors", "2-20-20-2, 20 chains", "posteriors, vmap"),
    "`posteriors`, 784-400-400-10, 1 chain": ("against_posteriors", "784-400-400-10, 1 chain", "posteriors, in place"),
    "`posteriors` under `vmap`, 784-400-400-10, 20 chains": ("against_posteriors", "784-400-400-10, 20 chains", "posteriors, vmap"),
    "BlackJAX, jitted, 784-400-400-10, 1 chain": ("against_blackjax", "784-400-400-10, 1 chain", "blackjax"),
    "BlackJAX, jitted, 784-400-400-10, 5 chains one by one": ("against_blackjax", "784-400-400-10, 5 chains", "blackjax, one by one"),
    "BlackJAX, jitted, 784-400-400-10, 5 chains under `vmap`": ("against_blackjax", "784-400-400-10, 5 chains", "blackjax"),
    "BlackJAX, jitted, 2-20-20-2, 1 chain": ("against_blackjax", "2-20-20-2, 1 chain", "blackjax"),
    "BlackJAX, jitted, 2-20-20-2, 20 chains": ("against_blackjax", "2-20-20-2, 20 chains", "blackjax"),
}


def medians(name: str = "cpu.json", number: str = "median"):
    """Of the benchmark on a CPU: by row, workload and comparison."""
    measured = json.loads((MEASURED / name).read_text())["rows"]
    return {
        (row, result["what"], compared["what"]): compared[number]
        for row, content in measured.items()
        for result in content["results"]
        for compared in result["comparisons"]
    }


def test_speeds_are_those_of_the_benchmark():
    told, found = rows("| time of a step, as a multiple of | `graph` | `compile` |"), medians()
    assert set(told) == set(SPEEDS)
    for label, (row, what, rival) in SPEEDS.items():
        assert [cell.strip("*") for cell in told[label]] == [
            f"{found[row, what, f'{ours} / {rival}']:.2f}" for ours in ("graph", "compile")
        ]


def test_speeds_on_another_machine_are_those_of_its_file():
    found = medians("cpu_epyc.json")
    one, twenty = ((row, f"2-20-20-2, {chains}") for row, chains in (("step_small", "1 chain"), ("against_blackjax", "20 chains")))
    by_hand = [found[(*one, f"{ours} / hand-written loop")] for ours in ("graph", "compile")]
    assert "takes {:.2f} (`graph`) and {:.2f} (`compile`) of the loop by hand".format(*by_hand) in TEXT
    blackjax = "against_blackjax", "2-20-20-2, 1 chain"
    scan = (*blackjax, "compile / blackjax, scan")
    low, high = (medians("cpu_epyc.json", quartile)[scan] for quartile in ("low", "high"))
    assert f"`compile` {found[(*blackjax, 'compile / blackjax')]:.2f} of BlackJAX's time a step a call" in TEXT
    assert f"**{found[scan]:.1f}** ({low:.1f} to {high:.1f}) of its time with all steps in one call" in TEXT
    many = [found[(*twenty, f"compile / {rival}")] for rival in ("blackjax", "blackjax, scan")]
    assert "with 20 chains {:.2f} and **{:.2f}**".format(*many) in TEXT


def runs(name: str) -> list[dict]:
    return [json.loads(line) for line in (MEASURED / name).read_text().splitlines()[1:]]


def test_which_sampler_has_the_numbers_of_its_files():
    kernels = ("SGLD", "SGAdaLD", "SGHMC", "SGHMC-adaptive", "MCLMC")
    sizes = {(run["case"], run["kernel"]): run["ess"] for run in runs("which_sampler.jsonl")}
    told = rows("| rows / batch | SGLD | SGAdaLD | SGHMC | SGHMC, adaptive | MCLMC |")
    for label, ratio in (("1 (full data)", 1), ("4", 4), ("20", 20)):
        for cell, kernel in zip(told[label], kernels, strict=True):
            size = sizes[f"linear 200x20 N/B={ratio}", kernel]
            assert float(cell.split(",")[0]) == pytest.approx(size, abs=0.5 if size > 1 else 0.05), (label, kernel)
    course = Counter((run["kernel"], run["verdict"]) for run in runs("course.jsonl"))
    told = rows("| of 13 | SGLD | SGAdaLD | SGHMC | SGHMC, adaptive | MCLMC |")
    for label, verdict in (("right", "right"), ("wrong or too short, and warned", "warned"), ("refused", "refused")):
        assert [int(cell.split(" ")[0] or 0) for cell in told[label]] == [course[kernel, verdict] for kernel in kernels]
    assert {verdict for _, verdict in course} <= {"right", "warned", "refused"}, "README says that none is silent, or a false alarm"


def test_first_runs_are_those_of_their_file():
    found = Counter(run["verdict"] for run in runs("trust.jsonl"))
    right, alarms = found["right"], found["false alarm"]
    assert f"Of {found.total()} first runs with default arguments on posteriors with known moments, {right} were right, " in TEXT
    assert f"{found['SILENT']} were wrong without a warning, and {100 * alarms / (right + alarms):.1f} % of the good ones warned" in TEXT


def test_what_is_said_of_speed_beside_the_table_is_of_the_benchmark():
    found = medians()

    def of(row, compared, what=""):
        """Medians of a row's comparisons, smallest first."""
        values = [value for (name, where, of_what), value in found.items() if name == row and of_what == compared and what in where]
        assert values, (row, compared, what)
        return sorted(values)

    pyros, ours = "Pyro's Predictive / Predictive", "TraceAdversarial_ELBO / {}".format
    for what, told in (
        ("1000 inputs, obs", "{:.1f} to {:.1f} times as fast as Pyro's at 1000 inputs"),
        ("32 inputs", "{:.0f} to {:.0f} times at 32"),
    ):
        speeds = of("predict_small", pyros, what)
        assert told.format(speeds[0], speeds[-1]) in TEXT
    assert "{:.0f} times for the return value alone".format(of("predict_small", pyros, "1000 inputs, _RETURN")[0]) in TEXT
    shares = [1 / speed for network in ("2-20-20-2", "784-400-400-10") for speed in of("guide_prediction", pyros, network)]
    assert "from a guide {:.2f} of Pyro's on 2-20-20-2 and {:.2f} of it on 784-400-400-10".format(*shares) in TEXT
    assert "An iteration of BAL takes {:.2f} of the time".format(*of("bal_iteration", "graph / hand-written loop")) in TEXT
    losses = [
        *of("attack_large", "PGD, mean_loss / loop over draws, mean_loss"),
        *of("attack_large", "PGD, loss_of_mean / loop over draws, loss_of_mean"),
    ]
    assert "({:.2f} for the mean of their losses, {:.2f} for the loss of their mean)".format(*losses) in TEXT
    assert "and {:.2f} of foolbox's".format(*of("attack_large", "PGD, loss_of_mean / foolbox")) in TEXT
    assert "it is {:.0f} times as fast as the loop".format(*of("attack_small", "loop over draws, loss_of_mean / PGD, loss_of_mean")) in TEXT
    steps = of("mean_field_step", ours("TraceMeanField_ELBO and AutoNormal"))
    assert f"mean-field SVI takes {steps[0]:.2f} to {steps[-1]:.2f} of the time of Pyro's" in TEXT
    assert "Adversarial Sampling {:.2f} of the same by hand".format(*of("adversarial_step", ours("hand-written PyTorch"))) in TEXT
    loops = [
        *of("exemplar_gradient", "loop over images / ExemplarReparameterization"),
        *of("exemplar_gradient", "the same without Pyro / ExemplarReparameterization"),
    ]
    assert "{:.0f} times as fast as a loop of Pyro's ELBO over them ({:.1f} times as fast as a loop without Pyro)".format(*loops) in TEXT
    steps = [value for size in ("small", "medium", "large") for value in of(f"distill_{size}", "WGAN / hand-written loop")]
    assert (
        "WGAN of distillation takes {:.2f}, {:.2f} and {:.2f} of a loop by hand on draws of 6, 3760 and 478 410 weights".format(*steps)
        in TEXT
    )
    parts = "FactoredGenerator / its random numbers and product"
    drawn = [*of("factored_draws", parts, "a network"), *of("factored_draws", parts, "kept codes, packed")]
    assert "takes {:.2f} of its random numbers and its matrix product alone at rank 8, and {:.2f} packed at rank 32".format(*drawn) in TEXT
    assert "use at their peak the memory of {:.0f} copies of their state".format(*of("sampler_memory", "peak, 200 draws, in use")) in TEXT


def test_links_and_commands_exist():
    for page in (ROOT / "README.md", *PAGES):
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert (page.parent / target).exists(), (page.name, target)
        for heading in re.findall(r"\]\(#([^)]+)\)", text):
            assert heading in {title.lower().replace(" ", "-") for title in re.findall(r"^##+ (.*)", text, flags=re.M)}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([\w-]+)", TOLD)) <= targets
